"""Whole sequences, as reward clients send them: texts, token ids or a chat that nobody has parted."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from vhead.errors import FieldError, RequestError
from vhead.rollouts import Rollout
from vhead.scoring.fields import Asked
from vhead.serve.models import Prepared, ServedModel

# One text, one sequence of token ids, or several of either.
Input = str | list[str | int | list[int]]

Ids = NDArray[np.int64] | Sequence[int]
AT_THE_END = Asked(("reward",))
AT_EACH_TOKEN = Asked(("values", "bootstrap"))


def parts_of(given: Input, field: str) -> list[str | list[int]]:
    """The texts or sequences of token ids in an input.

    Raises:
        RequestError: There are none, or they are mixed.
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError(f"{field}: expected a text, token ids, or a list of either, got an empty list")
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise RequestError(f"{field}: expected texts alone or token ids alone, got a mixture")
    if kinds == {int}:
        return [given]  # type: ignore[list-item]  # all of them are
    return given  # type: ignore[return-value]  # as above


def all_token_ids(
    model: ServedModel, parts: Sequence[str | list[int] | list[dict[str, Any]]], names: Sequence[str]
) -> list[Ids]:
    """The token ids of parts; to be run by `Service.read`.

    Raises:
        FieldError: One is text, and cannot become token ids.
        RequestError: They are more text than a request may have.
    """
    model.check_texts([part for part in parts if _is_text(part)])
    return [token_ids(model, part, name) for part, name in zip(parts, names, strict=True)]


def token_ids(model: ServedModel, part: str | list[int] | list[dict[str, Any]], name: str, **options: Any) -> Ids:
    """A part's token ids; to be run by `Service.read`.

    Raises:
        FieldError: It is text, and cannot become token ids.
    """
    if _is_text(part):
        return model.scorer.encoder.whole(part, name, **options)
    return part  # type: ignore[return-value]


def _is_text(part: str | list[int] | list[dict[str, Any]]) -> TypeGuard[str | list[dict[str, Any]]]:
    return isinstance(part, str) or bool(part and isinstance(part[0], Mapping))


def prepared(model: ServedModel, sequences: Sequence[Ids], names: Sequence[str], asked: Asked = AT_THE_END) -> Prepared:
    """Sequences as rollouts: of one token and its prompt, or of one prompt token and what follows it.

    Raises:
        RequestError: There are more tokens than a request may have.
        FieldError: One of them has fewer than two tokens, or cannot be scored.
    """
    border = -1 if asked is AT_THE_END else 1
    rollouts = [_rollout(ids, border, name) for ids, name in zip(sequences, names, strict=True)]
    # Errors are to speak of what was sent, which has neither prompt nor completion.
    for rollout, name in zip(rollouts, names, strict=True):
        whole = np.concatenate([rollout.prompt, rollout.completion])
        model.scorer.encoder.check_whole(whole, name, cut="prompt" if asked is AT_THE_END else "completion")
    return model.prepare(rollouts, asked, names)


def check_count(model: ServedModel, parts: Sequence[object], field: str) -> None:
    """Raises `RequestError` for more parts in a field than a request may have."""
    model.check_count(len(parts), f"entries of {field}")


def _rollout(ids: Ids, border: int, name: str) -> Rollout:
    if len(ids) < 2:
        raise FieldError(name, "tokens", expected="at least two", got=str(len(ids)))
    try:
        return Rollout(ids[:border], ids[border:])
    except FieldError as error:
        raise FieldError(name, "tokens", expected=error.expected, got=error.got) from None
