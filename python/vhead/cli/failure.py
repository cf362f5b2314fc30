"""How a command ends when it cannot go on: one line on standard error, never a traceback for a user's mistake."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vhead.cli.signals import asked_to_end
from vhead.cli.terminal import say
from vhead.errors import VheadError

FAILED = 1


@contextmanager
def reported() -> Iterator[None]:
    """Turns what went wrong into one line and exit code 1."""
    try:
        yield
    except (VheadError, OSError, MemoryError) as error:
        if not asked_to_end():
            say(described(error))
        raise typer.Exit(FAILED) from None


def described(error: Exception) -> str:
    """An error in one line: `NAME: what is wrong with it` for a file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or "out of memory"
