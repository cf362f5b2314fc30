"""One file of named tensors, each read only when it is asked for: safetensors, pickled by torch, or a NeMo archive.

Files are untrusted: whatever is wrong with one is a `HeadFileError` that names it. Nothing is unpickled but tensors and
plain containers, and nothing is read that holds more than its file has bytes for.
"""

import gzip
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import IO, Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vhead import upstream
from vhead.checkpoints.pickle_bombs import bomb_in
from vhead.env import allows_pickle
from vhead.errors import HeadFileError, in_one_line

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
# Those that this release of torch has, by safetensors' names.
TORCH_DTYPES = {
    name: found
    for torch_name, name in SAFETENSORS_DTYPES.items()
    if (found := getattr(torch, torch_name.removeprefix("torch."), None)) is not None
}
_TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}

# How torch names what a pickle would import and run.
_CODE = re.compile(r"GLOBAL ([\w.]+)")
# Where trainers put a model's state dict inside what they pickle.
_STATE_DICT_KEYS = ("state_dict", "model", "module", "model_state_dict")

_NEMO_WEIGHTS = "model_weights.ckpt"
_NEMO_MEMBERS = 100_000

# Room for 200,000 tensors in one file; the library takes ten times as much memory and seconds to read as many.
_LONGEST_HEADER = 25_000_000

# Weights hardly compress: what becomes so many times longer is no model.
_LARGEST_RATIO = 20
_FREE_BYTES = 1 << 20

_ZIP = b"PK\x03\x04"
_GZIP = b"\x1f\x8b"

# Before it, a TorchScript archive runs code although nothing but weights is asked for, and so did other files.
_SAFE_UNPICKLING = (2, 6)


@dataclass(frozen=True)
class TensorInfo:
    """What is known about a tensor before it is read.

    Attributes:
        shape: Its shape.
        dtype: Its dtype as torch prints it, such as `torch.bfloat16`, or as the file writes it if torch has none. If
            the tensor is not plain numbers in memory, a word for what it is stands before that, such as `sparse`.
    """

    shape: tuple[int, ...]
    dtype: str


