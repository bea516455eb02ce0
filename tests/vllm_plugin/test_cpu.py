"""A product by slots is that of each token with the matrix of its own slot."""
import pytest
import torch
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from types import SimpleNamespace
from vllm.lora.ops.torch_ops import lora_ops

from swift_patch.vllm_plugin.cpu import Tokens, install_fix

SLOTS, WIDTH, OUT = 6, 5, 7
WEIGHTS = torch.randn(SLOTS, 1, OUT, WIDTH, generator=torch.Generator().manual_seed(0))


@tries(100)
@given(slots=st.lists(st.integers(-1, SLOTS - 1), max_size=40))
def test_each_token_is_multiplied_once_by_the_matrix_of_its_slot(slots):
    x = torch.randn(len(slots), WIDTH, generator=torch.Generator().manual_seed(1))
    found = torch.zeros(len(slots), OUT)
    for tokens, product in Tokens(slots).products(x, WEIGHTS, torch.float32):
        found.index_add_(0, tokens, product)
    expected = [torch.zeros(OUT) if slot < 0 else WEIGHTS[slot, 0] @ each for slot, each in zip(slots, x)]
    torch.testing.assert_close(found, torch.stack(expected) if slots else found)


@pytest.mark.parametrize('slots, rows', [([0, 1, 2, 3, 4, 5], 6), ([3] * 8, 8), ([0] * 30 + [1, 2, 3, 4], 34)])
def test_few_rows_are_empty(slots, rows):
    assert sum(part.num_slots * part.room for part in Tokens(slots)._parts) == rows


def test_tokens_without_an_adapter_are_left_as_they_are_where_vllm_multiplies_itself():
    module = SimpleNamespace(bgmv_shrink=getattr(lora_ops.bgmv_shrink, '__wrapped__', lora_ops.bgmv_shrink))
    install_fix(module)
    x, found = torch.ones(3, WIDTH), torch.full((3, OUT), 9.)
    module.bgmv_shrink(x, WEIGHTS, found, torch.tensor([-1, 2, -1]), 2.)
    torch.testing.assert_close(found, torch.stack([torch.zeros(OUT), 2 * WEIGHTS[2, 0].sum(1), torch.zeros(OUT)]))
