"""The model's side of training: what it can take, and hidden states with gradients."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vhead.errors import HeadError, VheadError
from vhead.heads import distribution
from vhead.packing import limits
from vhead.packing.adapters import check_adapter, make_trainable, running_adapter, using_adapter
from vhead.packing.plan import Attention, Ways, find_ways
from vhead.packing.strategies import Body
from vhead.scoring.engine import untrained_output
from vhead.scoring.logits import LogitsRule, find_logits_rule
from vhead.training.batches import TrainingBatch
from vhead.training.gradient_check import GradientCheck, TrainingPlan
from vhead.training.kept_states import KeptStates, drops, states_key
from vhead.training.layers import keeping_less
from vhead.training.shared_weight import SharedWeight
from vhead.training.totals import all_say, is_distributed

RETURNS = ("values", "logprobs")
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")


class Selected(NamedTuple):
    """Hidden states `[T, H]`, and the weight for their logits where it is not the language-model head's own tensor."""

    states: Tensor
    lm_head_weight: Tensor | None = None


class TrainedModel:
    """A language model and its value head, and how batches go through them.

    Args:
        model: The model, as `TrainingPass` takes it.
        attention: How tokens are to see each other in packed rollouts, or None.
        adapters: By what is computed, the adapter that computes it; None: the active one.
        kept: Hidden states of a frozen body.
        in_place: Whether backward adds the gradient of the language-model head's weight to its `.grad` by itself.

    Attributes:
        body: The language model.
        returns: What can be computed.
        rule: How logits are made of hidden states; None: by the model alone.
        ways: The strategies that passed.
        plan: The same to be printed.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: Attention | None,
        adapters: dict[str, str | None],
        kept: KeptStates,
        *,
        in_place: bool = False,
    ) -> None:
        _check_unwrapped(model)
        body = getattr(model, "pretrained_model", model)
        self.body, self._head = Body.decoder_only(body), getattr(model, "v_head", None)
        self._adapters, self._kept = adapters, kept
        for what, adapter in adapters.items():
            check_adapter(body, "value_adapter" if what == "values" else "policy_adapter", adapter)
            if adapter is not None:
                make_trainable(body, adapter)
        has_head = isinstance(self._head, nn.Module)
        self._untrained = untrained_output(model, body)
        self.returns = tuple(name for name in RETURNS if (has_head if name == "values" else not self._untrained))
        with _evaluating(body), torch.no_grad():
            self.rule: LogitsRule | None = find_logits_rule(body, self.body.plan)
            self._shared = SharedWeight(body, self.rule, in_place=in_place)
            context = limits.context_length(body)
            check = GradientCheck(self.body, context)
            self.ways: Ways = find_ways(self.body, own_logits=self.rule is None, attention=attention, gradients=check)
        self._layers = check.layers
        self.plan = self._plan(check)

    def _plan(self, check: GradientCheck) -> TrainingPlan:
        logits = "of the whole batch, by the model" if self.rule is None else str(self.rule)
        notes = []
        if self.body.fused and not self._layers:
            notes.append("modules with kernels of this package run by their own ones, as their gradients differed")
        if self.ways.plan.attention is None:
            notes.append("nothing is shared, so a prompt is computed once for each of its completions")
        if self.rule is None and "logprobs" in self.returns:
            notes.append("nothing is shared where log-probabilities are computed, as the model makes its own logits")
        if self.ways.plan.attention is not None and _has_dropout(self.body.model):
            notes.append("dropout in the body draws once for a token that several rollouts share")
        return TrainingPlan(replace(self.ways.plan, logits=logits), check.finding(self.ways.usual), tuple(notes))

    def check_returns(self, returns: Sequence[str]) -> tuple[str, ...]:
        """What is asked for, if it can be computed.

        Raises:
            HeadError: Values are asked for, and the model has no value head.
            VheadError: Log-probabilities are, and the checkpoint had no language-model head.
            ValueError: Something else is.
        """
        if isinstance(returns, str) or not returns or not set(returns) <= set(RETURNS):
            raise ValueError(f"returns: expected some of {', '.join(RETURNS)}, got {returns!r}")
        if "values" in returns and "values" not in self.returns:
            raise HeadError(f"returns: expected no values of a {type(self.body.model).__name__} without a value head")
        if "logprobs" in returns and "logprobs" not in self.returns:
            raise VheadError(
                "returns: expected no log-probabilities, because the checkpoint holds no "
                f"{', '.join(self._untrained)}, got {', '.join(returns)}"
            )
        return tuple(returns)

    def selected(self, batch: TrainingBatch, returns: Sequence[str]) -> dict[str, Selected]:
        """What predicts a batch's completion tokens, for each of what is asked for."""
        by_adapter: dict[str | None, Selected] = {}
        found = {}
        for name in returns:
            adapter = self._adapters[name]
            if adapter not in by_adapter:
                by_adapter[adapter] = self._selected(batch, adapter)
            found[name] = by_adapter[adapter]
        return found

    def _selected(self, batch: TrainingBatch, adapter: str | None) -> Selected:
        trained = self._parameters()
        frozen = not any(parameter.requires_grad for parameter in trained)
        # Autograd refuses what was made in inference mode.
        keeps = frozen and not drops(self.body.model) and not torch.is_inference_mode_enabled()
        key = (adapter, *states_key(self.body.model, trained, self.body.device)) if keeps else ()
        kept = self._kept.get(batch, key) if keeps else None
        # To run a model whose weights are in parts takes all processes, each of which may have had room for others.
        in_parts = keeps and is_distributed() and any(hasattr(parameter, "to_local") for parameter in trained)
        if in_parts and not all_say(kept is not None, self.body.device):
            kept = None
        if kept is not None:
            return Selected(kept)
        with (
            using_adapter(self.body.model, adapter),
            torch.no_grad() if frozen else nullcontext(),
            keeping_less(self.body.model, self._layers),
            self._shared.watched() as weights,
        ):
            states = batch.strategy.states(batch.content)
        selected = states.index_select(0, batch.read.predicting.to(states.device))
        if keeps:
            self._kept.put(batch, key, selected)
        return Selected(selected, *weights)

    def _parameters(self) -> list[nn.Parameter]:
        """Those that hidden states depend on: all but the language-model head's own."""
        model: Any = self.body.model
        output, embedded = model.get_output_embeddings(), model.get_input_embeddings()
        own = set() if output is None else {id(p) for p in output.parameters()}
        own -= {id(p) for p in embedded.parameters()}
        return [parameter for parameter in model.parameters() if id(parameter) not in own]

    def policy_adapter(self) -> AbstractContextManager[None]:
        """A block in which the model's modules run with the adapter that computes log-probabilities."""
        return using_adapter(self.body.model, self._adapters["logprobs"])

    def states_and_logits(self, batch: TrainingBatch, returns: Sequence[str]) -> tuple[dict[str, Selected], Tensor]:
        """Hidden states as `selected`, of values alone, and the model's own logits of the same tokens `[T, V]`."""
        with self.policy_adapter():
            states, logits = batch.strategy.states_and_logits(batch.content)
        rows = batch.read.predicting
        found = dict[str, Selected]()
        if "values" in returns:
            policy, critic = (running_adapter(self.body.model, self._adapters[name]) for name in ("logprobs", "values"))
            if policy == critic:
                found["values"] = Selected(states.index_select(0, rows.to(states.device)))
            else:
                found = self.selected(batch, ("values",))
        return found, logits.index_select(0, rows.to(logits.device))

    def head_outputs(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values `[T]` or `[T, K]` of hidden states, and the logits of a distributional head."""
        head: Any = self._head
        logits = None
        if getattr(head, "support", None) is not None:
            logits = head.logits(states)
            values = distribution.expectation(logits, head.support)
        else:
            values = head(states)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return (values.squeeze(-1) if values.shape[-1] == 1 else values), logits


def _check_unwrapped(model: nn.Module) -> None:
    for module in model.modules():
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            raise VheadError(
                f"model: expected a model that is not wrapped for several processes yet, got one with {wrapper}; make "
                "the TrainingPass first and wrap that, so that gradients are exchanged: "
                "DistributedDataParallel(training_pass), or fully_shard(training_pass) after its layers"
            )


def _has_dropout(model: nn.Module) -> bool:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        return drops(model)
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the block lasts; every module as before afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
