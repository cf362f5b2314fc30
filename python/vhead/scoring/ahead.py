"""Doing the next piece of work in a thread while the current one is used."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")

# A thread that waits for its input, such as a pipe, cannot be stopped; it is left behind after this long.
_FAREWELL_S = 0.5


class _End:
    """What the thread says last: nothing more comes, or what went wrong."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Ahead(Generic[Item]):
    """Runs an iterator in a thread of its own, which waits while `depth` items are not yet taken.

    Iterating gives the items in order and raises what the iterator raised. Leaving the block ends the thread: at once,
    or where the iterator is waiting for something, when that comes.

    Args:
        items: Runs in the thread.
        depth: Items that are ready and not yet taken; one more is in the making.
    """

    def __init__(self, items: Iterator[Item], depth: int = 1) -> None:
        self._items = items
        self._queue: queue.Queue[Item | _End] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vhead-ahead", daemon=True)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                self._queue.put(item)
                if self._stopped.is_set():
                    return
        except BaseException as problem:  # Raised again where the items are used.
            error = problem
        if not self._stopped.is_set():
            self._queue.put(_End(error))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopped.set()
        # Room for the item that the thread may be waiting to hand over.
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join(_FAREWELL_S)

    @property
    def has_next(self) -> bool:
        """Whether the next item, or the end, is there already."""
        return not self._queue.empty()

    def __iter__(self) -> Iterator[Item]:
        while not isinstance(item := self._queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
