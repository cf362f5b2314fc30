"""`vhead score`: a file of rollouts in, the same file with scores out."""

from contextlib import closing
from typing import TYPE_CHECKING

import typer

from vhead.cli import score_options as option
from vhead.cli.failure import FAILED, reported
from vhead.cli.model_runs import SkippedRecords, keeping, loading_shown, naming_input
from vhead.cli.terminal import say

if TYPE_CHECKING:
    from vhead.rollouts.files.opening import Reader
    from vhead.scoring.files.output import Output
    from vhead.scoring.options import ScorerOptions
    from vhead.scoring.progress import ScoringProgress
    from vhead.scoring.scorer import Scorer


def score(
    source: option.Source,
    *,
    model: option.Model,
    output: option.Output,
    fields: option.FieldsOption = None,
    head: option.Head = None,
    returns: option.Returns = None,
    top_logprobs: option.TopLogprobs = 0,
    step_separator: option.StepSeparator = None,
    gamma: option.Gamma = 1.0,
    lam: option.Lam = 0.95,
    value_lam: option.ValueLam = None,
    reward_field: option.RewardField = None,
    cut_off_field: option.CutOffField = None,
    temperature: option.Temperature = 1.0,
    dtype: option.ModelDtype = None,
    device: option.Device = None,
    token_budget: option.TokenBudget = None,
    chunk_tokens: option.ChunkTokens = None,
    window_tokens: option.OldChunkTokens = None,
    num_threads: option.NumThreads = None,
    attention: option.AttentionOption = None,
    batch_invariant: option.BatchInvariant = False,
    normalize_rewards: option.NormalizeRewards = False,
    allow_random_head: option.AllowRandomHead = False,
    trust_remote_code: option.TrustRemoteCode = False,
    truncate: option.TruncateOption = option.Truncate.ERROR,
    max_length: option.MaxLength = None,
    separate_tokens: option.SeparateTokens = False,
    append_eos: option.AppendEos = False,
    follow: option.Follow = None,
    min_step: option.MinStep = None,
    patience: option.Patience = 0.0,
    limit: option.Limit = None,
    on_error: option.OnErrorOption = option.OnError.FAIL,
    unique_ids: option.UniqueIds = False,
    suffix: option.Suffix = "",
    resume: option.Resume = False,
    overwrite: option.Overwrite = False,
    quiet: option.Quiet = False,
) -> None:
    """Score a file of rollouts: per-token values and log-probabilities, and a reward each.

    The output has the records in input order, as they came, with one more field per score. It appears under its name
    when it is complete; until then, and when scoring stops early, it is NAME.partial beside it. The same command with
    --resume continues it: nothing is lost, and nothing is in the output twice. If there is an output already, nothing
    is scored without --overwrite.

    Exit codes: 0 done, though records may have been skipped, 1 failed, or all were skipped, 2 wrong usage,
    130 interrupted, 143 terminated.

    **Examples**

    - `vhead score rollouts.jsonl --model ./critic --output scores.jsonl`
    - `vhead score rollouts.parquet --model ./critic --output scores.parquet --returns values,reward`
    - `cat rollouts.jsonl | vhead score - --model ./critic --output - --on-error skip | jq .reward`
    """
    given = locals()
    with reported():
        request = option.request_of(given)
        request.check()
        _run(request)


def _run(request: option.ScoreRequest) -> None:
    from vhead.rollouts.files.opening import open_reader  # for a fast --help
    from vhead.scoring.files.opening import open_output  # for a fast --help
    from vhead.scoring.progress import ScoringProgress  # for a fast --help

    progress = ScoringProgress(shown=request.shows_progress)
    skipped = SkippedRecords(request.source)
    with (
        naming_input(request.source),
        closing(
            open_reader(request.source, request.columns, replaces=request.overwrite, fields=request.fields)
        ) as reader,
        keeping(
            open_output(request.output, resume=request.resume, overwrite=request.overwrite, suffix=request.suffix)
        ) as output,
    ):
        with loading_shown(request.model, shown=request.shows_progress, quiet=request.quiet):
            output.begin({} if request.output == option.STANDARD_STREAM else request.settings(), reader.schema)
            if not output.finished:
                scorer = _scorer(request)
        if output.finished:
            _check_finished(output, reader, request)
            return
        from vhead.scoring.files.pipeline import score_file  # imports torch

        with progress:
            score_file(
                scorer,
                reader,
                output,
                returns=request.returns,
                top_logprobs=request.top_logprobs,
                advantages=request.advantages,
                temperature=request.temperature,
                progress=progress,
                limit=request.limit,
                on_error=skipped if request.skips else None,
                unique_ids=request.unique_ids,
            )
    if not request.quiet:
        _summarise(progress, output, skipped.count, request.output)
        _say_replaced(reader)
    if skipped.count and not output.written and not output.continued:
        say("no record could be scored, so the output has none")
        raise typer.Exit(FAILED)


def _say_replaced(reader: "Reader") -> None:
    """Names what --overwrite took from the records, as nobody may have meant that."""
    if reader.replaced:
        columns = ", ".join(f"`{name}`" for name in sorted(reader.replaced))
        say(f"the input had columns that scores go to, and their content is not in the output: {columns}")


def _check_finished(output: "Output", reader: "Reader", request: option.ScoreRequest) -> None:
    """Checks that the finished output belongs to this input, and says that there is nothing to do."""
    if output.journal is not None:
        output.journal.check_whole(reader, request.output, request.limit)
        if not request.quiet:
            say(f"{request.output} is finished already with {output.journal.records:,} records, so nothing was scored")


def _scorer(request: option.ScoreRequest) -> "Scorer":
    from vhead.scoring.conventions import Conventions  # imports numpy
    from vhead.scoring.scorer import Scorer  # imports torch

    options: ScorerOptions = {**request.options, "conventions": Conventions(step_separator=request.step_separator)}
    return Scorer.from_pretrained(request.model, **request.loading, **options)


def _summarise(progress: "ScoringProgress", output: "Output", skipped: int, name: str) -> None:
    counts = (("skipped", skipped), ("truncated", output.truncated))
    others = "".join(f", {count:,} {what}" for what, count in counts if count)
    target = "" if name == option.STANDARD_STREAM else f", written to {name}"
    before = f" after the first {output.continued:,} records, which were done already" if output.continued else ""
    say(f"{output.written:,} {output.unit} scored{others}{before}{target}")
    # Without a batch the model computed nothing, as with `--returns tokens`, and there is no speed to speak of.
    if progress.tokens:
        shared = f", {progress.shared:.0%} shared" if progress.shared else ""
        say(
            f"{progress.tokens:,} tokens in {progress.seconds:.1f} s{shared}: {progress.rollout_rate:,.0f} rollouts/s, "
            f"{progress.rate:,.0f} tokens/s"
        )