class TensorFile(Protocol):
    """A file of named tensors."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What each tensor is, by name."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file says beside its tensors; nothing in a pickled one."""

    def read(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own."""

    def check(self) -> None:
        """Refuses what no loader may open, without reading a tensor.

        Raises:
            HeadFileError: The file is something else than its name says, or holds more than it has bytes for.
        """


def open_tensors(path: Path, name: str) -> TensorFile:
    """The reader for a file of this name; nothing is read yet."""
    if name.endswith(".safetensors"):
        return SafetensorsFile(path)
    return NemoFile(path) if name.endswith(".nemo") else PickledFile(path)


def unpickles_safely() -> bool:
    """Whether pickled files may be read: torch runs none of their code, or the user trusts them."""
    return upstream.release("torch") >= _SAFE_UNPICKLING or allows_pickle()


class SafetensorsFile:
    """A safetensors file; the library checks the whole header before any tensor is read.

    It is opened once, so that all of its tensors are of one save, also where somebody replaces it meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        with _naming(self.path, "expected a safetensors file"):
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118, no iterator
            return {name: _info_of_slice(part) for name, part in slices.items()}

    @cached_property
    def metadata(self) -> dict[str, str]:
        with _naming(self.path, "expected a safetensors file"):
            return dict(self._file.metadata() or {})

    def read(self, name: str) -> Tensor:
        with _naming(self.path, f"cannot read {name}"):
            tensor: Tensor = self._file.get_tensor(name)
            return tensor.clone()

    def check(self) -> None:
        """Refuses a header that is longer than any model's, which takes the library minutes and gigabytes."""
        with _opened(self.path) as (file, _):
            self._check(file)

    def _check(self, file: IO[bytes]) -> None:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise HeadFileError(
                f"{self.path}: expected a header of at most {_LONGEST_HEADER:,} bytes, got one of {length:,}"
            )

    @cached_property
    def _file(self) -> Any:
        with _opened(self.path) as (file, name):
            self._check(file)
            with _naming(self.path, "expected a safetensors file"):
                return safe_open(name, framework="pt")


class _StateDictFile:
    """A file around one state dict, which is unpickled when something of it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: _info_of_tensor(tensor) for name, tensor in self._state.items()}

    @property
    def metadata(self) -> dict[str, str]:
        return {}

    def read(self, name: str) -> Tensor:
        return self._state[name].detach().clone()

    def check(self) -> None:
        """Refuses a file that must not be unpickled."""
        if not unpickles_safely():
            raise HeadFileError(
                f"{self.path}: a pickled file can run code on torch {torch.__version__}: use torch 2.6 or later, or a "
                "safetensors file, or set VHEAD_ALLOW_PICKLE=1 if you trust whoever made this one"
            )

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        raise NotImplementedError


class PickledFile(_StateDictFile):
    """A file that `torch.save` wrote; only tensors and plain containers are ever unpickled, and pages stay on disk."""

    def check(self) -> None:
        """Refuses archives that hold code, or that unpack to more than the file is long."""
        with _opened(self.path) as (file, _):
            self._check(file)

    def _check(self, file: IO[bytes]) -> bool:
        super().check()
        return _check_pickled(file, self.path)

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        with _opened(self.path) as (file, name):
            is_zip = self._check(file)
            return _unpickle(self.path, name, mmap=is_zip)


class NemoFile(_StateDictFile):
    """A NeMo archive: a tar around one pickled state dict, `model_weights.ckpt`, which is read without unpacking it.

    Archives of a model that was split over several devices hold a folder instead, which is an error that says so.
    """

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        self.check()
        with _naming(self.path, "expected a tar archive"), self.path.open("rb") as file:
            content = self._content(file)
            with tarfile.open(fileobj=content, mode="r:") as archive:
                weights = self._weights(archive)
                if content is not file:
                    # Going back means decompressing from the beginning, which unpickling would do often.
                    weights = io.BytesIO(weights.read())
                _check_pickled(weights, self.path)
                return _unpickle(self.path, weights)

    def _content(self, file: IO[bytes]) -> IO[bytes]:
        """The tar, which may be compressed as a whole."""
        start = file.read(len(_GZIP))
        file.seek(0)
        if start != _GZIP:
            return file
        limit = _LARGEST_RATIO * self.path.stat().st_size + _FREE_BYTES
        return io.BufferedReader(_Decompressed(gzip.GzipFile(fileobj=file), limit, self.path))

    def _weights(self, archive: tarfile.TarFile) -> IO[bytes]:
        first = list(islice(archive, _NEMO_MEMBERS))
        found = [member for member in first if PurePosixPath(member.name).name == _NEMO_WEIGHTS and member.isfile()]
        if len(found) != 1 or found[0].issparse():
            raise HeadFileError(
                f"{self.path}: expected a NeMo archive with one {_NEMO_WEIGHTS}, found {len(found)}: weights that were "
                "split over several devices must be merged, or exported to safetensors, by NeMo"
            )
        member = archive.extractfile(found[0])
        if member is None:
            raise HeadFileError(f"{self.path}: {_NEMO_WEIGHTS}: expected a file in the archive, got a link")
        return member


class _Decompressed(io.RawIOBase):
    """What a compressed file holds, as long as that is not suspiciously longer than the file."""

    def __init__(self, file: gzip.GzipFile, limit: int, path: Path) -> None:
        super().__init__()
        self._file, self._limit, self._path = file, limit, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check(offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(min(len(buffer), _FREE_BYTES))
        self._check(self._file.tell())
        buffer[: len(content)] = content
        return len(content)

    def _check(self, offset: int) -> None:
        if offset > self._limit:
            raise HeadFileError(
                f"{self._path}: expected weights, which hardly compress, got {self._path.stat().st_size:,} bytes that "
                f"unpack to more than {self._limit:,}"
            )


@contextmanager
def _naming(path: Path, problem: str) -> Iterator[None]:
    """Turns any error into one that names the file: reading what somebody else wrote can raise anything."""
    try:
        yield
    except HeadFileError:
        raise
    except Exception as error:
        raise HeadFileError(f"{path}: {problem}: {in_one_line(error)}") from error


def _check_pickled(file: IO[bytes], path: Path) -> bool:
    """Whether a file of `torch.save` is a zip archive; refuses archives that torch would read as something else."""
    start = file.read(tarfile.BLOCKSIZE)
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if start.startswith(_ZIP):
        _check_members(file, path, size)
        file.seek(0)
        return True
    if _is_tar_header(start):
        raise HeadFileError(f"{path}: expected pickled tensors, got a tar archive")
    _check_bombs(file, path)
    file.seek(0)
    return False


def _check_members(file: IO[bytes], path: Path, size: int) -> None:
    with _naming(path, "expected pickled tensors, got a damaged archive"):
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    if any(PurePosixPath(member.filename).name == "constants.pkl" for member in members):
        raise HeadFileError(f"{path}: expected pickled tensors, got a TorchScript archive, which holds a program")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise HeadFileError(
            f"{path}: expected an archive as torch.save writes it, without compression, got a compressed one"
        )
    claimed = sum(member.file_size for member in members)
    if claimed > size:
        raise HeadFileError(
            f"{path}: expected at most {size:,} bytes in the archive, which is the size of the file, got {claimed:,}; "
            "it is damaged or hostile"
        )
    for member in members:
        if PurePosixPath(member.filename).name == "data.pkl":
            with _naming(path, "expected pickled tensors, got a damaged archive"), archive.open(member) as pickled:
                _check_bombs(pickled, path)


def _check_bombs(file: IO[bytes], path: Path) -> None:
    if (bomb := bomb_in(file)) is not None:
        raise HeadFileError(f"{path}: expected pickled tensors, got {bomb}")


def _is_tar_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], str]]:
    """An open file, and a name that leads to it even where another file has taken its path meanwhile.

    The libraries take names and open them, safetensors twice: for the header and for the tensors.
    """
    with _naming(path, "cannot be read"), path.open("rb") as file:
        own_name = f"/proc/self/fd/{file.fileno()}"
        yield file, own_name if os.path.exists(own_name) else str(path)


def _unpickle(path: Path, source: str | IO[bytes], *, mmap: bool = False) -> dict[str, Tensor]:
    with _naming(path, "expected pickled tensors"):
        try:
            state = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        except UnpicklingError as error:
            # Torch goes on to say how to run the code all the same.
            if (code := _CODE.search(str(error))) is None:
                raise
            raise HeadFileError(
                f"{path}: expected pickled tensors alone, got a pickle that runs {code[1]}, which nothing here does; "
                "ask for the tensors as a safetensors file"
            ) from None
    if not isinstance(state, dict):
        raise HeadFileError(f"{path}: expected a dictionary of tensors, got a {type(state).__name__}")
    return dict(_named_tensors(state))


def _named_tensors(state: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, or of the one that a trainer put inside another dictionary."""
    if not any(isinstance(value, Tensor) for value in state.values()):
        state = next((state[key] for key in _STATE_DICT_KEYS if isinstance(state.get(key), dict)), state)
    yield from ((name, value) for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor))


def _info_of_slice(part: Any) -> TensorInfo:
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
