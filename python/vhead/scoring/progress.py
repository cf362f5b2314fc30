"""Progress on standard error: rollouts, tokens per second, and the time that is left."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vhead.scoring.scores import Scores


class ScoringProgress:
    """A progress bar on standard error while it is entered; silent when not shown or when that is no terminal.

    Args:
        total: All there is to do, in the units that `advance` is told; None: unknown.
        shown: Whether to show anything.

    Attributes:
        rollouts: Rollouts scored so far.
        tokens: Their tokens, prompts included.
    """

    def __init__(self, total: float | None = None, *, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("scoring"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%" if total else ""),
            TextColumn("{task.fields[rollouts]:,} rollouts"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=total, rollouts=0, rate=0.0)
        self._started = time.monotonic()
        self.rollouts = 0
        self.tokens = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def advance(self, scores: Scores, completed: float | None = None) -> None:
        """Counts finished rollouts.

        Args:
            scores: Theirs.
            completed: How much of the total is done; None: as many units as rollouts so far.
        """
        self.rollouts += len(scores)
        self.tokens += scores.token_count + int(scores.prompt_lengths.sum())
        self._progress.update(
            self._task,
            completed=self.rollouts if completed is None else completed,
            rollouts=self.rollouts,
            rate=self.tokens / max(self.seconds, 1e-9),
        )

    def __enter__(self) -> Self:
        self._progress.start()
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
