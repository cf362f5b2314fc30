"""The model's side of scoring: rollouts in, the asked-for fields of each out."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vhead.backbone.placement import Arriving, to_device
from vhead.errors import FieldError, HeadError, VheadError
from vhead.heads import stacked
from vhead.ops.matrix_unit import has_matrix_unit
from vhead.packing import limits
from vhead.packing.adapters import check_adapter, running_adapter, using_adapter
from vhead.packing.budget import chosen
from vhead.packing.gates import UNIT_ROWS, uses_matrix_unit
from vhead.packing.plan import find_ways
from vhead.packing.strategies import Batch, Body, Rows, Strategy
from vhead.rollouts.encoding import Encoded
from vhead.scoring.chunks import Outputs
from vhead.scoring.conventions import Conventions
from vhead.scoring.fields import COLUMNS, NOTHING, Asked, empty
from vhead.scoring.logits import Statistics, find_logits_rule, statistics_of_logits, token_statistics
from vhead.scoring.options import ScorerOptions

Fields = dict[str, NDArray[Any]]

# Without a rule for the logits of chosen rows, those of a whole batch exist at once; batches are then this small.
_FULL_LOGITS_BYTES = 64 * 1024 * 1024
_FLOAT32_BYTES = 4
# The options that name adapters: log-probabilities and entropies are by the one, and what the head gives by the other.
_POLICY, _VALUE = "policy_adapter", "value_adapter"


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A batch of a chunk, and the strategy that takes it through the model; `batch.places` count in the chunk."""

    strategy: Strategy[Any]
    batch: Batch[Any]


