"""Ways to take many sequences through a language model, from the fastest to the most plain.

Each says which sequences go together, and runs the model over such a batch up to its last hidden states. What it says
is arithmetic on token ids, so that it can be done ahead while the model computes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from vhead.backbone import BackbonePlan, last_hidden_state, run
from vhead.scoring.attention import dense_mask, tree_attention
from vhead.scoring.batches import token_budget_batches
from vhead.scoring.trees import Pack, Tokens, pack_trees, shared_prefixes

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
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
    content: Any


class Strategy(Protocol):
    """One way to batch and to run."""

    name: str

    def batches(self, sequences: Sequence[Tokens], budget: int) -> Iterator[Batch]:
        """Batches of at most `budget` tokens, or of one sequence, that hold each of the sequences `[length]` once."""

    def states(self, batch: Batch) -> Tensor:
        """The last hidden states `[N, H]` of a batch."""


class Body:
    """A language model that runs up to its last hidden state.

    Attributes:
        model: As given.
        plan: How the state is reached.
    """

    def __init__(self, model: nn.Module, plan: BackbonePlan) -> None:
        self.model, self.plan = model, plan

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The hidden states'."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        return dtype

    def states(self, tokens: Tensor, **inputs: object) -> Tensor:
        """The last hidden states `[N, H]` of `[B, T]` token ids, N = B * T."""
        on_device = {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        hidden = last_hidden_state(self.model, plan=self.plan, input_ids=tokens.to(self.device), **on_device)
        return hidden.flatten(0, 1)

    def states_and_logits(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden states `[N, H]` and the model's own logits `[N, V]`."""
        inputs = {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device), "use_cache": False}
        output, hidden = run(self.model, self.plan, inputs)
        logits: Tensor = output.logits
        return hidden.flatten(0, 1), logits.flatten(0, 1)


class TreePacking:
    """Trees of sequences as one row, attended segment by segment; needs transformers' attention interface."""

    name = "tree packing"

    def __init__(self, body: Body) -> None:
        self._body = body

    def batches(self, sequences: Sequence[Tokens], budget: int) -> Iterator[Batch]:
        """One packed row each."""
        return (_packed(pack) for pack in pack_trees(sequences, budget))

    def states(self, batch: Batch) -> Tensor:
        """No mask is given, as none is looked at."""
        pack: Pack = batch.content
        with tree_attention(self._body.model, pack.segments):
            return self._body.states(_row(pack.tokens), position_ids=_row(pack.positions))


class MaskedTreePacking:
    """Trees of sequences as one row, with a mask over all pairs of tokens.

    Args:
        body: The language model.
        longest_row: Rows in which a model that looks at places in the row, not at positions, still sees everything.
    """

    name = "tree packing with a dense mask"

    def __init__(self, body: Body, longest_row: int | None) -> None:
        self._body, self._longest_row = body, longest_row

    def batches(self, sequences: Sequence[Tokens], budget: int) -> Iterator[Batch]:
        """One packed row each."""
        budget = budget if self._longest_row is None else min(budget, self._longest_row)
        return (_packed(pack) for pack in pack_trees(sequences, budget))

    def states(self, batch: Batch) -> Tensor:
        """The mask is additive, as every model that takes one expects."""
        pack: Pack = batch.content
        mask = dense_mask(pack.segments, self._body.dtype)
        return self._body.states(_row(pack.tokens), position_ids=_row(pack.positions), attention_mask=mask)


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """A prefix, and what follows it in each sequence, padded on the right."""

    prefix: Tokens
    tokens: Tensor
    mask: Tensor


