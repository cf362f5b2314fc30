"""Weights change between two batches, never during one: those who compute and those who swap take turns."""

import _thread
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Any number of readers at a time, or one swap; a swap that waits goes first."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._waiting = 0
        self._swapping = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While the block runs, no weights are swapped."""
        changed = self._changed
        with changed:
            changed.wait_for(lambda: not (self._swapping or self._waiting))
            self._readers += 1
        try:
            yield
        finally:
            # In a process that was forked within the block, everybody's turns have been forgotten.
            if changed is self._changed:
                with changed:
                    self._readers -= 1
                    changed.notify_all()

    @contextmanager
    def swapping(self) -> Iterator[None]:
        """While the block runs, nobody reads."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not (self._swapping or self._readers))
                self._swapping = True
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                self._swapping = False
                self._changed.notify_all()

    def before_fork(self) -> None:
        """A child gets a copy of the memory: it is made when no swap is under way."""
        self._changed.acquire()
        self._changed.wait_for(lambda: not self._swapping)

    def after_fork_in_parent(self) -> None:
        """Swaps go on."""
        self._changed.release()

    def after_fork_in_child(self) -> None:
        """The other threads are gone, and their turns with them."""
        self._reset()


TURNS = Turns()
os.register_at_fork(
    before=TURNS.before_fork,
    after_in_parent=TURNS.after_fork_in_parent,
    after_in_child=TURNS.after_fork_in_child,
)


def uninterrupted(work: Callable[[], None]) -> None:
    """Runs something to its end although Ctrl-C or another signal's handler raises meanwhile; that is raised then.

    Python runs handlers of signals in the main thread alone, so that nothing can be raised within another one.
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    aside = _Aside(work)
    interrupt: BaseException | None = None
    while not aside.done.is_set():
        try:
            aside.start()
            aside.done.wait()
        except BaseException as error:  # A handler's, which can come at any line.
            if isinstance(error, RuntimeError) and not aside.begun:
                raise
            interrupt = error
    if aside.failure is not None:
        raise aside.failure
    if interrupt is not None:
        raise interrupt


class _Aside:
    """Work that is done once, in a thread of its own."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._claim = threading.Lock()
        self.done = threading.Event()
        self.failure: BaseException | None = None
        self.begun = False

    def start(self) -> None:
        """Starts the thread, where that is not known to have been done."""
        if not self.begun:
            _thread.start_new_thread(self._run, ())
            self.begun = True

    def _run(self) -> None:
        # An interrupt can come after the thread has started and before that is known, so that there is a second one.
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._work()
        except BaseException as error:  # Raised again where the work was asked for.
            self.failure = error
        self.done.set()
