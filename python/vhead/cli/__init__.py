"""The command `vhead`."""

import os
import sys
import threading
from collections.abc import Callable

from vhead.cli import terminal
from vhead.cli.signals import Signals

_OPTIONAL = ("typer", "rich", "click")


def main() -> None:
    """Runs the command line.

    Exits with 0 (done), 1 (failed), 2 (wrong usage), 130 (interrupted by SIGINT) or 143 (by SIGTERM).
    """
    # First of all, as every file that is opened could get a closed stream's number.
    terminal.open_closed_streams()
    with Signals():
        code = _run(_app())
    if any(thread.name == "vhead-ahead" for thread in threading.enumerate()):
        # Ending the interpreter under a thread that is inside another library can crash.
        os._exit(code)
    sys.exit(code)


def _app() -> Callable[[], object]:
    try:
        from vhead.cli.app import app  # what it needs is optional
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OPTIONAL:
            raise
        sys.exit(f"vhead: {error.name} is not installed; the command line needs: pip install 'vhead[cli]'")
    return app


def _run(app: Callable[[], object]) -> int:
    """Runs a command to its end; gives its exit code."""
    from vhead.cli import threads  # a missing package is to be named first

    terminal.route_messages()
    threads.choose()
    code = _code_of(app)
    # A command that failed has said why.
    unwritten = _code_of(terminal.flush_output, says=not code)
    return code or unwritten


def _code_of(action: Callable[[], object], *, says: bool = True) -> int:
    from vhead.cli.failure import FAILED, described  # as above

    try:
        action()
    except SystemExit as end:
        return int(end.code or 0)
    except OSError as error:
        if says:
            # Files name themselves.
            terminal.say(described(error) if error.filename else f"standard output: {error.strerror or error}")
        return FAILED
    return 0
