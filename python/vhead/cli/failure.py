"""How a command ends when it cannot go on: one line on standard error, never a traceback for a user's mistake."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vhead.errors import VheadError

FAILED = 1
INTERRUPTED = 130


def say(message: str) -> None:
    """One line on standard error."""
    typer.echo(f"vhead: {message}", err=True)


@contextmanager
def reported() -> Iterator[None]:
    """Turns errors into one line and an exit code: 1 for what went wrong, 130 for an interrupt."""
    try:
        yield
    except BrokenPipeError:
        # Whoever read our output has gone; a second attempt to flush it at exit would only complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except (VheadError, OSError) as error:
        say(str(error))
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
