import pytest
import torch

from swift_patch.model.undo import Undo

CPU, META = torch.device('cpu'), torch.device('meta')


def test_what_was_overwritten_is_put_back_last_first():
    tensors = [torch.arange(5.0), torch.arange(6, dtype=torch.bfloat16).view(2, 3), torch.arange(3)]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(KeyError), Undo() as undo:
        # Too little for all of them.
        undo.reserve({}, {CPU: 40}, 0)
        for tensor in [*tensors, *tensors]:
            undo.keep(tensor)
            tensor.zero_()
        raise KeyError
    assert all(map(torch.equal, tensors, before))


def test_after_a_commit_nothing_is_put_back_and_the_memory_serves_again():
    spare, tensor = {}, torch.arange(5.0)
    for _ in range(2):
        with Undo() as undo:
            undo.reserve(spare, {CPU: tensor.nbytes}, 1)
            undo.keep(tensor)
            tensor.add_(1)
            assert CPU not in spare
            undo.commit()
        address = spare[CPU].data_ptr()
    assert torch.equal(tensor, torch.arange(5.0) + 2)
    with Undo() as undo:
        undo.reserve(spare, {CPU: tensor.nbytes}, 1)
        undo.commit()
    assert spare[CPU].data_ptr() == address


def test_two_at_a_time_have_memory_of_their_own():
    spare, tensor = {}, torch.arange(5.0)
    with Undo() as first:
        first.reserve(spare, {CPU: tensor.nbytes}, 1)
        first.commit()
    with pytest.raises(KeyError), Undo() as first:
        first.reserve(spare, {CPU: tensor.nbytes}, 1)
        first.keep(tensor)
        other = torch.ones(5)
        with Undo() as second:
            second.reserve(spare, {CPU: other.nbytes}, 1)
            second.keep(other)
            second.commit()
        tensor.zero_()
        raise KeyError
    assert torch.equal(tensor, torch.arange(5.0))


def test_each_device_has_memory_for_its_own_tensors_alone():
    spare, tensors = {}, [torch.arange(5.0), torch.empty(4096, device='meta'), torch.arange(3.0)]
    before = [tensor.clone() for tensor in tensors]
    for is_committed in (True, False):
        with Undo() as undo:
            undo.reserve(spare, {CPU: 32, META: 2**14}, 3)
            for tensor in tensors:
                undo.keep(tensor)
                tensor.zero_()
            if is_committed:
                undo.commit()
                for tensor, values in zip(tensors, before):
                    tensor.copy_(values)
                assert {device: memory.nbytes // 256 for device, memory in spare.items()} == {CPU: 0, META: 64}
    assert all(torch.equal(tensor, values) for tensor, values in zip(tensors, before) if not tensor.is_meta)


def test_memory_on_a_device_that_has_no_tensors_any_more_is_given_back():
    spare = {META: torch.empty(64, dtype=torch.uint8, device=META)}
    with Undo() as undo:
        undo.reserve(spare, {CPU: 64}, 1)
        undo.commit()
    assert list(spare) == [CPU]
