"""Progress on standard error: rollouts, tokens per second, and the time that is left."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vhead.errors import MissingExtraError

if TYPE_CHECKING:
    from rich.progress import Progress


class ScoringProgress:
    """Counts what is scored, and shows it on standard error while it is entered, if asked to and that is a terminal.

    Args:
        total: How many rollouts there are; None: unknown.
        shown: Whether to show a bar.

    Attributes:
        rollouts: Rollouts scored so far.
        tokens: Their tokens, prompts included.

    Raises:
        MissingExtraError: A bar is to be shown and rich is not installed.
    """

    def __init__(self, total: float | None = None, *, shown: bool = True) -> None:
        self.rollouts = 0
        self.tokens = 0
        self._started = time.monotonic()
        self._bar = _bar() if shown and sys.stderr.isatty() else None
        self._task = None if self._bar is None else self._bar.add_task("scoring", total=total, rollouts=0, rate=0.0)

    @property
    def seconds(self) -> float:
        """Since it was entered."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Tokens per second so far."""
        return self.tokens / max(self.seconds, 1e-9)

    def expect(self, total: float) -> None:
        """A better estimate of how many rollouts there are."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def advance(self, rollouts: int, tokens: int) -> None:
        """Counts rollouts that are computed, and their tokens."""
        self.rollouts += rollouts
        self.tokens += tokens
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.rollouts, rollouts=self.rollouts, rate=self.rate)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar() -> "Progress":
    try:
        from rich import progress  # noqa: PLC0415, an optional dependency
        from rich.console import Console  # noqa: PLC0415, an optional dependency
    except ImportError as error:
        raise MissingExtraError("rich", "cli") from error
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[rollouts]:,} rollouts, {task.fields[rate]:,.0f} tokens/s,"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("elapsed,"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
        console=Console(stderr=True),
        transient=True,
    )
