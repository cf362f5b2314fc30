"""Scoring rollouts: values, log-probabilities, entropies and rewards from one backbone pass."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import torch
from torch import nn

from vhead.errors import HeadError, RecordError, loading
from vhead.scoring.ahead import Ahead
from vhead.scoring.conventions import Conventions
from vhead.scoring.encode import Encoded, Encoder, IdRegistry
from vhead.scoring.engine import Engine, Work
from vhead.scoring.loading import Critic, load_critic
from vhead.scoring.plan import ATTENTIONS, Attention, ScorerPlan
from vhead.scoring.progress import ScoringProgress
from vhead.scoring.rollout import Rollout
from vhead.scoring.scores import Score, Scores, check_fields
from vhead.scoring.truncation import LengthLimit, Truncation
from vhead.scoring.window import Results, windows

DEFAULT_RETURNS = ("values", "logprobs", "reward")

_CPU_TOKEN_BUDGET = 2048
_DEVICE_TOKEN_BUDGET = 16384
# A window is batched and written as a whole: long enough to fill batches evenly, short enough that even a slow model
# finishes one in seconds.
_BATCHES_PER_WINDOW = 8
_REMEMBERED_IDS = 65536

ErrorHandler = Callable[[RecordError], None]
BatchHandler = Callable[[int, int, int], None]
Naming = Callable[[int, Rollout], str]


def default_name(index: int, rollout: Rollout) -> str:
    """What errors call a rollout: its position in the input, and its id where it has one."""
    name = getattr(rollout, "id", None)
    return f"record {index}" if name is None else f"record {index} (id {name!r})"


class ScorerOptions(TypedDict, total=False):
    """The arguments of `Scorer` that are neither the model nor the tokenizer."""

    token_budget: int | None
    window_tokens: int | None
    num_threads: int | None
    conventions: Conventions | None
    batch_invariant: bool
    attention: Attention | None
    truncation: Truncation | None
    max_length: int | None


class Scorer:
    """Gives values, log-probabilities, entropies and rewards of rollouts.

    The value of completion token t is the head's output at the position that predicts it; the reward is the head's
    output at the last completion token itself. Dropout is off while scoring, whatever mode the model is in.

    Rollouts that begin with the same tokens share their computation where the model can take that: see `plan`. What
    the model can take is tried on a few tokens when the scorer is made.

    Args:
        model: A language model with a value head, such as `AutoModelForCausalLMWithValueHead`.
        tokenizer: Needed for rollouts of text or messages.
        token_budget: Tokens of a batch; None: 2048 on a CPU, 16384 elsewhere.
        window_tokens: Tokens of rollouts that are read before they are batched, among which shared beginnings are
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

    Attributes:
        model: As given.
        token_budget: As given or chosen.

    Raises:
        HeadError: The model has no value head, or one with several outputs.
        VheadError: The model is an encoder-decoder, takes fewer tokens than `max_length`, or cannot take the asked-for
            attention.
        ValueError: The budget, the window or the number of threads is below 1, `max_length` is below 2, `truncation` or
            `attention` is none of these, or `attention` is given with `batch_invariant`, which packs nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,  # noqa: ANN401, any tokenizer of transformers
        *,
        token_budget: int | None = None,
        window_tokens: int | None = None,
        num_threads: int | None = None,
        conventions: Conventions | None = None,
        batch_invariant: bool = False,
        attention: Attention | None = None,
        truncation: Truncation | None = None,
        max_length: int | None = None,
    ) -> None:
        numbers = {"token_budget": token_budget, "window_tokens": window_tokens, "num_threads": num_threads}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if attention is not None and (batch_invariant or attention not in ATTENTIONS):
            expected = "None with batch_invariant" if batch_invariant else f"one of {', '.join(ATTENTIONS)}"
            raise ValueError(f"attention: expected {expected}, got {attention!r}")
        self.model = model
        self._conventions = conventions or Conventions()
        self._engine = Engine(
            model, num_threads, self._conventions, batch_invariant=batch_invariant, attention=attention
        )
        limit = LengthLimit.of(self._engine.context_length, max_length, truncation)
        self._encoder = Encoder(tokenizer, self._engine.vocabulary_size, limit)
        self._truncates = truncation is not None
        is_cpu = self._engine.device.type == "cpu"
        self.token_budget = token_budget or (_CPU_TOKEN_BUDGET if is_cpu else _DEVICE_TOKEN_BUDGET)
        self._window_tokens = window_tokens or self.token_budget * _BATCHES_PER_WINDOW

    @property
    def plan(self) -> ScorerPlan:
        """How this model's rollouts are batched, which faster ways it cannot take, and why; to be printed."""
        return self._engine.plan

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
            **options: The constructor's other arguments.

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
            allow_random_head=allow_random_head,
            trust_remote_code=trust_remote_code,
        )
        if normalize_rewards:
            options["conventions"] = _normalising(options.get("conventions"), critic, path if head is None else head)
        with loading(path):
            return cls(critic.model, critic.tokenizer, **options)

    def score(
        self,
        rollouts: Iterable[Rollout],
        returns: Sequence[str] = DEFAULT_RETURNS,
        temperature: float = 1.0,
        *,
        progress: bool = False,
    ) -> Scores:
        """Scores all rollouts.

        Args:
            rollouts: In any order of length; the scores come in the same order.
            returns: Some of values, logprobs, entropy, reward.
            temperature: Raw logits are divided by it before log-probabilities and entropies are taken.
            progress: Whether to show progress on standard error when that is a terminal.

        Returns:
            Flat float32 arrays with offsets; empty for no rollouts.

        Raises:
            RecordError: A rollout cannot be scored; the error names it and the field.
            VheadError: The model's checkpoint lacked what a field of `returns` needs.
            ValueError: `returns` or `temperature` is out of range.
        """
        rollouts = list(rollouts)
        fields = check_fields(returns)
        parts = [self._results([], fields).before_first_error()]
        with ScoringProgress(total=len(rollouts), shown=progress) as display:
            parts += self.windows(rollouts, fields, temperature, remembered_ids=None, on_batch=display.advance)
        return Scores.concat(parts)

    def stream(
        self,
        rollouts: Iterable[Rollout],
        returns: Sequence[str] = DEFAULT_RETURNS,
        temperature: float = 1.0,
        *,
        on_error: ErrorHandler | None = None,
    ) -> Iterator[Score]:
        """Scores rollouts as they come, in input order, in memory that does not grow with their number.

        The arguments are those of `windows`.

        Yields:
            One `Score` per rollout; its `index` is the rollout's position in the input.
        """
        for window in self.windows(rollouts, returns, temperature, on_error=on_error):
            yield from window

    def windows(
        self,
        rollouts: Iterable[Rollout | RecordError],
        returns: Sequence[str] = DEFAULT_RETURNS,
        temperature: float = 1.0,
        *,
        on_error: ErrorHandler | None = None,
        on_batch: BatchHandler | None = None,
        name_of: Naming = default_name,
        remembered_ids: int | None = _REMEMBERED_IDS,
    ) -> Iterator[Scores]:
        """Scores rollouts as they come, a window of them at a time.

        While the model computes one window, the next ones are read, tokenised and batched in a thread.

        Args:
            rollouts: Iterated in a thread of its own, no further than two windows ahead of the one that is computed. An
                error among them stands for a record that holds no rollout.
            returns: Some of values, logprobs, entropy, reward.
            temperature: Raw logits are divided by it before log-probabilities and entropies are taken.
            on_error: Told of each rollout that cannot be scored, which is then left out; None: the first one is raised,
                after everything before it has been given.
            on_batch: Told of each batch that is computed: how many rollouts, how many tokens, prompts included, and how
                many tokens went through the model for them.
            name_of: What errors call a rollout.
            remembered_ids: How many of the last ids are compared with each new one, None for all.

        Yields:
            The scores of consecutive rollouts, in input order.

        Raises:
            RecordError: A rollout cannot be scored, and `on_error` is None.
            VheadError: The model's checkpoint lacked what a field of `returns` needs.
            ValueError: `returns` or `temperature` is out of range.
        """
        fields = check_fields(returns)
        self._engine.check(fields)
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        prepared = self._prepared(rollouts, fields, name_of, IdRegistry(remembered_ids), skips=on_error is not None)
        with Ahead(prepared) as ready:
            for window in ready:
                results = self._score(window, fields, temperature, on_batch)
                yield from _report(results, window.errors, on_error)
                if window.failure is not None:
                    raise window.failure

    def _prepared(
        self,
        rollouts: Iterable[Rollout | RecordError],
        fields: Sequence[str],
        name_of: Naming,
        ids: IdRegistry,
        *,
        skips: bool,
    ) -> Iterator["_Window"]:
        """Windows with all that can be done before the model is needed."""
        errors: list[RecordError] = []
        encoded = self._encoded(rollouts, errors if skips else None, name_of, ids)
        for window, failure in windows(encoded, self._window_tokens):
            left_out, errors[:] = list(errors), []
            yield _Window(window, self._engine.work(window, self.token_budget, fields), left_out, failure)
        if errors:
            yield _Window([], [], errors, None)

    def _encoded(
        self,
        rollouts: Iterable[Rollout | RecordError],
        errors: list[RecordError] | None,
        name_of: Naming,
        ids: IdRegistry,
    ) -> Iterator[Encoded]:
        """The rollouts that can be scored; the others' errors are collected, or the first one is raised."""
        for index, rollout in enumerate(rollouts):
            try:
                if isinstance(rollout, RecordError):
                    raise rollout
                name = name_of(index, rollout)
                encoded = self._encoder.encode(index, rollout, name)
                ids.add(encoded.id, name)
            except RecordError as error:
                if errors is None:
                    raise
                errors.append(error)
            else:
                yield encoded

    def _score(
        self, window: "_Window", fields: Sequence[str], temperature: float, on_batch: BatchHandler | None
    ) -> Results:
        results = self._results(window.rollouts, fields)
        for work in window.work:
            batch = work.batch
            results.put(batch.places, self._engine.score(window.rollouts, work, fields, temperature))
            if on_batch is not None:
                on_batch(len(batch.places), sum(len(window.rollouts[place]) for place in batch.places), batch.tokens)
        self._engine.forget()
        return results

    def _results(self, rollouts: Sequence[Encoded], fields: Sequence[str]) -> Results:
        return Results(rollouts, fields, self._conventions, truncates=self._truncates)


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
class _Window:
    """Consecutive rollouts, ready for the model.

    Attributes:
        rollouts: In input order.
        work: Their batches.
        errors: Of rollouts among them that are left out.
        failure: What ended the input after them.
    """

    rollouts: list[Encoded]
    work: list[Work]
    errors: list[RecordError]
    failure: Exception | None


def _report(results: Results, left_out: Sequence[RecordError], on_error: ErrorHandler | None) -> Iterator[Scores]:
    """The good scores; the errors between them go to `on_error`, or the first one ends it."""
    if on_error is not None:
        for error in [*left_out, *results.errors]:
            on_error(error)
        yield from results.good()
        return
    scores = results.before_first_error()
    if len(scores):
        yield scores
    for error in results.errors:
        raise error
