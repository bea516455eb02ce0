"""Streams of an engine: the thread that their tokens come from, the clients that they go to, the errors in them."""
import threading
from contextlib import contextmanager
from typing import Any, AsyncIterator, Iterator, Optional

# What a stream of a batch says where it has nothing new to say.
NOTHING = object()


class Stream:
    """One batch of streams, whose tokens come from a thread of their own.

    Stock waits for ever where that thread fails, and does not wait for it where nobody reads on.

    Attributes:
        error: what went wrong in the thread.
    """

    def __init__(self) -> None:
        self.error: Optional[BaseException] = None
        self._is_abandoned = False
        self._thread: Optional[threading.Thread] = None

    @contextmanager
    def guarded(self, streamer: Any) -> Iterator[None]:
        """Within it, the thread generates: it ends where nobody reads on, and an error ends what `streamer` gives."""
        self._thread, put = threading.current_thread(), streamer.put

        def put_unless_abandoned(value: Any) -> None:
            if self._is_abandoned:
                raise RuntimeError('Nobody reads on.')
            put(value)

        streamer.put = put_unless_abandoned
        try:
            yield
        except Exception as e:
            self.error = e
            streamer.end()

    @contextmanager
    def until_its_end(self) -> Iterator[None]:
        """Waits at the end of the `with` block for the thread, which computes with the rows that were composed."""
        try:
            yield
        finally:
            self._is_abandoned = True
            if self._thread is not None:
                self._thread.join()


class Mailbox:
    """The queue of one client, in which what other streams of a batch have to say leaves no gaps.

    Stock puts None where a stream of a batch has nothing new, which ends it in many releases.
    """

    def __init__(self, queue: Any):
        self._queue = queue

    async def put(self, item: Any) -> None:
        """Puts what is something."""
        if item is not NOTHING:
            await self._queue.put(item)


class Client:
    """An event loop that may be closed by now, with which its client went away: then nothing is delivered.

    Stock's worker would end there, and with it whatever else waits.
    """

    def __init__(self, loop: Any):
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_soon_threadsafe(self, callback: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls back in the loop, unless that is closed."""
        try:
            return self._loop.call_soon_threadsafe(callback, *args, **kwargs)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


async def checked(chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yields chunks, and raises what takes the place of one."""
    async for chunk in chunks:
        if isinstance(chunk, Exception):
            raise chunk
        yield chunk
