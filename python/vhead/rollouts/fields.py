"""Fields of records: which there are, and the columns that hold them where those have other names."""

from collections.abc import Iterable, Mapping
from typing import Any

from vhead.errors import FieldError

IDS, TEXT = ("prompt_ids", "completion_ids"), ("prompt", "completion")
PAIRS = (IDS, TEXT)
# The two completions of one prompt that a preference pair has.
SIDES_OF_IDS, SIDES = ("chosen_ids", "rejected_ids"), ("chosen", "rejected")
MESSAGES, TOOLS = "messages", "tools"
MASK, CANDIDATES = "completion_mask", "candidates"
INPUT_FIELDS = ("id", MESSAGES, TOOLS, MASK, CANDIDATES, *IDS, *TEXT, *SIDES_OF_IDS, *SIDES)
# The fields of each form that a record may have.
_FORMS = ({MESSAGES}, set(IDS), set(TEXT), {IDS[0], *SIDES_OF_IDS}, {TEXT[0], *SIDES})

Fields = Mapping[str, str]


def parsed_fields(text: str) -> dict[str, str]:
    """Reads `prompt=question,completion=response` as the columns that hold these fields.

    Raises:
        ValueError: The text is of another form, or names a field twice or one that there is not.
    """
    pairs = [pair.partition("=")[::2] for pair in text.split(",")]
    fields = [field.strip() for field, _ in pairs]
    if doubled := next((field for field in fields if fields.count(field) > 1), None):
        raise ValueError(f"fields: expected each field once, got {doubled} twice")
    return checked_fields({field: column.strip() for field, (_, column) in zip(fields, pairs, strict=True)})


def checked_fields(fields: Mapping[str, str]) -> dict[str, str]:
    """Checks a mapping from fields to the columns that hold them.

    Raises:
        ValueError: A field is none of `INPUT_FIELDS`, or has no column.
    """
    for field, column in fields.items():
        if field not in INPUT_FIELDS:
            raise ValueError(f"fields: expected some of {', '.join(INPUT_FIELDS)}, got {field!r}")
        if not isinstance(column, str) or not column:
            raise ValueError(f"fields: expected {field}=COLUMN, got {column!r} as its column")
    return dict(fields)


def columns_of_fields(fields: Fields) -> tuple[str, ...]:
    """The columns in which fields are looked for."""
    return tuple(fields.get(field, field) for field in INPUT_FIELDS)


def present_fields(record: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """The fields of a record that hold something; where some forms of a rollout are mapped, no other one counts.

    Raises:
        FieldError: The record lacks a mapped column.
    """
    for field, column in fields.items():
        if column not in record:
            expected = f"a column of this name, because `{field}` is mapped to it"
            raise FieldError(None, column, expected=expected, got=f"the fields {listed(record)}")
    ignored = _ignored(fields)
    found = {field: record.get(fields.get(field, field)) for field in INPUT_FIELDS if field not in ignored}
    return {field: value for field, value in found.items() if value is not None}


def _ignored(fields: Fields) -> set[str]:
    mapped = [form for form in _FORMS if not form.isdisjoint(fields)]
    return set().union(*_FORMS).difference(*mapped) if mapped else set()


def listed(names: Iterable[str]) -> str:
    """The first few names, each cut where it is long."""
    first, *others = sorted(map(str, names)) or ["none"]
    listed = ", ".join(name[:40] for name in (first, *others[:9]))
    return listed if len(others) < 10 else f"{listed} and {len(others) - 9:,} more"
