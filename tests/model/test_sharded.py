"""On two processes, with FSDP, DDP or tensor parallelism, a merge is stock's of a whole copy, or is refused."""
import copy
import forkserver
import os
import pytest
import socket
import torch
from models import BUILDERS, layers, stock
from peft import PeftModel
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from typing import Any

from swift_patch.compose.composer import FusionComposer
from swift_patch.model.layers import factors_of

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch < 2.6
    from torch.distributed._composable.fsdp import fully_shard

# For the slowest machine; nothing takes nearly as long.
DEADLINE = 120
NAMES, WEIGHTS = ['l2', 'l0', 'l1'], [0.3, 0.9, 0.2]


def fsdp(model: Any, mesh: Any) -> None:
    fully_shard(model, mesh=mesh)


def fsdp_after_a_forward(model: Any, mesh: Any) -> None:
    # What holds the adapters has plain tensors again, until it is sharded the next time.
    fully_shard(model, mesh=mesh)
    logits(model)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def fsdp_of_base_layers(model: Any, mesh: Any) -> None:
    for layer in layers(model).values():
        fully_shard(layer.base_layer, mesh=mesh)


def fsdp_that_ignores_adapters(model: Any, mesh: Any) -> None:
    ignored = {parameter for name, parameter in model.named_parameters() if 'lora_' in name}
    for module in list(model.modules()):
        if isinstance(module, Qwen2DecoderLayer):
            fully_shard(module, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def fsdp1_of_views(model: Any, mesh: Any) -> Any:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device('cpu'))


def fsdp1_of_one_parameter(model: Any, mesh: Any) -> Any:
    # It flattens what all needs a gradient, or does not.
    return FullyShardedDataParallel(model.requires_grad_(False), device_id=torch.device('cpu'))


def ddp(model: Any, mesh: Any) -> Any:
    return DistributedDataParallel(model.requires_grad_(True))


def columns_of_base_layers(model: Any, mesh: Any) -> None:
    for layer in layers(model).values():
        parallelize_module(layer.base_layer, mesh, ColwiseParallel(output_layouts=Replicate()))


def columns_of(*adapters: str) -> Any:

    def shard(model: Any, mesh: Any) -> None:
        for layer in layers(model).values():
            for adapter in adapters:
                parallelize_module(layer.lora_A[adapter], mesh, ColwiseParallel(output_layouts=Replicate()))

    return shard


WHOLE = {
    'ddp': ddp,
    'fsdp of base layers': fsdp_of_base_layers,
    'fsdp that ignores adapters': fsdp_that_ignores_adapters,
    'columns of base layers': columns_of_base_layers
}
# What an error says.
REFUSED = {
    'fsdp': (fsdp, 'found a DTensor in layer'),
    'fsdp after a forward': (fsdp_after_a_forward, 'found that FSDP or ZeRO-3 keeps those of layer'),
    'fsdp1 of views': (fsdp1_of_views, 'found that FSDP or ZeRO-3 keeps those of layer'),
    'fsdp1 of one parameter': (fsdp1_of_one_parameter, 'found that FSDP or ZeRO-3 keeps those of layer'),
    'columns of a source': (columns_of('l2'), 'found a DTensor in layer'),
    'columns of the target': (columns_of('fused'), 'found a DTensor in layer')
}


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def logits(model: Any) -> Any:
    with torch.no_grad():
        return whole(model(input_ids=torch.arange(12).reshape(2, 6)).logits)


def parameters(model: Any) -> Any:
    """All of them, as objects and bit by bit; of a DTensor its local part."""
    return {
        name: (id(parameter), getattr(parameter, '_local_tensor', parameter).detach().clone())
        for name, parameter in model.named_parameters()
    }


def be_rank(rank: int, port: int, how: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    distributed.init_process_group('gloo')
    mesh = init_device_mesh('cpu', (2, ))
    for build in BUILDERS.values():
        original = build()
        oracle = copy.deepcopy(original)
        original.add_weighted_adapter(['l0', 'l1'], [0.5, 0.5], 'fused', 'linear')
        with stock():
            oracle.add_weighted_adapter(NAMES, WEIGHTS, 'fused', 'linear')
        # Of a copy, nothing is remembered.
        model = copy.deepcopy(original)
        for one in (model, oracle):
            (one.set_adapter if isinstance(one, PeftModel) else one.set_active_adapters)('fused')
        if how in WHOLE:
            WHOLE[how](model, mesh)
            check_whole(model, oracle)
        else:
            shard, message = REFUSED[how]
            check_refused(model, shard(model, mesh) or model, message)
    distributed.destroy_process_group()


def check_whole(model: Any, oracle: Any) -> None:
    expected = logits(oracle)
    model.update_weighted_adapter(NAMES, WEIGHTS, 'fused', 'linear')
    for layer, of_oracle in zip(layers(model).values(), layers(oracle).values()):
        for found, wanted in zip(factors_of(layer, 'fused'), factors_of(of_oracle, 'fused')):
            torch.testing.assert_close(whole(found.detach()), wanted.detach())
    torch.testing.assert_close(logits(model), expected)
    composer = FusionComposer(model, combination_type='linear', adapter_name='composed')
    composer.compose(NAMES[::-1], WEIGHTS[::-1])
    torch.testing.assert_close(logits(model), expected)
    composer.compose_batch([(NAMES, WEIGHTS), (['l0'], [1.0])])
    torch.testing.assert_close(logits(model)[:1], expected[:1])
    assert not torch.allclose(logits(model)[1:], expected[1:])


def check_refused(model: Any, runner: Any, message: str) -> None:
    before = parameters(model)
    composer = FusionComposer(model)
    for merge in (lambda: model.update_weighted_adapter(NAMES, WEIGHTS, 'fused', 'linear'),
                  lambda: composer.compose(NAMES, WEIGHTS), lambda: composer.compose_batch([(NAMES, WEIGHTS)])):
        with pytest.raises(ValueError, match=message):
            merge()
        after = parameters(model)
        assert after.keys() == before.keys()
        assert all(after[name][0] == before[name][0] and torch.equal(after[name][1], before[name][1])
                   for name in before)
    if runner is not None:
        logits(runner)


@pytest.mark.parametrize('how', [*WHOLE, *REFUSED])
def test_a_merge_on_two_processes_is_stocks_or_is_refused_by_name(tmp_path: Any, how: str) -> None:
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    logs = [tmp_path / f'{rank}.log' for rank in range(2)]
    ranks = [forkserver.start(be_rank, log, rank, port, how) for rank, log in enumerate(logs)]
    for rank in ranks:
        rank.join(DEADLINE)
    statuses = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert statuses == [0, 0], ''.join(log.read_text()[-3000:] for log in logs)


@pytest.mark.parametrize('is_gathered', [False, True])
@pytest.mark.parametrize('kept', ['l2', 'fused'])
def test_a_merge_of_what_zero_3_partitions_is_refused_by_name(build: Any, kept: str, is_gathered: bool) -> None:
    model = build()
    model.add_weighted_adapter(['l0', 'l1'], [0.5, 0.5], 'fused', 'linear')
    # Values that are gathered are in other memory.
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if kept in name.split('.'):
            # As DeepSpeed, which CI does not have, marks parameters and takes their values away.
            parameter.ds_id = name
            if not is_gathered:
                parameter.data = torch.empty(0)
    check_refused(model, None, 'found that FSDP or ZeRO-3 keeps those of layer')
