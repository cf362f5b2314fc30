"""`TrainingPass`: rollouts through a model once, with gradients."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vhead.errors import FieldError, VheadError
from vhead.packing import limits
from vhead.packing.plan import Attention
from vhead.packing.self_check import probes
from vhead.packing.strategies import Batch, OneByOne, Strategy
from vhead.rollouts.encoding import Encoded, Encoder, LengthLimit
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.wording import named
from vhead.scoring.engine import candidate_count
from vhead.scoring.logits import LogitsRule
from vhead.training import statistics
from vhead.training.batches import Given, Read, TrainingBatch, mask_of
from vhead.training.finite import watch
from vhead.training.gradient_check import TrainingPlan
from vhead.training.kept_states import KeptStates
from vhead.training.outputs import TrainingOutput
from vhead.training.shared_weight import check_alone
from vhead.training.totals import Share, Totals, is_distributed, of_all_processes, own_totals, tell_refusal
from vhead.training.trained_model import Selected, TrainedModel

# Activations are kept until backward, so that a batch takes more memory than a scorer's.
_CPU_TOKEN_BUDGET = 1024
_DEVICE_TOKEN_BUDGET = 8192
_KEPT_BYTES = 2**30
# Without a rule for the logits of chosen rows, those of a whole batch exist at once; batches are then this small.
_FULL_LOGITS_BYTES = 256 * 1024 * 1024
_FLOAT32_BYTES = 4


class TrainingPass(nn.Module):
    """Packs rollouts, and runs each batch through a model once, with gradients: shared tokens once, nothing padded.

    What the model can take is tried when the pass is made: the gradients of packed sequences are compared with those of
    one sequence at a time, and an error on purpose has to be seen. `plan` says what was found.

    The pass is a module that holds the model. Where several processes train together, wrap the pass, and not the
    model: `DistributedDataParallel(training_pass)`, or `fully_shard` on the layers and then on the pass.

    Args:
        model: A model with a value head, such as `AutoModelForCausalLMWithValueHead`, or a language model without one.
        tokenizer: Needed for rollouts of text or messages.
        token_budget: Tokens of a batch. No rollout may have more. None: 1024 on a CPU, 8192 elsewhere, and longer
            rollouts go alone.
        temperature: Raw logits are divided by it before log-probabilities and entropies are taken.
        returns: What is computed unless a call says otherwise: some of `"values"` and `"logprobs"`, with which
            entropies come; None: all that the model can give.
        attention: How tokens see each other in packed rollouts: `"segments"`, `"mask"` or, away from CPUs, `"flex"`;
            None: the fastest one that the model can be trained with.
        policy_adapter: Which of a model's adapters computes log-probabilities; None: the active one. It is made
            trainable; freeze it afterwards if it is not to be.
        value_adapter: Which one computes values, likewise. If the two differ, the body runs once for each.
        keep_states: Bytes of memory for the hidden states of a frozen body. As long as a batch lives and the body's
            weights do not change, its states are computed once, however many updates there are.
        states_folder: Where states beyond that are written; None: they are computed anew.
        check_finite: Whether backward raises `GradientError` where a gradient is not finite, and names the rollouts.
            Under float16 autocast it never does, as loss scaling looks for such gradients itself.
        accumulate_in_place: Whether backward adds the gradient of the language-model head's weight to its `.grad` part
            by part, so that no other tensor of that size is made. Then `backward()` is the only way to that gradient:
            `torch.autograd.grad` does not see it, nor do hooks on the weight. It is for one process.

    Attributes:
        model: The model.
        token_budget: The tokens of a batch, as given or chosen.

    Raises:
        HeadError: Values are asked for, and the model has no value head.
        AdapterError: The model has no such adapter.
        VheadError: The model is an encoder-decoder, cannot take the asked-for attention, is wrapped for several
            processes already, or its checkpoint lacked the language-model head that is asked for.
        TypeError: The model is none, such as the path of one.
        ValueError: A number is out of range, or `returns` or `attention` is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        token_budget: int | None = None,
        temperature: float = 1.0,
        returns: Sequence[str] | None = None,
        attention: Attention | None = None,
        policy_adapter: str | None = None,
        value_adapter: str | None = None,
        keep_states: int = _KEPT_BYTES,
        states_folder: str | Path | None = None,
        check_finite: bool = True,
        accumulate_in_place: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a loaded language model, got a {type(model).__name__}")
        _check_numbers(token_budget, temperature, keep_states)
        # What a copy, in another process for instance, is made from.
        self._arguments = {
            "tokenizer": tokenizer,
            "token_budget": token_budget,
            "temperature": temperature,
            "returns": returns,
            "attention": attention,
            "policy_adapter": policy_adapter,
            "value_adapter": value_adapter,
            "keep_states": keep_states,
            "states_folder": states_folder,
            "check_finite": check_finite,
            "accumulate_in_place": accumulate_in_place,
        }
        self.model = model
        self.training = model.training
        self._temperature, self._check_finite = temperature, check_finite
        kept = KeptStates(keep_states, None if states_folder is None else Path(states_folder))
        adapters = {"values": value_adapter, "logprobs": policy_adapter}
        self._in_place = accumulate_in_place
        self._trained = TrainedModel(model, attention, adapters, kept, in_place=accumulate_in_place)
        self._returns = self._trained.check_returns(self._trained.returns if returns is None else returns)
        body = self._trained.body
        usual = _CPU_TOKEN_BUDGET if body.device.type == "cpu" else _DEVICE_TOKEN_BUDGET
        self.token_budget, self._takes_longer = token_budget or usual, token_budget is None
        self._vocabulary = limits.vocabulary_size(body.model)
        self._encoder = Encoder(tokenizer, self._vocabulary, LengthLimit(limits.context_length(body.model)))

    def __reduce__(self) -> tuple[object, ...]:
        """A copy tries anew what its model can take."""
        return _made_again, (type(self), self.model, self._arguments)

    @property
    def plan(self) -> TrainingPlan:
        """How rollouts are packed, what the trial of the gradients found, and which faster ways the model cannot take.

        It is plain data, to be printed.
        """
        return self._trained.plan

    def batches(self, rollouts: Iterable[Rollout], *, alone: bool = False) -> list[TrainingBatch]:
        """Packs rollouts into batches, each rollout into one.

        Where several processes train together, all of them have to call this at the same time, each with its own
        rollouts: losses are then means over all of them, and each process gets the same number of batches, as those
        with fewer get empty ones.

        Args:
            rollouts: Those of one optimiser step, or of as many as a mean is to be taken over.
            alone: Whether the other processes are left out of it.

        Returns:
            The batches, in no particular order; they can be shuffled, and used several times.

        Raises:
            FieldError: A rollout cannot be trained on; the error names it and the field.
            TypeError: A rollout came alone, and not in a list.
            VheadError: Another process has refused one of its rollouts, or has another number of candidates.
        """
        is_shared = not alone and is_distributed()
        try:
            encoded = self._encoded(rollouts)
            given, work = Given.of(encoded), self._work(encoded)
        except Exception:
            if is_shared:
                tell_refusal(self._trained.body.device)
            raise
        share = Share(own_totals(encoded), len(work), given.candidates)
        if is_shared:
            share = of_all_processes(share, self._trained.body.device)
            given = replace(given, candidates=share.candidates)
        batches = [self._batch(encoded, given, share.totals, *each) for each in work]
        empty = (self._batch([], given, share.totals, *self._nothing()) for _ in range(share.batches - len(work)))
        return [*batches, *empty]

    def forward(self, batch: TrainingBatch, returns: Sequence[str] | None = None) -> TrainingOutput:
        """Runs a batch through the model.

        Args:
            batch: One of `batches`.
            returns: What is computed, as in the constructor; None: what it said.

        Returns:
            Flat tensors, one entry for each completion token, with gradients.

        Raises:
            HeadError: As in the constructor.
            VheadError: As in the constructor; or the model makes its own logits, and the constructor was not told that
                log-probabilities are wanted.
            ValueError: As in the constructor.
        """
        if not isinstance(batch, TrainingBatch):
            raise TypeError(f"batch: expected one that batches() gave, got a {type(batch).__name__}")
        asked = self._returns if returns is None else self._trained.check_returns(returns)
        rule, found = self._trained.rule, dict[str, Tensor | None]()
        if "logprobs" in asked and rule is None:
            self._check_logits()
            selected, logits = self._trained.states_and_logits(batch, asked)
            found |= self._of_logits(batch, logits)
        else:
            selected = self._trained.selected(batch, asked)
            if "logprobs" in asked and rule is not None:
                found |= self._of_states(batch, selected["logprobs"], rule)
        if "values" in asked:
            found["values"], found["value_logits"] = self._trained.head_outputs(selected["values"].states)
        self._watch(batch, selected, found)
        return TrainingOutput(**found)

    def _of_states(self, batch: TrainingBatch, selected: Selected, rule: LogitsRule) -> dict[str, Tensor | None]:
        states, weight = selected
        if self._in_place:
            check_alone(rule.lm_head)
        read = batch.read.to(states.device)
        written = states if read.written is None else states.index_select(0, read.written)
        given = (written, rule, read.targets, read.candidates, self._temperature, weight)
        within = self._trained.policy_adapter
        return _aligned(statistics.of_states(*given, in_place=self._in_place, within=within), read)

    def _of_logits(self, batch: TrainingBatch, logits: Tensor) -> dict[str, Tensor | None]:
        read = batch.read.to(logits.device)
        written = logits if read.written is None else logits.index_select(0, read.written)
        return _aligned(statistics.of_logits(written, read.targets, read.candidates, self._temperature), read)

    def _check_logits(self) -> None:
        """Raises unless batches were made so that the model can give its own logits."""
        if "logprobs" not in self._returns:
            raise VheadError(
                "returns: expected no log-probabilities of a pass that was made without them, because the model makes "
                "its own logits, for which batches share no tokens; name them when the pass is made"
            )

    def _watch(self, batch: TrainingBatch, selected: dict[str, Selected], found: dict[str, Tensor | None]) -> None:
        if not self._check_finite or _scales_losses(batch.mask.device):
            return
        for name, tensor in found.items():
            if tensor is not None:
                watch(batch, name, tensor)
        for tensor in {id(states): states for states, _ in selected.values()}.values():
            watch(batch, "the hidden states", tensor)

    def _encoded(self, rollouts: Iterable[Rollout]) -> list[Encoded]:
        if isinstance(rollouts, Rollout):
            raise TypeError("rollouts: expected a list of them, got one Rollout alone")
        encoded = [
            self._encoder.encode(index, rollout, named(f"record {index}", getattr(rollout, "id", None)))
            for index, rollout in enumerate(rollouts)
        ]
        for rollout in encoded:
            self._check(rollout, encoded[0])
        return encoded

    def _check(self, rollout: Encoded, first: Encoded) -> None:
        """Raises unless a rollout fits the budget, and brings candidates if the first one does."""
        if not self._takes_longer and len(rollout) > self.token_budget:
            expected = f"at most the token_budget's {self.token_budget} tokens together with the prompt"
            got = f"{rollout.prompt_length} + {rollout.completion_length} = {len(rollout)}; give a larger token_budget"
            raise FieldError(rollout.name, "completion", expected=expected, got=got)
        if (rollout.candidates is None) != (first.candidates is None) or (
            first.candidates is not None and candidate_count(rollout) != candidate_count(first)
        ):
            count = 0 if first.candidates is None else candidate_count(first)
            got = "none" if rollout.candidates is None else str(candidate_count(rollout))
            raise FieldError(rollout.name, "candidates", expected=f"{count} for each token, as {first.name}", got=got)

    def _work(self, encoded: Sequence[Encoded]) -> list[tuple[Strategy[Any], Batch[Any]]]:
        ways, budget = self._trained.ways, self.token_budget
        groups = ways.groups([len(rollout) for rollout in encoded])
        if self._trained.rule is None and "logprobs" in self._returns:
            budget = min(budget, max(1, _FULL_LOGITS_BYTES // (_FLOAT32_BYTES * self._vocabulary)))
            groups = ways.without_sharing([len(rollout) for rollout in encoded])
        work = []
        for strategy, places in groups:
            sequences = [encoded[place].tokens for place in places]
            prompts = [encoded[place].prompt_length for place in places]
            for batch in strategy.batches(sequences, prompts, budget):
                work.append((strategy, replace(batch, places=tuple(places[at] for at in batch.places))))
        return work

    def _nothing(self) -> tuple[Strategy[Any], Batch[Any]]:
        """A batch of no rollouts: one token, that the model runs and nobody reads."""
        body = self._trained.body
        strategy = OneByOne(body)
        (batch,) = strategy.batches([probes(body.model, 1)[0]], [1], 1)
        return strategy, replace(batch, places=(), rows=())

    def _batch(
        self, encoded: Sequence[Encoded], given: Given, totals: Totals, strategy: Strategy[Any], content: Batch[Any]
    ) -> TrainingBatch:
        rollouts = [encoded[place] for place in content.places]
        lengths = [rollout.completion_length for rollout in rollouts]
        return TrainingBatch(
            places=np.array(content.places, np.int64),
            offsets=np.cumsum([0, *lengths]),
            mask=torch.from_numpy(mask_of(rollouts)).to(self._trained.body.device),
            tokens=content.tokens,
            totals=totals,
            given=given,
            strategy=strategy,
            content=content,
            read=Read.of(rollouts, content.rows, given.candidates),
        )


def _made_again(cls: type[TrainingPass], model: nn.Module, arguments: dict[str, Any]) -> TrainingPass:
    return cls(model, **arguments)


def _aligned(found: statistics.Statistics, read: Read) -> dict[str, Tensor | None]:
    """What was found of W written tokens, with 0 at the other ones of T."""
    columns = {"logprobs": found.logprobs, "entropy": found.entropy, "candidate_logprobs": found.candidate_logprobs}
    if read.written is None:
        return dict(columns)
    count, places = len(read.predicting), read.written
    return {
        name: None if column is None else column.new_zeros(count, *column.shape[1:]).index_copy(0, places, column)
        for name, column in columns.items()
    }


def _scales_losses(device: torch.device) -> bool:
    """Whether autocast to float16 is on, with which losses are scaled, and what overflows is found and skipped."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16


def _check_numbers(token_budget: int | None, temperature: float, keep_states: int) -> None:
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"token_budget: expected at least 1, got {token_budget}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above zero, got {temperature}")
    if keep_states < 0:
        raise ValueError(f"keep_states: expected bytes, 0 or more, got {keep_states}")
