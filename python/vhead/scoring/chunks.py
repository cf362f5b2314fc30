"""Cutting the stream of rollouts into chunks, and putting a chunk's results back into the order of the input."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vhead.errors import FieldError
from vhead.rollouts.encoding import Encoded
from vhead.rollouts.ragged import offsets_of
from vhead.rollouts.rollout import Rollout
from vhead.scoring.conventions import Conventions
from vhead.scoring.fields import COLUMNS, TOP, WEIGHTS_STEP, Asked, empty
from vhead.scoring.scores import Scores

# A chunk is what is sorted by length: large enough to fill batches evenly, small enough to keep memory flat.
_ROLLOUTS = 4096


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a head gives for a hidden state.

    Attributes:
        count: How many numbers.
        names: The head that gives each of them, where there are several heads; empty where there is one.
        classes: Which of them are classes of one classifier, whose probabilities are wanted.
    """

    count: int
    names: tuple[str, ...] = ()
    classes: tuple[slice, ...] = ()

    @classmethod
    def of(cls, head: Any) -> Self:
        """The outputs of a head, or of several side by side."""
        columns: dict[str, slice] = getattr(head, "columns", {"": slice(0, getattr(head, "num_outputs", 1))})
        each = getattr(head, "heads", [head])
        named = [name for name, place in columns.items() for _ in range(place.stop - place.start) if name]
        softmax = [getattr(one, "activation", None) == "softmax" for one in each]
        classes = [place for place, is_classifier in zip(columns.values(), softmax, strict=True) if is_classifier]
        return cls(max(place.stop for place in columns.values()), tuple(named), tuple(classes))

    def probable(self, outputs: Tensor) -> Tensor:
        """The outputs `[..., K]` with probabilities in place of a classifier's."""
        outputs = outputs.clone() if self.classes else outputs
        for place in self.classes:
            outputs[..., place] = outputs[..., place].softmax(-1)
        return outputs


class Source(Protocol):
    """Where rollouts come from: a record of a file, or a place in a list."""

    @property
    def where(self) -> str:
        """What errors call the place."""

    def rollouts(self) -> tuple[Rollout, ...]:
        """The rollout, or the two of a pair.

        Raises:
            RecordError: There is none.
        """


Sourced = TypeVar("Sourced", bound=Source)


def chunks(
    encoded: Iterable[tuple[Sourced, Sequence[Encoded]]], tokens: int
) -> Iterator[tuple[list[tuple[Sourced, Sequence[Encoded]]], Exception | None]]:
    """Groups consecutive rollouts of about `tokens` tokens, with the exception that ended the input early, if any.

    So what was read before the exception is still scored. The rollouts of one source stay together.
    """
    chunk: list[tuple[Sourced, Sequence[Encoded]]] = []
    total = 0
    try:
        for source, rollouts in encoded:
            chunk.append((source, rollouts))
            total += sum(map(len, rollouts))
            if total >= tokens or len(chunk) >= _ROLLOUTS:
                yield chunk, None
                chunk, total = [], 0
    except Exception as error:  # Handed on as it came.
        yield chunk, error
        return
    if chunk:
        yield chunk, None


