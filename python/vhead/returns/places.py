"""Where a call is computed: by the kernels on arrays that numpy sees, or in torch where the tensors are."""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vhead.returns import native

# Elements up to which a tensor that is elsewhere is moved: a scan there would be many small kernels.
SMALL = 1 << 18


@dataclass(frozen=True)
class Place:
    """The functions that compute a call, what they take, and where the results go.

    Attributes:
        kernels: `native` or `plain`, which have the same functions.
        device: Where the results go; None: they are numpy arrays.
    """

    kernels: ModuleType
    device: Any

    def floats(self, name: str, array: Any) -> Any:
        """float32, as the kernels take it."""
        return self.kernels.floats(name, self._moved(array))

    def mask(self, array: Any) -> Any:
        """1 where the model wrote the token, as the kernels take it."""
        return None if array is None else self.kernels.mask_of(self._moved(array))

    def result(self, array: Any) -> Any:
        """A result as the caller's kind of array."""
        if self.device is None:
            return array
        torch = sys.modules["torch"]
        return torch.as_tensor(array).to(self.device)

    def _moved(self, array: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(array, torch.Tensor):
            return (
                array if self.kernels is native else importlib.import_module("torch").as_tensor(array).to(self.device)
            )
        if self.kernels is not native:
            return array.detach()
        # numpy has no bfloat16.
        moved = array.detach().cpu()
        return (moved.float() if moved.is_floating_point() else moved).numpy()


def place_of(**arrays: Any) -> Place:
    """The place for a call with these arguments; tensors decide, and the first of them says where the results go.

    Raises:
        ValueError: Tensors are on several devices.
    """
    torch = sys.modules.get("torch")
    tensors = {name: a for name, a in arrays.items() if torch is not None and isinstance(a, torch.Tensor)}
    if not tensors:
        return Place(native, None)
    (first, tensor), *others = tensors.items()
    for name, other in others:
        if other.device != tensor.device:
            raise ValueError(f"{name}: expected a tensor on {tensor.device} as {first}, got one on {other.device}")
    # The settings, and torch's own threads for the kernels, come with the operations.
    settings = importlib.import_module("vhead.ops.devices").SETTINGS
    near = tensor.is_cpu or max(other.numel() for other in tensors.values()) <= SMALL
    return Place(
        native if near and not settings.plain_torch else importlib.import_module("vhead.returns.plain"), tensor.device
    )
