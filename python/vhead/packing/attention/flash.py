"""Attention by FlashAttention's packed sequences: the segments are the sequences, and what they share is merged in.

First every segment attends to itself. Then, for the first stretch of rows on each path, for the second, and so on, the
segments after it attend to it. Every part comes with the logarithm of its softmax's denominator, by which the parts
are one softmax again. Where nothing is shared the first part is all there is.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vhead.backbone.placement import to_device
from vhead.packing.attention.segments import pieces
from vhead.packing.trees import Range, Segment


class FlashAttention:
    """Attention over one packed row, for one layer after the other.

    Args:
        segments: What the row consists of.

    Raises:
        ImportError: The package flash_attn is not installed, or cannot be loaded.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._kernel: Callable[..., Any] = import_module("flash_attn").flash_attn_varlen_func
        self._segments = segments
        self._longest = max(segment.path_length + segment.stop - segment.start for segment in segments)
        # By device, as a model's layers may be on several.
        self._parts: dict[torch.device, list[_Sequences]] = {}
        self._paths: dict[tuple[torch.device, int], _Sequences] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Attends over the row, as `Attend` says.

        Raises:
            RuntimeError: This version of flash_attn gives the logarithms in another layout.
        """
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        states = _States(self._kernel, query, key, value, scale, softcap)
        if window is not None and window < self._longest:
            return states.attend(self._along_paths(window, query.device), window)[None]
        own, *shared = self._by_depth(query.device)
        if not shared:
            return states.attend(own)[None]
        output, log_sums = states.attend_in_part(own, causal=True)
        whole = output.float()
        for part in shared:
            _merge(whole, log_sums, part.queries, *states.attend_in_part(part, causal=False))
        return whole.to(output.dtype)[None]

    def _along_paths(self, window: int, device: torch.device) -> "_Sequences":
        """Each segment with the keys of its path that its window reaches; those of shared rows are repeated."""
        if (device, window) not in self._paths:
            found = list(pieces(self._segments, window))
            queries = [(piece.start, piece.stop) for piece in found]
            self._paths[device, window] = _Sequences.of(queries, [piece.keys for piece in found], device)
        return self._paths[device, window]

    def _by_depth(self, device: torch.device) -> "list[_Sequences]":
        """Each segment by itself, then what attends to the first stretch of paths, to the second, and so on."""
        if device not in self._parts:
            own = [(segment.start, segment.stop) for segment in self._segments]
            levels = itertools.takewhile(len, (after_stretch(self._segments, depth) for depth in itertools.count()))
            self._parts[device] = [_Sequences.of(own, [(rows,) for rows in own], device)]
            self._parts[device] += [
                _Sequences.of([queries for queries, _ in level], [(keys,) for _, keys in level], device)
                for level in levels
            ]
        return self._parts[device]


def after_stretch(segments: Sequence[Segment], depth: int) -> list[tuple[Range, Range]]:
    """Rows of queries and the stretch of rows that comes at this place of their paths, for those that have one.

    Neighbours with the same stretch are one range.
    """
    found: list[tuple[Range, Range]] = []
    for segment in segments:
        if depth < len(segment.path):
            start, keys = segment.start, segment.path[depth]
            if found and found[-1] == ((found[-1][0][0], start), keys):
                start = found.pop()[0][0]
            found.append(((start, segment.stop), keys))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Sequences:
    """Packed sequences of queries, and those of the keys that each looks at.

    Attributes:
        queries: Rows of the queries, int64, or a slice of the first ones.
        keys: Rows of the keys, likewise.
        query_bounds: Where each sequence begins and the last one ends, int32.
        key_bounds: The same of the keys.
        most_queries: How many queries the longest sequence has.
        most_keys: How many keys the longest sequence has.
    """

    queries: Tensor | slice
    keys: Tensor | slice
    query_bounds: Tensor
    key_bounds: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, queries: Sequence[Range], keys: Sequence[Sequence[Range]], device: torch.device) -> Self:
        """Makes them from row ranges: for each sequence one of queries, and one or several of keys."""
        query_counts = [stop - start for start, stop in queries]
        key_counts = [sum(stop - start for start, stop in ranges) for ranges in keys]
        bounds = np.array([[0, *itertools.accumulate(counts)] for counts in (query_counts, key_counts)], np.int32)
        query_bounds, key_bounds = to_device(torch.from_numpy(bounds), device).unbind()
        return cls(
            _rows(queries, device),
            _rows([stretch for ranges in keys for stretch in ranges], device),
            query_bounds,
            key_bounds,
            max(query_counts),
            max(key_counts),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _States:
    """What a layer attends with: `[T, heads, D]`, `[T, key heads, D]`, `[T, key heads, E]`."""

    kernel: Callable[..., Any]
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    softcap: float | None

    def attend(self, sequences: _Sequences, window: int | None = None) -> Tensor:
        """The results `[T, heads, E]` of all rows in order; the last query of a sequence sees up to its last key."""
        limits = {} if window is None else {"window_size": (window - 1, 0)}
        output: Tensor = self._run(self.query, sequences, causal=True, **limits)
        return output

    def attend_in_part(self, sequences: _Sequences, *, causal: bool) -> tuple[Tensor, Tensor]:
        """The results `[N, heads, E]` of these sequences' queries, and the logarithms of their sums `[N, heads]`."""
        query = self.query[sequences.queries]
        output, log_sums, *_ = self._run(query, sequences, causal=causal, return_attn_probs=True)
        if log_sums.shape != query.shape[1::-1]:
            raise RuntimeError(
                f"flash_attn: expected logarithms of sums by token, of shape {tuple(query.shape[1::-1])}, "
                f"got {tuple(log_sums.shape)}, as earlier versions give"
            )
        return output, log_sums.T

    def _run(self, query: Tensor, sequences: _Sequences, **options: object) -> Any:
        if self.softcap is not None:
            options["softcap"] = self.softcap
        return self.kernel(
            query,
            self.key[sequences.keys],
            self.value[sequences.keys],
            sequences.query_bounds,
            sequences.key_bounds,
            sequences.most_queries,
            sequences.most_keys,
            softmax_scale=self.scale,
            **options,
        )


def _merge(output: Tensor, log_sums: Tensor, rows: Tensor | slice, more: Tensor, more_log_sums: Tensor) -> None:
    """Adds softmax terms to some rows of `[T, heads, E]` and `[T, heads]`, in place."""
    before, after = log_sums[rows], torch.logaddexp(log_sums[rows], more_log_sums)
    output[rows] = output[rows] * (before - after).exp()[..., None] + more * (more_log_sums - after).exp()[..., None]
    log_sums[rows] = after


def _rows(ranges: Sequence[Range], device: torch.device) -> Tensor | slice:
    """The rows of these ranges; a slice if they are the first rows in order, because that is a view and no copy."""
    chosen = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    if np.array_equal(chosen, np.arange(len(chosen))):
        return slice(0, len(chosen))
    return to_device(torch.from_numpy(chosen), device)
