"""The cache stays within its bytes, keeps what is used again, and hands out no memory that somebody holds."""
import pytest
import torch
from collections import Counter
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from typing import Any, Dict, List, Tuple

from swift_patch.lora.cache import _FIRST_OF, TensorCache

CPU, OTHER = torch.device('cpu'), torch.device('meta')
KIND = (torch.float32, CPU)
SIGNATURE = 'signature'


def put(cache: TensorCache, key: Any, nbytes: int, signature: Any = SIGNATURE, value: float = 0.0) -> torch.Tensor:
    """As the library does: reads into memory of the cache's, and puts what was read."""
    buffer = cache.buffer(nbytes)
    tensor = buffer[:nbytes].view(torch.float32).fill_(value)
    cache.put(key, signature, {KIND: tensor})
    return tensor


def use(cache: TensorCache, key: Any, nbytes: int) -> bool:
    """Returns whether what was read before was found."""
    found = cache.get(key, SIGNATURE) is not None
    if not found:
        put(cache, key, nbytes)
    return found


def kept(cache: TensorCache, keys: Any) -> List[Any]:
    """Looks at the insides: asking is a use."""
    return [key for key in keys if key in cache._first.entries or key in cache._again.entries]


def memory_of(cache: TensorCache) -> Dict[torch.device, int]:
    """The bytes that the cache holds on each device, by the memory itself and not by the cache's own account."""
    tensors = [tensor for queue in (cache._first, cache._again) for entry in queue.entries.values()
               for tensor in entry.tensors.values()]  # yapf: disable
    storages = {}
    for tensor in tensors + cache._free:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
    found: 'Counter[torch.device]' = Counter()
    for storage in storages.values():
        found[storage.device] += storage.nbytes()
    return found


actions = st.lists(
    st.tuples(
        st.sampled_from(['use', 'use', 'use', 'stale', 'drop', 'drop all', 'recycle']), st.integers(0, 9),
        st.integers(0, 40), st.sampled_from(['one', 'two in one', 'converted', 'on another device', 'on both'])),
    max_size=60)


@tries(200)
@given(st.integers(0, 5000), actions)
def test_whatever_is_done_the_memory_stays_within_its_bounds(max_bytes, todo):
    cache = TensorCache(max_bytes)
    for number, (action, key, size, where) in enumerate(todo):
        nbytes = size * 4
        if action == 'drop':
            cache.drop(key)
        elif action == 'drop all':
            cache.drop_all(lambda of: of < key)
        elif action == 'recycle':
            cache.recycle(torch.empty(nbytes, dtype=torch.uint8))
        elif cache.get(key, SIGNATURE) is None or action == 'stale':
            buffer = cache.buffer(nbytes)
            half = nbytes // 8 * 4
            tensors = {
                'one': lambda: {
                    KIND: buffer[:nbytes].view(torch.float32)
                },
                # Of two dtypes, as in a model whose layers are.
                'two in one': lambda: {
                    KIND: buffer[:half].view(torch.float32),
                    (torch.int32, CPU): buffer[half:nbytes].view(torch.int32)
                },
                'converted': lambda: {
                    KIND: buffer[:half].view(torch.float32),
                    (torch.float64, CPU): torch.empty(size, dtype=torch.float64)
                },
                'on another device': lambda: {
                    (torch.float32, OTHER): torch.empty(size, device=OTHER)
                },
                'on both': lambda: {
                    KIND: buffer[:nbytes].view(torch.float32),
                    (torch.float32, OTHER): torch.empty(size, device=OTHER)
                },
            }[where]()
            cache.put(key, SIGNATURE, tensors)
            del buffer, tensors
        found = memory_of(cache)
        assert all(nbytes <= max_bytes for nbytes in found.values()), (number, found)
        assert {device: nbytes for device, nbytes in cache.nbytes.items() if nbytes} == \
            {device: nbytes for device, nbytes in found.items() if nbytes}
    cache.drop_all(lambda key: True)
    cache._free.clear()
    assert not any(cache.nbytes.values())


@tries(200)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(['use', 'use', 'hold', 'let go', 'drop'])), max_size=60))
def test_memory_that_somebody_holds_keeps_its_values(todo):
    """A merge in another thread reads what went out of the cache meanwhile."""
    # What came once goes when the next one comes, and its memory waits to be filled again.
    cache, held, value, values = TensorCache(_FIRST_OF * 400), [], 0.0, {}
    for key, action in todo:
        found = cache.get(key, SIGNATURE)
        if action == 'let go' and held:
            held.pop(key % len(held))
        elif action == 'drop':
            cache.drop(key)
        elif found is None:
            value += 1
            values[key] = value
            tensor = put(cache, key, 400, value=value)
            if action == 'hold':
                held.append((tensor, value))
            del tensor
        else:
            assert torch.equal(found[KIND], torch.full([100], values[key]))
            if action == 'hold':
                held.append((found[KIND][10:20], values[key]))
        del found
        assert all(bool((tensor == of).all()) for tensor, of in held)


