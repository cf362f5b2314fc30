"""`vhead score`: a file of rollouts in, the same file with scores out."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vhead.cli.failure import reported, say
from vhead.errors import FileFormatError, RecordError

if TYPE_CHECKING:
    from vhead.scoring.files import OutputFile
    from vhead.scoring.progress import ScoringProgress
    from vhead.scoring.scorer import Scorer

_ERRORS_SHOWN = 20
_STANDARD_STREAM = "-"


class Dtype(StrEnum):
    """Dtypes of the language model."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class OnError(StrEnum):
    """What to do with a record that cannot be scored."""

    FAIL = "fail"
    SKIP = "skip"


class SkippedRecords:
    """Says which records were skipped: the first few one by one, the others as a number."""

    def __init__(self, source: str) -> None:
        self._source = source
        self.count = 0

    def __call__(self, error: RecordError) -> None:
        """Reports one more."""
        self.count += 1
        if self.count <= _ERRORS_SHOWN:
            say(f"skipped {self._source}: {error}")
        if self.count == _ERRORS_SHOWN:
            say("further skipped records are only counted")


def score(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="Rollouts: .jsonl, .parquet, or - for JSON Lines on standard input. Each record has prompt and "
            "completion (text), prompt_ids and completion_ids, or messages; other fields are carried through.",
        ),
    ],
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub id of a model with a trained value head.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Where scores go: .jsonl, .parquet, or - for standard output.")
    ],
    returns: Annotated[
        str, typer.Option(help="Comma-separated: values, logprobs, entropy, reward.")
    ] = "values,logprobs,reward",
    temperature: Annotated[float, typer.Option(help="Divides the logits before log-probabilities and entropy.")] = 1.0,
    dtype: Annotated[Dtype | None, typer.Option(help="The language model's; default: as saved.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda if any.")] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Tokens of a padded batch.")] = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
    allow_random_head: Annotated[
        bool, typer.Option("--allow-random-head", help="Score with an untrained head where there is no trained one.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first N records.")] = None,
    on_error: Annotated[OnError, typer.Option(help="Stop at a record that cannot be scored, or leave it out.")] = (
        OnError.FAIL
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier run with this output stopped, if one did.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
) -> None:
    """Score a file of rollouts: per-token values and log-probabilities, and a reward each.

    The output has the records in input order, as they came, with one more field per score. It appears under its name
    when it is complete; until then, and when scoring stops early, it is NAME.partial beside it, and --resume goes on
    with it: nothing is lost, and nothing is in the output twice.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    **Examples**

    - `vhead score rollouts.jsonl --model ./critic --output scores.jsonl`
    - `vhead score rollouts.parquet --model ./critic --output scores.parquet --returns values,reward`
    - `cat rollouts.jsonl | vhead score - --model ./critic --output - --on-error skip | jq .reward`
    """
    with reported():
        fields = _checked_fields(returns)
        _check_paths(source, output, resume=resume)
        if not 0.0 < temperature < float("inf"):
            raise typer.BadParameter(f"expected a positive number, got {temperature}", param_hint="--temperature")
        from vhead.scoring.files import OutputFile, open_reader  # noqa: PLC0415, for a fast --help
        from vhead.scoring.progress import ScoringProgress  # noqa: PLC0415, for a fast --help

        skipped = SkippedRecords(source)
        settings = None if _STANDARD_STREAM in (source, output) else _settings(model, fields, temperature, dtype)
        with (
            _naming(source),
            closing(open_reader(source, fields)) as reader,
            _kept(OutputFile(output, settings=settings, resume=resume)) as destination,
        ):
            with _loading(model, quiet=quiet):
                from vhead.scoring.pipeline import score_file  # noqa: PLC0415, imports torch

                scorer = _scorer(model, dtype, device, token_budget, num_threads, allow_random_head=allow_random_head)
            with ScoringProgress(shown=not quiet) as progress:
                score_file(
                    scorer,
                    reader,
                    destination,
                    returns=fields,
                    temperature=temperature,
                    progress=progress,
                    limit=limit,
                    on_error=skipped if on_error is OnError.SKIP else None,
                )
        if not quiet:
            _summarise(progress, skipped.count, output)


