"""Values of Arrow as Python objects, without losing a digit.

Python's own times end at microseconds, so that pyarrow cuts a time of nanoseconds, and asks for pandas where a point
in time has them.
"""

from decimal import Decimal
from functools import cache
from typing import Any

from vhead.rollouts.files.arrow import pa

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def exact(value: pa.Scalar) -> Any:
    """The value as a Python object; a time with nanoseconds as ISO 8601, and of a time span the scalar itself."""
    if not value.is_valid or not _needs_care(value.type):
        return value.as_py()
    if pa.types.is_struct(value.type):
        return {name: exact(member) for name, member in value.items()}
    if pa.types.is_map(value.type):
        return [tuple(exact(member) for member in pair.values()) for pair in value.values]
    if pa.types.is_nested(value.type):
        return [exact(item) for item in value.values]
    if pa.types.is_dictionary(value.type):
        return exact(value.value)
    return value if pa.types.is_duration(value.type) else _isoformat(value)


def seconds(span: pa.DurationScalar) -> float:
    """The seconds of a time span.

    Raises:
        ValueError: A 64-bit float would round them.
    """
    unit = span.type.unit
    found: float = span.value / _PER_SECOND[unit]
    if Decimal(repr(found)) * _PER_SECOND[unit] != span.value:
        raise ValueError(
            f"a time span of {span.value} {unit}, whose seconds a 64-bit float rounds; a Parquet output keeps it"
        )
    return found


@cache
def _needs_care(of: pa.DataType) -> bool:
    """Whether `as_py` could lose digits of such a value, or of one inside it."""
    if pa.types.is_duration(of):
        return True
    if pa.types.is_timestamp(of) or pa.types.is_time(of):
        return bool(of.unit == "ns")
    if pa.types.is_dictionary(of):
        return _needs_care(of.value_type)
    return any(_needs_care(of.field(at).type) for at in range(of.num_fields))


def _isoformat(value: pa.Scalar) -> str:
    """A time of nanoseconds: that of its microseconds, with three more digits where it needs them."""
    microseconds, nanoseconds = divmod(value.value, 1000)
    kind = pa.timestamp("us", value.type.tz) if pa.types.is_timestamp(value.type) else pa.time64("us")
    time = pa.scalar(microseconds, kind).as_py()
    if not nanoseconds:
        return str(time.isoformat())
    text = time.isoformat(timespec="microseconds")
    end = text.index(".") + len(".000000")
    return f"{text[:end]}{nanoseconds:03}{text[end:]}"
