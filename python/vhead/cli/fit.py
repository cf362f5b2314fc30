"""`vhead fit`: a file of rollouts in, a head that was fitted to them out."""

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vhead.cli import score_options as option
from vhead.cli.failure import reported
from vhead.cli.model_runs import SkippedRecords, keeping, loading_shown, naming_input
from vhead.cli.terminal import say, show_json

if TYPE_CHECKING:
    from vhead.fitting.fitted import FittedHead
    from vhead.fitting.fitting import FitOptions
    from vhead.scoring.options import ScorerOptions
    from vhead.scoring.progress import ScoringProgress
    from vhead.scoring.scorer import Scorer

_GIB = 2**30


class Target(StrEnum):
    """What a head is fitted to."""

    RETURNS = "returns"
    REWARD = "reward"
    PAIRS = "pairs"


class Loss(StrEnum):
    """What is minimised."""

    SQUARED = "squared"
    LOGISTIC = "logistic"


Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="Where the head goes: .safetensors, .bin, .pt or .pth."),
]
Model = Annotated[
    str,
    typer.Option("--model", "-m", metavar="PATH", help="Folder or hub id of a model; a head of its own is ignored."),
]
TargetOption = Annotated[
    Target,
    typer.Option(
        "--target",
        metavar="WHAT",
        help="returns (values of tokens), reward (one number a rollout) or pairs (chosen above rejected).",
    ),
]
TargetField = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="The field with the targets, or one for each output with commas between. For returns, a list has a return "
        "for each completion token, and a number is the rollout's reward. Default: returns or else reward, whichever "
        "the first record has; reward.",
    ),
]
WeightField = Annotated[
    str | None, typer.Option(metavar="NAME", help="The field with each record's weight. Default: all weigh the same.")
]
Gamma = Annotated[
    float, typer.Option(min=0, max=1, metavar="G", help="Discount of a token, for returns made of rewards.")
]
LossOption = Annotated[
    Loss | None,
    typer.Option(
        "--loss",
        metavar="LOSS",
        help="squared or logistic. Default: logistic for pairs and for rewards that are all 0 or 1, else squared.",
    ),
]
Strengths = Annotated[
    str | None,
    typer.Option(
        "--strength",
        metavar="S,...",
        help="Penalty on squared weights, or several to choose from on held-out prompts. Default: a wide range.",
    ),
]
FoldCount = Annotated[int, typer.Option("--folds", min=2, metavar="N", help="Parts that prompts are divided into.")]
IntermediateSize = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="I", help="Fit two projections with so many elements between. Default: one projection."
    ),
]
MaxIterations = Annotated[int, typer.Option(min=1, metavar="N", help="Most iterations, for two projections.")]
CacheGb = Annotated[
    float, typer.Option(min=0, metavar="GIB", help="Most GiB of hidden states on the disk, where they are kept.")
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", "-f", help="The head's format. Default: trl, or vhead for several outputs or two projections."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write the figures to standard output as one JSON document.")]


def fit(
    source: option.Source,
    *,
    model: Model,
    output: Output,
    target: TargetOption = Target.RETURNS,
    target_field: TargetField = None,
    weight_field: WeightField = None,
    fields: option.FieldsOption = None,
    gamma: Gamma = 1.0,
    loss: LossOption = None,
    strengths: Strengths = None,
    folds: FoldCount = 5,
    intermediate_size: IntermediateSize = None,
    max_iterations: MaxIterations = 100,
    cache_gb: CacheGb = 16.0,
    format: Format = None,
    dtype: option.ModelDtype = None,
    device: option.Device = None,
    token_budget: option.TokenBudget = None,
    chunk_tokens: option.ChunkTokens = None,
    num_threads: option.NumThreads = None,
    attention: option.AttentionOption = None,
    trust_remote_code: option.TrustRemoteCode = False,
    truncate: option.TruncateOption = option.Truncate.ERROR,
    max_length: option.MaxLength = None,
    separate_tokens: option.SeparateTokens = False,
    append_eos: option.AppendEos = False,
    limit: option.Limit = None,
    on_error: option.OnErrorOption = option.OnError.FAIL,
    resume: option.Resume = False,
    overwrite: option.Overwrite = False,
    quiet: option.Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit a value or reward head to rollouts, on a language model that stays as it is.

    The model runs over the rollouts once, as for scoring. Figures are of held-out prompts. The head appears under its
    name when it is complete; until then, and when the run stops early, what has been read is in NAME.partial beside it.
    The same command with --resume continues it, and the head is the same to the bit.

    Exit codes: 0 done, though records may have been skipped, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.

    **Examples**

    - `vhead fit rollouts.jsonl --model ./policy --target returns --gamma 0.99 --output v_head.safetensors`
    - `vhead fit pairs.parquet --model ./policy --target pairs --output reward_head.safetensors --json`
    """
    given = {
        name: value.value if isinstance(value, StrEnum) else value
        for name, value in locals().items()
        if name != "given"
    }
    with reported():
        _check(given)
        _run(given, _fit_options(given))


def _check(given: Mapping[str, Any]) -> None:
    """Checks names before anything is loaded.

    Raises:
        typer.BadParameter: One of them is not allowed.
    """
    from vhead.formats import FORMATS  # imports torch
    from vhead.formats.writing import is_head_file  # imports torch

    output, format = given["output"], given["format"]
    sources = option.checked_sources(given["source"])
    if not is_head_file(output):
        expected = "a name that ends in .safetensors, .bin, .pt or .pth"
        raise typer.BadParameter(f"expected {expected}, got {str(output)!r}", param_hint="--output")
    if not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output}: no such folder", param_hint="--output")
    if any(option.is_of_output(file, output) for file in sources):
        raise typer.BadParameter(f"{output}: is the input", param_hint="--output")
    known = [head_format.name for head_format in FORMATS]
    if format is not None and format not in known:
        raise typer.BadParameter(f"expected one of {', '.join(known)}, got {format!r}", param_hint="--format")
    if given["target"] == Target.PAIRS and given["target_field"] is not None:
        raise typer.BadParameter(
            "expected none for pairs, whose first side is the better one", param_hint="--target-field"
        )


def _fit_options(given: Mapping[str, Any]) -> "FitOptions":
    from vhead.fitting.fitting import FitOptions  # imports torch

    names = ("target", "gamma", "loss", "folds", "intermediate_size", "max_iterations")
    cache_bytes = max(1, int(given["cache_gb"] * _GIB))
    try:
        return FitOptions(
            **{name: given[name] for name in names}, strengths=_strengths(given["strengths"]), cache_bytes=cache_bytes
        )
    except ValueError as error:
        name, _, problem = str(error).partition(": ")
        hint = {"strengths": "--strength"}.get(name, f"--{name.replace('_', '-')}")
        raise typer.BadParameter(problem, param_hint=hint) from None


def _strengths(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(each) for each in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"expected numbers with commas between, got {text!r}", param_hint="--strength"
        ) from None


def _names(text: str | None) -> tuple[str, ...] | None:
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    if text is not None and not names:
        raise typer.BadParameter("expected the name of a field, got none", param_hint="--target-field")
    return names or None


def _run(given: Mapping[str, Any], options: "FitOptions") -> None:
    from vhead.fitting.examples import TargetFields  # imports torch
    from vhead.fitting.files import fit_file  # imports torch
    from vhead.fitting.output import HeadOutput  # imports torch
    from vhead.rollouts.files.opening import open_reader  # for a fast --help
    from vhead.scoring.progress import ScoringProgress  # for a fast --help

    columns = option.checked_fields(given["fields"])
    fields = TargetFields(_names(given["target_field"]), given["weight_field"])
    source, output_name = given["source"], str(given["output"])
    skipped, progress = SkippedRecords(source), ScoringProgress(shown=not given["quiet"])
    with (
        naming_input(source),
        closing(open_reader(source, fields=columns)) as reader,
        keeping(HeadOutput(given["output"], resume=given["resume"], overwrite=given["overwrite"]), "read") as output,
    ):
        with loading_shown(given["model"], shown=not given["quiet"], quiet=given["quiet"]):
            output.begin(_settings(given, options, fields, columns))
            scorer = None if output.finished else _scorer(given)
        if scorer is None:
            output.check_whole(reader, given["limit"])
            if not given["quiet"]:
                say(f"{output_name} is finished already, so nothing was fitted")
            return
        with progress:
            fitted = fit_file(
                scorer,
                reader,
                output,
                options=options,
                fields=fields,
                format=given["format"],
                progress=progress,
                limit=given["limit"],
                on_error=skipped if given["on_error"] == option.OnError.SKIP else None,
            )
    if given["as_json"]:
        show_json(document(fitted))
    if not given["quiet"]:
        _summarise(fitted, progress, skipped.count, output_name)


def _scorer(given: Mapping[str, Any]) -> "Scorer":
    from vhead.scoring.scorer import Scorer  # imports torch

    options: ScorerOptions = {**_scorer_options(given)}
    loading = {name: given[name] for name in ("dtype", "device", "trust_remote_code")}
    # A head of the model's own is not read, and one that is drawn is not either.
    return Scorer.from_pretrained(given["model"], allow_random_head=True, **loading, **options)


def _scorer_options(given: Mapping[str, Any]) -> "ScorerOptions":
    from vhead.scoring.options import ScorerOptions  # for a fast --help

    names = ScorerOptions.__annotations__.keys() & given.keys()
    truncation = None if given["truncate"] == option.Truncate.ERROR else given["truncate"]
    options: Any = {name: given[name] for name in names} | {"truncation": truncation}
    return options  # type: ignore[no-any-return]


def _settings(
    given: Mapping[str, Any], options: "FitOptions", fields: Any, columns: dict[str, str]
) -> dict[str, object]:
    """What must be the same in a run and in the one that it resumes, because the head depends on it."""
    from vhead.checkpoints.identity import identity  # for a fast --help

    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
    return {
        "vhead": version("vhead"),
        **identity(given["model"], "model"),
        **lists,
        **{name: given[name] for name in ("format", "dtype", "device", "trust_remote_code")},
        **{name: value for name, value in _scorer_options(given).items() if name != "truncation"},
        "truncate": given["truncate"],
        "fields": columns,
        "target_field": None if fields.targets is None else list(fields.targets),
        "weight_field": fields.weight,
    }


def document(fitted: "FittedHead") -> dict[str, Any]:
    """What was found as a JSON object: null for what is not finite."""
    return {
        "metrics": {name: _finite(value) for name, value in fitted.metrics.items()},
        "strength": _finite(fitted.strength),
        "loss": fitted.loss,
        "rollouts": fitted.rollouts,
        "tokens": fitted.tokens,
        "hidden_size": fitted.head.hidden_size,
        "outputs": fitted.head.num_outputs,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _summarise(fitted: "FittedHead", progress: "ScoringProgress", skipped: int, name: str) -> None:
    others = f", {skipped:,} skipped" if skipped else ""
    say(f"a head fitted to {fitted.rollouts:,} rollouts{others}, written to {name}")
    say(f"{fitted.loss} loss over {fitted.tokens:,} hidden states, strength {_figure(fitted.strength)}")
    for figure, value in fitted.metrics.items():
        say(f"on held-out prompts: {figure.replace('_', ' ')} {_figure(value)}")
    say(f"{progress.tokens:,} tokens in {progress.seconds:.1f} s: {progress.rate:,.0f} tokens/s")


def _figure(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_figure(item) for item in value)
    return f"{value:.4g}"
