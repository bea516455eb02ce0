"""Answers that are there already, where one is waited for."""
from concurrent.futures import Future
from typing import Callable, TypeVar

_T = TypeVar('_T')


def settled(call: Callable[[], _T]) -> 'Future[_T]':
    """Calls a function, and returns a future with what it returned or raised."""
    future: 'Future[_T]' = Future()
    try:
        future.set_result(call())
    except Exception as e:
        future.set_exception(e)
    return future
