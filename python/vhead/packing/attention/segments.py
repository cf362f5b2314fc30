"""Attention by segments: what a mask would hide is not computed.

Where the processor has a matrix unit, bfloat16 rows go to it in blocks of 32. Elsewhere torch's kernels are called, in
float32 where the processor is faster so:

A segment's queries look at the keys of its path and at their own. Large segments are attended one by one. Small ones,
of which calls would cost more than arithmetic, are put together: padded to one shape, they are one batched call. Short
ones after the same long path are one call under a mask, so that the path's keys are not copied for each.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vhead.backbone.placement import to_device
from vhead.ops.matrix_unit import MOST_ROWS, RowAttention, suits_matrix_unit
from vhead.packing.attention.gradients import differentiate
from vhead.packing.attention.visibility import Visibility
from vhead.packing.products import suits_wide
from vhead.packing.trees import Range, Segment, joined

# Queries that are looked at together: more of them need a larger mask, and compute more that it hides.
_QUERY_BLOCK = 512
_HIDDEN = float("-inf")
# Multiplications and additions that take as long as one more call: on a CPU measured, elsewhere estimated from the
# launches that a call takes and a device's arithmetic.
_CALL_WORK = {"cpu": 2e6}
_DEVICE_CALL_WORK = 1e9
# Copying a query to the others of a batched call and its result back takes as long as so many keys.
_COPIED_AS_PAIRS = 32
# Putting a key and its value beside the others of a path likewise.
_JOINED_AS_PAIRS = 4
# Keys of a batched call, which are copied for it.
_MOST_KEYS = 2**15
# Pairs of a query and a key in one batched call, which has a mask of that size.
_MOST_PAIRS = 2**22
# The CPU's fused kernel takes fewer key heads than query heads; elsewhere that would leave the fused kernel.
_KERNEL_GROUPS_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive queries of one path, or of paths that differ in these queries alone.

    Attributes:
        start: The first query's row.
        stop: One after the last query's row.
        keys: Row ranges of the keys in the order of their path; the queries' own rows are the last ones.
        queries: How many queries.
        key_count: How many keys.
        forks: Whether the queries' own rows are several paths.
    """

    start: int
    stop: int
    keys: tuple[Range, ...]
    queries: int
    key_count: int
    forks: bool = False

    @property
    def path_length(self) -> int:
        """How many keys come before the queries' own."""
        return self.key_count - self.queries

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are computed where the piece is alone."""
        return self.queries * self.key_count // (2 if self.is_causal else 1)

    @property
    def is_causal(self) -> bool:
        """Whether the queries see themselves alone."""
        return len(self.keys) == 1 and self.keys[0][0] == self.start


def pieces(segments: Sequence[Segment], window: int | None) -> Iterator[Piece]:
    """The segments as pieces; long segments are divided."""
    for segment in segments:
        for start in range(segment.start, segment.stop, _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, segment.stop)
            keys = joined(segment.path, (segment.start, stop))
            if window is not None:
                keys = _last(keys, window - 1 + stop - start)
            yield Piece(start, stop, keys, stop - start, sum(stop - start for start, stop in keys))


def branches(found: Iterable[Piece], window: int | None) -> list[Piece]:
    """The same pieces, with neighbours put together if what a mask hides costs less than copying their common path.

    A branch's own rows may fork again: what they see of each other is the tree's matter.
    """
    result: list[Piece] = []
    for piece in found:
        if result and _belong_together(result[-1], piece, window):
            first = result.pop()
            rows, count = (first.start, piece.stop), first.queries + piece.queries
            branch = Piece(*rows, (*first.keys[:-1], rows), count, first.path_length + count, forks=True)
            result.append(branch)
        else:
            result.append(piece)
    return result


def _belong_together(first: Piece, second: Piece, window: int | None) -> bool:
    path, common = first.path_length, len(first.keys) - 1
    # What follows the common path are rows of the first one, as whatever continues a path comes before anything else.
    if not path or first.keys[-1][0] != first.start or first.keys[:-1] != second.keys[:common]:
        return False
    count = first.queries + second.queries
    hidden = count * (path + count) - first.queries * first.key_count - second.queries * second.key_count
    seen = window is None or window >= max(first.key_count, second.key_count)
    return seen and hidden <= _JOINED_AS_PAIRS * path and count * (path + count) <= _MOST_PAIRS


def groups(found: Sequence[Piece], pair_work: float, call_work: float) -> list[list[Piece]]:
    """Which pieces are attended in one call: as many as cost less together, padding counted, than in a call more.

    Args:
        found: The pieces.
        pair_work: Multiplications and additions of one query with one key, in all heads.
        call_work: As many as take as long as one call.
    """
    result: list[list[Piece]] = []
    queries, spent = 0, 0
    for piece in sorted(found, key=lambda piece: (piece.key_count, piece.queries)):
        if result and not piece.forks and not result[-1][0].forks:
            count, wider = len(result[-1]) + 1, max(queries, piece.queries)
            area = count * wider * piece.key_count
            padding = area + _COPIED_AS_PAIRS * count * wider - spent - piece.pairs
            if padding * pair_work <= call_work and area <= _MOST_PAIRS and count * piece.key_count <= _MOST_KEYS:
                result[-1].append(piece)
                queries, spent = wider, area + _COPIED_AS_PAIRS * count * wider
                continue
        result.append([piece])
        queries, spent = piece.queries, piece.pairs
    return result


class _Call(Protocol):
    """One call of the attention kernel: some of the row's queries."""

    def attend(self, states: "_States", output: Tensor) -> None:
        """Writes the queries' results into `output` `[T + 1, heads, E]`, whose last row is nobody's."""

    def differentiate(self, states: "_States", grad_output: Tensor, sums: "_States") -> None:
        """Adds what the queries' results `[T + 1, heads, E]` send back to the gradients of all rows."""


