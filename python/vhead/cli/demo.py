"""`vhead demo`: the bundled model scores the bundled rollouts."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vhead.cli.failure import reported

if TYPE_CHECKING:
    from vhead.demo.judgement import Judged, Summary
    from vhead.demo.rollouts import DemoRollout

PICTURES = (".svg", ".html")


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


def demo(
    *,
    passages: Annotated[
        int | None, typer.Option(min=1, help="Show only so many passages with their corrupted twins.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Also write what is shown to this .svg or .html.", callback=_picture_name)
    ] = None,
) -> None:
    """Score bundled rollouts with the bundled model, and colour every character by its value.

    The texts are passages of Python's documentation that the model was not trained on, each followed by two twins: one
    corrupted to the end, one corrupted in the middle. Nothing is downloaded.
    """
    from rich.console import Console  # noqa: PLC0415, slow imports wait until the command runs

    from vhead.cli.demo_table import picture, show  # noqa: PLC0415
    from vhead.demo.judgement import summarise  # noqa: PLC0415
    from vhead.demo.rollouts import read_demo_rollouts  # noqa: PLC0415

    with reported():
        rollouts = read_demo_rollouts()
        run = _score(rollouts)
        shown = [j for j in run.judged if j.rollout.topic in _first_topics(rollouts, passages)]
        lines = _result_lines(summarise(run.judged), run)
        show(Console(), shown, lines)
        if save is not None:
            _write(save, picture(save.suffix, shown, lines))


def _first_topics(rollouts: "list[DemoRollout]", count: int | None) -> list[str]:
    return list(dict.fromkeys(rollout.topic for rollout in rollouts))[:count]


def _score(rollouts: "list[DemoRollout]") -> Run:
    """Scores through the public interface, as any user's rollouts are scored."""
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    from vhead import Rollout, Scorer, backends  # noqa: PLC0415
    from vhead.demo import demo_model_path  # noqa: PLC0415
    from vhead.demo.judgement import judge  # noqa: PLC0415

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
        f"in between   corrupted in the middle only, the reward ends at {summary.recovered:+.1f}",
        f"characters   corrupted spans against the rest: AUC {summary.token_auc:.2f}",
        f"speed        {run.tokens} tokens in {run.seconds:.2f} s on one thread: {speed:,.0f} tokens/s",
        f"head         {run.backend}",
    ]


def _write(path: Path, text: str) -> None:
    """Writes beside and renames, so that a broken run leaves the old picture."""
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
