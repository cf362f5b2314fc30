"""The arguments and options of `vhead score`: what each is called, takes, and means."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vhead.cli.terminal import say
from vhead.env import MOST_THREADS
from vhead.errors import FileFormatError

if TYPE_CHECKING:
    from vhead.scoring.options import ScorerOptions

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


class Attention(StrEnum):
    """How tokens see each other in packed rollouts."""

    SEGMENTS = "segments"
    FLEX = "flex"
    FLASH = "flash"
    MASK = "mask"


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
Model = Annotated[
    str, typer.Option("--model", "-m", metavar="PATH", help="Folder or hub id of a model with a trained value head.")
]
Output = Annotated[
    str,
    typer.Option("--output", "-o", metavar="FILE", help="Where scores go: .jsonl, .parquet, or - for standard output."),
]
Head = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="File, folder or hub id with the head, where the model's own does not hold it."),
]
Returns = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Some of values, logprobs, entropy, reward, tokens (ids and places in the text), with commas between; "
        "default: values, logprobs and reward, without logprobs where the checkpoint has no language-model head.",
    ),
]
Temperature = Annotated[
    float, typer.Option(metavar="T", help="Divides the logits before log-probabilities and entropy.")
]
ModelDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype", metavar="DTYPE", help="The language model's: float32, bfloat16, float16; default: as saved."
    ),
]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ...; default: cuda if any.")]
TokenBudget = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens of a batch; default: 2048 on a CPU, 16384 elsewhere.")
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        "--chunk-tokens",
        min=1,
        metavar="N",
        help="Tokens among which shared beginnings are found; default: eight batches.",
    ),
]
OldChunkTokens = Annotated[int | None, typer.Option("--window-tokens", min=1, hidden=True)]
NumThreads = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_THREADS, metavar="N", help="CPU threads; default: those that this process may use."),
]
AttentionOption = Annotated[
    Attention | None,
    typer.Option(
        "--attention",
        metavar="WAY",
        help="segments, flex, flash or mask: how tokens that several rollouts share are attended; default: the fastest "
        "way that the model can take.",
    ),
]
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
        metavar="PART",
        help="error, prompt or completion: a rollout with too many tokens cannot be scored, or loses the prompt's "
        "first or the completion's last ones, and the output says which were truncated.",
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", help="Tokens of prompt and completion together; default: what the model takes."),
]
SeparateTokens = Annotated[
    bool,
    typer.Option(
        "--separate-tokens",
        help="Tokenise prompt and completion apart; default: as one text, and a token across the border is the "
        "completion's.",
    ),
]
AppendEos = Annotated[
    bool,
    typer.Option("--append-eos", help="Put the end-of-sequence token behind completions of plain text that lack it."),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Score only the first N records.")]
OnErrorOption = Annotated[
    OnError,
    typer.Option(metavar="ACTION", help="At a record that cannot be scored: fail stops there, skip leaves it out."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where an earlier run with this output stopped, if one did.")
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an output of this name, whole or in part, when the new one is complete, and columns of the input "
        "that have the scores' names.",
    ),
]
Suffix = Annotated[str, typer.Option(help="Stands behind the new columns' names: values_b for _b.")]
UniqueIds = Annotated[bool, typer.Option("--unique-ids", help="A record whose id another record had cannot be scored.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]


@dataclass(frozen=True)
class ScoreRequest:
    """One call of `vhead score`, its names and numbers checked.

    Attributes:
        loading: The arguments of `Scorer.from_pretrained` that say what is loaded, and how.
        options: The scorer's own.
    """

    source: str
    model: str
    output: str
    returns: tuple[str, ...] | None
    temperature: float
    loading: dict[str, Any]
    options: "ScorerOptions"
    limit: int | None
    skips: bool
    resume: bool
    overwrite: bool
    suffix: str
    unique_ids: bool
    quiet: bool

    def check(self) -> None:
        """Says what is wrong with the names and numbers themselves, before anything is loaded.

        Raises:
            typer.BadParameter: One of them is not what it must be.
        """
        _check_paths(self.source, self.output)
        for asked, hint in ((self.resume, "--resume"), (self.overwrite, "--overwrite")):
            if asked and self.output == STANDARD_STREAM:
                raise typer.BadParameter("expected a file as --output, got a stream", param_hint=hint)
        if not 0.0 < self.temperature < float("inf"):
            raise typer.BadParameter(f"expected a positive number, got {self.temperature}", param_hint="--temperature")

    @property
    def columns(self) -> tuple[str, ...]:
        """What the output has beside the input's columns, which these names are therefore kept from."""
        from vhead.scoring.scores import DEFAULT_RETURNS, TRUNCATED, columns_of  # for a fast --help

        columns = columns_of(self.returns or DEFAULT_RETURNS)
        names = columns if self.options["truncation"] is None else (*columns, TRUNCATED)
        return tuple(f"{name}{self.suffix}" for name in names)

    @property
    def shows_progress(self) -> bool:
        """Whether somebody is there to see it, and does not see the scores themselves in the same place."""
        covered = self.output == STANDARD_STREAM and sys.stdout.isatty()
        return not self.quiet and sys.stderr.isatty() and not covered

    def settings(self) -> dict[str, object]:
        """What a run must have in common with the one that it resumes: on each of these the numbers depend.

        Reads the model's files.

        Raises:
            OSError: One of them cannot be read.
        """
        from vhead.checkpoints.identity import identity  # for a fast --help

        head = self.loading["head"]
        return {
            "vhead": version("vhead"),
            **identity(self.model, "model"),
            **({} if head is None else identity(head, "head")),
            "returns": None if self.returns is None else list(self.returns),
            "suffix": self.suffix,
            "overwrite": self.overwrite,
            "temperature": self.temperature,
            "unique_ids": self.unique_ids,
            **{name: value for name, value in self.loading.items() if name != "head"},
            # By the option's name, which the user knows.
            **{"truncate" if name == "truncation" else name: value for name, value in self.options.items()},
        }