def _checked_fields(returns: str) -> tuple[str, ...]:
    from vhead.scoring.scores import check_fields  # noqa: PLC0415, for a fast --help

    try:
        return check_fields([name.strip() for name in returns.split(",") if name.strip()])
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("returns: "), param_hint="--returns") from None


def _check_paths(source: str, output: str, *, resume: bool) -> None:
    """What is wrong with the names themselves is wrong usage, and said before anything is loaded."""
    from vhead.scoring.files import format_of  # noqa: PLC0415, for a fast --help

    for name, hint in ((source, "INPUT"), (output, "--output")):
        try:
            format_of(name)
        except FileFormatError as error:
            raise typer.BadParameter(str(error), param_hint=hint) from None
    if source != _STANDARD_STREAM and not Path(source).is_file():
        raise typer.BadParameter(f"{source}: no such file", param_hint="INPUT")
    if resume and _STANDARD_STREAM in (source, output):
        raise typer.BadParameter("expected files as INPUT and --output, got a stream", param_hint="--resume")
    if output != _STANDARD_STREAM and not Path(output).absolute().parent.is_dir():
        raise typer.BadParameter(f"{output}: no such folder", param_hint="--output")
    if _STANDARD_STREAM not in (source, output) and Path(output).exists() and Path(output).samefile(source):
        raise typer.BadParameter(f"{output}: is the input", param_hint="--output")


def _settings(model: str, fields: Sequence[str], temperature: float, dtype: Dtype | None) -> dict[str, object]:
    """What a run must have in common with the one that it resumes, or the output would be of two minds."""
    folder = Path(model)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return {
        "model": str(folder.resolve()) if folder.is_dir() else model,
        "model files": [[str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        "returns": list(fields),
        "temperature": temperature,
        "dtype": None if dtype is None else dtype.value,
    }


def _scorer(
    model: str,
    dtype: Dtype | None,
    device: str | None,
    token_budget: int | None,
    num_threads: int | None,
    *,
    allow_random_head: bool,
) -> "Scorer":
    from vhead.scoring.scorer import Scorer  # noqa: PLC0415, imports torch

    return Scorer.from_pretrained(
        model,
        dtype=None if dtype is None else dtype.value,
        device=device,
        token_budget=token_budget,
        num_threads=num_threads,
        allow_random_head=allow_random_head,
    )


@contextmanager
def _loading(model: str, *, quiet: bool) -> Iterator[None]:
    """Says that the model is being loaded, on a terminal; transformers' own bars and notes stay out of the way."""
    from rich.console import Console  # noqa: PLC0415, for a fast --help

    logger = logging.getLogger("vhead")
    level = logger.level
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    try:
        if quiet:
            logger.setLevel(logging.ERROR)
        with console.status(f"loading {model}"):
            _silence_transformers()
            yield
    finally:
        logger.setLevel(level)


def _silence_transformers() -> None:
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415, imports torch

    transformers_logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Errors about records say in which file."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{source}: {error}", record=error.record, field=error.field) from None


@contextmanager
def _kept(output: "OutputFile") -> Iterator["OutputFile"]:
    """Says where the part is that was finished when scoring stopped early."""
    try:
        with output:
            yield output
    except BaseException:
        if output.partial is not None and output.partial.exists():
            say(f"what was scored is kept in {output.partial}; --resume goes on with it")
        raise


def _summarise(progress: "ScoringProgress", skipped: int, output: str) -> None:
    left_out = f", {skipped:,} skipped" if skipped else ""
    say(
        f"{progress.rollouts:,} rollouts scored{left_out}: {progress.tokens:,} tokens in {progress.seconds:.1f} s, "
        f"{progress.rate:,.0f} tokens/s{'' if output == _STANDARD_STREAM else f', written to {output}'}"
    )
