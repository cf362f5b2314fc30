"""Scores as what other packages hold: tables of Arrow and pandas, torch tensors, and what a notebook shows."""

import importlib
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vhead.errors import MissingExtraError, MissingPackageError
from vhead.rollouts.wording import Id
from vhead.scoring.fields import is_per

if TYPE_CHECKING:
    import pyarrow

    from vhead.scoring.scores import Scores

_ARROW_LIST_LIMIT = 2**31 - 1
_ROWS_SHOWN = 10


def arrow_table(scores: "Scores") -> "pyarrow.Table":
    """A table with a column `id` and one for each of `scores.columns`; they share the flat arrays' memory."""
    try:
        import pyarrow as pa  # an optional dependency
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    columns: dict[str, Any] = {"id": pa.array(_one_type(scores.ids))}
    for name in scores.columns:
        flat, offsets = scores.flat(name)
        columns[name] = nested(pa, flat) if offsets is None else _list_column(pa, flat, offsets)
    return pa.table(columns)


def data_frame(scores: "Scores") -> Any:
    """A `pandas.DataFrame` with the columns of `arrow_table`; those with several entries a row hold array views."""
    try:
        pd: Any = importlib.import_module("pandas")
    except ImportError as error:
        raise MissingPackageError("pandas is not installed; to_pandas needs it: pip install pandas") from error
    columns: dict[str, Any] = {"id": pd.Series(list(scores.ids), dtype=object)}
    for name in scores.columns:
        flat, offsets = scores.flat(name)
        if offsets is not None:
            views = [flat[start:stop] for start, stop in pairwise(offsets.tolist())]
            columns[name] = pd.Series(views, dtype=object)
        else:
            columns[name] = flat if flat.ndim == 1 else pd.Series(list(flat), dtype=object)
    return pd.DataFrame(columns)


def html_table(scores: "Scores") -> str:
    """The first rollouts, a row each, with what has several entries by its mean."""
    names = [name for name in scores.fields if scores.computed[name].dtype == np.float32]
    shown = scores[:_ROWS_SHOWN]
    titles = [name if is_per("rollout", name) else f"mean of {name}" for name in names]
    rows = [
        (score.index, score.id, count, *(_mean(score.computed[name]) for name in names))
        for score, count in zip(shown, shown.token_counts.tolist(), strict=True)
    ]
    below = f"and {len(scores) - len(shown):,} more" if len(scores) > len(shown) else ""
    return _table(repr(scores), ["", "id", "tokens", *titles], rows, below)


def _mean(numbers: NDArray[np.float32]) -> float | None:
    return float(np.mean(numbers)) if np.size(numbers) else None


def _list_column(pa: Any, flat: NDArray[Any], offsets: NDArray[np.int64]) -> "pyarrow.ChunkedArray":
    """Arrow's list offsets have 32 bits, so that a longer column is cut into chunks between rollouts."""
    start, count = 0, len(offsets) - 1
    chunks: list[pyarrow.ListArray] = []
    while start < count or not chunks:
        fitting = int(np.searchsorted(offsets, offsets[start] + _ARROW_LIST_LIMIT, side="right")) - 1
        stop = min(max(fitting, start + 1), count)
        own = offsets[start : stop + 1] - offsets[start]
        values = nested(pa, flat[offsets[start] : offsets[stop]])
        chunks.append(pa.ListArray.from_arrays(pa.array(own.astype(np.int32)), values))
        start = stop
    return pa.chunked_array(chunks)


def nested(pa: Any, flat: NDArray[Any]) -> Any:
    """An array `[N]`, or `[N, K]` as lists of K."""
    values = pa.array(flat.reshape(-1))
    if flat.ndim == 1:
        return values
    if flat.shape[1] == 0:
        # Nobody gave candidates: nobody knows how many there would be, and Arrow has no lists of 0.
        return pa.array([[]] * len(flat), pa.list_(values.type))
    return pa.FixedSizeListArray.from_arrays(values, flat.shape[1])


def _one_type(ids: Sequence[Id]) -> list[Id]:
    """Arrow columns have one type: ids of several become text, and so do integers that have more than 64 bits."""
    types = {type(name) for name in ids if name is not None}
    large = types == {int} and any(abs(name) >= 2**63 for name in ids if isinstance(name, int))
    if len(types) < 2 and not large:
        return list(ids)
    return [None if name is None else str(name) for name in ids]


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], below: str = "") -> str:
    """An HTML table; numbers with four significant digits, None as nothing."""
    titles = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row)}</tr>" for row in rows)
    return (
        f"<p>{escape(caption)}</p><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{escape(below)}</p>"
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
