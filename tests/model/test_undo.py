import pytest
import torch

from swift_patch.model.undo import Undo

CPU = torch.device('cpu')


def test_what_was_overwritten_is_put_back_last_first():
    tensors = [torch.arange(5.0), torch.arange(6, dtype=torch.bfloat16).view(2, 3), torch.arange(3)]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(KeyError), Undo() as undo:
        # Too little for all of them.
        undo.reserve({}, 40, 0, CPU)
        for tensor in [*tensors, *tensors]:
            undo.keep(tensor)
            tensor.zero_()
        raise KeyError
    assert all(map(torch.equal, tensors, before))


def test_after_a_commit_nothing_is_put_back_and_the_memory_serves_again():
    spare, tensor = {}, torch.arange(5.0)
    for _ in range(2):
        with Undo() as undo:
            undo.reserve(spare, tensor.nbytes, 1, CPU)
            undo.keep(tensor)
            tensor.add_(1)
            assert CPU not in spare
            undo.commit()
        address = spare[CPU].data_ptr()
    assert torch.equal(tensor, torch.arange(5.0) + 2)
    with Undo() as undo:
        undo.reserve(spare, tensor.nbytes, 1, CPU)
        undo.commit()
    assert spare[CPU].data_ptr() == address


def test_two_at_a_time_have_memory_of_their_own():
    spare, tensor = {}, torch.arange(5.0)
    with Undo() as first:
        first.reserve(spare, tensor.nbytes, 1, CPU)
        first.commit()
    with pytest.raises(KeyError), Undo() as first:
        first.reserve(spare, tensor.nbytes, 1, CPU)
        first.keep(tensor)
        other = torch.ones(5)
        with Undo() as second:
            second.reserve(spare, other.nbytes, 1, CPU)
            second.keep(other)
            second.commit()
        tensor.zero_()
        raise KeyError
    assert torch.equal(tensor, torch.arange(5.0))