class Engine:
    """Runs a language model with a value head over rollouts.

    Args:
        model: `.pretrained_model` is the language model, `.v_head` maps `[..., H]` to `[..., K]`. With heads of their
            own among the options, it can be a language model itself.
        options: The scorer's; of them the threads, the heads, the adapters, the attention and batch invariance.
        conventions: What is read where; a separator of steps is token ids.

    Attributes:
        outputs: What the head gives.
        device: The device that token ids go to.
        vocabulary_size: How many token ids there are; each is below it.
        context_length: Tokens that the model takes at once, None where it states no limit.
        plan: How rollouts are batched and logits reached.
        token_budget: The tokens of a batch, as given or chosen.
        untrained_output: The parameters of the language-model head that were drawn and not loaded, by name.

    Raises:
        HeadError: The model has no value head.
        AdapterError: The model has no such adapter.
        VheadError: The model is an encoder-decoder, or cannot take the asked-for attention.
        ValueError: There is no such attention, or it is asked for together with batch invariance.
    """

    def __init__(self, model: nn.Module, options: ScorerOptions, conventions: Conventions) -> None:
        heads = options.get("heads")
        body = getattr(model, "pretrained_model", None if heads is None else model)
        head = getattr(model, "v_head", None) if heads is None else stacked(heads)
        if not isinstance(body, nn.Module) or not isinstance(head, nn.Module):
            raise HeadError(f"model: expected a language model with a value head, got a {type(model).__name__}")
        self._model, self._head = model, head
        self.outputs = Outputs.of(head)
        self._num_threads = options.get("num_threads")
        self._conventions = conventions
        self._body = Body.decoder_only(body)
        self.device: torch.device = self._body.device
        self.vocabulary_size = limits.vocabulary_size(body)
        self.context_length = limits.context_length(body)
        self.untrained_output = untrained_output(model, body)
        self._pad_token = limits.pad_token(body.config)
        self._adapters = {_POLICY: options.get("policy_adapter"), _VALUE: options.get("value_adapter")}
        for argument, adapter in self._adapters.items():
            check_adapter(body, argument, adapter)
        with self._computing(), using_adapter(body, self._adapters[_POLICY]):
            self._rule = find_logits_rule(body, self._body.plan)
            self._ways = find_ways(
                self._body,
                batch_invariant=options.get("batch_invariant", False),
                own_logits=self._rule is None,
                attention=options.get("attention"),
            )
            budget = chosen(self._body, self._ways.usual, options.get("token_budget"))
        self.token_budget = budget.tokens
        logits = "of the whole batch, by the model" if self._rule is None else str(self._rule)
        named = {"log-probabilities": self._adapters[_POLICY], "values": self._adapters[_VALUE]}
        self.plan = replace(
            self._ways.plan,
            logits=logits,
            batches=str(budget),
            matrix_unit=", ".join(self._by_matrix_unit()),
            adapters=", ".join(f"{what} by {adapter}" for what, adapter in named.items() if adapter is not None),
        )

    def with_head(self, head: nn.Module, conventions: Conventions) -> "Engine":
        """The same engine with another head, read by these conventions; what the model can take is not tried again."""
        other = copy.copy(self)
        other._head, other.outputs, other._conventions = head, Outputs.of(head), conventions
        return other

    def _by_matrix_unit(self) -> Iterator[str]:
        if uses_matrix_unit(self._body.fused.gates):
            yield f"gated layers of batches from {UNIT_ROWS} tokens on"
        if self._ways.plan.attention == "segments" and self._attends_by_matrix_unit():
            yield "attention"
        if self._rule is not None and self._rule.uses_matrix_unit:
            yield "token statistics"

    def _attends_by_matrix_unit(self) -> bool:
        return self.device.type == "cpu" and self._body.dtype == torch.bfloat16 and has_matrix_unit()

    @property
    def selects_rows(self) -> bool:
        """Whether logits are computed for the scored tokens only, by a rule that the model's own logits confirmed."""
        return self._rule is not None

    def check(self, asked: Asked) -> None:
        """Checks that this model can give what is asked for.

        Raises:
            VheadError: Log-probabilities or entropies are asked for, and the checkpoint had no language-model head.
        """
        if asked.top > self.vocabulary_size:
            raise VheadError(f"top_logprobs: expected at most the vocabulary's {self.vocabulary_size}, got {asked.top}")
        if self.untrained_output and asked.needs_logits:
            raise VheadError(
                "returns: expected only what the head gives, such as values and reward, because the checkpoint holds "
                f"no {', '.join(self.untrained_output)} and log-probabilities would come from random weights, "
                f"got {', '.join(asked.computed)}"
            )

    def work(self, chunk: Sequence[Encoded], token_budget: int, asked: Asked) -> list[Work]:
        """How a chunk is batched, for what is asked for; each rollout is in one batch."""
        groups = self._ways.groups([len(rollout) for rollout in chunk])
        if asked.needs_logits and self._rule is None:
            token_budget = min(token_budget, max(1, _FULL_LOGITS_BYTES // (_FLOAT32_BYTES * self.vocabulary_size)))
            groups = self._ways.without_sharing([len(rollout) for rollout in chunk])
        work = []
        for strategy, places in groups:
            sequences = [chunk[place].tokens for place in places]
            prompts = [chunk[place].prompt_length for place in places]
            for batch in strategy.batches(sequences, prompts, token_budget):
                work.append(Work(strategy, replace(batch, places=tuple(places[at] for at in batch.places))))
        return work

    @property
    def computes_behind(self) -> bool:
        """Whether the device computes a batch while the host goes on, so that more may be queued before it is read."""
        return self.device.type != "cpu"

    def score(self, chunk: Sequence[Encoded], work: Work, asked: Asked) -> "Queued":
        """Gives a batch to the device, without waiting for it.

        Raises:
            VheadError: The device has not enough memory for the batch.
        """
        rollouts = [chunk[place] for place in work.batch.places]
        with _out_of_memory_named(work.batch.tokens), self._computing():
            read, computed = self._score(rollouts, work, asked)
            return Queued(self, rollouts, work.batch.tokens, asked, read, Arriving(computed))

    def _finished(self, queued: "Queued") -> Fields:
        rollouts, asked = queued.rollouts, queued.asked
        with _out_of_memory_named(queued.tokens):
            computed = queued.read.aligned(queued.computed.arrays(), self._conventions)
            if len(rollouts) == 1 or all(np.isfinite(array).all() for array in computed.values()):
                return computed
            with self._computing():
                return self._one_by_one(rollouts, asked)

    def _one_by_one(self, rollouts: Sequence[Encoded], asked: Asked) -> Fields:
        """Scores each rollout of a batch alone, if a number is not finite: a masked NaN is still NaN, and spreads."""
        alone, parts = self._ways.alone, []
        for rollout in rollouts:
            (batch,) = alone.batches([rollout.tokens], [rollout.prompt_length], 1)
            read, computed = self._score([rollout], Work(alone, batch), asked)
            parts.append(read.aligned(Arriving(computed).arrays(), self._conventions))
        return {name: np.concatenate([part[name] for part in parts]) for name in asked.computed}

    def _score(self, rollouts: Sequence[Encoded], work: Work, asked: Asked) -> tuple["Read", dict[str, Tensor]]:
        """What is read off a batch, and the computed columns, which the device may still be computing."""
        read = Read.of(rollouts, work.batch, self._conventions, self._pad_token, asked)
        computed: dict[str, Tensor] = {}
        states = None
        if asked.needs_logits:
            with self._through(_POLICY):
                states, computed = self._statistics(work, read, asked)
        if any(name in asked for name in read.of_head):
            if states is None or self._has_two_adapters:
                with self._through(_VALUE):
                    states = work.strategy.states_of(work.batch, read.rows)
            computed |= self._head_outputs(states, read, asked)
        return read, {name: computed[name] for name in asked.computed}

    def _statistics(self, work: Work, read: "Read", asked: Asked) -> tuple[Tensor, dict[str, Tensor]]:
        """The states of a batch, and what is asked about the distributions there."""
        wanted = read.statistics(asked)
        if self._rule is None:
            states, logits = work.strategy.states_and_logits(work.batch)
            rows = to_device(torch.from_numpy(read.rows), states.device)
            return states[rows], statistics_of_logits(logits, torch.from_numpy(read.rows)[read.written], wanted)
        states = work.strategy.states_of(work.batch, read.rows)
        # Observations cost no logits: only the rows that predict a token of the model's are read.
        return states, token_statistics(states[to_device(read.written, states.device)], self._rule, wanted)

    @property
    def _has_two_adapters(self) -> bool:
        policy, value = self._adapters.values()
        model = self._body.model
        return policy != value and running_adapter(model, policy) != running_adapter(model, value)

    @contextmanager
    def _through(self, adapter: str) -> Iterator[None]:
        """Runs the model with the adapter that this option names."""
        if self._has_two_adapters:
            # What was kept of shared tokens may be the other one's.
            self.forget()
        with using_adapter(self._body.model, self._adapters[adapter]):
            yield

    def forget(self) -> None:
        """Drops what was kept of the model's states, as its weights may change."""
        self._ways.usual.forget()

    def _head_outputs(self, states: Tensor, read: "Read", asked: Asked) -> dict[str, Tensor]:
        """The head sees the rows that are read and no others."""
        rows = {name: index for name, index in read.of_head.items() if name in asked}
        if not rows:
            return {}
        index = to_device(torch.cat(list(rows.values())), states.device)
        outputs = self._head(states[index]).float()
        parts = dict(zip(rows, outputs.split([len(part) for part in rows.values()]), strict=True))
        if "steps" in parts:
            parts["steps"] = self.outputs.probable(parts["steps"])
        # Steps keep their dimension of outputs, however many there are.
        return {
            name: part.squeeze(-1) if name != "steps" and part.shape[-1] == 1 else part for name, part in parts.items()
        }

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Evaluation mode, no gradients and the asked-for threads; all as before afterwards."""
        training = [module for module in self._model.modules() if module.training]
        threads = torch.get_num_threads()
        try:
            for module in training:
                module.training = False
            if self._num_threads is not None:
                torch.set_num_threads(self._num_threads)
            # Not inference mode: what a model caches on its first call would then be of no use to training.
            with torch.no_grad():
                yield
        finally:
            if self._num_threads is not None:
                torch.set_num_threads(threads)
            for module in training:
                module.training = True


@contextmanager
def _out_of_memory_named(tokens: int) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise VheadError(
            f"out of memory with a batch of {tokens} tokens; a smaller token_budget "
            f"(--token-budget) needs less: {str(error).splitlines()[0]}"
        ) from error


@dataclass(frozen=True, slots=True, eq=False)
class Queued:
    """A batch that the device computes, or has computed.

    Attributes:
        engine: What queued it.
        rollouts: Those of the batch.
        tokens: Tokens that the model computes for it.
        asked: What is asked for.
        read: What is read off it.
        computed: The columns, on their way to the host.
    """

    engine: Engine
    rollouts: Sequence[Encoded]
    tokens: int
    asked: Asked
    read: "Read"
    computed: Arriving

    def fields(self) -> Fields:
        """The computed columns of the rollouts, one after the other in the batch's order; waits for the device.

        Raises:
            VheadError: The device has not enough memory to compute a batch again that has numbers which are not finite.
        """
        return self.engine._finished(self)


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What is read off a batch's hidden states `[N, H]`, for rollouts with T computed entries in all.

    Attributes:
        rows: The R of the N rows that are read, in order, int64 `[R]`.
        of_head: Which of the R rows the head is read at, for each column that it gives, int64.
        written: Which of them predict a token of the model's, int64 `[W]`.
        targets: The tokens that they predict, int64 `[W]`.
        candidates: The other tokens that are asked about there, int64 `[W, M]`, or None.
        places: Which of the T entries they are, int64 `[W]`; None: all of them.
        counts: Computed entries of each rollout.
    """

    rows: Rows
    of_head: dict[str, Tensor]
    written: Tensor
    targets: Tensor
    candidates: Tensor | None
    places: NDArray[np.int64] | None
    counts: tuple[int, ...]

    @classmethod
    def of(
        cls,
        rollouts: Sequence[Encoded],
        batch: Batch[Any],
        conventions: Conventions,
        pad_token: int | None,
        asked: Asked,
    ) -> "Read":
        """Finds what to read off a batch by these conventions."""
        pairs = list(zip(batch.rows, rollouts, strict=True))
        first = [conventions.first_scored(rollout) for rollout in rollouts]
        predicting = np.concatenate([rows[start - 1 : -1] for rows, start in zip(batch.rows, first, strict=True)])
        targets = [rollout.tokens[start:] for rollout, start in zip(rollouts, first, strict=True)]
        of_head = {"values": predicting}
        if "reward" in asked:
            rewarded = [rows[conventions.rewarded(rollout, pad_token)] for rows, rollout in pairs]
            of_head["reward"] = np.asarray(rewarded, np.int64)
        if "prompt_value" in asked:
            of_head["prompt_value"] = np.asarray([rows[rollout.prompt_length - 1] for rows, rollout in pairs], np.int64)
        if "bootstrap" in asked:
            of_head["bootstrap"] = np.asarray([rows[-1] for rows in batch.rows], np.int64)
        if "steps" in asked:
            steps = [rows[rollout.prompt_length + conventions.step_ends(rollout)] for rows, rollout in pairs]
            of_head["steps"] = np.concatenate(steps)
        places = None
        if any(rollout.mask is not None for rollout in rollouts):
            observed = np.concatenate([conventions.needs_no_logits(rollout) for rollout in rollouts])
            places = np.flatnonzero(~observed)
        chosen = slice(None) if places is None else places
        candidates = None
        if "candidate_logprobs" in asked:
            given = [_candidates(rollout, len(own)) for rollout, own in zip(rollouts, targets, strict=True)]
            candidates = torch.from_numpy(np.concatenate(given)[chosen])
        written = predicting[chosen] if asked.needs_logits else predicting[:0]
        of_head = {name: rows for name, rows in of_head.items() if name in asked}
        read = np.unique(np.concatenate([written, *of_head.values()]))
        return cls(
            rows=read,
            of_head={name: torch.from_numpy(np.searchsorted(read, rows)) for name, rows in of_head.items()},
            written=torch.from_numpy(np.searchsorted(read, written)),
            targets=torch.from_numpy(np.concatenate(targets)[chosen]),
            candidates=candidates,
            places=places,
            counts=tuple(map(len, targets)),
        )

    def statistics(self, asked: Asked) -> Statistics:
        """What is asked about the distributions of the rows in `written`."""
        entropy = "entropy" in asked
        return Statistics(self.targets, self.candidates, asked.temperature, entropy=entropy, top=asked.top)

    def aligned(self, computed: Fields, conventions: Conventions) -> Fields:
        """Brings computed columns into the form that the conventions ask for, with nothing at observations."""
        if "reward" in computed:
            computed["reward"] = conventions.normalised(computed["reward"])
        starts = np.cumsum([0, *self.counts[:-1]])
        for name, found in computed.items():
            column = COLUMNS[name]
            if column.origin == "logits" and self.places is not None:
                whole = empty(name, sum(self.counts), found.shape[1:])
                whole[self.places] = found
                computed[name] = whole
            if column.unit == "token" and conventions.leading_zeros:
                computed[name] = np.insert(computed[name], starts, NOTHING.get(name, 0), axis=0)
        return computed


def candidate_count(rollout: Encoded) -> int:
    """How many candidates a rollout brings for each token.

    Raises:
        FieldError: It brings none.
    """
    if rollout.candidates is None:
        raise FieldError(rollout.name, "candidates", expected="candidates, because they are asked for", got="none")
    return int(rollout.candidates.shape[1])


def _candidates(rollout: Encoded, entries: int) -> NDArray[np.int64]:
    """The candidates of a rollout's computed entries; before its completion, these are the tokens themselves."""
    count, own = candidate_count(rollout), rollout.candidates
    before = rollout.tokens[len(rollout) - entries : rollout.prompt_length]
    return np.concatenate(
        [np.repeat(before[:, None], count, axis=1), np.empty((0, count), np.int64) if own is None else own]
    )


def untrained_output(model: Any, body: Any) -> list[str]:
    """The parameters of the language-model head that were drawn and not loaded, by name."""
    output = body.get_output_embeddings()
    own = set() if output is None else {id(parameter) for parameter in output.parameters()}
    untrained: frozenset[str] = getattr(model, "untrained", frozenset())
    named = body.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if id(parameter) in own and name in untrained]
