"""`vhead demo`: the bundled model scores the bundled rollouts."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vhead.checkpoints.replacing import replacing_file
from vhead.cli.failure import reported
from vhead.cli.terminal import say
from vhead.errors import VheadError, naming

if TYPE_CHECKING:
    from vhead.demo.judgement import Judged, Summary
    from vhead.demo.rollouts import DemoRollout

PICTURES = (".svg", ".html")
ROLLOUTS = ".jsonl"
LINE_END = b"\n"


@dataclass(frozen=True)
class Run:
    """What one scoring pass gave and cost."""

    judged: "list[Judged]"
    tokens: int
    seconds: float
    backend: str


def _picture_name(value: Path | None) -> Path | None:
    if value is not None and value.suffix not in PICTURES:
        raise typer.BadParameter(f"expected a name that ends in {' or '.join(PICTURES)}, got {value.name!r}")
    return value


def _rollouts_name(value: Path | None) -> Path | None:
    if value is not None and value.suffix != ROLLOUTS:
        raise typer.BadParameter(f"expected a name that ends in {ROLLOUTS}, got {value.name!r}")
    return value


def demo(
    *,
    passages: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Passages to show, each with its corrupted twins. Default: what the screen holds."
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write what is shown to this .svg or .html.", callback=_picture_name),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the rollouts to this new .jsonl file for vhead score, and score nothing.",
            callback=_rollouts_name,
        ),
    ] = None,
) -> None:
    """Score bundled rollouts with the bundled model, and colour every character by its value.

    The texts are passages of Python's documentation that the model was not trained on, each followed by two twins: one
    corrupted to the end, one corrupted in the middle. Nothing is downloaded.
    """
    from rich.console import Console  # slow imports wait until the command runs

    from vhead.cli.demo_table import fitting, picture, show
    from vhead.demo.judgement import summarise
    from vhead.demo.rollouts import read_demo_rollouts

    with reported():
        if write is not None:
            _write_rollouts(write)
            return
        console, rollouts = Console(), read_demo_rollouts()
        run = _score(rollouts)
        topics = _first_topics(rollouts, passages)
        lines = _result_lines(summarise(run.judged), run)
        shown = [j for j in run.judged if j.rollout.topic in topics]
        if passages is None and console.is_terminal:
            shown = fitting(console, shown, len(lines) + 1)
            count = len({j.rollout.topic for j in shown})
            lines.append(f"passages     {count} of {len(topics)} shown; --passages {len(topics)} shows all")
        with naming("standard output"):
            show(console, shown, lines)
        if save is not None:
            with replacing_file(save) as file:
                file.write(picture(save.suffix, shown, lines).encode())


def _first_topics(rollouts: "list[DemoRollout]", count: int | None) -> list[str]:
    return list(dict.fromkeys(rollout.topic for rollout in rollouts))[:count]


def _score(rollouts: "list[DemoRollout]") -> Run:
    """Scores through the public interface, as any user's rollouts are scored."""
    from transformers.utils.logging import disable_progress_bar

    from vhead import Rollout, Scorer, backends
    from vhead.demo import demo_model_path
    from vhead.demo.judgement import judge

    disable_progress_bar()
    # A model of this size gains nothing from a second thread and loses much to one when the machine is busy.
    scorer = Scorer.from_pretrained(demo_model_path(), device="cpu", num_threads=1)
    inputs = [Rollout(rollout.prompt, rollout.completion, id=rollout.id) for rollout in rollouts]
    started = time.perf_counter()
    scores = scorer.score(inputs, returns=("values", "logprobs", "reward"))
    seconds = time.perf_counter() - started
    judged = [judge(rollout, score) for rollout, score in zip(rollouts, scores, strict=True)]
    tokens = int(scores.prompt_lengths.sum()) + scores.token_count
    return Run(judged, tokens, seconds, _backend(backends()["cpu"]))


def _backend(row: dict[str, object]) -> str:
    return ", ".join(str(row[name]) for name in ("kernel", "simd") if name in row)


def _result_lines(summary: "Summary", run: Run) -> list[str]:
    speed = run.tokens / run.seconds
    return [
        f"reward       natural {summary.natural:+.1f}, corrupted {summary.corrupted:+.1f}: "
        f"AUC {summary.auc:.2f}, {summary.ordered} of {summary.pairs} pairs in order",
        f"in between   if only the middle is corrupted, the reward ends at {summary.recovered:+.1f}",
        f"characters   corrupted spans against the rest: AUC {summary.token_auc:.2f}",
        f"speed        {run.tokens} tokens in {run.seconds:.2f} s on one thread: {speed:,.0f} tokens/s",
        f"head         {run.backend}",
    ]


def _write_rollouts(path: Path) -> None:
    """Writes the bundled rollouts to a new file; a file that is there already stays as it is."""
    from vhead.demo import demo_rollouts_path

    content = demo_rollouts_path().read_bytes()
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        raise VheadError(f"{path}: expected a new file to write to, found one that is there") from None
    say(f"{content.count(LINE_END)} rollouts written to {path}")
