"""The arguments and options of `vhead score`: what each is called, takes, and means."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vhead.cli.terminal import say
from vhead.env import MOST_THREADS
from vhead.errors import FileFormatError
from vhead.scoring.options import ScorerOptions

if TYPE_CHECKING:
    from vhead.scoring.advantages import AdvantageColumns

STANDARD_STREAM = "-"


class Dtype(StrEnum):
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
        help="Rollouts: .jsonl (also .gz or .zst), .parquet, a folder or a pattern of Parquet files, "
        "hf://datasets/..., or - for JSON Lines on standard input. Each record has prompt and completion (text or "
        "messages), prompt_ids and completion_ids, messages, or chosen and rejected; other fields are carried through.",
    ),
]
FieldsOption = Annotated[
    str | None,
    typer.Option(
        "--fields",
        metavar="FIELD=COLUMN,...",
        help="Columns that hold fields under other names: prompt=question, or several with commas between.",
    ),
]
Model = Annotated[
    str, typer.Option("--model", "-m", metavar="PATH", help="Folder or hub id of a model with a trained value head.")
]
Output = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where scores go: .jsonl (also .gz or .zst), .parquet, or - for standard output.",
    ),
]
Head = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="File, folder or hub id with the head, if the model's own does not hold it."),
]
Returns = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="What to compute, with commas between: values, logprobs, entropy, candidates, reward, prompt_value, "
        "bootstrap, steps, tokens (ids and places in the text), advantages, returns. Default: values, logprobs and "
        "reward, without logprobs if the checkpoint has no language-model head.",
    ),
]
TopLogprobs = Annotated[
    int, typer.Option(min=0, metavar="K", help="Also the K likeliest tokens at each position, as top_tokens.")
]
StepSeparator = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What ends a step, for steps. Default: a step is one turn of the model's."),
]
Gamma = Annotated[float, typer.Option(min=0, max=1, metavar="G", help="Discount, for advantages and returns.")]
Lam = Annotated[float, typer.Option(min=0, max=1, metavar="L", help="Lambda, for advantages.")]
ValueLam = Annotated[
    float | None, typer.Option(min=0, max=1, metavar="L", help="Lambda, for returns. Default: the one for advantages.")
]
RewardField = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The field with each record's reward, for advantages. Default: the head's own reward."
    ),
]
CutOffField = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The field that says whether a record was cut off (true, or the finish reason length), for advantages.",
    ),
]
Temperature = Annotated[
    float, typer.Option(metavar="T", help="Divides the logits before log-probabilities and entropy.")
]
ModelDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Dtype of the language model: float32, bfloat16 or float16. Default: as it was saved.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ... Default: cuda if there is one, otherwise cpu."),
]
TokenBudget = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens of a batch. Default: the fastest on this machine.")
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        "--chunk-tokens",
        min=1,
        metavar="N",
        help="Tokens of rollouts that are read at once, among which shared prompts are found. Default: eight batches.",
    ),
]
OldChunkTokens = Annotated[int | None, typer.Option("--window-tokens", min=1, hidden=True)]
NumThreads = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_THREADS, metavar="N", help="CPU threads. Default: those that this process may use."),
]
AttentionOption = Annotated[
    Attention | None,
    typer.Option(
        "--attention",
        metavar="WAY",
        help="How rollouts that share tokens attend to them: segments, flex, flash or mask. Default: the fastest way "
        "that the model can take.",
    ),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant", help="Give each rollout the same bits whatever else is scored with it. This is slower."
    ),
]
NormalizeRewards = Annotated[
    bool,
    typer.Option(
        "--normalize-rewards",
        help="Normalise rewards by the mean and the standard deviation that the checkpoint states.",
    ),
]
AllowRandomHead = Annotated[
    bool, typer.Option("--allow-random-head", help="Score with an untrained head if there is no trained one.")
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
        help="What to do with a rollout that has too many tokens: error (it cannot be scored), prompt (cut off the "
        "prompt's first tokens) or completion (cut off the completion's last ones). The output then says which "
        "rollouts were truncated.",
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=2, metavar="N", help="Most tokens of prompt and completion together. Default: what the model takes."
    ),
]
SeparateTokens = Annotated[
    bool,
    typer.Option(
        "--separate-tokens",
        help="Tokenise prompt and completion apart. Default: as one text, in which a token across the border belongs "
        "to the completion.",
    ),
]
AppendEos = Annotated[
    bool,
    typer.Option(
        "--append-eos", help="Add the end-of-sequence token to completions of plain text that do not end in it."
    ),
]
Follow = Annotated[
    str | None,
    typer.Option(
        metavar="DIRECTORY",
        help="Take over the weights that a trainer publishes there, between two batches; weights_step says which.",
    ),
]
MinStep = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="With --follow: score with no weights of an earlier step.")
]
Patience = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="With --min-step: how long to wait for such weights.")
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Score only the first N records.")]
OnErrorOption = Annotated[
    OnError,
    typer.Option(
        metavar="ACTION",
        help="What to do with a record that cannot be scored: fail (stop there) or skip (leave it out).",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue where an earlier run with this output stopped, if one did.")
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an output of this name, finished or not, once the new one is complete. Columns of the input that "
        "have the scores' names are replaced too.",
    ),
]
Suffix = Annotated[
    str, typer.Option(help="Added to the names of the new columns: with _b they are values_b, reward_b, ...")
]
UniqueIds = Annotated[
    bool, typer.Option("--unique-ids", help="A record with an id that an earlier record had cannot be scored.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]


@dataclass(frozen=True)
class ScoreRequest:
    """One call of `vhead score`.

    Attributes:
        loading: The arguments of `Scorer.from_pretrained` that say what is loaded, and how.
        options: The scorer's own.
    """

    source: str
    model: str
    output: str
    fields: dict[str, str]
    returns: tuple[str, ...] | None
    advantages: "AdvantageColumns | None"
    top_logprobs: int
    step_separator: str | None
    temperature: float
    loading: dict[str, Any]
    options: ScorerOptions
    limit: int | None
    skips: bool
    resume: bool
    overwrite: bool
    suffix: str
    unique_ids: bool
    quiet: bool

    def check(self) -> None:
        """Checks the names and numbers themselves, before anything is loaded.

        Raises:
            typer.BadParameter: One of them is not allowed.
        """
        _check_paths(self.source, self.output)
        for asked, hint in ((self.resume, "--resume"), (self.overwrite, "--overwrite")):
            if asked and self.output == STANDARD_STREAM:
                raise typer.BadParameter("expected a file as --output, got standard output", param_hint=hint)
        if not self.suffix.isprintable():
            raise typer.BadParameter(f"expected printable text, got {self.suffix!r}", param_hint="--suffix")
        if not 0.0 < self.temperature < float("inf"):
            raise typer.BadParameter(f"expected a positive number, got {self.temperature}", param_hint="--temperature")

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns that scoring adds, which columns of the input may therefore not have."""
        from vhead.scoring.fields import (  # for a fast --help
            DEFAULT_RETURNS,
            WEIGHTS_STEP,  # for a fast --help
            Asked,
        )
        from vhead.scoring.scores import TRUNCATED  # for a fast --help

        asked = Asked(self.returns or DEFAULT_RETURNS, top=self.top_logprobs)
        names = [column.name for column in asked.columns]
        names += [] if self.advantages is None else self.advantages.columns
        names += [] if self.options["follow"] is None else [WEIGHTS_STEP]
        names += [] if self.options["truncation"] is None else [TRUNCATED]
        return tuple(f"{name}{self.suffix}" for name in names)

    @property
    def shows_progress(self) -> bool:
        """Whether standard error is a terminal, and the scores themselves do not go to one."""
        covered = self.output == STANDARD_STREAM and sys.stdout.isatty()
        return not self.quiet and sys.stderr.isatty() and not covered

    def settings(self) -> dict[str, object]:
        """What must be the same in a run and in the one that it resumes, because the scores depend on it.

        This reads the model's files.

        Raises:
            OSError: One of the files cannot be read.
        """
        from vhead.checkpoints.identity import identity  # for a fast --help

        head = self.loading["head"]
        return {
            "vhead": version("vhead"),
            **identity(self.model, "model"),
            **({} if head is None else identity(head, "head")),
            "returns": None if self.returns is None else list(self.returns),
            "fields": self.fields,
            "advantages": None if self.advantages is None else asdict(self.advantages),
            "top_logprobs": self.top_logprobs,
            "step_separator": self.step_separator,
            "suffix": self.suffix,
            "overwrite": self.overwrite,
            "temperature": self.temperature,
            "unique_ids": self.unique_ids,
            **{name: value for name, value in self.loading.items() if name != "head"},
            # By the option's name, which the user knows.
            **{"truncate" if name == "truncation" else name: value for name, value in self.options.items()},
        }


