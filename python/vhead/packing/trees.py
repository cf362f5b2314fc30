"""Rollouts that share their first tokens, packed into rows in which every shared token stands once.

Sorted token sequences are a trie read from left to right: what a sequence has in common with the one before it is on
that one's path already, and only the rest gets rows of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Range = tuple[int, int]

# Sharing fewer tokens than this, such as a beginning-of-sequence token, costs more in extra calls than it saves.
_LEAST_SHARED = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a pack that continue one path.

    Attributes:
        start: The first row.
        stop: One after the last row.
        path: Row ranges of the tokens before it, from the first token on.
    """

    start: int
    stop: int
    path: tuple[Range, ...]

    @property
    def path_length(self) -> int:
        """How many tokens come before the segment on its path."""
        return sum(stop - start for start, stop in self.path)


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Sequences that go through the model as one row of T tokens.

    Attributes:
        places: Which of the given sequences these are.
        tokens: int64 `[T]`.
        positions: The position of each token in its sequence, int64 `[T]`.
        segments: Cover all rows, in order; rows that no path has are there for their number only.
        paths: For each sequence, the row ranges of its tokens, in order.
    """

    places: tuple[int, ...]
    tokens: Tokens
    positions: NDArray[np.int64]
    segments: tuple[Segment, ...]
    paths: tuple[tuple[Range, ...], ...]

    def rows(self, sequence: int) -> NDArray[np.int64]:
        """The rows of one sequence's tokens, int64 `[length]`."""
        ranges = [np.arange(start, stop) for start, stop in self.paths[sequence]]
        return ranges[0] if len(ranges) == 1 else np.concatenate(ranges)


def pack_trees(sequences: Sequence[Tokens], budget: int, multiple: int = 1) -> Iterator[Pack]:
    """Packs sequences so that none of the packs has more than `budget` rows, and trees stay together where they fit.

    A tree that does not fit is divided between its leaves, and what those share is then computed once per pack. A
    sequence that is longer than the budget is a pack of its own.

    Args:
        sequences: Token ids `[length]`, none empty.
        budget: Rows of a pack.
        multiple: What the number of a pack's rows is a multiple of.

    Yields:
        Packs that hold each sequence once.
    """
    budget = max(multiple, budget - budget % multiple)
    builder = _Builder(sequences, multiple)
    for tree in _trees(sequences):
        size = sum(len(sequences[place]) - shared for place, shared in tree)
        if builder.size and builder.size + size > budget:
            yield builder.finish()
        for place, shared in tree:
            if builder.size and builder.size + len(sequences[place]) - builder.shared(shared) > budget:
                yield builder.finish()
            # Asked again: if a new pack has just begun, what the sequence shares has no rows there yet.
            builder.add(place, builder.shared(shared))
        builder.leave_tree()
    if builder.size:
        yield builder.finish()


def _trees(sequences: Sequence[Tokens]) -> Iterator[list[tuple[int, int]]]:
    """Groups of sequences that share tokens: places in sorted order, each with what it shares with the one before."""
    # Big-endian bytes compare as the token ids do.
    keys = [sequence.astype(">u8").tobytes() for sequence in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    tree: list[tuple[int, int]] = []
    for at, place in enumerate(order):
        shared = _common(sequences[order[at - 1]], sequences[place]) if at else 0
        if shared < _LEAST_SHARED:
            if tree:
                yield tree
            tree, shared = [], 0
        tree.append((place, shared))
    if tree:
        yield tree


def shared_prefixes(sequences: Sequence[Tokens]) -> Iterator[tuple[list[int], int]]:
    """Groups of sequences with the number of tokens that all of a group begin with, 0 where a sequence is alone.

    That number leaves each sequence at least one token of its own.
    """
    for tree in _trees(sequences):
        places = [place for place, _ in tree]
        shared = min((shared for _, shared in tree[1:]), default=0)
        shared = min(shared, *(len(sequences[place]) - 1 for place in places)) if shared else 0
        yield places, shared if shared >= _LEAST_SHARED else 0


def _common(first: Tokens, second: Tokens) -> int:
    """Tokens that two sequences start with alike."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    at = int(different.argmax()) if length else 0
    return at if length and different[at] else length


class _Builder:
    """The pack that is being filled, and the path of the sequence that was added last."""

    def __init__(self, sequences: Sequence[Tokens], multiple: int) -> None:
        self._sequences, self._multiple = sequences, multiple
        self._counted = np.arange(max(map(len, sequences), default=0))
        self._reset()

    def _reset(self) -> None:
        self.size = 0
        self._path: tuple[Range, ...] = ()
        self._places: list[int] = []
        self._paths: list[tuple[Range, ...]] = []
        self._segments: list[Segment] = []
        self._tokens: list[Tokens] = []
        self._positions: list[NDArray[np.int64]] = []

    def shared(self, tokens: int) -> int:
        """How many of these shared tokens have rows already: none at the beginning of a pack."""
        return tokens if self._path else 0

    def leave_tree(self) -> None:
        """Ends a tree: the sequence that comes next shares nothing with those before."""
        self._path = ()

    def add(self, place: int, shared: int) -> None:
        """Adds a sequence that begins with the first `shared` tokens of the one before."""
        tokens = self._sequences[place]
        path = _first(self._path, shared)
        start, stop = self.size, self.size + len(tokens) - shared
        if stop > start:
            self._segments.append(Segment(start, stop, path))
            self._tokens.append(tokens[shared:])
            self._positions.append(self._counted[shared : len(tokens)])
            path = joined(path, (start, stop))
        self._path, self.size = path, stop
        self._places.append(place)
        self._paths.append(path)

    def _fill(self, rows: int) -> None:
        """Adds rows that nobody reads: tokens of the pack again, since any others might mean something to the model."""
        if rows:
            self._segments.append(Segment(self.size, self.size + rows, ()))
            self._tokens.append(np.resize(self._tokens[0], rows))
            self._positions.append(np.zeros(rows, np.int64))

    def finish(self) -> Pack:
        """Gives the pack, and begins an empty one."""
        self._fill(-self.size % self._multiple)
        pack = Pack(
            places=tuple(self._places),
            tokens=np.concatenate(self._tokens),
            positions=np.concatenate(self._positions),
            segments=tuple(self._segments),
            paths=tuple(self._paths),
        )
        self._reset()
        return pack


def _first(path: Sequence[Range], length: int) -> tuple[Range, ...]:
    """The first `length` rows of a path."""
    kept: list[Range] = []
    for start, stop in path:
        if length <= 0:
            break
        kept.append((start, min(stop, start + length)))
        length -= stop - start
    return tuple(kept)


def joined(path: Sequence[Range], rows: Range) -> tuple[Range, ...]:
    """A path that goes on with these rows, as one range where they follow each other."""
    if path and path[-1][1] == rows[0]:
        return (*path[:-1], (path[-1][0], rows[1]))
    return (*path, rows)
