"""LoRA on a CPU: what is mended in vLLM there, and a product that reads each adapter of a batch once.

vLLM's own copies the adapter of each token before it multiplies. On a GPU it has kernels of another kind.
"""
import functools
import torch
import wrapt
from collections import defaultdict
from dataclasses import dataclass
from torch import Tensor
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

# The attribute of vLLM's wrapper of kernels that says which tokens of a batch have which slot.
_TOKENS = '_swift_patch_tokens'
# Where adapters have different numbers of tokens, at most so many rows are multiplied for each token.
_MAX_PADDED = 4


def install_fix(module: Any) -> None:
    """Leaves tokens of requests without an adapter as they are.

    Their number is -1, by which torch finds the last slot: where that is taken, the base model answers by its adapter.
    vLLM's pull request 48421 is about this.

    Args:
        module: `vllm.lora.ops.torch_ops.lora_ops`.
    """
    shrink = module.bgmv_shrink

    # A function like the one in its place, so that it can be compiled, too.
    @functools.wraps(shrink)
    def bgmv_shrink(inputs: Any, weights: Any, output: Any, slots: Any, scaling: float = 1.0) -> None:
        shrink(inputs, weights, output, slots, scaling)
        # What is zero here adds nothing.
        output.masked_fill_((slots < 0).unsqueeze(1), 0)

    module.bgmv_shrink = bgmv_shrink


def install_product(module: Any) -> None:
    """Has linear layers multiply by slots, where the model is not compiled.

    Args:
        module: `vllm.lora.punica_wrapper.punica_cpu`.
    """
    wrapt.wrap_function_wrapper(module, 'PunicaWrapperCPU.update_metadata', _update)
    wrapt.wrap_function_wrapper(module, 'PunicaWrapperCPU._apply_shrink', _shrink)
    wrapt.wrap_function_wrapper(module, 'PunicaWrapperCPU._apply_expand', _expand)


def _update(wrapped: Callable[..., None], wrapper: Any, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    setattr(wrapper, _TOKENS, Tokens(wrapper.token_lora_indices.tolist()))


def _tokens_of(wrapper: Any) -> 'Optional[Tokens]':
    """Returns which tokens have which slot; None where that is not to be relied on."""
    # What is compiled runs with other tokens later.
    return None if torch.compiler.is_compiling() else getattr(wrapper, _TOKENS, None)


def _shrink(wrapped: Callable[..., None], wrapper: Any, args: Any, kwargs: Any) -> None:
    """Puts the products of x and A into y, times a factor; zeros for tokens without an adapter."""
    found = _tokens_of(wrapper)
    if found is None:
        wrapped(*args, **kwargs)
        return
    y, x, weights, factor = args
    y.zero_()
    for tokens, product in found.products(x, weights, y.dtype):
        y[:, :product.shape[-1]].index_copy_(0, tokens, product.mul_(factor))


def _expand(wrapped: Callable[..., None], wrapper: Any, args: Any, kwargs: Any) -> None:
    """Adds the products of x and B to columns of y."""
    found = _tokens_of(wrapper)
    y, x, weights, offset, size, *add = args
    if found is None or not kwargs.get('add_inputs', *add or (True, )):
        wrapped(*args, **kwargs)
        return
    for tokens, product in found.products(x, weights, y.dtype):
        y[:, offset:offset + size].index_add_(0, tokens, product)


@dataclass(frozen=True)
class _Part:
    """Tokens that are multiplied at a time: as many of each slot of a range as there is room for.

    Attributes:
        tokens: which they are.
        rows: where they are among `num_slots` times `room` rows.
        first: the first slot.
        num_slots: how many slots there are.
        room: how many tokens of each there is room for.
    """
    tokens: Tensor
    rows: Tensor
    first: int
    num_slots: int
    room: int


class Tokens:
    """Which tokens of a batch have which slot.

    Args:
        slots: the slot of each token, -1 where it has no adapter.
    """

    def __init__(self, slots: Sequence[int]):
        by_slot: Dict[int, List[int]] = defaultdict(list)
        for token, slot in enumerate(slots):
            if slot >= 0:
                by_slot[slot].append(token)
        # Those that are being answered have one token each, a prompt that enters has many.
        single = {slot: tokens for slot, tokens in by_slot.items() if len(tokens) == 1}
        several = {slot: tokens for slot, tokens in by_slot.items() if len(tokens) > 1}
        self._parts = [part for group in (single, several) for part in _parts(group)]

    def products(self, x: Tensor, weights: Tensor, dtype: torch.dtype) -> Iterator[Tuple[Tensor, Tensor]]:
        """Yields tokens, and what they have multiplied by the matrices of their slots.

        Args:
            x: what each token has, (tokens, in_features).
            weights: the matrices, (slots, 1, out_features, in_features).
            dtype: the dtype of the products.
        """
        x = x.to(dtype)
        for part in self._parts:
            padded = x.new_zeros(part.num_slots * part.room, x.shape[-1]).index_copy_(0, part.rows, x[part.tokens])
            matrices = weights[part.first:part.first + part.num_slots, 0].to(dtype)
            product = torch.bmm(padded.view(part.num_slots, part.room, -1), matrices.mT)
            yield part.tokens, product.flatten(0, 1)[part.rows]


def _parts(by_slot: Dict[int, List[int]]) -> Iterator[_Part]:
    """Yields the tokens of some slots, all in one part where few of its rows are empty."""
    if not by_slot:
        return
    first, room = min(by_slot), max(map(len, by_slot.values()))
    count, num_tokens = max(by_slot) + 1 - first, sum(map(len, by_slot.values()))
    if len(by_slot) > 1 and count * room > _MAX_PADDED * num_tokens:
        for slot, tokens in by_slot.items():
            yield from _parts({slot: tokens})
        return
    tokens = [token for of_slot in by_slot.values() for token in of_slot]
    rows = [(slot - first) * room + number for slot, of_slot in by_slot.items() for number in range(len(of_slot))]
    yield _Part(torch.tensor(tokens), torch.tensor(rows), first, count, room)
