"""The arguments and options of `vhead score`: what each is called, takes, and means."""

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from vhead.errors import FileFormatError

STANDARD_STREAM = "-"


class Dtype(StrEnum):
    """Dtypes of the language model."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Truncate(StrEnum):
    """What to do with a rollout that has too many tokens."""

    ERROR = "error"
    PROMPT = "prompt"
    COMPLETION = "completion"


class OnError(StrEnum):
    """What to do with a record that cannot be scored."""

    FAIL = "fail"
    SKIP = "skip"


Source = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="Rollouts: .jsonl, .parquet, or - for JSON Lines on standard input. Each record has prompt and "
        "completion (text), prompt_ids and completion_ids, or messages; other fields are carried through.",
    ),
]
Model = Annotated[str, typer.Option("--model", "-m", help="Folder or hub id of a model with a trained value head.")]
Output = Annotated[
    str, typer.Option("--output", "-o", help="Where scores go: .jsonl, .parquet, or - for standard output.")
]
Head = Annotated[
    str | None, typer.Option(help="File, folder or hub id with the head, where the model's own does not hold it.")
]
Returns = Annotated[str, typer.Option(help="Comma-separated: values, logprobs, entropy, reward.")]
Temperature = Annotated[float, typer.Option(help="Divides the logits before log-probabilities and entropy.")]
ModelDtype = Annotated[Dtype | None, typer.Option("--dtype", help="The language model's; default: as saved.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda if any.")]
TokenBudget = Annotated[int | None, typer.Option(min=1, help="Tokens of a batch.")]
WindowTokens = Annotated[int | None, typer.Option(min=1, help="Tokens among which shared beginnings are found.")]
NumThreads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")]
BatchInvariant = Annotated[
    bool, typer.Option("--batch-invariant", help="The same bits for a rollout whatever else is scored; slower.")
]
NormalizeRewards = Annotated[
    bool, typer.Option("--normalize-rewards", help="By the mean and standard deviation that the checkpoint states.")
]
AllowRandomHead = Annotated[
    bool, typer.Option("--allow-random-head", help="Score with an untrained head where there is no trained one.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the model's folder or repository brings along."),
]
TruncateOption = Annotated[
    Truncate,
    typer.Option(
        "--truncate",
        help="A rollout with too many tokens is an error, or loses the prompt's first or the completion's last ones; "
        "the output then says which were truncated.",
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Tokens of prompt and completion together; default: what the model takes.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Score only the first N records.")]
OnErrorOption = Annotated[OnError, typer.Option(help="Stop at a record that cannot be scored, or leave it out.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where an earlier run with this output stopped, if one did.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]


@dataclass(frozen=True)
class ScoreRequest:
    """One call of `vhead score`, its names and numbers checked."""

    source: str
    model: str
    output: str
    head: str | None
    fields: tuple[str, ...]
    temperature: float
    dtype: str | None
    device: str | None
    token_budget: int | None
    window_tokens: int | None
    num_threads: int | None
    batch_invariant: bool
    normalize_rewards: bool
    allow_random_head: bool
    trust_remote_code: bool
    truncation: Literal["prompt", "completion"] | None
    max_length: int | None
    limit: int | None
    skips: bool
    resume: bool
    quiet: bool

    def check(self) -> None:
        """Says what is wrong with the names and numbers themselves, before anything is loaded.

        Raises:
            typer.BadParameter: One of them is not what it must be.
        """
        _check_paths(self.source, self.output)
        if self.resume and not self.has_files:
            raise typer.BadParameter("expected files as INPUT and --output, got a stream", param_hint="--resume")
        if not 0.0 < self.temperature < float("inf"):
            raise typer.BadParameter(f"expected a positive number, got {self.temperature}", param_hint="--temperature")

    @property
    def has_files(self) -> bool:
        """Whether input and output are files, so that the output can be gone on with."""
        return STANDARD_STREAM not in (self.source, self.output)

    @property
    def columns(self) -> tuple[str, ...]:
        """What the output has beside the input's columns, which these names are therefore kept from."""
        from vhead.scoring.scores import TRUNCATED  # noqa: PLC0415, for a fast --help

        return self.fields if self.truncation is None else (*self.fields, TRUNCATED)

    @property
    def shows_progress(self) -> bool:
        """Whether somebody is there to see it, and does not see the scores themselves in the same place."""
        covered = self.output == STANDARD_STREAM and sys.stdout.isatty()
        return not self.quiet and sys.stderr.isatty() and not covered

    def settings(self) -> dict[str, object]:
        """What a run must have in common with the one that it resumes, or the output would be of two minds."""
        return {
            "model": _identity(self.model),
            "head": None if self.head is None else _identity(self.head),
            "returns": list(self.fields),
            "temperature": self.temperature,
            "dtype": self.dtype,
            "batch_invariant": self.batch_invariant,
            "normalize_rewards": self.normalize_rewards,
            "truncate": self.truncation,
            "max_length": self.max_length,
        }


def truncation_of(truncate: Truncate) -> Literal["prompt", "completion"] | None:
    """The scorer's argument that the option stands for."""
    if truncate is Truncate.ERROR:
        return None
    return "prompt" if truncate is Truncate.PROMPT else "completion"


def checked_fields(returns: str) -> tuple[str, ...]:
    """The fields that a comma-separated list names.

    Raises:
        typer.BadParameter: It names something else, or nothing.
    """
    from vhead.scoring.scores import check_fields  # noqa: PLC0415, for a fast --help

    try:
        return check_fields([name.strip() for name in returns.split(",") if name.strip()])
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("returns: "), param_hint="--returns") from None


def _check_paths(source: str, output: str) -> None:
    from vhead.scoring.files import format_of  # noqa: PLC0415, for a fast --help

    for name, hint in ((source, "INPUT"), (output, "--output")):
        try:
            format_of(name)
        except FileFormatError as error:
            raise typer.BadParameter(str(error), param_hint=hint) from None
    if source != STANDARD_STREAM and not Path(source).is_file():
        raise typer.BadParameter(f"{source}: no such file", param_hint="INPUT")
    if output != STANDARD_STREAM and not Path(output).absolute().parent.is_dir():
        raise typer.BadParameter(f"{output}: no such folder", param_hint="--output")
    if STANDARD_STREAM not in (source, output) and Path(output).exists() and Path(output).samefile(source):
        raise typer.BadParameter(f"{output}: is the input", param_hint="--output")


def _identity(location: str) -> list[object]:
    """What tells a model from another one, and from itself after more training: its place, its files, their times."""
    path = Path(location)
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    place = str(path.resolve()) if path.exists() else location
    return [place, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
