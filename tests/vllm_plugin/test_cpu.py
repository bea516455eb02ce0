"""A product by slots is that of each token with the factors in its own slot."""
import pytest
import torch
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from types import SimpleNamespace
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from swift_patch.vllm_plugin.cpu import Tokens, install_fix

SLOTS, WIDTH, RANK, SIZES, SCALE = 6, 5, 3, (7, 4), 2.
GENERATOR = torch.Generator().manual_seed(0)
A = tuple(torch.randn(SLOTS, 1, RANK, WIDTH, generator=GENERATOR) for _ in SIZES)
B = tuple(torch.randn(SLOTS, 1, size, RANK, generator=GENERATOR) for size in SIZES)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@tries(100)
@given(slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40))
def test_to_each_token_is_added_what_the_adapter_in_its_slot_makes_of_it(dtype, slots):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(len(slots), width, generator=generator).to(dtype) for width in (WIDTH, sum(SIZES)))
    expected = y.float()
    for token, slot in enumerate(slots):
        if slot >= 0:
            made = [b[slot, 0] @ (a[slot, 0] @ x[token].float()) * SCALE for a, b in zip(A, B)]
            expected[token] += torch.cat(made)
    Tokens(slots).add(y, x, [a.to(dtype) for a in A], [b.to(dtype) for b in B], SCALE, SIZES)
    tolerance = {} if dtype == torch.float32 else {'rtol': 0.05, 'atol': 0.3}
    torch.testing.assert_close(y.float(), expected, **tolerance)


@pytest.mark.parametrize('slots, rows', [([0, 1, 2, 3, 4, 5], 6), ([3] * 8, 8), ([0] * 30 + [1, 2, 3, 4], 34)])
def test_few_rows_are_empty(slots, rows):
    assert sum(len(part.source) for part in Tokens(slots)._parts) == rows


def test_tokens_without_an_adapter_are_left_as_they_are_where_vllm_multiplies_itself():
    module = SimpleNamespace(bgmv_shrink=getattr(lora_ops.bgmv_shrink, '__wrapped__', lora_ops.bgmv_shrink))
    install_fix(module)
    x, found = torch.ones(3, WIDTH), torch.full((3, RANK), 9.)
    module.bgmv_shrink(x, A[0], found, torch.tensor([-1, 2, -1]), 2.)
    zeros = torch.zeros(RANK)
    torch.testing.assert_close(found, torch.stack([zeros, 2 * A[0][2, 0].sum(1), zeros]))


def test_the_product_is_that_of_vllm_itself():
    slots = torch.tensor([3, 0, 3, 5, 1, 1, 1, 4])
    x, y = torch.randn(len(slots), WIDTH), torch.randn(len(slots), sum(SIZES))
    wrapper, expected, found = PunicaWrapperCPU(len(slots), len(slots), 'cpu'), y.clone(), y.clone()
    wrapper._token_lora_indices.copy_(slots)
    wrapper.indices_len[0] = len(slots)
    add = PunicaWrapperCPU.add_lora_linear
    getattr(add, '__wrapped__', add)(wrapper, expected, x, A, B, SCALE, SIZES)
    Tokens(slots.tolist()).add(found, x, A, B, SCALE, SIZES)
    torch.testing.assert_close(found, expected)