def test_memory_of_what_went_is_filled_again() -> None:
    cache = TensorCache(100_000)
    for key in 'ab':
        put(cache, key, 4000)
        put(cache, key, 4000)  # Used again: it stays.
    address = cache.get('a', SIGNATURE)[KIND].data_ptr()
    cache.drop('a')
    assert put(cache, 'c', 4000).data_ptr() == address


def test_memory_of_two_tensors_is_filled_again_once() -> None:
    cache = TensorCache(_FIRST_OF * 4000)
    buffer = cache.buffer(4000)
    address = buffer.data_ptr()
    cache.put('a', SIGNATURE, {
        KIND: buffer[:2000].view(torch.float32),
        (torch.int32, CPU): buffer[2000:].view(torch.int32)
    })
    del buffer
    assert kept(cache, 'a')
    cache.drop('a')
    first, second = cache.buffer(4000), cache.buffer(4000)
    assert first.data_ptr() == address != second.data_ptr()


def test_memory_much_larger_than_what_is_needed_is_left_for_others() -> None:
    cache = TensorCache(100_000)
    memory = torch.empty(4000, dtype=torch.uint8)
    cache.recycle(memory)
    address = memory.data_ptr()
    del memory
    assert cache.buffer(1000).data_ptr() != address
    assert cache.buffer(4004).data_ptr() != address
    assert cache.buffer(3600).data_ptr() == address


@tries(100)
@given(st.lists(st.integers(0, 9), max_size=80))
def test_of_what_is_used_again_the_least_recently_used_goes_first(keys):
    cache, last, times = TensorCache(4 * 400), {}, Counter()
    for number, key in enumerate(keys):
        use(cache, key, 400)
        last[key] = number
        times[key] += 1
        again = [of for of in last if times[of] > 1]
        stay = kept(cache, again)
        gone = [of for of in again if of not in stay]
        assert len(stay) == min(len(again), 4)
        assert not gone or not stay or max(last[of] for of in gone) < min(last[of] for of in stay)


def test_what_comes_once_pushes_nothing_out_that_came_again() -> None:
    cache = TensorCache(_FIRST_OF * 400)
    again = [f'again{number}' for number in range(_FIRST_OF - 4)]
    for key in again + again:
        use(cache, key, 400)
    for number in range(1000):
        assert not use(cache, number, 400)
    assert kept(cache, again) == again
    assert all(use(cache, key, 400) for key in again)


def test_of_what_came_once_the_newest_are_kept() -> None:
    cache = TensorCache(_FIRST_OF * 4 * 400)
    for number in range(100):
        use(cache, number, 400)
    assert kept(cache, range(100)) == [96, 97, 98, 99]


def test_what_came_once_and_went_stays_when_it_comes_again() -> None:
    cache = TensorCache(1600)
    assert not use(cache, 'a', 1200) and not kept(cache, 'a')
    assert not use(cache, 'a', 1200) and kept(cache, 'a')
    assert use(cache, 'a', 1200)


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = TensorCache(1600)
    for key in 'abab':
        use(cache, key, 400)
    for _ in range(3):
        assert not use(cache, 'large', 1604)
    assert not kept(cache, ['large'])


def test_each_device_has_bytes_of_its_own() -> None:
    cache = TensorCache(1600)
    for _ in range(2):
        for number in range(4):
            put(cache, number, 400)
            cache.put(f'other{number}', SIGNATURE, {(torch.float32, OTHER): torch.empty(100, device=OTHER)})
    assert cache.nbytes == {CPU: 1600, OTHER: 1600}
    cache.put('other0', SIGNATURE, {(torch.float32, OTHER): torch.empty(200, device=OTHER)})
    assert cache.nbytes == {CPU: 1600, OTHER: 1600}
    assert kept(cache, ['other0', 'other1', 'other2', 'other3']) == ['other0', 'other2', 'other3']


def test_what_was_put_under_another_signature_is_not_found() -> None:
    cache = TensorCache(100_000)
    old = put(cache, 'a', 400, (1, 2), 1.0)
    assert cache.get('a', (1, 3)) is None
    new = put(cache, 'a', 400, (1, 3), 2.0)
    assert cache.get('a', (1, 2)) is None
    assert cache.get('a', (1, 3))[KIND] is new
    assert bool((old == 1).all())


@pytest.mark.parametrize('is_again', [False, True])
def test_what_is_dropped_is_not_found(is_again: bool) -> None:
    cache = TensorCache(100_000)
    names: List[Tuple[str, int]] = [(name, number) for name in 'ab' for number in range(2)]
    for key in names + names * is_again:
        use(cache, key, 400)
    cache.drop_all(lambda key: key[0] == 'a')
    assert kept(cache, names) == [('b', 0), ('b', 1)]
    cache.drop(('b', 0))
    cache.drop('nothing')
    assert kept(cache, names) == [('b', 1)]
