"""What people read on standard output and standard error: the one door through which it goes.

Records, file names, checkpoints and the messages of other packages are anybody's, and a terminal obeys what is written
to it. So a line stays one line of bounded length, in which nothing but printable characters is left.
"""

import json
import logging
import os
import sys
import traceback
import warnings
from types import TracebackType

_LONGEST = 4000


def say(message: str) -> None:
    """Writes one line to standard error, or nothing if that cannot be written: then there is nobody to tell."""
    _write_error(f"vhead: {escaped(message)}")


def show(line: str) -> None:
    """Writes one line to standard output.

    Raises:
        OSError: It cannot be written.
    """
    _write_output(encodable(escaped(line), sys.stdout.encoding))


def show_json(document: object) -> None:
    """Writes a JSON document to standard output, whole: other than ASCII, and what a terminal obeys, is escaped in it.

    Raises:
        OSError: It cannot be written.
    """
    _write_output(json.dumps(document, indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def encodable(text: str, encoding: str | None) -> str:
    """The text with what an encoding cannot hold as `repr` writes it."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def escaped(text: str) -> str:
    """The text as one line of printable characters: others as `repr` writes them, and what is too long cut off."""
    shown = text[:_LONGEST]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    if max(len(text), len(shown)) > _LONGEST:
        return f"{shown[:_LONGEST]}... (cut off, of {len(text):,} characters)"
    return shown


def route_messages() -> None:
    """Lets what other packages log or warn of, and tracebacks, go through this door as well."""
    logging.getLogger().addHandler(_Said(logging.WARNING))
    warnings.showwarning = lambda message, category, *_place: say(f"{category.__name__}: {message}")
    sys.excepthook = _show_traceback


def open_closed_streams() -> None:
    """Puts a file in the place of each closed standard stream, on which reading or writing fails as it would have.

    Otherwise the next file that is opened takes its place, and gets what some library prints.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            fails = os.O_WRONLY if name == "stdin" else os.O_RDONLY
            _put(os.open(os.devnull, os.O_WRONLY if name == "stderr" else fails), number)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115, as long as the process


def flush_output() -> None:
    """Writes what is left of standard output; what still cannot be written is given up.

    Raises:
        OSError: It cannot be written.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter would try again at its end, and complain.
        _put(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from None


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    for entry in traceback.format_exception(kind, error, trace):
        first, *others = entry.rstrip("\n").split("\n")
        _write_error(escaped(first))
        for line in others:
            # So that no line of a message looks like one of the command's own.
            _write_error(f"  {escaped(line)}")


def _write_output(text: str) -> None:
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def _write_error(line: str) -> None:
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        # The interpreter would try again at its end, and change the exit code.
        _put(os.open(os.devnull, os.O_WRONLY), 2)


def _put(opened: int, number: int) -> None:
    """Moves an open file to another number."""
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
