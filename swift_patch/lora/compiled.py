"""A weighted sum of whole adapters in one kernel, for those who ask for it: making it takes seconds.

PyTorch's own operations make a pass over memory for every term, and two more to round to half precision. A kernel that
`torch.compile` makes reads the terms and writes the sum, once.
"""
import logging
import torch
from torch import Tensor
from typing import Any, Callable, List, Optional, Sequence, Set, Tuple

logger = logging.getLogger(__name__)

# `_sums`, compiled; None unless somebody asked for it.
_kernel: Optional[Callable[[List[Tensor], List[Tensor], List[List[Tensor]]], None]] = None

# Kinds past PyTorch's recompile limit, of which it would log at every merge: numbers of sources, dtypes and devices.
_beyond_limit: Set[Tuple[Any, ...]] = set()


def compile_merging(enabled: bool = True) -> None:
    """Makes `linear` and `average` use a compiled kernel from now on, in all models of the process.

    It is compiled where it is first needed (a pause of some 15 s, of 2 s where PyTorch finds it in its cache on disk),
    and again for another dtype, device or number of sources, up to PyTorch's limit of eight: what is beyond is merged
    as before. That pays after hundreds of samples, in half precision above all. Where compiling fails, for want of a
    C++ compiler for one, that is logged and things stay as they were.

    Args:
        enabled: False to use PyTorch's own operations again.
    """
    global _kernel
    _beyond_limit.clear()
    # `fullgraph`: past the limit it raises instead of running `_sums` eagerly.
    _kernel = torch.compile(_sums, dynamic=True, fullgraph=True) if enabled else None


def compiled_sums(tensors: Sequence[Sequence[Tensor]], weights: Sequence[Sequence[float]],
                  outs: Sequence[Tensor]) -> bool:
    """Puts Σ wⱼTⱼ into each of `outs`, summed in float32 at least and rounded once to its dtype, if a kernel can.

    Args:
        tensors: for each sum, its terms. Those of more than one dimension are left to others.
        weights: their weights.
        outs: one more such tensor for each sum, all on one device.

    Returns:
        Whether it did; if not, `outs` may hold anything.
    """
    global _kernel
    kernel, kind = _kernel, (len(tensors[0]), outs[0].dtype, outs[0].device)
    # One dimension: the elements of all layers.
    if kernel is None or kind in _beyond_limit or any(out.dim() != 1 for out in outs):
        return False
    dtypes = [torch.promote_types(out.dtype, torch.float32) for out in outs]
    try:
        kernel(
            list(outs),
            [torch.tensor(of_sum, dtype=dtype).to(outs[0].device) for of_sum, dtype in zip(weights, dtypes)],
            list(map(list, tensors)))
    except _limit_hit():
        # What is compiled already stays of use.
        _beyond_limit.add(kind)
        return False
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as e:
        # One failure will be like the next, and each may take seconds.
        _kernel = None
        logger.warning('Merging goes on without a compiled kernel, for torch.compile failed: '
                       f'{(str(e) or repr(e)).splitlines()[0]}')
        return False
    return True


def _limit_hit() -> Any:
    """Returns the class of the error at PyTorch's recompile limit, which was named after the cache at first."""
    errors = torch._dynamo.exc
    return getattr(errors, 'FailOnRecompileLimitHit', None) or getattr(errors, 'FailOnCacheLimitHit')


def _sums(outs: List[Tensor], weights: List[Tensor], tensors: List[List[Tensor]]) -> None:
    for out, of_sum, terms in zip(outs, weights, tensors):
        total = terms[0].to(of_sum.dtype) * of_sum[0]
        for i in range(1, len(terms)):
            total = total + terms[i].to(of_sum.dtype) * of_sum[i]
        out.copy_(total)
