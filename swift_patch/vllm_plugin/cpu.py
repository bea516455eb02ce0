"""LoRA on a CPU: what is mended in vLLM there, and a product that reads each adapter of a batch once.

vLLM's own copies the adapter of each token before it multiplies. On a GPU it has kernels of another kind.
"""
import functools
import torch
import wrapt
from collections import defaultdict
from dataclasses import dataclass
from torch import Tensor
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

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

    @functools.wraps(shrink)
    def bgmv_shrink(inputs: Any, weights: Any, output: Any, slots: Any, scaling: float = 1.0) -> None:
        shrink(inputs, weights, output, slots, scaling)
        # What is zero here adds nothing.
        output.masked_fill_((slots < 0).unsqueeze(1), 0)

    module.bgmv_shrink = bgmv_shrink


def install_product(module: Any) -> None:
    """Has linear layers multiply by slots. Fully sharded ones, which vLLM has functions of their own for, do not.

    Args:
        module: `vllm.lora.punica_wrapper.punica_cpu`.
    """
    wrapt.wrap_function_wrapper(module, 'PunicaWrapperCPU.update_metadata', _update)
    wrapt.wrap_function_wrapper(module, 'PunicaWrapperCPU.add_lora_linear', _add)


def _update(wrapped: Callable[..., None], wrapper: Any, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    setattr(wrapper, _TOKENS, Tokens(wrapper.token_lora_indices.tolist()))


def _add(wrapped: Callable[..., None], wrapper: Any, args: Any, kwargs: Any) -> None:
    """Adds to what linear layers return what the adapters of the tokens make of their inputs."""
    found: Optional[Tokens] = getattr(wrapper, _TOKENS, None)
    # A buffer is left to vLLM, where nothing brings one today.
    if found is None or kwargs:
        wrapped(*args, **kwargs)
        return
    y, x, A, B, scale, sizes = args
    found.add(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), A, B, scale, sizes)


@dataclass(frozen=True)
class _Part:
    """Tokens that are multiplied at a time: as many of each slot of a range as there is room for.

    Attributes:
        first: the first slot.
        num_slots: how many slots there are.
        source: the token of each of `num_slots` times `room` rows; any token where a row is empty.
        rows: which rows are not empty; None for all.
        tokens: the tokens of these.
    """
    first: int
    num_slots: int
    source: Tensor
    rows: Optional[Tensor]
    tokens: Tensor

    def of_slots(self, weights: Tensor) -> Tensor:
        """Returns the transposed matrices of the slots, of all there are, (slots, 1, out_features, in_features)."""
        return weights[self.first:self.first + self.num_slots, 0].mT


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

    def add(self, y: Tensor, x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scale: float,
            sizes: Sequence[int]) -> None:
        """Adds to each token what the adapter in its slot makes of it.

        Args:
            y: what is added to, (tokens, out_features): columns of one linear layer after another.
            x: what the layers get, (tokens, in_features).
            A: of each layer the factors of all slots, (slots, 1, rank, in_features).
            B: the same, (slots, 1, out_features, rank).
            scale: a factor of all.
            sizes: the out_features of each layer.
        """
        # Like vLLM: x and A are multiplied in float32, the product and B in the dtype of y.
        x = x.float()
        for part in self._parts:
            padded = x.index_select(0, part.source).view(part.num_slots, -1, x.shape[-1])
            at = 0
            for to_rank, from_rank, size in zip(A, B, sizes):
                shrunk = torch.bmm(padded, part.of_slots(to_rank).float())
                shrunk = (shrunk if scale == 1 else shrunk.mul_(scale)).to(y.dtype)
                added = torch.bmm(shrunk, part.of_slots(from_rank).to(y.dtype)).flatten(0, 1)
                columns = y.narrow(1, at, size)
                columns.index_add_(0, part.tokens, added if part.rows is None else added.index_select(0, part.rows))
                at += size


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
    source = [tokens[0]] * (count * room)
    for row, token in zip(rows, tokens):
        source[row] = token
    if len(tokens) == len(source):
        # Every row is taken as it comes.
        yield _Part(first, count, torch.tensor(source), None, torch.tensor(source))
    else:
        yield _Part(first, count, torch.tensor(source), torch.tensor(rows), torch.tensor(tokens))
