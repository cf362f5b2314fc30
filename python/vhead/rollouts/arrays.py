"""Token ids, masks and candidates as arrays, from lists, numpy arrays and torch tensors."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError
from vhead.rollouts.wording import shown

_LARGEST = np.iinfo(np.int64).max


def token_ids(value: object, field: str, record: str | int | None = None) -> NDArray[np.int64]:
    """Token ids as a read-only int64 array `[N]`, N >= 1, none negative.

    Raises:
        FieldError: `value` is anything else.
    """
    array = _integer_array(value)
    if array is None:
        raise FieldError(record, field, expected="text or a flat list of integer token ids", got=shown(value))
    if array.ndim != 1:
        raise FieldError(record, field, expected="token ids of shape [N]", got=f"shape {list(array.shape)}")
    if array.size == 0:
        raise FieldError(record, field, expected="at least one token", got="none")
    _check_not_negative(array, field, record)
    array.flags.writeable = False
    return array


def token_mask(value: object, length: int, field: str, record: str | int | None = None) -> NDArray[np.bool_]:
    """Whether each token of a completion is the model's, as a read-only array `[length]` with at least one True.

    Raises:
        FieldError: `value` is anything else.
    """
    array = _array(value)
    expected = "a flat list of booleans, True where the model wrote the token"
    if array is None or array.ndim != 1 or (array.size and array.dtype != np.bool_):
        raise FieldError(record, field, expected=expected, got=shown(value))
    if len(array) != length:
        expected = f"one boolean for each of the completion's {length} tokens"
        raise FieldError(record, field, expected=expected, got=str(len(array)))
    if not array.any():
        raise FieldError(record, field, expected="at least one True, where the model wrote a token", got="none")
    mask = np.array(array, np.bool_)
    mask.flags.writeable = False
    return mask


def candidate_ids(value: object, length: int, field: str, record: str | int | None = None) -> NDArray[np.int64]:
    """Ids whose log-probabilities are wanted at each token of a completion, read-only int64 `[length, M]`, M >= 1.

    Raises:
        FieldError: `value` is anything else.
    """
    _check_not_ragged(value, field, record)
    array = _integer_array(value)
    expected = f"a list of integer token ids for each of the completion's {length} tokens"
    if array is None:
        raise FieldError(record, field, expected=expected, got=shown(value))
    if array.ndim != 2 or array.shape[0] != length or array.shape[1] == 0:
        expected = f"{expected}, shape [{length}, M] with M >= 1"
        raise FieldError(record, field, expected=expected, got=f"shape {list(array.shape)}")
    _check_not_negative(array, field, record)
    array.flags.writeable = False
    return array


def _check_not_negative(array: NDArray[np.int64], field: str, record: str | int | None) -> None:
    if array.min() < 0:
        at = int(array.reshape(len(array), -1).min(axis=1).argmin())
        raise FieldError(record, field, expected="token ids >= 0", got=f"{array[at].min()} at position {at}")


def _check_not_ragged(value: object, field: str, record: str | int | None) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(row, list | tuple | np.ndarray) for row in value):
        return
    lengths = [len(row) for row in value]
    at = next((at for at, length in enumerate(lengths) if length != lengths[0]), None)
    if at is not None:
        expected = f"as many candidates for every token as for the first, {lengths[0]}"
        raise FieldError(record, field, expected=expected, got=f"{lengths[at]} at position {at}")


def _array(value: object) -> NDArray[Any] | None:
    """A list, an array or a tensor as an array; None where it is none of these, or ragged."""
    try:
        if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
            value = value.detach().cpu().numpy()
        # What a mask hides would be there again.
        if not isinstance(value, list | tuple | range | np.ndarray) or isinstance(value, np.ma.MaskedArray):
            return None
        return np.asarray(value) if len(value) else np.empty(0, np.int64)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return None


def _integer_array(value: object) -> NDArray[np.int64] | None:
    # Among integers, numpy takes True as 1.
    if isinstance(value, list | tuple) and _has_booleans(value):
        return None
    array = _array(value)
    if array is None or array.dtype.kind not in "iu" or (array.size and array.max() > _LARGEST):
        return None
    return np.array(array, dtype=np.int64)


def _has_booleans(value: list[Any] | tuple[Any, ...]) -> bool:
    others = [item for item in value if type(item) is not int]
    return any(_is_bool(item) or (isinstance(item, list | tuple) and _has_booleans(item)) for item in others)


def _is_bool(item: object) -> bool:
    """Also as an array or a tensor of its own."""
    return isinstance(item, bool | np.bool_) or str(getattr(item, "dtype", "")) in ("bool", "torch.bool")