class Results:
    """The scores of a chunk while they are computed.

    Args:
        chunk: The rollouts in input order.
        asked: What is asked for.
        conventions: How many entries a rollout has in a per-token field.
        outputs: What the head gives.
        truncates: Whether the scores say which rollouts were truncated.
        follows: Whether they say which step's weights each rollout was scored with.

    Attributes:
        scores: The scores of all rollouts.
        errors: What is wrong with the rollouts whose numbers are not finite, by their places.
    """

    def __init__(
        self,
        chunk: Sequence[Encoded],
        asked: Asked,
        conventions: Conventions,
        *,
        outputs: Outputs,
        truncates: bool = False,
        follows: bool = False,
    ) -> None:
        self._chunk = chunk
        lengths = np.fromiter((conventions.entries(rollout) for rollout in chunk), np.int64, len(chunk))
        offsets = offsets_of(lengths)
        steps = [conventions.step_ends(rollout) for rollout in chunk] if "steps" in asked else None
        step_counts = None if steps is None else np.fromiter(map(len, steps), np.int64, len(steps))
        step_offsets = None if step_counts is None else offsets_of(step_counts)
        counts = {"token": int(offsets[-1]), "rollout": len(chunk)}
        if step_offsets is not None:
            counts["step"] = int(step_offsets[-1])
        computed: dict[str, NDArray[Any]] = {
            name: empty(name, counts[COLUMNS[name].unit], _width(name, asked, outputs, chunk))
            for name in asked.computed
        }
        if steps is not None:
            computed["step_positions"] = np.concatenate([np.empty(0, np.int64), *steps])
        if "token_ids" in asked:
            computed |= _tokens(chunk, lengths)
        if follows:
            computed[WEIGHTS_STEP] = empty(WEIGHTS_STEP, len(chunk))
        masks = [conventions.mask(rollout) for rollout in chunk]
        self.scores = Scores(
            ids=tuple(rollout.id for rollout in chunk),
            indices=np.fromiter((rollout.index for rollout in chunk), np.int64, len(chunk)),
            prompt_lengths=np.fromiter((rollout.prompt_length for rollout in chunk), np.int64, len(chunk)),
            offsets=offsets,
            computed=computed,
            truncated=np.array([rollout.truncated for rollout in chunk], np.bool_) if truncates else None,
            mask=np.concatenate([np.empty(0, np.bool_), *masks]),
            step_offsets=step_offsets,
            heads=outputs.names,
        )
        self.errors: dict[int, FieldError] = {}

    def put(self, places: Sequence[int], computed: dict[str, NDArray[Any]]) -> None:
        """Stores the fields of the rollouts at `places`, which come one after the other in `computed`."""
        for name, flat in computed.items():
            target, offsets = self.scores.flat(name)
            if offsets is None:
                target[list(places)] = flat
            else:
                at = 0
                for place in places:
                    own = target[offsets[place] : offsets[place + 1]]
                    own[:] = flat[at : at + len(own)]
                    at += len(own)
            if not np.isfinite(flat).all():
                self._note_nonfinite(name, places)

    def stamp(self, places: Sequence[int], step: int) -> None:
        """Says which step's weights the rollouts at `places` were scored with."""
        self.scores.flat(WEIGHTS_STEP)[0][list(places)] = step

    def _note_nonfinite(self, name: str, places: Sequence[int]) -> None:
        for place in places:
            numbers = np.atleast_1d(self.scores[place].computed[name])
            broken = np.argwhere(~np.isfinite(numbers))
            if len(broken):
                unit = {"token": " at completion token {}", "step": " at step {}", "rollout": ""}[COLUMNS[name].unit]
                got = f"{numbers[tuple(broken[0])]}{unit.format(broken[0][0])}"
                error = FieldError(self._chunk[place].name, name, expected="finite numbers from the model", got=got)
                self.errors.setdefault(place, error)


def _width(name: str, asked: Asked, outputs: Outputs, chunk: Sequence[Encoded]) -> tuple[int, ...]:
    """The shape of an entry of a column."""
    if name == "steps":
        return (outputs.count,)
    if COLUMNS[name].origin == "head":
        return () if outputs.count == 1 else (outputs.count,)
    if name == "candidate_logprobs":
        # Each rollout of a stream has as many candidates as the first one.
        return (chunk[0].candidates.shape[1] if chunk and chunk[0].candidates is not None else 0,)
    return (asked.top,) if name in TOP else ()


def _tokens(chunk: Sequence[Encoded], lengths: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """The columns that say which tokens the entries are about: the last ones of each rollout, so many."""
    ids, spans = [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
    for rollout, length in zip(chunk, lengths.tolist(), strict=True):
        if length and rollout.spans is not None:
            ids.append(rollout.tokens[-length:])
            spans.append(rollout.spans[-length:])
    return {"token_ids": np.concatenate(ids), "token_offsets": np.concatenate(spans)}
