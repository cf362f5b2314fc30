"""Strategies: how many sequences go through a language model. Here are the plain ones, and what is common to all.

Each strategy says which sequences go together, and runs the model over such a batch up to its last hidden states. What
it says is arithmetic on token ids, so that it can be done ahead while the model computes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vhead.backbone.hidden_states import BackbonePlan, last_hidden_state, plan_for, run
from vhead.backbone.placement import to_device
from vhead.errors import VheadError
from vhead.packing.gates import UNIT_ROWS, Fused
from vhead.packing.trees import Tokens

Rows = NDArray[np.int64]


Content = TypeVar("Content")
# What is read from a batch and never put there: a batch of one kind is one of several.
Content_co = TypeVar("Content_co", covariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class Batch(Generic[Content_co]):
    """Sequences that go through the model together.

    Attributes:
        places: Which of the given sequences these are.
        rows: For each of them, which row of the batch's hidden states `[N, H]` belongs to each token, int64 `[length]`.
        tokens: Tokens that the model computes for it, padding included.
        content: What the strategy that made it runs.
    """

    places: tuple[int, ...]
    rows: tuple[Rows, ...]
    tokens: int
    content: Content_co


class Strategy(ABC, Generic[Content]):
    """How sequences are batched, and how the model runs over them.

    Attributes:
        name: What the plan and the log call it.
        attention: How it attends in packed trees; None: it packs none.
        heeds_windows: Whether it attends within the model's sliding windows by itself.
        works_in_blocks: Whether its kernel works in blocks of rows, so that short sequences alone do not try it.
        is_differentiable: Whether it can be trained with.
        heeds_budget: Whether its batches have as many sequences as the budget allows; else they have one.
    """

    name: ClassVar[str]
    attention: ClassVar[str | None] = None
    heeds_windows: ClassVar[bool] = False
    works_in_blocks: ClassVar[bool] = False
    is_differentiable: bool = True
    heeds_budget: ClassVar[bool] = True

    @abstractmethod
    def batches(self, sequences: Sequence[Tokens], prompts: Sequence[int], budget: int) -> Iterator[Batch[Content]]:
        """Batches of at most `budget` tokens, or of one sequence, that hold each sequence once.

        Args:
            sequences: Token ids `[length]`.
            prompts: Tokens of each sequence's prompt.
            budget: Tokens that the model computes for a batch, padding included.
        """

    @abstractmethod
    def states(self, batch: Batch[Content]) -> Tensor:
        """The last hidden states `[N, H]` of a batch."""

    def states_of(self, batch: Batch[Content], rows: Rows) -> Tensor:
        """The last hidden states `[R, H]` of some rows of a batch, int64 `[R]`; a strategy may spare the others."""
        states = self.states(batch)
        return states[to_device(torch.from_numpy(rows), states.device)]

    def states_and_logits(self, batch: Batch[Content]) -> tuple[Tensor, Tensor]:
        """The last hidden states `[N, H]` and the model's own logits `[N, V]`, if this strategy shares no tokens.

        Raises:
            NotImplementedError: This strategy shares tokens.
        """
        raise NotImplementedError(f"{self.name} gives hidden states only")

    def spoilt(self, content: Content) -> Content:
        """What it would run if it mixed sequences up, or lost what they share. A check has to notice the difference."""
        return content

    def forget(self) -> None:
        """Drops what is kept of the model's states, as its weights may change."""


# What is chosen before the last layer's products is copied: with more rows than this, for nothing.
_MOST_SELECTED = 0.9