# What the command line and `Scorer.from_pretrained` call alike.
_LOADING = ("head", "dtype", "device", "normalize_rewards", "allow_random_head", "trust_remote_code")
_OPTIONS = (
    "token_budget",
    "chunk_tokens",
    "num_threads",
    "attention",
    "batch_invariant",
    "max_length",
    "separate_tokens",
    "append_eos",
)
_OWN = ("source", "model", "output", "temperature", "limit", "resume", "overwrite", "suffix", "unique_ids", "quiet")


def request_of(given: Mapping[str, Any]) -> ScoreRequest:
    """The request that the arguments of `vhead score` make, by their names.

    Raises:
        typer.BadParameter: `--returns` names something else than a field, or nothing.
    """
    if given["window_tokens"] is not None:
        say("--window-tokens is now called --chunk-tokens")
        given = {**given, "chunk_tokens": given["chunk_tokens"] or given["window_tokens"]}
    plain: dict[str, Any] = {
        name: value.value if isinstance(value, StrEnum) else value for name, value in given.items()
    }
    truncation = None if plain["truncate"] == Truncate.ERROR else plain["truncate"]
    options: Any = {name: plain[name] for name in _OPTIONS} | {"truncation": truncation}
    return ScoreRequest(
        **{name: plain[name] for name in _OWN},
        returns=checked_returns(plain["returns"]),
        loading={name: plain[name] for name in _LOADING},
        options=options,
        skips=plain["on_error"] == OnError.SKIP,
    )


def checked_returns(returns: str | None) -> tuple[str, ...] | None:
    """What a comma-separated list names; None: what the checkpoint can give.

    Raises:
        typer.BadParameter: It names something else, or nothing.
    """
    from vhead.scoring.scores import check_returns  # for a fast --help

    if returns is None:
        return None
    try:
        return check_returns([name.strip() for name in returns.split(",") if name.strip()])
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("returns: "), param_hint="--returns") from None


def _check_paths(source: str, output: str) -> None:
    from vhead.rollouts.files import format_of  # for a fast --help

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
