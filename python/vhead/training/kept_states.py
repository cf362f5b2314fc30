"""Hidden states of a frozen body, which are the same in every update, kept for the next ones."""

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vhead.ops.dispatch import is_plain
from vhead.packing.adapters import adapters_state
from vhead.training.batches import TrainingBatch

Key = tuple[Any, ...]

_WORD = 8


class KeptStates:
    """Hidden states by batch: in memory up to a budget, then on disk, and dropped with their batch.

    Args:
        budget: Bytes in memory; 0 keeps nothing there.
        folder: Where what is beyond the budget is written; None: it is computed anew each time.
    """

    def __init__(self, budget: int, folder: Path | None) -> None:
        self._budget, self._folder = budget, folder
        self._kept: weakref.WeakKeyDictionary[TrainingBatch, _Kept] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[object, ...]:
        """A copy begins with nothing kept."""
        return KeptStates, (self._budget, self._folder)

    def get(self, batch: TrainingBatch, key: Key) -> Tensor | None:
        """What was kept of a batch under this key, or None."""
        kept = self._kept.get(batch)
        if kept is None or kept.key != key:
            return None
        return kept.read()

    def put(self, batch: TrainingBatch, key: Key, states: Tensor) -> None:
        """Keeps a batch's states, where there is room; an older key's are dropped."""
        self._kept.pop(batch, None)
        size = states.numel() * states.element_size()
        used = sum(kept.size for kept in self._kept.values() if isinstance(kept, _InMemory))
        if used + size <= self._budget:
            self._kept[batch] = _InMemory(key, states)
        elif self._folder is not None:
            self._kept[batch] = _OnDisk(key, states, self._folder)


class _InMemory:
    def __init__(self, key: Key, states: Tensor) -> None:
        self.key, self._states = key, states
        self.size = states.numel() * states.element_size()

    def read(self) -> Tensor:
        return self._states


class _OnDisk:
    """A file that is deleted with this object."""

    def __init__(self, key: Key, states: Tensor, folder: Path) -> None:
        self.key, self._device = key, states.device
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="states-", suffix=".pt", delete=False) as file:
            self._path = Path(file.name)
            weakref.finalize(self, self._path.unlink, missing_ok=True)
            torch.save(states.cpu(), file)

    def read(self) -> Tensor | None:
        try:
            states: Tensor = torch.load(self._path, map_location=self._device, weights_only=True)
        except FileNotFoundError:  # Temporary folders are cleaned up, and what was kept can be computed again.
            return None
        return states


_Kept = _InMemory | _OnDisk


def states_key(model: nn.Module, parameters: Sequence[nn.Parameter], device: torch.device) -> Key:
    """What changes when hidden states are no longer what they were: other weights, adapters or dtypes.

    Args:
        model: The language model.
        parameters: Those that its states depend on.
        device: Where its states are.
    """
    half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return half, adapters_state(model), _weights_key(parameters)


def _weights_key(parameters: Sequence[nn.Parameter]) -> Key:
    """Which weights these are, and what is in them: fused optimisers write past the counter that torch has for it."""
    # Of tensors of another kind, such as quantised ones, the counter has to do.
    contents = [content for parameter in parameters if (content := _content(parameter)) is not None]
    sums = [_sum_of_bits(content) for content in contents]
    found = torch.stack([each.to(sums[0].device) for each in sums]).tolist() if sums else []
    return tuple((id(p), p._version, p.dtype, p.device) for p in parameters), tuple(found)


def _content(parameter: nn.Parameter) -> Tensor | None:
    """The numbers of a weight that are in this process, or None."""
    own: Any = parameter.data
    own = own.to_local() if hasattr(own, "to_local") else own
    return own if is_plain(own) and not own.is_meta else None


def _sum_of_bits(content: Tensor) -> Tensor:
    """Sum of all bytes, eight at a time, as integers: no change is rounded away."""
    flat = content.contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % _WORD:
        flat = flat.clone()
    own = flat.view(torch.uint8)
    whole = len(own) // _WORD * _WORD
    return own[:whole].view(torch.int64).sum() + own[whole:].sum()


def drops(model: nn.Module) -> bool:
    """Whether a model in its present mode may drop activations, so that its states are other ones each time."""
    modules = [module for module in model.modules() if module.training]
    if any(isinstance(module, nn.Dropout) and module.p > 0.0 for module in modules):
        return True
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    return any(
        "drop" in name and isinstance(value, float) and value > 0.0
        for config in configs.values()
        for name, value in vars(config).items()
    )