class Body:
    """A language model that runs up to its last hidden state.

    Attributes:
        model: The language model.
        plan: How the state is reached.
        fused: The modules that are computed by kernels of this package.
        unit_rows: Rows of a batch from which on gated layers are computed by the processor's matrix unit.
        most_selected: The largest part of a packed row for which the last layer computes that part alone.
    """

    def __init__(self, model: nn.Module, plan: BackbonePlan) -> None:
        self.model, self.plan = model, plan
        self.fused, self.unit_rows, self.most_selected = Fused(), UNIT_ROWS, _MOST_SELECTED

    @classmethod
    def decoder_only(cls, model: nn.Module) -> Self:
        """A language model that can be run over rollouts.

        Raises:
            VheadError: The model is an encoder-decoder, or sees learnt tokens before those of a rollout.
        """
        plan = plan_for(model)
        if plan.is_encoder_decoder:
            raise VheadError(f"model: expected a decoder-only language model, got the {type(model).__name__}")
        adapter: Any = getattr(model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise VheadError(
                f"model: expected a language model that sees only the tokens of a rollout, got one with a learnt "
                f"prompt ({adapter.peft_type.value}), which puts virtual tokens before them"
            )
        return cls(model, plan)

    @property
    def device(self) -> torch.device:
        """The device that token ids go to."""
        device: torch.device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states, as the input embeddings have it."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        return dtype

    def states(self, tokens: Tensor, *, rows: Tensor | None = None, **inputs: object) -> Tensor:
        """The last hidden states `[N, H]` of `[B, T]` token ids, N = B * T.

        Args:
            tokens: The token ids.
            rows: Where the last layer selects rows: those of a single row of tokens whose states are wanted.
            **inputs: What else the model takes.
        """
        device = self.device
        on_device = {
            name: to_device(value, device) if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        # Autograd needs what would be overwritten.
        with nullcontext() if torch.is_grad_enabled() else self.fused.running(self.unit_rows, rows):
            hidden = last_hidden_state(self.model, plan=self.plan, input_ids=to_device(tokens, device), **on_device)
        return hidden.flatten(0, 1)

    def states_and_logits(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The last hidden states `[N, H]` and the model's own logits `[N, V]`."""
        inputs: dict[str, object] = {"input_ids": to_device(tokens, self.device), "use_cache": False}
        if mask is not None:
            inputs["attention_mask"] = to_device(mask, self.device)
        output, hidden = run(self.model, self.plan, inputs)
        logits: Tensor = output.logits
        return hidden.flatten(0, 1), logits.flatten(0, 1)


# Token ids and attention mask, int64 `[B, T]`.
Padded = tuple[Tensor, Tensor]


class PaddedBatches(Strategy[Padded]):
    """Sequences of similar length, padded on the right."""

    name = "length-sorted batches"

    def __init__(self, body: Body) -> None:
        self._body = body

    def batches(self, sequences: Sequence[Tokens], prompts: Sequence[int], budget: int) -> Iterator[Batch[Padded]]:
        """Batches sequences of similar length, the longest first."""
        del prompts
        for chosen in token_budget_batches([len(sequence) for sequence in sequences], budget):
            yield padded(chosen.tolist(), sequences)

    def states(self, batch: Batch[Padded]) -> Tensor:
        """The states of all tokens, padding included."""
        tokens, mask = batch.content
        return self._body.states(tokens, attention_mask=mask)

    def states_and_logits(self, batch: Batch[Padded]) -> tuple[Tensor, Tensor]:
        """The hidden states `[N, H]` and the model's own logits `[N, V]`."""
        return self._body.states_and_logits(*batch.content)


class OneByOne(PaddedBatches):
    """Each sequence alone.

    Args:
        body: The language model.
        forgets: Whether the model remembers lengths, as transformers' dynamic rotary embeddings do until a short
            sequence comes; each sequence is then preceded by one of a single token.
    """

    name = "one sequence at a time"
    heeds_budget = False

    def __init__(self, body: Body, *, forgets: bool = False) -> None:
        super().__init__(body)
        self._forgets = forgets

    def batches(self, sequences: Sequence[Tokens], prompts: Sequence[int], budget: int) -> Iterator[Batch[Padded]]:
        """One sequence each, whatever the budget."""
        del prompts, budget
        return (padded([place], sequences) for place in range(len(sequences)))

    def states(self, batch: Batch[Padded]) -> Tensor:
        """The states of the sequence's tokens."""
        tokens, _mask = batch.content
        self._forget(tokens)
        return self._body.states(tokens)

    def states_and_logits(self, batch: Batch[Padded]) -> tuple[Tensor, Tensor]:
        """The hidden states `[N, H]` and the model's own logits `[N, V]`."""
        tokens, _mask = batch.content
        self._forget(tokens)
        return self._body.states_and_logits(tokens)

    def _forget(self, tokens: Tensor) -> None:
        if self._forgets:
            self._body.states(tokens[:, :1])


def as_row(array: NDArray[np.int64]) -> Tensor:
    """Token ids or positions `[T]` as a batch of one, `[1, T]`."""
    return torch.from_numpy(array)[None]


def padded(places: Sequence[int], sequences: Sequence[Tokens]) -> Batch[Padded]:
    """Some of the sequences as one padded batch."""
    tokens, mask = padded_tokens([sequences[place] for place in places])
    width = tokens.shape[1]
    rows = tuple(np.arange(len(sequences[place])) + at * width for at, place in enumerate(places))
    return Batch(tuple(places), rows, tokens.numel(), (tokens, mask))


def padded_tokens(parts: Sequence[Tokens]) -> Padded:
    """Token ids and attention mask, int64 `[B, T]`, padded on the right, where no token's position depends on it."""
    tokens = np.zeros((len(parts), max(map(len, parts))), np.int64)
    mask = np.zeros_like(tokens)
    for row, part in enumerate(parts):
        tokens[row, : len(part)] = part
        mask[row, : len(part)] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def token_budget_batches(lengths: Sequence[int], budget: int) -> Iterator[NDArray[np.int64]]:
    """Groups sequences of similar length so that each padded batch has at most `budget` tokens.

    The longest come first, so that a batch that does not fit into memory fails at once and not at the end. A sequence
    that is longer than the budget is a batch of its own.

    Args:
        lengths: Tokens of each sequence.
        budget: Rows times the longest row of a batch.

    Yields:
        Positions in `lengths`, int64 `[B]`; each position once.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, int(lengths[order[start]])))
        yield order[start : start + rows]
        start += rows


_HALF = (torch.bfloat16, torch.float16)
_HALF_MULTIPLE = 64


def row_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """What the number of rows of a packed batch should be a multiple of.

    On a CPU, torch multiplies half precisions with kernels that oneDNN compiles for each number of rows and then keeps:
    some milliseconds and some hundred KiB each. Sizes that come again cost neither.
    """
    return _HALF_MULTIPLE if device.type == "cpu" and dtype in _HALF else 1
