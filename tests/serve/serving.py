"""A server of a small model and its LoRAs, as `written` has them, in a process of its own; and what it is to answer."""
from contextlib import contextmanager
from models import swift_arguments
from server import Server, serving
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

from swift_patch import AdapterLibrary, FusionEngine
from swift_patch.inference.engine import load_base_model
from swift_patch.ms_swift import InferRequest
from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE

# Answers in full precision, that of the likeliest tokens where a request does not say.
OPTIONS = ('--model_type', MODEL_TYPE, '--template', TEMPLATE, '--torch_dtype', 'float32', '--temperature', '0')


@contextmanager
def serving_written(written: Tuple[str, Dict[str, Dict[str, str]]],
                    *options: str,
                    kind: str = 'peft') -> Iterator[Server]:
    """Serves what `written` returns, see `server.serving`.

    Args:
        written: The folder of a model, and by format the folders of its LoRAs.
        *options: Further options of `swift-patch deploy`.
        kind: The format of the LoRAs.
    """
    model, adapters = written
    with serving(model, adapters[kind], *OPTIONS, *options) as server:
        yield server


def alone(written: Tuple[str, Dict[str, Dict[str, str]]], kind: str = 'peft', **changes: Any) -> Callable[..., str]:
    """Returns what answers one question by an engine of its own, without a server.

    Args:
        written: See `serving_written`.
        kind: The format of the LoRAs.
        **changes: Other arguments of ms-swift than those of `swift_arguments`.
    """
    model_dir, adapters = written
    args = swift_arguments(model_dir, **changes)
    engine = FusionEngine(*load_base_model(args), library=AdapterLibrary(adapters[kind]))

    def answer(text: str, composition: Any = None, merge_method: Optional[str] = None) -> str:
        if merge_method is not None:
            composition = engine.composer.composition(tuple(composition), tuple(composition.values()), merge_method)
        request = InferRequest(messages=[{'role': 'user', 'content': text}])
        [response] = engine.infer([request], args.get_request_config(), compositions=[composition], use_tqdm=False)
        return str(response.choices[0].message.content)

    return answer