# What the command line and `Scorer.from_pretrained` call alike.
LOADING = ("head", "dtype", "device", "normalize_rewards", "allow_random_head", "trust_remote_code")


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
    of_scorer = ScorerOptions.__annotations__.keys() & plain.keys()
    made = {
        "fields": checked_fields(plain["fields"]),
        **_returns_and_advantages(plain),
        "loading": {name: plain[name] for name in LOADING},
        "options": {name: plain[name] for name in of_scorer} | {"truncation": truncation},
        "skips": plain["on_error"] == OnError.SKIP,
    }
    own = [field.name for field in fields(ScoreRequest) if field.name not in made]
    return ScoreRequest(**{name: plain[name] for name in own}, **made)


def _returns_and_advantages(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the comma-separated list of what to compute; None stands for whatever the checkpoint can give.

    Raises:
        typer.BadParameter: The list names something else, or nothing.
    """
    from vhead.scoring.fields import ADVANTAGES, check_returns  # for a fast --help

    if plain["returns"] is None:
        return {"returns": None, "advantages": None}
    names = [name.strip() for name in plain["returns"].split(",") if name.strip()]
    derived = tuple(name for name in ADVANTAGES if name in names)
    others = [name for name in names if name not in ADVANTAGES]
    try:
        # Advantages by themselves are scored from the values, which are then in the output too.
        returns = check_returns(others or (["values"] if derived else []))
    except ValueError as error:
        message = str(error).removeprefix("returns: ").replace(", got", f", {', '.join(ADVANTAGES)}, got", 1)
        raise typer.BadParameter(message, param_hint="--returns") from None
    if not derived:
        return {"returns": returns, "advantages": None}
    from vhead.scoring.advantages import AdvantageColumns  # for a fast --help

    numbers = {name: plain[name] for name in ("gamma", "lam", "value_lam", "reward_field", "cut_off_field")}
    return {"returns": returns, "advantages": AdvantageColumns(derived, **numbers)}


def checked_fields(text: str | None) -> dict[str, str]:
    from vhead.rollouts.fields import parsed_fields  # for a fast --help

    try:
        return {} if text is None else parsed_fields(text)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("fields: "), param_hint="--fields") from None


def _check_paths(source: str, output: str) -> None:
    from vhead.rollouts.files.opening import format_of  # for a fast --help

    sources = checked_sources(source)
    try:
        format_of(output)
    except FileFormatError as error:
        raise typer.BadParameter(str(error), param_hint="--output") from None
    if output != STANDARD_STREAM and not Path(output).absolute().parent.is_dir():
        raise typer.BadParameter(f"{output}: no such folder", param_hint="--output")
    if output != STANDARD_STREAM and any(is_of_output(file, Path(output)) for file in sources):
        raise typer.BadParameter(f"{output}: is the input", param_hint="--output")
    if output != STANDARD_STREAM and Path(source).is_dir() and Path(output).absolute().parent.samefile(source):
        raise typer.BadParameter(f"{output}: lies in the input's folder", param_hint="--output")


def checked_sources(source: str) -> list[Path]:
    """The input's files where they are on this machine; those of the hub are looked for when they are read."""
    from vhead.rollouts.files.opening import format_of  # for a fast --help
    from vhead.rollouts.files.sources import HUB, input_files  # for a fast --help

    if source == STANDARD_STREAM or source.startswith(HUB):
        return []
    try:
        if not Path(source).is_dir():
            format_of(source)
        sources = input_files(source)
    except FileFormatError as error:
        raise typer.BadParameter(str(error), param_hint="INPUT") from None
    except FileNotFoundError:
        raise typer.BadParameter(f"{source}: no such file", param_hint="INPUT") from None
    except OSError as error:
        raise typer.BadParameter(f"{source}: {error.strerror}", param_hint="INPUT") from None
    for file in sources:
        if not file.is_file():
            told = "expected a file, found a pipe, a device or a folder; for a pipe, give - and < NAME"
            raise typer.BadParameter(f"{file}: {told}", param_hint="INPUT")
    return sources


def is_of_output(source: Path, output: Path) -> bool:
    """Whether the input is one of the files that the output is written to, whatever name leads there."""
    names = (output.name, f"{output.name}.partial", f".{output.name}.journal")
    files = [output.with_name(name) for name in names]
    return any(file.exists() and file.samefile(source) for file in files)
