"""`vhead compare`: what two scorings of the same rollouts say about each other."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vhead.cli.failure import FAILED, reported
from vhead.cli.terminal import say, show_json
from vhead.errors import naming

if TYPE_CHECKING:
    from vhead.report import Comparison

# What `--fail-above` can bound; each is 0 where nothing differs.
BOUNDED = ("k1", "k3", "chi2", "outside", "mean_abs", "max_abs")
_STANDARD_STREAM = "-"


def compare(
    ours: Annotated[str, typer.Argument(metavar="OURS", help="A file of scores: .jsonl or .parquet.")],
    theirs: Annotated[
        str | None,
        typer.Argument(
            metavar="[THEIRS]",
            help="Another file of scores of the same rollouts. Default: theirs are a column of OURS, see --theirs.",
        ),
    ] = None,
    *,
    ours_column: Annotated[
        str, typer.Option("--ours", metavar="COLUMN", help="The column with our log-probabilities.")
    ] = "logprobs",
    theirs_column: Annotated[
        str | None,
        typer.Option(
            "--theirs",
            metavar="COLUMN",
            help="The column with theirs. Default: the same column of THEIRS, or old_logprobs of OURS where it is "
            "the only file.",
        ),
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the tokens that differ most are shown.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document instead of tables.")] = False,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LIMIT",
            help="Exit with 1 if a number is above a limit, such as k3=0.01, or if something could not be compared. "
            f"Names: {', '.join(BOUNDED)}. Give the option again for more than one.",
        ),
    ] = None,
) -> None:
    """Compare two scorings of the same rollouts, and guess why they differ.

    For log-probabilities, d = ours - theirs, which is new - old where theirs come from the engine that generated. Below
    the numbers you find them by position and by length, the tokens that differ most, values and rewards, and a guess at
    the cause: another temperature, a shift by one token, padding, a shorter dtype, or other weights.

    Records are matched by their `id` where all have one, otherwise by position.

    Exit codes: 0 done, whatever the difference; 1 failed, or a number is above its `--fail-above`, or with that option
    something could not be compared; 2 wrong usage, 130 interrupted, 143 terminated.

    **Examples**

    - `vhead compare before.parquet after.parquet`
    - `vhead compare scores.jsonl --theirs old_logprobs`
    - `vhead compare scores.jsonl --json --fail-above k3=0.01`
    """
    limits = dict(parsed_limit(text) for text in fail_above or ())
    if _STANDARD_STREAM in {ours, theirs}:
        raise typer.BadParameter("expected the name of a file, because files are read twice", param_hint="OURS, THEIRS")
    with reported():
        from vhead.report import compare_files  # imports numpy

        found = compare_files(ours, theirs, ours_column=ours_column, theirs_column=theirs_column, worst=worst)
        if as_json:
            show_json(document(found))
        else:
            _show_tables(found, ours, theirs, ours_column, theirs_column)
    exceeded = [text for name, limit in limits.items() if (text := _exceeded(found, name, limit))]
    if limits and (found.left_out or found.only_ours or found.only_theirs):
        # Otherwise a limit would be kept by whatever is left.
        exceeded.append(
            f"--fail-above: expected all records to be compared, got {found.left_out:,} left out, {found.only_ours:,} "
            f"in ours only and {found.only_theirs:,} in theirs only"
        )
    if exceeded:
        for text in exceeded:
            say(text)
        raise typer.Exit(FAILED)


def parsed_limit(text: str) -> tuple[str, float]:
    """Reads a name and a limit from a text such as `k3=0.01`.

    Raises:
        typer.BadParameter: The text has another form, or the name is unknown.
    """
    name, _, number = text.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if name not in BOUNDED or math.isnan(limit):
        expected = f"NAME=LIMIT with a name among {', '.join(BOUNDED)} and a number"
        raise typer.BadParameter(f"expected {expected}, got {text!r}", param_hint="--fail-above")
    return name, limit


def document(found: "Comparison") -> dict[str, Any]:
    """The comparison as a JSON object: the names of its attributes, and null for what is not finite."""
    finite: dict[str, Any] = _finite(asdict(found))
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show_tables(
    found: "Comparison", ours: str, theirs: str | None, ours_column: str, theirs_column: str | None
) -> None:
    from rich.console import Console  # for a fast --help

    from vhead.cli.comparison_tables import report  # for a fast --help

    column = theirs_column or (ours_column if theirs else "old_logprobs")
    with naming("standard output"):
        report(Console(), found, f"{ours} ({ours_column})", f"{theirs or ours} ({column})")


def _exceeded(found: "Comparison", name: str, limit: float) -> str | None:
    """What to say where a number is above its limit, or is not there."""
    if found.logprobs is None:
        return f"{name}: expected at most {limit:g}, and no log-probabilities could be compared"
    number = abs(float(getattr(found.logprobs, name)))
    return f"{name}: expected at most {limit:g}, got {number:.4g}" if number > limit else None
