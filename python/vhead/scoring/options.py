"""The options of a scorer: one object from the command line to the engine."""

import warnings
from numbers import Integral
from typing import TYPE_CHECKING, TypedDict

from vhead.env import MOST_THREADS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from vhead.heads import ValueHead
    from vhead.packing.plan import Attention
    from vhead.rollouts.encoding import Truncation
    from vhead.scoring.conventions import Conventions


class ScorerOptions(TypedDict, total=False):
    """The arguments of `Scorer` that are neither the model nor the tokenizer; what each means is said there.

    An option that is missing is None, or False.
    """

    token_budget: int | None
    chunk_tokens: int | None
    num_threads: int | None
    conventions: "Conventions | None"
    batch_invariant: bool
    attention: "Attention | None"
    truncation: "Truncation | None"
    max_length: int | None
    separate_tokens: bool
    append_eos: bool
    heads: "Mapping[str, ValueHead] | None"
    policy_adapter: str | None
    value_adapter: str | None
    follow: "str | Path | None"
    min_step: int | None
    patience: float
    share_weights: bool


_WHOLE = (Integral, "a whole number")
_KINDS: dict[str, tuple[type, str]] = dict.fromkeys(
    ("token_budget", "chunk_tokens", "num_threads", "max_length", "min_step"), _WHOLE
)
_KINDS |= dict.fromkeys(("batch_invariant", "separate_tokens", "append_eos", "share_weights"), (bool, "True or False"))
_KINDS |= dict.fromkeys(("policy_adapter", "value_adapter"), (str, "an adapter's name"))


def checked_options(options: ScorerOptions) -> ScorerOptions:
    """Checks that there are such options and that their numbers are in range, and gives them by their new names.

    Raises:
        TypeError: There is no such option, or it is of another type.
        ValueError: A number is out of range.
    """
    if "window_tokens" in options:
        warnings.warn("window_tokens is now called chunk_tokens", FutureWarning, stacklevel=3)
        options = {**options, "chunk_tokens": options["window_tokens"]}  # type: ignore[typeddict-item]
        del options["window_tokens"]  # type: ignore[typeddict-item]
    if unknown := options.keys() - ScorerOptions.__annotations__.keys():
        known = ", ".join(ScorerOptions.__annotations__)
        raise TypeError(f"Scorer: expected options among {known}, got {', '.join(sorted(unknown))}")
    for name, value in options.items():
        kind, expected = _KINDS.get(name, (object, ""))
        if value is not None and (not isinstance(value, kind) or (kind is Integral and isinstance(value, bool))):
            raise TypeError(f"{name}: expected {expected}, got {value!r}")
    numbers = {"token_budget": options.get("token_budget"), "chunk_tokens": options.get("chunk_tokens")}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if options.get("follow") is None and options.get("min_step") is not None:
        raise ValueError("min_step: expected a directory to follow as well (follow), got none")
    if options.get("follow") is not None and options.get("heads"):
        raise ValueError("follow: expected a model with its own head, whose weights are followed, got several heads")
    threads = options.get("num_threads")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"num_threads: expected 1 to {MOST_THREADS}, got {threads}")
    return options
