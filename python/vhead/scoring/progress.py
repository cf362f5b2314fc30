"""Progress on standard error: rollouts, their rate, and the time that is left."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vhead.errors import MissingExtraError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ScoringProgress:
    """Counts what is scored, and shows it on standard error while it is entered, if asked to and that is a terminal.

    Args:
        total: How many rollouts there are; None: unknown.
        shown: Whether to show a bar.

    Attributes:
        rollouts: Rollouts that the model has computed so far.
        tokens: Their tokens, prompts included.
        computed: Tokens that went through the model for them: fewer where they share some, more where some are padding.

    Raises:
        MissingExtraError: A bar is to be shown and rich is not installed.
    """

    def __init__(self, total: float | None = None, *, shown: bool = True) -> None:
        self.rollouts = 0
        self.tokens = 0
        self.computed = 0
        self._total = total
        self._started = time.monotonic()
        self._ended: float | None = None
        self._bar = _bar() if shown and sys.stderr.isatty() else None
        self._task: TaskID | None = None

    @property
    def seconds(self) -> float:
        """Seconds since it was entered, or from then until it was left."""
        return (time.monotonic() if self._ended is None else self._ended) - self._started

    @property
    def rate(self) -> float:
        """Tokens per second so far."""
        return self._per_second(self.tokens)

    @property
    def rollout_rate(self) -> float:
        """Rollouts per second so far."""
        return self._per_second(self.rollouts)

    @property
    def shared(self) -> float:
        """The part of all tokens that needed no computation of their own, as another rollout had them too; 0 to 1."""
        return max(0.0, 1.0 - self.computed / self.tokens) if self.tokens else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds that are left at the rate so far; None while nothing is scored, or if the total is not known."""
        if self._total is None or not self.rollouts:
            return None
        return max(0.0, self._total - self.rollouts) / max(self.rollout_rate, 1e-9)

    @property
    def figures(self) -> str:
        """What stands beside the bar."""
        left = self.seconds_left
        parts = [f"{self.rollouts:,} rollouts", f"{self.rollout_rate:,.0f}/s", f"{self.rate:,.0f} tokens/s"]
        return ", ".join([*parts, *([] if left is None else [f"{_clock(left)} left"])])

    def expect(self, total: float) -> None:
        """Takes a better estimate of how many rollouts there are."""
        self._total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def advance(self, rollouts: int, tokens: int, computed: int) -> None:
        """Counts rollouts that are computed, their tokens, and those that went through the model."""
        self.rollouts += rollouts
        self.tokens += tokens
        self.computed += computed
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.rollouts, figures=self.figures)

    def _per_second(self, count: int) -> float:
        return count / max(self.seconds, 1e-9)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self._total, figures=self.figures)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = time.monotonic()
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar() -> "Progress":
    """A bar that takes the width that the figures leave."""
    try:
        from rich import progress  # an optional dependency
        from rich.console import Console  # an optional dependency
        from rich.table import Column  # an optional dependency
    except ImportError as error:
        raise MissingExtraError("rich", "cli") from error
    return progress.Progress(
        progress.BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1)),
        progress.TimeElapsedColumn(table_column=Column(no_wrap=True)),
        progress.TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    )
