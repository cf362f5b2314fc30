"""Loading what a scorer needs: a language model, its trained head and its tokenizer."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vhead import upstream
from vhead.checkpoints.checkpoint import Checkpoint
from vhead.checkpoints.config_bounds import check_config
from vhead.errors import BodyMismatchError, HeadNotFoundError, LoadError, VheadError, loading
from vhead.formats import find_head

logger = logging.getLogger("vhead")

_NAMES_SHOWN = 20


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
    trust_remote_code: bool,
    adapters: Iterable[str | None] = (),
) -> Critic:
    """Loads a model, its trained head and its tokenizer.

    Args:
        path: As `Scorer.from_pretrained` takes it, like all arguments but the last.
        dtype: Likewise.
        device: Likewise.
        head: Likewise.
        allow_random_head: Likewise.
        trust_remote_code: Likewise.
        adapters: The names of adapters that are wanted; those other than the first lie in folders of their names, as
            peft saves them.
    """
    with loading(path):
        # A folder that is no model's, or a name with a typing mistake, is found before anything is said about heads.
        Checkpoint(path).require()
        weights = find_head(path if head is None else head)
    if weights is None and (head is not None or not allow_random_head):
        # A random head never takes the place of one that was named.
        if head is not None:
            found = "none" if Path(head).exists() else "no such file or folder, and no repository with one on the hub"
            raise HeadNotFoundError(f"{head}: expected a trained value head, found {found}")
        raise HeadNotFoundError(
            f"{path}: expected a trained value head, found none; "
            "to score with a new, untrained one, pass allow_random_head=True (--allow-random-head)"
        )
    model = _load(path, dtype, head, trust_remote_code=trust_remote_code)
    for name in adapters:
        _add_adapter(model.pretrained_model, path, name)
    _move(model, device)
    statistics = (None, None) if weights is None else (weights.mean, weights.std)
    tokenizer = _tokenizer(_home_of_tokenizer(path, model), trust_remote_code=trust_remote_code)
    return Critic(model, tokenizer, statistics)


def _load(
    path: str | Path, dtype: torch.dtype | str | None, head: str | Path | None, *, trust_remote_code: bool
) -> Any:
    from vhead.modeling import AutoModelForCausalLMWithValueHead  # slow, and only needed to load

    options = {} if dtype is None else {upstream.DTYPE: _dtype(dtype)}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        path, head=head, trust_remote_code=trust_remote_code, **options
    )
    _check_complete(model, path)
    return model.eval()


def _add_adapter(body: Any, path: str | Path, name: str | None) -> None:
    """Loads a further adapter from the folder of its name, if there is one; a scorer says what is missing."""
    from vhead.modeling.adapters import load_further  # imports transformers

    known = getattr(body, "peft_config", None)
    if known and name and name not in known and Path(name).name == name:
        load_further(body, Checkpoint(path, subfolder=name), name)


def _check_complete(model: Any, path: str | Path) -> None:
    """Refuses a model some of whose layers were drawn at random, because the checkpoint lacks them.

    A language-model head that is missing is reported only where it is used.
    """
    from vhead.modeling.loading import trunk_names  # imports transformers

    missing = sorted(trunk_names(model.pretrained_model, set(model.untrained)))
    if missing:
        raise BodyMismatchError(
            f"{path}: the checkpoint does not hold the whole language model: {_listed(missing)}: missing, or of "
            "another shape"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point dtype of torch, got {dtype!r}")
    return found


def _move(model: nn.Module, device: torch.device | str | None) -> None:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        # Torch explains itself over many lines; the first one says what is wrong.
        reason = str(error).splitlines()[0]
        raise VheadError(f"device: the model cannot be moved to {str(device)!r}: {reason}") from error


def _home_of_tokenizer(path: str | Path, model: Any) -> str | Path:
    """Where a model's tokenizer is: an adapter that was saved without one has that of its language model."""
    adapter = getattr(model.pretrained_model, "active_peft_config", None)
    base: str | None = getattr(adapter, "base_model_name_or_path", None)
    return path if base is None or Checkpoint(path).path("tokenizer_config.json") is not None else base


def _check_tokenizer(path: str | Path) -> None:
    """Its files are the folder's own, and it asks for no more tokens than a vocabulary has.

    Raises:
        LoadError: It names a file elsewhere, or a number is out of all proportion.
    """
    with loading(path):
        config = Checkpoint(path).json_object("tokenizer_config.json")
        check_config(config, f"{path}: tokenizer_config.json", runs_code=True)
        for key in ("fast_tokenizer_files", "vocab_file", "merges_file", "tokenizer_file"):
            value = config.get(key)
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str) and Path(name).name != name:
                    raise LoadError(
                        f"{path}: tokenizer_config.json: {key}: expected the name of a file of this folder, got "
                        f"{name!r}; delete the entry, which transformers does not need"
                    )


def _tokenizer(path: str | Path, *, trust_remote_code: bool) -> Any:
    """The model's tokenizer, or None where it has none: token ids can be scored without."""
    from transformers import AutoTokenizer  # slow, and only needed to load

    _check_tokenizer(path)
    try:
        with loading(path):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code is True)
    except LoadError as error:
        logger.warning("%s: no tokenizer could be loaded, so only token ids can be scored: %s", path, error)
        return None