class SegmentAttention:
    """Attention over one packed row, for one layer after the other.

    Args:
        segments: What the row consists of.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._visibility = Visibility.of(segments)
        self._by_unit: RowAttention | None = None
        self._calls: dict[tuple[torch.device, torch.dtype, int | None, int], list[_Call]] = {}

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
        """Attends over the row, as `Attend` says."""
        query, key, value = _autocast(query, key, value)
        if self._suits_unit(query, key, value, scale, softcap):
            scale = query.shape[3] ** -0.5 if scale is None else scale
            return self._unit()(query[0], key[0], value[0], scale, window)[None]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            plain = partial(self, scale=scale, softcap=softcap, window=window)
            calls = self._planned(query, value, window)
            attended: Tensor = _Differentiable.apply(plain, calls, query, key, value, scale, softcap)
            return attended
        if suits_wide(query) and not torch.is_autocast_enabled("cpu"):
            wide = query.float()
            calls = self._planned(wide, value, window)
            return _attend(calls, _States(wide, key.float(), value.float(), scale, softcap)).to(query.dtype)
        return _attend(self._planned(query, value, window), _States(query, key, value, scale, softcap))

    def _suits_unit(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None
    ) -> bool:
        plain = softcap is None and (scale is None or scale > 0) and len(self._visibility.ends) < MOST_ROWS
        return plain and not torch.is_grad_enabled() and suits_matrix_unit(query, key, value)

    def _unit(self) -> RowAttention:
        """The row for the processor's matrix unit, which needs no calls: it goes through all rows in blocks of 32."""
        if self._by_unit is None:
            ends, positions = (torch.from_numpy(rows) for rows in (self._visibility.ends, self._visibility.positions))
            self._by_unit = RowAttention(ends, positions)
        return self._by_unit

    def _planned(self, query: Tensor, value: Tensor, window: int | None) -> list[_Call]:
        """The calls, found once, as every layer of a kind makes the same ones; layers may be on several devices."""
        pair_work = 2 * query.shape[1] * (query.shape[3] + value.shape[3])
        kind = query.device, query.dtype, window, pair_work
        if kind not in self._calls:
            call_work = _CALL_WORK.get(query.device.type, _DEVICE_CALL_WORK)
            together = groups(branches(pieces(self._segments, window), window), pair_work, call_work)
            self._calls[kind] = [*_calls(together, query, window, self._visibility.ends)]
        return self._calls[kind]


def _autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """The same in one dtype: what torch's attention would make of them under autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _attend(calls: Iterable[_Call], states: "_States") -> Tensor:
    rows, heads = states.query.shape[:2]
    output = states.query.new_empty(rows + 1, heads, states.value.shape[2])
    for call in calls:
        call.attend(states, output)
    return output[None, :-1]


class _Differentiable(torch.autograd.Function):
    """The whole row as one step of autograd, which keeps queries, keys and values, and computes each call again.

    Were each call a step, autograd would make a gradient of the whole row for each of its slices.
    """

    @staticmethod
    def forward(ctx: Any, plain: Callable[..., Tensor], calls: list[_Call], *inputs: Any) -> Tensor:
        """The results, by what attends without gradients."""
        query, key, value, *ctx.numbers = inputs
        ctx.calls = calls
        ctx.save_for_backward(query, key, value)
        return plain(query, key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of queries, keys and values, summed over calls in float32 at least."""
        inputs = ctx.saved_tensors
        states = _States(*inputs, *ctx.numbers)
        query, key, value = map(_zeros_like, inputs)
        sums = _States(query, key, value, None, None)
        # Padding's results go to a row of their own, and nothing comes back from there.
        padded = torch.cat([grad_output[0], grad_output.new_zeros(1, *grad_output.shape[2:])])
        for call in ctx.calls:
            call.differentiate(states, padded, sums)
        found = (sums.query, sums.key, sums.value)
        gradients = (total.transpose(0, 1)[None].to(own.dtype) for total, own in zip(found, inputs, strict=True))
        return None, None, *gradients, None, None


