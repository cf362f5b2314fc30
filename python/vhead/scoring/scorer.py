"""Scoring rollouts: values, log-probabilities, entropies and rewards from one backbone pass."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Self, Unpack

import torch
from torch import nn

from vhead.errors import FieldError, HeadError, RecordError, loading
from vhead.packing.plan import ScorerPlan
from vhead.rollouts.encoding import Encoded, Encoder, IdRegistry, LengthLimit
from vhead.rollouts.fields import SIDES
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.wording import named
from vhead.scoring.ahead import Ahead
from vhead.scoring.chunks import Results, Sourced, chunks
from vhead.scoring.conventions import Conventions
from vhead.scoring.engine import Engine, candidate_count
from vhead.scoring.fields import DEFAULT_RETURNS, Asked, check_returns
from vhead.scoring.following import Following
from vhead.scoring.loading import Critic, load_critic
from vhead.scoring.options import ScorerOptions, checked_options
from vhead.scoring.progress import ScoringProgress
from vhead.scoring.scores import Score, Scores
from vhead.scoring.sharing import share_weights
from vhead.scoring.underway import BatchHandler, Chunk, Underway

logger = logging.getLogger("vhead")

# A chunk is batched and written as a whole: long enough to fill batches evenly, short enough that even a slow model
# finishes one in seconds.
_BATCHES_PER_CHUNK = 8

ErrorHandler = Callable[[RecordError], None]
SourceCheck = Callable[[Any, Sequence[Rollout]], None]


class Scorer:
    """Gives values, log-probabilities, entropies and rewards of rollouts.

    The value of completion token t is the head's output at the position that predicts it; the reward is the head's
    output at the last completion token itself. Dropout is off while scoring, whatever mode the model is in.

    Rollouts that begin with the same tokens share their computation where the model can take that: see `plan`. What
    the model can take is tried on a few tokens when the scorer is made.

    Args:
        model: A language model with a value head, such as `AutoModelForCausalLMWithValueHead`.
        tokenizer: Needed for rollouts of text or messages.
        token_budget: Tokens of a batch; None: the fastest of a few sizes around 2048 on a CPU and 16384 elsewhere,
            which are tried for a second when a model is first scored on a machine. The plan says which it is.
        chunk_tokens: Tokens of rollouts that are read before they are batched, among which shared beginnings are
            found; None: eight times the budget.
        num_threads: Torch's threads while scoring; None leaves them as they are.
        conventions: Which positions values and rewards are read at; None: as above.
        batch_invariant: Whether a rollout's numbers are the same bit for bit whatever else is scored, on one machine
            with one number of threads. Costs time: each completion then goes through the model by itself.
        attention: How tokens see each other in packed rollouts: `"segments"`, `"flex"` (FlexAttention), `"flash"` (the
            package flash_attn) or `"mask"`; None: the fastest one that the model can take.
        truncation: What becomes of a rollout with more tokens than `max_length`: `"prompt"` cuts off the prompt's first
            tokens, a beginning-of-sequence token among them, `"completion"` the completion's last ones, None neither:
            it cannot be scored. The scores then say which rollouts were truncated.
        max_length: Tokens of prompt and completion that a rollout may have; None: as many as the model takes.
        separate_tokens: Whether text is tokenised in two parts; False: prompt and completion are tokenised as one text,
            and a token across the border between them is the completion's.
        append_eos: Whether a completion of plain text that does not end in the tokenizer's end-of-sequence token is
            followed by it; the reward is then read there.
        heads: Several heads by name, which read the same hidden states in one pass, in place of the model's own: the
            scores then have one output for each of theirs, and `Scores.of(name)` has those of one head.
        policy_adapter: Which of the model's adapters computes log-probabilities and entropies; None: the active one.
        value_adapter: Which one computes what the head gives. If the two differ, the language model runs once for each.
        follow: A directory in which a `vhead.sync.Publisher` publishes: before each batch, the newest weights are
            brought into the model, and `weights_step` of each score says which. A publication that is refused is a
            warning, and the old weights go on.
        min_step: With `follow`: nothing is scored with weights of an earlier step.
        patience: With `min_step`: seconds that a batch waits for such weights before that is an error.
        share_weights: Whether the weights are mapped from their files, so that all processes of a machine share one
            copy: those that `from_pretrained` loads, and with `follow` those of full publications. On the CPU only;
            the files must stay as they are.

    Attributes:
        model: The model.
        token_budget: The tokens of a batch, as given or chosen.

    Raises:
        HeadError: The model has no value head.
        AdapterError: The model has no such adapter.
        VheadError: The model is an encoder-decoder, takes fewer tokens than `max_length`, or cannot take the asked-for
            attention; or `append_eos` is asked for, and the tokenizer has no end-of-sequence token.
        ValueError: The budget, the chunk or the number of threads is below 1, `max_length` is below 2, `truncation` or
            `attention` is none of these, or `attention` is given with `batch_invariant`, which packs nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        **options: Unpack[ScorerOptions],
    ) -> None:
        options = checked_options(options)
        # What a copy in another process is made from.
        self._arguments = {"tokenizer": tokenizer, **options}
        self._other_head: tuple[nn.Module, Conventions] | None = None
        self.model = model
        self._conventions = (options.get("conventions") or Conventions()).resolved(tokenizer)
        self._engine = Engine(model, options, self._conventions)
        limit = LengthLimit.of(self._engine.context_length, options.get("max_length"), options.get("truncation"))
        self._encoder = Encoder(
            tokenizer,
            self._engine.vocabulary_size,
            limit,
            separate_tokens=options.get("separate_tokens", False),
            append_eos=options.get("append_eos", False),
        )
        self._truncates = options.get("truncation") is not None
        self.token_budget = self._engine.token_budget
        self._chunk_tokens = options.get("chunk_tokens") or self.token_budget * _BATCHES_PER_CHUNK
        self._has_said_what_is_left_out = False
        follow = options.get("follow")
        self._following = None if follow is None else Following(follow, options)

    def __reduce__(self) -> tuple[object, ...]:
        """A copy in another process tries anew what the model can take there."""
        return _made_again, (type(self), self.model, self._arguments, self._other_head)

    def __repr__(self) -> str:
        what = f"{self.plan.architecture} on {self._engine.device}, {self.plan.strategy}"
        return f"{type(self).__name__}({what}, token_budget={self.token_budget})"

    @property
    def plan(self) -> ScorerPlan:
        """How this model's rollouts are batched, which faster strategies it cannot take, and why; to be printed."""
        return self._engine.plan

    @property
    def encoder(self) -> Encoder:
        """Turns rollouts into the token ids that this scorer scores; it is used in one thread at a time."""
        return self._encoder

    @property
    def num_outputs(self) -> int:
        """How many numbers the head gives for a hidden state."""
        return self._engine.outputs.count

    @property
    def conventions(self) -> Conventions:
        """Which positions values and rewards are read at."""
        return self._conventions

    @property
    def device(self) -> torch.device:
        """Where the language model takes token ids."""
        return self._engine.device

    @property
    def default_returns(self) -> tuple[str, ...]:
        """What is given where no `returns` are named: values and rewards, and log-probabilities where a checkpoint can.

        A checkpoint without a trained language-model head, such as a classifier's, gives none.
        """
        return tuple(name for name in DEFAULT_RETURNS if name != "logprobs" or not self._engine.untrained_output)

    def with_head(self, head: nn.Module, conventions: Conventions | None = None) -> "Scorer":
        """A scorer of the same language model with another head; what the model can take is not tried again.

        Args:
            head: Maps hidden states `[N, H]` to `[N, K]`, and has K as `num_outputs`.
            conventions: Which positions values and rewards are read at; None: as in this scorer.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._conventions = (conventions or self._conventions).resolved(self._arguments["tokenizer"])
        other._other_head = head, other._conventions
        other._engine = self._engine.with_head(*other._other_head)
        # What is published is of the model's own head.
        other._following = None
        return other

    def asked(self, returns: Sequence[str] | None = None, temperature: float = 1.0, top_logprobs: int = 0) -> Asked:
        """What is asked for by the arguments of `score`, checked.

        None stands for `default_returns`; if log-probabilities are not among these, the log says so once.

        Raises:
            VheadError: The model's checkpoint lacked what a field needs, or its vocabulary has fewer tokens.
            ValueError: A name is unknown, there is none, or a number is out of range.
        """
        default = self.default_returns
        asked = Asked(default if returns is None else check_returns(returns), temperature, top_logprobs)
        self._engine.check(asked)
        if returns is None and default != DEFAULT_RETURNS and not self._has_said_what_is_left_out:
            self._has_said_what_is_left_out = True
            missing = ", ".join(self._engine.untrained_output)
            logger.warning("the checkpoint holds no %s, so the scores are only %s", missing, ", ".join(default))
        return asked

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        head: str | Path | None = None,
        allow_random_head: bool = False,
        normalize_rewards: bool = False,
        trust_remote_code: bool = False,
        **options: Unpack[ScorerOptions],
    ) -> Self:
        """Loads a model, its trained head and its tokenizer.

        Args:
            path: A folder or a hub repository's id.
            dtype: The language model's, such as `"bfloat16"`; None: the checkpoint's own. The head stays float32.
            device: Where the model goes; None: CUDA where there is one, else the CPU.
            head: A file, folder or repository with the head, where `path` does not hold it.
            allow_random_head: Whether a checkpoint without a head gets a new, untrained one.
            normalize_rewards: Whether rewards are normalised by the mean and the standard deviation that the checkpoint
                states, as OpenRLHF writes them.
            trust_remote_code: Whether code that the checkpoint brings along, or names, is run; nobody is asked.
            **options: The constructor's other arguments. An adapter that is named there and not loaded with the
                model is looked for in the folder of its name, where peft saves it.

        Raises:
            HeadNotFoundError: There is no trained head, and a random one is not allowed.
            HeadError: There is a head that does not fit, or its file is broken.
            BodyMismatchError: The checkpoint lacks layers of the language model.
            LoadError: There is no such model, or transformers or peft cannot load or run it.
            VheadError: The model cannot be found, read, or moved to the device.
        """
        critic = load_critic(
            path,
            dtype=dtype,
            device=device,
            head=head,
            allow_random_head=allow_random_head or bool(options.get("heads")),
            trust_remote_code=trust_remote_code,
            adapters=(options.get("policy_adapter"), options.get("value_adapter")),
        )
        if options.get("share_weights"):
            share_weights(critic.model, path)
        if normalize_rewards:
            options["conventions"] = _normalising(options.get("conventions"), critic, path if head is None else head)
        with loading(path):
            return cls(critic.model, critic.tokenizer, **options)

    def score(
        self,
        rollouts: Iterable[Rollout],
        returns: Sequence[str] | None = None,
        temperature: float = 1.0,
        *,
        top_logprobs: int = 0,
        progress: bool = False,
    ) -> Scores:
        """Scores all rollouts.

        Args:
            rollouts: In any order of length; the scores come in the same order. If one of them brings candidates,
                their log-probabilities are given as well, and each has to bring as many.
            returns: Some of values, logprobs, entropy, candidates, reward, prompt_value, bootstrap, steps and tokens;
                None: `default_returns`.
            temperature: Raw logits are divided by it before log-probabilities and entropies are taken.
            top_logprobs: How many of the likeliest tokens are wanted at each position.
            progress: Whether to show progress on standard error when that is a terminal.

        Returns:
            Flat arrays with offsets; empty for no rollouts.

        Raises:
            RecordError: A rollout cannot be scored; the error names it and the field.
            VheadError: The model's checkpoint lacked what a field of `returns` needs.
            ValueError: `returns`, `temperature` or `top_logprobs` is out of range.
        """
        rollouts = list(rollouts)
        asked = self.asked(returns, temperature, top_logprobs)
        if any(getattr(rollout, "candidates", None) is not None for rollout in rollouts):
            asked = replace(asked, returns=(*asked.returns, "candidates"))
        given = (_Given(index, rollout) for index, rollout in enumerate(rollouts))
        with ScoringProgress(total=len(rollouts), shown=progress) as display:
            parts = [chunk.scores for chunk in self.scored(given, asked, on_batch=display.advance)]
        return Scores.concat(parts or [self.nothing(asked)])

    def stream(
        self,
        rollouts: Iterable[Rollout],
        returns: Sequence[str] | None = None,
        temperature: float = 1.0,
        *,
        top_logprobs: int = 0,
        on_error: ErrorHandler | None = None,
    ) -> Iterator[Score]:
        """Scores rollouts as they come, in input order, in memory that does not grow with their number.

        The arguments are those of `chunks`.

        Yields:
            One `Score` per rollout; its `index` is the rollout's position in the input.
        """
        for chunk in self.chunks(rollouts, returns, temperature, top_logprobs=top_logprobs, on_error=on_error):
            yield from chunk

    def chunks(
        self,
        rollouts: Iterable[Rollout],
        returns: Sequence[str] | None = None,
        temperature: float = 1.0,
        *,
        top_logprobs: int = 0,
        on_error: ErrorHandler | None = None,
        on_batch: BatchHandler | None = None,
    ) -> Iterator[Scores]:
        """Scores rollouts as they come, a chunk of them at a time.

        While the model computes one chunk, the next ones are read, tokenised and batched in a thread.

        Args:
            rollouts: Iterated in a thread of its own, no further than two chunks ahead of the one that is computed.
            returns: Some of values, logprobs, entropy, candidates, reward, prompt_value, bootstrap, steps and tokens;
                None: `default_returns`.
            temperature: Raw logits are divided by it before log-probabilities and entropies are taken.
            top_logprobs: How many of the likeliest tokens are wanted at each position.
            on_error: Told of each rollout that cannot be scored, as soon as that is known and maybe in the thread that
                reads, which is then left out; None: the first one is raised, after everything before it has been given.
            on_batch: Told of each batch that is computed: how many rollouts, how many tokens, prompts included, and how
                many tokens went through the model for them.

        Yields:
            The scores of consecutive rollouts, in input order.

        Raises:
            RecordError: A rollout cannot be scored, and `on_error` is None.
            VheadError: The model's checkpoint lacked what a field of `returns` needs.
            ValueError: `returns`, `temperature` or `top_logprobs` is out of range.
        """
        asked = self.asked(returns, temperature, top_logprobs)
        given = (_Given(index, rollout) for index, rollout in enumerate(rollouts))
        for chunk in self.scored(given, asked, on_error=on_error, on_batch=on_batch):
            if len(chunk.scores):
                yield chunk.scores

    def windows(self, *arguments: Any, **named: Any) -> Iterator[Scores]:
        """The old name of `chunks`."""
        warnings.warn("Scorer.windows is now called Scorer.chunks", FutureWarning, stacklevel=2)
        return self.chunks(*arguments, **named)

    def scored(
        self,
        sources: Iterable[Sourced],
        asked: Asked,
        *,
        on_error: ErrorHandler | None = None,
        on_batch: BatchHandler | None = None,
        ids: IdRegistry | None = None,
        check: SourceCheck | None = None,
    ) -> Iterator["ScoredChunk[Sourced]"]:
        """Scores what `sources` give, a chunk at a time, and gives each chunk's scores with the sources they are of.

        The other arguments are those of `chunks`.

        Args:
            sources: Each gives its rollouts when it is asked, in the thread that reads: as many as all others.
            asked: What is asked for, as `Scorer.asked` has checked it.
            on_error: Told of each rollout that cannot be scored.
            on_batch: Told of each batch that is computed.
            ids: Refuses an id that it knows; None: ids need not differ.
            check: Called with each source and its rollouts, and raises `RecordError` if they cannot be scored.
        """
        with Ahead(self._prepared(sources, asked, on_error, ids, check)) as ready:
            before: Underway[Sourced] | None = None
            for chunk in ready:
                underway = self._underway(chunk, asked, on_batch)
                # While the device computes this batch, the chunk before is read back and used.
                underway.queue(1)
                if before is not None:
                    yield from _report(before.chunk, before.finish(), on_error)
                underway.queue(len(chunk.work))
                before = underway
                if chunk.failure is not None or not (underway.computes_behind and ready.has_next):
                    yield from _report(chunk, underway.finish(), on_error)
                    before = None
                if chunk.failure is not None:
                    raise chunk.failure
            if before is not None:
                yield from _report(before.chunk, before.finish(), on_error)

    def nothing(self, asked: Asked) -> Scores:
        """The scores of no rollouts."""
        return self._results([], asked).scores

    def _prepared(
        self,
        sources: Iterable[Sourced],
        asked: Asked,
        on_error: ErrorHandler | None,
        ids: IdRegistry | None,
        check: SourceCheck | None,
    ) -> Iterator[Chunk[Sourced]]:
        """Chunks with all that can be done before the model is needed."""
        encoded = self._encoded(sources, asked, on_error, ids, check)
        for chunk, failure in chunks(encoded, self._chunk_tokens):
            rollouts = [rollout for _, sides in chunk for rollout in sides]
            work = self._engine.work(rollouts, self.token_budget, asked) if asked.computed else []
            yield Chunk([source for source, _ in chunk], rollouts, work, failure)

    def _encoded(
        self,
        sources: Iterable[Sourced],
        asked: Asked,
        on_error: ErrorHandler | None,
        ids: IdRegistry | None,
        check: SourceCheck | None,
    ) -> Iterator[tuple[Sourced, list[Encoded]]]:
        """The rollouts that can be scored. Errors about the others go to `on_error`, or the first one is raised."""
        fits = self.fitting(asked)
        for index, source in enumerate(sources):
            try:
                rollouts = source.rollouts()
                if check is not None:
                    check(source, rollouts)
                name = named(source.where, getattr(rollouts[0], "id", None))
                if ids is not None:
                    ids.add(rollouts[0].id, name)
                names = [name] if len(rollouts) == 1 else [f"{name}, {side}" for side in SIDES]
                encoded = [
                    self._encoder.encode(index, rollout, own, with_spans="token_ids" in asked)
                    for rollout, own in zip(rollouts, names, strict=True)
                ]
                for each in encoded:
                    fits.check(each)
            except RecordError as error:
                if on_error is None:
                    raise
                on_error(error)
            else:
                yield source, encoded

    def fitting(self, asked: Asked) -> "Fitting":
        """Checks rollouts that are scored together, one after the other."""
        return Fitting(asked, self._conventions)

    def _underway(self, chunk: Chunk[Sourced], asked: Asked, on_batch: BatchHandler | None) -> Underway[Sourced]:
        results = self._results(chunk.rollouts, asked)
        return Underway(self._engine, self.model, chunk, asked, results, self._following, on_batch)

    def _results(self, rollouts: Sequence[Encoded], asked: Asked) -> Results:
        return Results(
            rollouts,
            asked,
            self._conventions,
            outputs=self._engine.outputs,
            truncates=self._truncates,
            follows=self._following is not None,
        )


class Fitting:
    """Checks what the columns that are asked for need of each rollout of a stream.

    Args:
        asked: What is asked for.
        conventions: Where steps end.
    """

    def __init__(self, asked: Asked, conventions: Conventions) -> None:
        self._asked = asked
        self._conventions = conventions
        self._first: Encoded | None = None

    def check(self, rollout: Encoded) -> None:
        """Checks the next rollout.

        Raises:
            FieldError: It has no step, no candidates, or not as many candidates as the first one.
        """
        if "steps" in self._asked:
            self._conventions.step_ends(rollout)
        if "candidate_logprobs" in self._asked:
            count = candidate_count(rollout)
            first = self._first = self._first or rollout
            if count != candidate_count(first):
                expected = f"{candidate_count(first)} for each token, as {first.name} has"
                raise FieldError(rollout.name, "candidates", expected=expected, got=str(count))


def _made_again(
    cls: type[Scorer],
    model: nn.Module,
    arguments: dict[str, Any],
    other_head: tuple[nn.Module, Conventions] | None = None,
) -> Scorer:
    scorer = cls(model, **arguments)
    return scorer if other_head is None else scorer.with_head(*other_head)


def _normalising(conventions: Conventions | None, critic: Critic, source: str | Path) -> Conventions:
    mean, std = critic.reward_statistics
    if mean is None and std is None:
        raise HeadError(f"{source}: normalize_rewards needs the mean and std of rewards, which its configuration lacks")
    return replace(
        conventions or Conventions(),
        reward_mean=0.0 if mean is None else mean,
        reward_std=1.0 if std is None else std,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """A rollout that was given as an object, and its position."""

    index: int
    given: Rollout

    @property
    def where(self) -> str:
        return f"record {self.index}"

    def rollouts(self) -> tuple[Rollout]:
        return (self.given,)


@dataclass(frozen=True, slots=True, eq=False)
class ScoredChunk(Generic[Sourced]):
    """Consecutive rollouts that have been scored.

    Attributes:
        sources: Where they come from.
        scores: Their scores, in the same order; where each source gives two rollouts, one after the other.
        last: Where the last one comes from that is done with them, whether or not it could be scored.
    """

    sources: list[Sourced]
    scores: Scores
    last: Sourced


def _report(chunk: Chunk[Sourced], results: Results, on_error: ErrorHandler | None) -> Iterator[ScoredChunk[Sourced]]:
    """Yields the good scores. Errors between them go to `on_error`, or the first one is raised."""
    scores, sources = results.scores, chunk.sources
    each = len(chunk.rollouts) // max(len(sources), 1)
    # Of a source with two bad rollouts, the first one is told of.
    errors = {place // each: results.errors[place] for place in sorted(results.errors, reverse=True)}
    for place, error in sorted(errors.items()):
        if on_error is None:
            if place:
                yield ScoredChunk(sources[:place], scores[: place * each], sources[place - 1])
            raise error
        on_error(error)
    if sources:
        good = [source for place, source in enumerate(sources) if place not in errors]
        bad = {place * each + side for place in errors for side in range(each)}
        yield ScoredChunk(good, scores.without(bad), sources[-1])
