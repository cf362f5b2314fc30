"""SIGINT and SIGTERM end a command within a second, whatever it is doing.

First the command is asked: the signal raises `SystemExit` in the main thread, so that files are closed and what is done
is noted. Not everything can be asked: an operation of torch that takes seconds, a write that nobody reads, a library
that swallows the exception. A thread beside the command therefore ends the process where it has not ended by itself.
What is on the disk then is what a kill would have left.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# With what a busy machine adds, the process is gone within a second.
_PATIENCE_S = 0.6
_ASK_AGAIN_S = 0.01
_STANDARD_ERROR = 2
_asked = threading.Event()


def asked_to_end() -> bool:
    """Whether a signal has come: what goes wrong from then on may be what a library made of the interruption."""
    return _asked.is_set()


class Signals:
    """Listens to SIGINT and SIGTERM while it is entered, and then ends the process with 128 and the signal's number."""

    def __init__(self) -> None:
        self._code: int | None = None
        self._request: SystemExit | None = None
        self._before: dict[signal.Signals, Callable[..., Any] | int | None] = {}
        self._leaving = threading.Lock()

    def __enter__(self) -> Self:
        self._came, self._coming = os.pipe()
        os.set_blocking(self._coming, False)
        threading.Thread(target=self._insist, name="vhead-signals", daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._coming)
        for number in _SIGNALS:
            # `nohup` and `&` start programs that are to ignore one of them.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)
        self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._ask_again
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._code is not None:
            self._leave(self._code)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._unraisable_before
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._coming)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        """Runs in the main thread, and raises only once: a second time would interrupt the orderly end."""
        if self._code is None:
            self._code = 128 + number
            _asked.set()
            self._request = SystemExit(self._code)
            raise self._request

    def _ask_again(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Runs where the signal came in the middle of a `__del__`, whose exceptions Python reports and then drops."""
        if self._code is None or unraisable.exc_value is not self._request:
            self._unraisable_before(unraisable)
            return
        # What is sent now is not a second signal, and must not look like one.
        signal.set_wakeup_fd(-1)
        number, self._code = self._code - 128, None
        again = threading.Timer(_ASK_AGAIN_S, signal.pthread_kill, (threading.get_ident(), number))
        again.daemon = True
        again.start()

    def _insist(self) -> None:
        """Waits for a signal in a thread of its own, and ends the process if the main thread does not do so in time."""
        while (number := os.read(self._came, 1)) and ord(number) not in _SIGNALS:
            pass
        if number:
            # A second signal says that somebody has lost patience.
            select.select([self._came], [], [], _PATIENCE_S)
            self._leave(128 + ord(number), abruptly=True)
        os.close(self._came)

    def _leave(self, code: int, *, abruptly: bool = False) -> NoReturn:
        """Ends the process at once: threads that wait for input, and the interpreter's own end, could take for ever."""
        # Of the two threads that can come here, the second waits until the first has ended the process.
        self._leaving.acquire()
        line = b"vhead: interrupted\n"
        if abruptly and os.isatty(_STANDARD_ERROR):
            # A progress bar hides the cursor, and stands in the line.
            line = b"\x1b[?25h\n" + line
        # Not through `sys.stderr`, which another thread may hold while it waits for its reader.
        with suppress(OSError):
            if select.select([], [_STANDARD_ERROR], [], 0.1)[1]:
                os.write(_STANDARD_ERROR, line)
        os._exit(code)


@contextmanager
def answered_by(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` for each SIGINT and SIGTERM, in place of ending the command: for one that takes its time to end."""
    wakeup = signal.set_wakeup_fd(-1)
    before = {
        number: signal.signal(number, lambda *_: stop())
        for number in _SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
