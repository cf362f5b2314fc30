"""What commands share that take a model over a file of rollouts."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

from vhead.cli.terminal import escaped, say
from vhead.errors import InputChangedError, RecordError

_ERRORS_SHOWN = 20


class _Keeps(AbstractContextManager[Any], Protocol):
    """An output that may have a part of it when it is left early."""

    @property
    def kept(self) -> Path | None: ...


Kept = TypeVar("Kept", bound=_Keeps)


class SkippedRecords:
    """Says which records were skipped: the first few one by one, the others as a number.

    Args:
        source: What the input is called.

    Attributes:
        count: How many so far.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        # Records that cannot be read are told of in the thread that reads.
        self._lock = Lock()
        self.count = 0

    def __call__(self, error: RecordError) -> None:
        """Counts one more record, and reports it unless many were reported already."""
        with self._lock:
            self.count += 1
            if self.count <= _ERRORS_SHOWN:
                say(f"skipped {self._source}: {error}")
            if self.count == _ERRORS_SHOWN:
                say("further skipped records are only counted")


@contextmanager
def loading_shown(model: str, *, shown: bool, quiet: bool) -> Iterator[None]:
    """Says that the model is being loaded, on a terminal; transformers' own bars and notes stay out of the way."""
    from rich.console import Console  # for a fast --help
    from rich.text import Text  # for a fast --help

    logger = logging.getLogger("vhead")
    level = logger.level
    console = Console(stderr=True, quiet=not shown)
    try:
        if quiet:
            logger.setLevel(logging.ERROR)
        with console.status(Text(f"loading {escaped(model)}")):
            _silence_transformers()
            yield
    finally:
        logger.setLevel(level)


def _silence_transformers() -> None:
    from transformers.utils import logging as transformers_logging  # imports torch

    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()


@contextmanager
def naming_input(source: str) -> Iterator[None]:
    """Puts the input's name before errors about its records."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{source}: {error}", record=error.record, field=error.field) from None
    except InputChangedError as error:
        raise InputChangedError(f"{source}: {error}") from None


@contextmanager
def keeping(output: Kept, done: str = "scored") -> Iterator[Kept]:
    """Says where the finished part is if a run stops early; `done` says what happened to it."""
    try:
        with output:
            yield output
    except BaseException as error:
        if output.kept is not None:
            say(f"what has been {done} is kept in {output.kept}; {_way_on(error)}")
        raise


def _way_on(error: BaseException) -> str:
    """What continues a run that stopped with an error: the same command would stop at the same record again."""
    if isinstance(error, RecordError):
        return "to continue, mend the record and give the same command with --resume, or add --on-error skip as well"
    return "give the same command again with --resume to continue"
