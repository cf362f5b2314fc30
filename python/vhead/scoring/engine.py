"""The model's side of scoring: rollouts in, the asked-for fields of each out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vhead.backbone.hidden_states import plan_for
from vhead.backbone.placement import to_device
from vhead.errors import HeadError, VheadError
from vhead.packing import limits
from vhead.packing.plan import find_ways
from vhead.packing.strategies import Batch, Body, Strategy
from vhead.rollouts.encoding import Encoded
from vhead.scoring.conventions import Conventions
from vhead.scoring.logits import find_logits_rule, statistics_of_logits, token_statistics
from vhead.scoring.options import ScorerOptions
from vhead.scoring.scores import PER_TOKEN

Fields = dict[str, NDArray[np.float32]]

# Without a rule for the logits of chosen rows, those of a whole batch exist at once; batches are then this small.
_FULL_LOGITS_BYTES = 64 * 1024 * 1024
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A batch of a chunk, and the strategy that takes it through the model; `batch.places` count in the chunk."""

    strategy: Strategy[Any]
    batch: Batch[Any]


class Engine:
    """Runs a language model with a value head over rollouts.

    Args:
        model: `.pretrained_model` is the language model, `.v_head` maps `[..., H]` to `[..., 1]`.
        options: The scorer's; of them the threads, the conventions, the attention and batch invariance.

    Attributes:
        device: The device that token ids go to.
        vocabulary_size: How many token ids there are; each is below it.
        context_length: Tokens that the model takes at once, None where it states no limit.
        plan: How rollouts are batched and logits reached.
        untrained_output: The parameters of the language-model head that were drawn and not loaded, by name.

    Raises:
        HeadError: The model has no value head, or one with several outputs.
        VheadError: The model is an encoder-decoder, or cannot take the asked-for attention.
        ValueError: There is no such attention, or it is asked for together with batch invariance.
    """

    def __init__(self, model: nn.Module, options: ScorerOptions) -> None:
        body, head = getattr(model, "pretrained_model", None), getattr(model, "v_head", None)
        if not isinstance(body, nn.Module) or not isinstance(head, nn.Module):
            raise HeadError(f"model: expected a language model with a value head, got a {type(model).__name__}")
        if (outputs := getattr(head, "num_outputs", 1)) != 1:
            raise HeadError(f"model: expected a head with one output to score with, got one with {outputs}")
        self._model, self._head = model, head
        self._num_threads = options.get("num_threads")
        self._conventions = options.get("conventions") or Conventions()
        plan = plan_for(body)
        if plan.is_encoder_decoder:
            raise VheadError(f"model: expected a decoder-only language model, got the {type(body).__name__}")
        adapter = getattr(body, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise VheadError(
                f"model: expected a language model that sees only the tokens of a rollout, got one with a learnt "
                f"prompt ({adapter.peft_type.value}), which puts virtual tokens before them"
            )
        self._body = Body(body, plan)
        self.device: torch.device = self._body.device
        self.vocabulary_size = limits.vocabulary_size(body)
        self.context_length = limits.context_length(body)
        self.untrained_output = _untrained_output(model, body)
        self._pad_token = limits.pad_token(body.config)
        with self._computing():
            self._rule = find_logits_rule(body, plan)
            self._ways = find_ways(
                self._body,
                batch_invariant=options.get("batch_invariant", False),
                own_logits=self._rule is None,
                attention=options.get("attention"),
            )
        logits = "of the whole batch, by the model" if self._rule is None else str(self._rule)
        self.plan = replace(self._ways.plan, logits=logits)

    @property
    def selects_rows(self) -> bool:
        """Whether logits are computed for the scored tokens only, by a rule that the model's own logits confirmed."""
        return self._rule is not None

    def check(self, fields: Sequence[str]) -> None:
        """Checks that this model can give these fields.

        Raises:
            VheadError: Log-probabilities or entropies are asked for, and the checkpoint had no language-model head.
        """
        if self.untrained_output and needs_logits(fields):
            raise VheadError(
                "returns: expected only values and reward, because the checkpoint holds no "
                f"{', '.join(self.untrained_output)} and log-probabilities would come from random weights, "
                f"got {', '.join(fields)}"
            )

    def work(self, chunk: Sequence[Encoded], token_budget: int, fields: Sequence[str]) -> list[Work]:
        """How a chunk is batched, for the asked-for fields; each rollout is in one batch."""
        groups = self._ways.groups([len(rollout) for rollout in chunk])
        if needs_logits(fields) and self._rule is None:
            token_budget = min(token_budget, max(1, _FULL_LOGITS_BYTES // (_FLOAT32_BYTES * self.vocabulary_size)))
            groups = self._ways.without_sharing([len(rollout) for rollout in chunk])
        work = []
        for strategy, places in groups:
            sequences = [chunk[place].tokens for place in places]
            prompts = [chunk[place].prompt_length for place in places]
            for batch in strategy.batches(sequences, prompts, token_budget):
                work.append(Work(strategy, replace(batch, places=tuple(places[at] for at in batch.places))))
        return work

    def score(self, chunk: Sequence[Encoded], work: Work, fields: Sequence[str], temperature: float) -> Fields:
        """The fields of a batch's rollouts, one after the other in the batch's order, float32.

        Raises:
            VheadError: The device has not enough memory for the batch.
        """
        rollouts = [chunk[place] for place in work.batch.places]
        try:
            with self._computing():
                computed = self._score(rollouts, work, fields, temperature)
                if len(rollouts) > 1 and not all(np.isfinite(array).all() for array in computed.values()):
                    return self._one_by_one(rollouts, fields, temperature)
                return computed
        except torch.cuda.OutOfMemoryError as error:
            raise VheadError(
                f"out of memory with a batch of {work.batch.tokens} tokens; a smaller token_budget "
                f"(--token-budget) needs less: {str(error).splitlines()[0]}"
            ) from error

    def _one_by_one(self, rollouts: Sequence[Encoded], fields: Sequence[str], temperature: float) -> Fields:
        """Scores each rollout of a batch alone, if a number is not finite: a masked NaN is still NaN, and spreads."""
        alone, parts = self._ways.alone, []
        for rollout in rollouts:
            (batch,) = alone.batches([rollout.tokens], [rollout.prompt_length], 1)
            parts.append(self._score([rollout], Work(alone, batch), fields, temperature))
        return {name: np.concatenate([part[name] for part in parts]) for name in fields}

    def _score(self, rollouts: Sequence[Encoded], work: Work, fields: Sequence[str], temperature: float) -> Fields:
        read = Read.of(rollouts, work.batch, self._conventions, self._pad_token)
        rule, entropy = self._rule, "entropy" in fields
        statistics: dict[str, Tensor] = {}
        if rule is None and needs_logits(fields):
            states, logits = work.strategy.states_and_logits(work.batch)
            statistics = statistics_of_logits(
                logits, read.predicting, read.targets, temperature=temperature, entropy=entropy
            )
        else:
            states = work.strategy.states(work.batch)
            if rule is not None and needs_logits(fields):
                predicting = states[to_device(read.predicting, states.device)]
                statistics = token_statistics(predicting, rule, read.targets, temperature=temperature, entropy=entropy)
        computed = self._head_outputs(states, read, fields) | statistics
        return read.aligned({name: computed[name].cpu().numpy() for name in fields}, self._conventions)

    def forget(self) -> None:
        """Drops what was kept of the model's states, as its weights may change."""
        self._ways.usual.forget()

    def _head_outputs(self, states: Tensor, read: "Read", fields: Sequence[str]) -> dict[str, Tensor]:
        """The head sees the rows that are read and no others."""
        readable = {"values": read.predicting, "reward": read.rewarded}
        rows = {name: index for name, index in readable.items() if name in fields}
        if not rows:
            return {}
        index = to_device(torch.cat(list(rows.values())), states.device)
        outputs = self._head(states[index])
        parts = outputs.float().flatten().split([len(part) for part in rows.values()])
        return dict(zip(rows, parts, strict=True))

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


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What is read off a batch's hidden states `[N, H]`, for R rollouts with T computed entries in all.

    Attributes:
        predicting: Rows that predict a token, int64 `[T]`.
        targets: The tokens that they predict, int64 `[T]`.
        rewarded: The row of each reward, int64 `[R]`.
        counts: Computed entries of each rollout.
    """

    predicting: Tensor
    targets: Tensor
    rewarded: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(
        cls, rollouts: Sequence[Encoded], batch: Batch[Any], conventions: Conventions, pad_token: int | None
    ) -> "Read":
        """Finds what to read off a batch by these conventions."""
        first = [conventions.first_scored(rollout) for rollout in rollouts]
        predicting = [rows[start - 1 : -1] for rows, start in zip(batch.rows, first, strict=True)]
        targets = [rollout.tokens[start:] for rollout, start in zip(rollouts, first, strict=True)]
        rewarded = [
            rows[conventions.rewarded(rollout, pad_token)] for rows, rollout in zip(batch.rows, rollouts, strict=True)
        ]
        return cls(
            predicting=torch.from_numpy(np.concatenate(predicting)),
            targets=torch.from_numpy(np.concatenate(targets)),
            rewarded=torch.from_numpy(np.asarray(rewarded, np.int64)),
            counts=tuple(map(len, targets)),
        )

    def aligned(self, computed: Fields, conventions: Conventions) -> Fields:
        """Brings computed fields into the form that the conventions ask for."""
        if "reward" in computed:
            computed["reward"] = conventions.normalised(computed["reward"])
        if conventions.leading_zeros:
            starts = np.cumsum([0, *self.counts[:-1]])
            computed |= {name: np.insert(computed[name], starts, 0.0) for name in PER_TOKEN if name in computed}
        return computed


def _untrained_output(model: Any, body: Any) -> list[str]:
    """The parameters of the language-model head that were drawn and not loaded, by name."""
    output = body.get_output_embeddings()
    own = set() if output is None else {id(parameter) for parameter in output.parameters()}
    untrained: frozenset[str] = getattr(model, "untrained", frozenset())
    named = body.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if id(parameter) in own and name in untrained]


def needs_logits(fields: Sequence[str]) -> bool:
    """Whether these fields need the language-model head."""
    return "logprobs" in fields or "entropy" in fields
