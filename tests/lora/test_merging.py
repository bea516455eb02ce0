import math
import pytest
import torch
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from models import fresh, layers, loras, swift_model
from peft.utils.merge_utils import task_arithmetic

from swift_patch.lora import decomposed, formulas
from swift_patch.lora.combination import COMBINATION_TYPES, MergeOptions
from swift_patch.lora.factors import Source
from swift_patch.lora.merging import Task, _is_sign_on_both_factors, reference_scaling
from swift_patch.lora.numbers import as_float32

numbers = st.floats(-2, 2, allow_nan=False, width=32)


@st.composite
def sources(draw, same_rank=True, shape=None):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    out_features, in_features = shape or (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    rank, found = draw(st.integers(1, 5)), []
    for _ in range(draw(st.integers(1, 4))):
        rank = rank if same_rank else draw(st.integers(1, 5))
        found.append(
            Source(
                torch.randn(rank, in_features, generator=generator, dtype=torch.float64),
                torch.randn(out_features, rank, generator=generator, dtype=torch.float64), draw(numbers),
                draw(st.floats(0.1, 4))))
    return found


def delta(pair):
    return pair.B @ pair.A


def merge(name, found, rank=100, **options):
    return formulas.merge(name, Task(found, MergeOptions(name, **options), rank, False))


@tries(100)
@given(sources(same_rank=False))
def test_cat_makes_the_weighted_sum_of_the_deltas(found):
    expected = sum(source.weight * source.scaling * delta(source) for source in found)
    torch.testing.assert_close(delta(merge('cat', found)), expected)


@tries(100)
@given(sources())
def test_average_does_not_depend_on_the_scaling_it_is_expressed_for(found):
    result = reference_scaling(found) * delta(merge('average', found))
    A = sum(source.weight * math.sqrt(source.scaling) * source.A for source in found)
    B = sum(source.weight * math.sqrt(source.scaling) * source.B for source in found)
    torch.testing.assert_close(result, B @ A)


@tries(100)
@given(sources(), st.floats(0.1, 4))
def test_average_of_sources_of_one_scaling_is_the_weighted_sum_of_the_factors(found, scaling):
    found = [source._replace(scaling=scaling) for source in found]
    pair = merge('average', found)
    torch.testing.assert_close(pair.A, sum(source.weight * source.A for source in found))
    torch.testing.assert_close(pair.B, sum(source.weight * source.B for source in found))
    assert reference_scaling(found) == scaling


@pytest.mark.parametrize('scaling', [0.0, -1.5])
def test_average_keeps_a_scaling_that_is_zero_or_negative(scaling):
    A, B = torch.randn(2, 5), torch.randn(4, 2)
    found = [Source(A, B, 1.0, scaling)]
    torch.testing.assert_close(reference_scaling(found) * delta(merge('average', found)), scaling * B @ A)


@tries(100)
@given(sources(same_rank=False), st.integers(1, 12))
def test_svd_of_the_factors_is_the_truncated_svd_of_the_dense_delta(found, rank):
    dense = sum(as_float32(s.weight * s.scaling) * s.scaling * delta(s) for s in found)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    pair = merge('svd', found, rank)
    assert pair.A.shape[0] == pair.B.shape[1] <= rank
    # Where singular values are equal the factors are not unique, but the distance to the dense delta is.
    expected = S[rank:].norm()
    torch.testing.assert_close((dense - delta(pair)).norm(), expected, rtol=1e-6, atol=1e-6 * (1 + S.max().item()))


@tries(100)
@given(sources(), st.sampled_from(['linear', 'average', 'cat', 'svd']))
def test_what_is_merged_is_new_and_the_sources_stay_as_they_were(found, name):
    before = [(source.A.clone(), source.B.clone()) for source in found]
    pair = merge(name, found)
    for source, (A, B) in zip(found, before):
        assert torch.equal(source.A, A) and torch.equal(source.B, B)
        assert pair.A.data_ptr() != source.A.data_ptr() and pair.B.data_ptr() != source.B.data_ptr()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['linear', 'average'])
def test_half_precision_is_summed_in_float32_and_rounded_once(name, dtype):
    found = [
        Source(torch.randn(4, 50).to(dtype),
               torch.randn(30, 4).to(dtype), weight, 1.0) for weight in (0.3, 0.3, 0.4)
    ]
    exact = merge(name, [source._replace(A=source.A.float(), B=source.B.float()) for source in found])
    pair = merge(name, found)
    assert torch.equal(pair.A, exact.A.to(dtype)) and torch.equal(pair.B, exact.B.to(dtype))


def test_dense_types_leave_half_precision_sources_where_they_are():
    found = [Source(torch.randn(2, 5).bfloat16(), torch.randn(4, 2).bfloat16(), 1.0, 2.0) for _ in range(2)]
    addresses = [(source.A.data_ptr(), source.B.data_ptr()) for source in found]
    merge('ties_svd', found, 2, density=0.5)
    assert [(source.A.data_ptr(), source.B.data_ptr()) for source in found] == addresses


def test_the_dense_delta_of_a_convolution_is_the_convolution_of_its_factors():
    A, B = torch.randn(2, 5, 3, 3), torch.randn(4, 2, 1, 1)
    expected = torch.nn.functional.conv2d(A.transpose(0, 1), B).transpose(0, 1) * 0.5
    result = decomposed._dense_delta(Source(A, B, 1.0, 0.5), False)
    torch.testing.assert_close(result.reshape(expected.shape), expected)
    assert result.flatten(1).shape == task_arithmetic([expected.flatten(1)], torch.ones(1)).shape


def test_the_dense_delta_of_half_precision_factors_is_rounded_once():
    A, B = torch.randn(4, 50).bfloat16(), torch.randn(30, 4).bfloat16()
    result = decomposed._dense_delta(Source(A, B, 1.0, 0.3), False)
    assert torch.equal(result, (B.float() @ A.float() * 0.3).bfloat16())


@pytest.mark.parametrize('name', COMBINATION_TYPES)
def test_half_precision_sources_make_half_precision_factors_unless_decomposed(name):
    found = [Source(torch.randn(2, 5).bfloat16(), torch.randn(4, 2).bfloat16(), 0.5, 2.0) for _ in range(2)]
    pair = merge(name, found, 2, density=0.5)
    assert {pair.A.dtype, pair.B.dtype} == {torch.float32 if name.endswith('svd') else torch.bfloat16}


def test_every_combination_type_has_a_formula():
    assert formulas._FORMULAS.keys() == COMBINATION_TYPES.keys()


def test_the_sign_of_a_negative_weight_is_where_the_installed_peft_puts_it():
    oracle = fresh(swift_model(loras()), ['l0'], [-1.0], 'linear')
    for layer in layers(oracle).values():
        assert torch.all(layer.lora_A['oracle'].weight * layer.lora_A['l0'].weight <= 0)
        product = layer.lora_B['oracle'].weight * layer.lora_B['l0'].weight
        assert torch.all(product <= 0 if _is_sign_on_both_factors() else product >= 0)
