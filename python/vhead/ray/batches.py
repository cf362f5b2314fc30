"""Batches of a data set: rows in, the same rows with their scores out."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vhead.errors import FieldError, MissingExtraError, RecordError
from vhead.rollouts.fields import CANDIDATES, MASK, MESSAGES, SIDES, TEXT, Fields, checked_fields
from vhead.rollouts.records import rollouts_of
from vhead.rollouts.rollout import Rollout
from vhead.rollouts.wording import named
from vhead.scoring.fields import Asked
from vhead.scoring.scores import Scores

# As `ray.data.llm` calls it: empty where the row was processed.
ERROR_COLUMN = "__inference_error__"


class BatchScorer:
    """Scores batches of rows; the callable class for `ray.data.Dataset.map_batches`.

    An actor loads the model once and keeps it. Rows have the fields of records in files: `prompt` and `completion`, or
    `prompt_ids` and `completion_ids` with `completion_mask` and `candidates`, or `messages`; `id` and `tools` beside
    them.

    Args:
        model: A folder that every machine has, or a hub repository's id.
        returns: What is wanted, as for `Scorer.score`.
        temperature: As for `Scorer.score`.
        top_logprobs: As for `Scorer.score`.
        fields: Columns that hold fields under other names, such as `{"prompt": "question"}`.
        suffix: Added to the names of the scores' columns.
        should_continue_on_error: Whether a row that cannot be scored stays in the output with nulls for scores and what
            is wrong with it in `__inference_error__`, which all rows then have; False: it is raised.
        **options: Those of `Scorer.from_pretrained`, such as `dtype`, `device`, `token_budget`, `follow` and
            `share_weights`.

    Raises:
        VheadError: As `Scorer.from_pretrained` says.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        returns: Sequence[str] | None = None,
        temperature: float = 1.0,
        top_logprobs: int = 0,
        fields: Fields | None = None,
        suffix: str = "",
        should_continue_on_error: bool = False,
        **options: Any,
    ) -> None:
        self._fields = {} if fields is None else checked_fields(fields)
        self._suffix = suffix
        self._continues = should_continue_on_error
        from vhead.scoring.scorer import Scorer  # imports torch, which only actors need

        self._scorer = Scorer.from_pretrained(model, **options)
        self._asked = self._scorer.asked(returns, temperature, top_logprobs)

    def __call__(self, batch: Any) -> Any:
        """Scores a batch.

        Args:
            batch: A `pyarrow.Table`, or a mapping from columns' names to arrays.

        Returns:
            A `pyarrow.Table` of the same rows in the same order, with a column for each of `Scores.columns`, as
            `Scores.to_arrow` gives them. Where chats are scored, `completion_mask` says which tokens are the model's.

        Raises:
            RecordError: A row cannot be scored, and `should_continue_on_error` is False.
            FieldError: A column of the scores is there already.
        """
        pa = _arrow()
        table = batch if isinstance(batch, pa.Table) else pa.table({name: list(batch[name]) for name in batch})
        rows = [_Row(at, record, self._fields) for at, record in enumerate(table.to_pylist())]
        errors = _Errors(rows)
        asked = self._asked_of(table)
        parts, places = [self._scorer.nothing(asked)], []
        for chunk in self._scorer.scored(rows, asked, on_error=errors.add if self._continues else None):
            parts.append(chunk.scores)
            places += [row.at for row in chunk.sources]
        scores = Scores.concat(parts if len(parts) == 1 else parts[1:])
        computed = self._computed(pa, scores, with_mask=self._holds_chats(pa, table))
        table = _beside(table, _scattered(pa, computed, places, len(rows)))
        return _beside(table, errors.column(pa)) if self._continues else table

    def _asked_of(self, table: Any) -> Asked:
        """What is asked for, and candidates where the rows bring some."""
        column = self._fields.get(CANDIDATES, CANDIDATES)
        if column not in table.column_names or table.column(column).null_count == len(table):
            return self._asked
        return replace(self._asked, returns=(*self._asked.returns, "candidates"))

    def _holds_chats(self, pa: Any, table: Any) -> bool:
        names = [self._fields.get(field, field) for field in (MESSAGES, TEXT[1])]
        return any(name in table.column_names and pa.types.is_list(table.schema.field(name).type) for name in names)

    def _computed(self, pa: Any, scores: Scores, *, with_mask: bool) -> Any:
        # Ids are among the rows' columns as they came.
        table = replace(scores, ids=(None,) * len(scores)).to_arrow().drop_columns(["id"])
        if with_mask:
            offsets, mask = pa.array(scores.offsets.astype("int32")), pa.array(scores.mask)
            table = table.append_column(MASK, pa.ListArray.from_arrays(offsets, mask))
        return table.rename_columns([f"{name}{self._suffix}" for name in table.column_names])


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """A row of a batch."""

    at: int
    record: Mapping[str, Any]
    fields: Fields

    @property
    def where(self) -> str:
        """What errors call it."""
        return f"row {self.at} of a batch"

    @property
    def name(self) -> str:
        """What errors call it, with its id."""
        id = self.record.get(self.fields.get("id", "id"))
        return named(self.where, id if isinstance(id, str | int | float) else None)

    def rollouts(self) -> tuple[Rollout, ...]:
        """Its rollout.

        Raises:
            RecordError: It holds none, or a pair.
        """
        found = rollouts_of(self.record, self.where, self.fields)
        if len(found) != 1:
            expected = "one completion; score the two sides of pairs as two rows"
            raise FieldError(self.name, SIDES[0], expected=expected, got="a pair")
        return found


class _Errors:
    """What is wrong with the rows of a batch."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._places = {row.name: row.at for row in rows}
        self._found: dict[int, str] = {}

    def add(self, error: RecordError) -> None:
        """Takes note of an error; one that names no row of the batch is raised."""
        if error.record not in self._places:
            raise error
        self._found[self._places[error.record]] = str(error)

    def column(self, pa: Any) -> Any:
        """A table of one column, with an empty text where there was none."""
        texts = [self._found.get(at, "") for at in self._places.values()]
        return pa.table({ERROR_COLUMN: pa.array(texts, pa.string())})


def _arrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise MissingExtraError("pyarrow", "ray") from error


def _scattered(pa: Any, table: Any, places: Sequence[int], count: int) -> Any:
    """The rows of a table at these places of `count`, with nulls between them."""
    if len(places) == count:
        return table
    at = dict(zip(places, range(len(places)), strict=True))
    # An empty table has nothing to take nulls of.
    if not at:
        return pa.table([pa.nulls(count, column.type) for column in table.schema], schema=table.schema)
    return table.take(pa.array([at.get(place) for place in range(count)], pa.int64()))


def _beside(table: Any, other: Any) -> Any:
    """Two tables of the same rows as one."""
    for name in other.column_names:
        if name in table.column_names:
            expected = (
                "no such column in the data set, because the scores go there; give them other names with `suffix`"
            )
            raise FieldError("the data set", name, expected=expected, got="one")
        table = table.append_column(other.schema.field(name), other.column(name))
    return table
