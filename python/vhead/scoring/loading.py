"""Loading what a scorer needs: a language model, its trained head and its tokenizer."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vhead import upstream
from vhead.errors import HeadNotFoundError, VheadError
from vhead.formats import find_head

logger = logging.getLogger("vhead")


@dataclass(frozen=True)
class Critic:
    """What was loaded.

    Attributes:
        model: The language model with its head, in evaluation mode.
        tokenizer: Its tokenizer, None where it has none.
        reward_statistics: The mean and the standard deviation of rewards that the head's checkpoint states, or None.
    """

    model: nn.Module
    tokenizer: Any
    reward_statistics: tuple[float | None, float | None]


def load_critic(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    head: str | Path | None,
    allow_random_head: bool,
) -> Critic:
    """Loads a model, its trained head and its tokenizer; the arguments are those of `Scorer.from_pretrained`."""
    _check_config(path)
    weights = find_head(path if head is None else head)
    if weights is None and (head is not None or not allow_random_head):
        raise HeadNotFoundError(
            f"{path if head is None else head}: expected a trained value head, found none; "
            "allow_random_head=True (--allow-random-head) scores with a new, untrained one"
        )
    model = _load(path, dtype)
    if head is not None and weights is not None:
        model._load_head(weights)
    _move(model, device)
    statistics = (None, None) if weights is None else (weights.mean, weights.std)
    return Critic(model, _tokenizer(path), statistics)


def _load(path: str | Path, dtype: torch.dtype | str | None) -> Any:  # noqa: ANN401, the class is imported on use
    from vhead.modeling import AutoModelForCausalLMWithValueHead  # noqa: PLC0415, slow, and only needed to load

    options = {} if dtype is None else {upstream.DTYPE: _dtype(dtype)}
    with _named(path):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(path, **options)
    return model.eval()


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point dtype of torch, got {dtype!r}")
    return found


def _check_config(path: str | Path) -> None:
    """A folder that is no model's, or a name with a typing mistake, is found before anything is said about heads."""
    from transformers import AutoConfig  # noqa: PLC0415, slow, and only needed to load

    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return
    if not folder.is_dir() and (folder.is_absolute() or len(folder.parts) > 2 or str(path).startswith(".")):
        raise VheadError(f"{path}: expected the folder of a model, found no such folder")
    with _named(path):
        AutoConfig.from_pretrained(path)


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Errors of transformers say which model they are about."""
    try:
        yield
    except VheadError:
        raise
    except (OSError, ValueError) as error:
        raise VheadError(f"{path}: the model cannot be loaded: {error}") from error


def _move(model: nn.Module, device: torch.device | str | None) -> None:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        # Torch explains itself over many lines; the first one says what is wrong.
        raise VheadError(f"device: the model cannot go to {str(device)!r}: {str(error).splitlines()[0]}") from error


def _tokenizer(path: str | Path) -> Any:  # noqa: ANN401, any tokenizer of transformers
    """The model's tokenizer, or None where it has none: token ids can be scored without."""
    from transformers import AutoTokenizer  # noqa: PLC0415, slow, and only needed to load

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError) as error:
        # A KeyError is how transformers 4 says that a registered model type has no tokenizer of its own.
        logger.warning("%s: no tokenizer, so that only token ids can be scored: %s", path, error)
        return None