def _zeros_like(tensor: Tensor) -> Tensor:
    """Zeros `[1, heads, T, D]`, laid out as projections leave them."""
    batch, heads, rows, size = tensor.shape
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.new_zeros(batch, rows, heads, size, dtype=dtype).transpose(1, 2)


class _States:
    """What a layer attends with; each row's heads side by side, as projections leave them."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None) -> None:
        self.query, self.key, self.value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        self._groups = query.shape[1] // key.shape[1]
        self._scale, self._softcap = scale, softcap

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attends with queries `[B, queries, heads, D]` and keys and values `[B, keys, key heads, D or E]`.

        Without a mask, each query sees the keys up to its own place.

        Returns:
            `[B, queries, heads, E]`.
        """
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        options: dict[str, Any] = {"scale": self._scale}
        if self._groups > 1 and self._softcap is None and _KERNEL_GROUPS_HEADS and query.device.type == "cpu":
            options["enable_gqa"] = True
        else:
            key, value = _repeated(key, self._groups), _repeated(value, self._groups)
        if self._softcap is not None:
            return self._capped(query, key, value, mask, self._softcap).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, **options
        )
        return attended.transpose(1, 2)

    def _capped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float) -> Tensor:
        products = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if self._scale is None else self._scale)
        # Not the last of them in place: the gradient of a hyperbolic tangent is found from its result.
        products = products.div_(softcap).tanh_() * softcap
        products += _mask(query, [0], query.shape[2], key.shape[2], None) if mask is None else mask
        return products.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value

    def differentiate(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grad_output: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradients of what `attend` takes, from those of what it gives."""
        if self._softcap is None and query.device.type == "cpu":
            asked, *others = (tensor.transpose(1, 2) for tensor in (query, key, value, grad_output))
            mask = _mask(query, [0], asked.shape[2], others[0].shape[2], None) if mask is None else mask
            found = differentiate(asked, others[0], others[1], mask, others[2], self._scale)
            return tuple(gradient.transpose(1, 2) for gradient in found)
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        with torch.enable_grad():
            output = self.attend(query, key, value, mask)
        return torch.autograd.grad(output, (query, key, value), grad_output)


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """One piece; its keys are a view where they stand side by side."""

    piece: Piece
    mask: Tensor | None

    def attend(self, states: _States, output: Tensor) -> None:
        start, stop = self.piece.start, self.piece.stop
        keys, values = (_rows(tensor, self.piece.keys)[None] for tensor in (states.key, states.value))
        output[start:stop] = states.attend(states.query[None, start:stop], keys, values, self.mask)[0]

    def differentiate(self, states: _States, grad_output: Tensor, sums: _States) -> None:
        start, stop = self.piece.start, self.piece.stop
        keys, values = (_rows(tensor, self.piece.keys)[None] for tensor in (states.key, states.value))
        query, *others = states.differentiate(
            states.query[None, start:stop], keys, values, self.mask, grad_output[None, start:stop]
        )
        sums.query[start:stop] += query[0]
        for total, gradient in zip((sums.key, sums.value), others, strict=True):
            _add_rows(total, self.piece.keys, gradient[0])


@dataclass(frozen=True, slots=True, eq=False)
class _Together:
    """B pieces, padded to one shape with rows that are looked at by padding alone.

    Attributes:
        sources: Rows of the queries, `[B * queries]`.
        targets: Where the results go: the same rows, but for padding the one after the last row.
        keys: Rows of the keys, `[B * keys]`.
        mask: `[B, 1, queries, keys]`.
    """

    sources: Tensor
    targets: Tensor
    keys: Tensor
    mask: Tensor

    def attend(self, states: _States, output: Tensor) -> None:
        query, key, value = self._selected(states)
        output.index_copy_(0, self.targets, states.attend(query, key, value, self.mask).flatten(0, 1))

    def differentiate(self, states: _States, grad_output: Tensor, sums: _States) -> None:
        query, key, value = self._selected(states)
        wanted = grad_output.index_select(0, self.targets).view(*query.shape[:3], -1)
        found = states.differentiate(query, key, value, self.mask, wanted)
        for (total, rows), gradient in zip(self._places(sums), found, strict=True):
            total.index_add_(0, rows, gradient.flatten(0, 1).to(total.dtype))

    def _selected(self, states: _States) -> Iterator[Tensor]:
        batch = self.mask.shape[0]
        return (
            tensor.index_select(0, rows).view(batch, -1, *tensor.shape[1:]) for tensor, rows in self._places(states)
        )

    def _places(self, states: _States) -> tuple[tuple[Tensor, Tensor], ...]:
        return (states.query, self.sources), (states.key, self.keys), (states.value, self.keys)


def _calls(
    together: Sequence[Sequence[Piece]], query: Tensor, window: int | None, ends: NDArray[np.int64]
) -> Iterator[_Call]:
    """Everything that is the same in every layer; the rows go to the device at once."""
    masks: dict[tuple[int, int], Tensor] = {}
    several = [group for group in together if len(group) > 1]
    indices = [array for group in several for array in _indices(group, query.shape[2])]
    rows = iter(_split(indices, query.device))
    for group in together:
        piece, queries, keys = group[0], max(p.queries for p in group), max(p.key_count for p in group)
        if len(group) > 1:
            mask = _mask(query, [p.key_count - p.queries for p in group], queries, keys, window)
            yield _Together(next(rows), next(rows), next(rows), mask)
        elif piece.forks:
            yield _Alone(piece, _mask_of_branch(query, piece, ends))
        elif piece.is_causal and (window is None or window >= queries):
            yield _Alone(piece, None)
        else:
            if (queries, keys) not in masks:
                masks[queries, keys] = _mask(query, [keys - queries], queries, keys, window)
            yield _Alone(piece, masks[queries, keys])


def _indices(group: Sequence[Piece], nobody: int) -> list[NDArray[np.int64]]:
    """Rows of the queries, of their results, and of the keys, each with padding, flat."""
    queries, keys = max(piece.queries for piece in group), max(piece.key_count for piece in group)
    sources = np.zeros((len(group), queries), np.int64)
    targets = np.full((len(group), queries), nobody, np.int64)
    seen = np.zeros((len(group), keys), np.int64)
    for at, piece in enumerate(group):
        sources[at, : piece.queries] = targets[at, : piece.queries] = np.arange(piece.start, piece.stop)
        seen[at, : piece.key_count] = np.concatenate([np.arange(start, stop) for start, stop in piece.keys])
    return [sources.ravel(), targets.ravel(), seen.ravel()]


def _split(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> Sequence[Tensor]:
    """Arrays of row numbers on the device, by one copy."""
    if not arrays:
        return ()
    return torch.split(to_device(torch.from_numpy(np.concatenate(arrays)), device), [len(array) for array in arrays])


def _mask(query: Tensor, before: Sequence[int], queries: int, keys: int, window: int | None) -> Tensor:
    """Additive, `[B, 1, queries, keys]`: a piece's query j sees the keys up to `before + j`, a window of them.

    What padding sees does not matter, as nobody reads it, as long as it sees something: else it is no number.
    """
    device = query.device
    last = to_device(torch.tensor(before), device)[:, None, None] + torch.arange(queries, device=device)[:, None]
    last = last.clamp(max=keys - 1)
    place = torch.arange(keys, device=device)
    hidden = place > last
    if window is not None:
        hidden |= place <= last - window
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=device)
    return mask.masked_fill_(hidden, _HIDDEN)[:, None]


def _mask_of_branch(query: Tensor, piece: Piece, ends: NDArray[np.int64]) -> Tensor:
    """Additive, `[1, 1, queries, keys]`: all of the path before the branch, and of its own rows each query's path."""
    own = to_device(torch.from_numpy(ends[piece.start : piece.stop] - piece.start), query.device)
    mask = _mask(query, [piece.path_length], piece.queries, piece.key_count, None)
    left = own <= torch.arange(piece.queries, device=query.device)[:, None]
    mask[..., piece.path_length :].masked_fill_(left, _HIDDEN)
    return mask


def _rows(states: Tensor, ranges: Sequence[Range]) -> Tensor:
    """These rows of `[T, heads, D]`."""
    parts = [states[start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _add_rows(total: Tensor, ranges: Sequence[Range], added: Tensor) -> None:
    """Adds `[N, heads, D]` to these rows of `[T, heads, D]`."""
    parts = torch.split(added, [stop - start for start, stop in ranges])
    for (start, stop), part in zip(ranges, parts, strict=True):
        total[start:stop] += part


def _repeated(states: Tensor, count: int) -> Tensor:
    """Each head `count` times, one after the other."""
    return states if count == 1 else states.repeat_interleave(count, dim=1)


def _last(ranges: tuple[Range, ...], count: int) -> tuple[Range, ...]:
    """The last `count` rows of a path."""
    kept: list[Range] = []
    for start, stop in reversed(ranges):
        if count <= 0:
            break
        kept.insert(0, (max(start, stop - count), stop))
        count -= stop - start
    return tuple(kept)
