"""One file of named tensors, each read only when it is asked for: safetensors, pickled by torch, or a NeMo archive.

Files are untrusted: whatever is wrong with one is a `HeadFileError` that names it. Nothing is unpickled but tensors and
plain containers.
"""

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vhead.errors import HeadFileError

# The names that a safetensors header gives torch's dtypes.
SAFETENSORS_DTYPES = {
    "torch.bfloat16": "BF16",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.int8": "I8",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.uint8": "U8",
}
_TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}

# Where trainers put a model's state dict inside what they pickle.
_STATE_DICT_KEYS = ("state_dict", "model", "module", "model_state_dict")

_NEMO_WEIGHTS = "model_weights.ckpt"
_NEMO_MEMBERS = 100_000


@dataclass(frozen=True)
class TensorInfo:
    """What is known about a tensor before it is read.

    Attributes:
        shape: Its shape.
        dtype: Its dtype as torch prints it, `torch.bfloat16`, or as the file does, where torch has none; before it, for
            what is not plain numbers in memory, a word for what it is.
    """

    shape: tuple[int, ...]
    dtype: str


class TensorFile(Protocol):
    """A file of named tensors."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What each tensor is, by name."""

    def read(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own."""


def open_tensors(path: Path, name: str) -> TensorFile:
    """The reader for a file of this name; nothing is read yet."""
    if name.endswith(".safetensors"):
        return SafetensorsFile(path)
    return NemoFile(path) if name.endswith(".nemo") else PickledFile(path)


class SafetensorsFile:
    """A safetensors file; the library checks the whole header before any tensor is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """What each tensor is, by name."""
        try:
            with safe_open(self.path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no iterator
                return {name: _info_of_slice(part) for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise HeadFileError(f"{self.path}: expected a safetensors file, got: {error}") from error

    def read(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own."""
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise HeadFileError(f"{self.path}: cannot read {name}: {error}") from error
        return tensor.clone()


class _StateDictFile:
    """A file around one state dict, which is unpickled when something of it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """What each tensor is, by name."""
        return {name: _info_of_tensor(tensor) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own."""
        return self._state[name].detach().clone()

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        raise NotImplementedError


class PickledFile(_StateDictFile):
    """A file that `torch.save` wrote; only tensors and plain containers are ever unpickled, and pages stay on disk."""

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        try:
            with self.path.open("rb") as file:
                is_zip = file.read(2) == b"PK"
        except OSError as error:
            raise HeadFileError(f"{self.path}: cannot be read: {error}") from error
        return _unpickle(self.path, str(self.path), mmap=is_zip)


class NemoFile(_StateDictFile):
    """A NeMo archive: a tar around one pickled state dict, `model_weights.ckpt`, which is read without unpacking it.

    Archives of a model that was split over several devices hold a folder instead, which is an error that says so.
    """

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        try:
            with tarfile.open(self.path, "r:*") as archive:
                file = archive.extractfile(self._weights(archive))
                if file is None:
                    raise HeadFileError(f"{self.path}: {_NEMO_WEIGHTS}: expected a file in the archive, got a link")
                return _unpickle(self.path, file)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise HeadFileError(f"{self.path}: expected a tar archive, got: {error}") from error

    def _weights(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        first = list(islice(archive, _NEMO_MEMBERS))
        found = [member for member in first if PurePosixPath(member.name).name == _NEMO_WEIGHTS and member.isfile()]
        if len(found) != 1:
            raise HeadFileError(
                f"{self.path}: expected a NeMo archive with one {_NEMO_WEIGHTS}, found {len(found)}: weights that were "
                "split over several devices must be merged, or exported to safetensors, by NeMo"
            )
        return found[0]


def _unpickle(path: Path, source: str | IO[bytes], *, mmap: bool = False) -> dict[str, Tensor]:
    try:
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # Unpickling what somebody else wrote can raise anything.
        raise HeadFileError(f"{path}: expected pickled tensors, got: {error}") from error
    if not isinstance(state, dict):
        raise HeadFileError(f"{path}: expected a dictionary of tensors, got a {type(state).__name__}")
    return dict(_named_tensors(state))


def _named_tensors(state: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, or of the one that a trainer put inside another dictionary."""
    if not any(isinstance(value, Tensor) for value in state.values()):
        state = next((state[key] for key in _STATE_DICT_KEYS if isinstance(state.get(key), dict)), state)
    yield from ((str(name), value) for name, value in state.items() if isinstance(value, Tensor))


def _info_of_slice(part: Any) -> TensorInfo:  # noqa: ANN401, the library's class has no name
    dtype = part.get_dtype()
    return TensorInfo(tuple(part.get_shape()), _TORCH_DTYPES.get(dtype, dtype))


def _info_of_tensor(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), _peculiarity(tensor) + str(tensor.dtype))


def _peculiarity(tensor: Tensor) -> str:
    """A word for what keeps a tensor from being plain numbers in memory, each stored once."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"{type(tensor).__name__} of "
    if tensor.layout is not torch.strided or tensor.is_meta:
        return "meta " if tensor.is_meta else "sparse "
    # A tensor of a few stored bytes can claim any shape by strides of zero, and copying it would fill the memory.
    stored = tensor.untyped_storage().nbytes()
    return "expanded " if tensor.numel() * tensor.element_size() > stored else ""
