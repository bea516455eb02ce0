"""The entry point of vLLM's general plugins, which it calls in each of its processes."""
import os
import wrapt
from functools import lru_cache

from . import children, cpu, failures, front_end, worker
from .settings import ADAPTERS


@lru_cache(maxsize=None)
def register() -> None:
    """Has vLLM merge mixtures: its workers, its engine core and, where the environment names adapters, its server.

    Calling it again is a no-op. What it wraps is looked for once vLLM has imported it.
    """
    children.settle()
    wrapt.register_post_import_hook(worker.install, 'vllm.lora.worker_manager')
    wrapt.register_post_import_hook(failures.install, 'vllm.v1.engine.core')
    wrapt.register_post_import_hook(cpu.install_fix, 'vllm.lora.ops.torch_ops.lora_ops')
    wrapt.register_post_import_hook(cpu.install_product, 'vllm.lora.punica_wrapper.punica_cpu')
    if os.environ.get(ADAPTERS):
        for install, module in ((front_end.install_options, 'vllm.engine.arg_utils'),
                                (front_end.install_models, 'vllm.entrypoints.openai.models.serving'),
                                (front_end.install_serving, 'vllm.entrypoints.serve.engine.serving'),
                                (front_end.install_metrics, 'vllm.v1.metrics.loggers')):
            wrapt.register_post_import_hook(install, module)