class PrefixCache:
    """What sequences begin with goes through the model once, and its keys and values serve them all."""

    name = "prefix cache"

    def __init__(self, body: Body) -> None:
        self._body = body

    def batches(self, sequences: Sequence[Tokens], budget: int) -> Iterator[Batch]:
        """Groups with one prefix; what shares none is padded."""
        single: list[int] = []
        for places, shared in shared_prefixes(sequences):
            if not shared:
                single += places
                continue
            rests = [len(sequences[place]) - shared for place in places]
            for group in token_budget_batches(rests, max(1, budget - shared)):
                yield _with_prefix([places[at] for at in group], sequences, shared)
        for chosen in token_budget_batches([len(sequences[place]) for place in single], budget):
            yield _padded([single[at] for at in chosen], sequences)

    def states(self, batch: Batch) -> Tensor:
        """The prefix's states first, then those of the padded rest."""
        if not isinstance(batch.content, SharedPrefix):
            tokens, mask = batch.content
            return self._body.states(tokens, attention_mask=mask)
        shared: SharedPrefix = batch.content
        cache = new_cache(self._body.model)
        first = self._body.states(_row(shared.prefix), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(shared.tokens.shape[0])
        seen = shared.mask.new_ones(shared.mask.shape[0], len(shared.prefix))
        rest = self._body.states(
            shared.tokens,
            attention_mask=torch.cat([seen, shared.mask], dim=1),
            past_key_values=cache,
            use_cache=True,
        )
        return torch.cat([first, rest])


class PaddedBatches:
    """Sequences of similar length, padded on the right."""

    name = "length-sorted batches"

    def __init__(self, body: Body) -> None:
        self._body = body

    def batches(self, sequences: Sequence[Tokens], budget: int) -> Iterator[Batch]:
        """The longest first."""
        for chosen in token_budget_batches([len(sequence) for sequence in sequences], budget):
            yield _padded(chosen.tolist(), sequences)

    def states(self, batch: Batch) -> Tensor:
        """Of all rows, padding included."""
        tokens, mask = batch.content
        return self._body.states(tokens, attention_mask=mask)

    def states_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
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

    def __init__(self, body: Body, *, forgets: bool = False) -> None:
        super().__init__(body)
        self._forgets = forgets

    def batches(self, sequences: Sequence[Tokens], budget: int) -> Iterator[Batch]:
        """One sequence each, whatever the budget."""
        del budget
        return (_padded([place], sequences) for place in range(len(sequences)))

    def states(self, batch: Batch) -> Tensor:
        """Of the sequence's tokens."""
        self._forget(batch)
        return super().states(batch)

    def states_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The hidden states `[N, H]` and the model's own logits `[N, V]`."""
        self._forget(batch)
        return super().states_and_logits(batch)

    def _forget(self, batch: Batch) -> None:
        if self._forgets:
            tokens, _mask = batch.content
            self._body.states(tokens[:, :1])


def new_cache(model: Any) -> Any:  # noqa: ANN401, a language model of any class and its cache
    """An empty cache of the kinds of layers that the model has."""
    try:
        return DynamicCache(config=model.config)
    except TypeError:
        # Before transformers 4.56 it took no configuration.
        return DynamicCache()


def _row(array: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(array)[None]


def _packed(pack: Pack) -> Batch:
    rows = tuple(pack.rows(at) for at in range(len(pack.places)))
    return Batch(pack.places, rows, len(pack.tokens), pack)


def _padded(places: Sequence[int], sequences: Sequence[Tokens]) -> Batch:
    tokens, mask = _padded_rest([sequences[place] for place in places])
    width = tokens.shape[1]
    rows = tuple(np.arange(len(sequences[place])) + at * width for at, place in enumerate(places))
    return Batch(tuple(places), rows, tokens.numel(), (tokens, mask))


def _with_prefix(places: Sequence[int], sequences: Sequence[Tokens], shared: int) -> Batch:
    tokens, mask = _padded_rest([sequences[place][shared:] for place in places])
    width = tokens.shape[1]
    first = np.arange(shared)
    rows = tuple(
        np.concatenate([first, shared + at * width + np.arange(len(sequences[place]) - shared)])
        for at, place in enumerate(places)
    )
    content = SharedPrefix(sequences[places[0]][:shared], tokens, mask)
    return Batch(tuple(places), rows, shared + tokens.numel(), content)


def _padded_rest(parts: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 `[B, T]`, padded on the right, where no token's position depends on it."""
    tokens = np.zeros((len(parts), max(map(len, parts))), np.int64)
    mask = np.zeros_like(tokens)
    for row, part in enumerate(parts):
        tokens[row, : len(part)] = part
        mask[row, : len(part)] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)
