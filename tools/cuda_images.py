"""Compiles rust/cuda/kernels to the images in rust/cuda/images: no GPU, no CUDA toolkit, no CUDA header.

    python tools/cuda_images.py            # compile, and write the images that differ
    python tools/cuda_images.py --check    # compile, and name what differs from the images that are there

The compiler is NVRTC from PyPI (`pip install nvidia-cuda-nvrtc-cu12==12.9.86`), pinned because the images are compared
byte by byte. An image is stored as zlib's stream of what NVRTC gives, and that is what cuModuleLoadData takes: a cubin,
or PTX text with its closing NUL. The streams themselves are not compared, since releases of zlib differ in them.
"""

import argparse
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "rust" / "cuda" / "kernels"
IMAGES = ROOT / "rust" / "cuda" / "images"
MANIFEST = IMAGES / "manifest.json"
UNIT = "vhead.cu"

PACKAGE, VERSION = "nvidia-cuda-nvrtc-cu12", "12.9.86"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "compute_80")
# A multiplication and an addition stay two roundings unless the source says fma: the order of additions is a promise.
OPTIONS = ("--std=c++17", "--fmad=false")
REBUILD = "make cuda-images"


class ImagesError(Exception):
    """The compiler is missing or another one, or it refused the sources."""


class Compiler:
    """NVRTC, loaded from the wheel."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(library()))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def compile(self, sources: Mapping[str, bytes], architecture: str) -> bytes:
        """The image of the sources' translation unit: a cubin for `sm_*`, PTX with its closing NUL for `compute_*`."""
        program = self._program(sources)
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
        try:
            if self._library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
                raise ImagesError(f"{architecture}: {self._bytes(program, 'ProgramLog').decode().rstrip(chr(0))}")
            return self._bytes(program, "PTX" if architecture.startswith("compute_") else "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _program(self, sources: Mapping[str, bytes]) -> ctypes.c_void_p:
        program, included = ctypes.c_void_p(), {name: text for name, text in sources.items() if name != UNIT}
        texts = (ctypes.c_char_p * len(included))(*included.values())
        names = (ctypes.c_char_p * len(included))(*(name.encode() for name in included))
        self._call("CreateProgram", ctypes.byref(program), sources[UNIT], UNIT.encode(), len(included), texts, names)
        return program

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        if code := getattr(self._library, f"nvrtc{function}")(*arguments):
            raise ImagesError(f"nvrtc{function}: {self._library.nvrtcGetErrorString(code).decode()}")


def library() -> Path:
    """Where the pinned wheel's libnvrtc lies."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ImagesError(f"NVRTC is not installed: pip install {PACKAGE}=={VERSION}") from None
    if found != VERSION:
        raise ImagesError(
            f"the images are made by {PACKAGE}=={VERSION}, found {found}: pip install {PACKAGE}=={VERSION}"
        )
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / "lib" / "libnvrtc.so.12").is_file():
            return path
    raise ImagesError(f"{PACKAGE}=={VERSION} is installed, but holds no libnvrtc.so.12 for this system")


def read_sources() -> dict[str, bytes]:
    """The kernels' files by the names that they include each other by."""
    paths = sorted(path for path in KERNELS.iterdir() if path.suffix in {".cu", ".cuh"})
    return {path.name: path.read_bytes() for path in paths}


def file_name(architecture: str) -> str:
    """The image's file in `rust/cuda/images`."""
    return f"{architecture}.{'ptx' if architecture.startswith('compute_') else 'cubin'}.zlib"


def read_image(architecture: str) -> bytes:
    """The stored image, decompressed."""
    return zlib.decompress((IMAGES / file_name(architecture)).read_bytes())


def read_manifest() -> dict[str, object]:
    """What the stored images were made from."""
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def manifest(sources: Mapping[str, bytes], images: Mapping[str, bytes]) -> dict[str, object]:
    """What the images were made from, and what they are: hashes are SHA-256 of the decompressed bytes."""
    ptx = "".join(image.decode() for architecture, image in images.items() if architecture.startswith("compute_"))
    return {
        "compiler": f"{PACKAGE}=={VERSION}",
        "options": list(OPTIONS),
        "sources": {name: digest(text) for name, text in sources.items()},
        "images": {
            architecture: {"file": file_name(architecture), "bytes": len(image), "sha256": digest(image)}
            for architecture, image in images.items()
        },
        "kernels": kernel_names(ptx),
    }


def kernel_names(ptx: str) -> list[str]:
    """The kernels that a PTX text defines."""
    return sorted(set(re.findall(r"\.entry\s+(\w+)", ptx)))


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write(images: Mapping[str, bytes], description: dict[str, object]) -> list[str]:
    """Stores what differs; the names of the files that changed."""
    IMAGES.mkdir(exist_ok=True)
    changed = [architecture for architecture, image in images.items() if stored(architecture) != image]
    for architecture in changed:
        replace(IMAGES / file_name(architecture), zlib.compress(images[architecture], 9))
    replace(MANIFEST, (json.dumps(description, indent=2) + "\n").encode())
    return [file_name(architecture) for architecture in changed]


def replace(path: Path, data: bytes) -> None:
    """Writes beside the file, then renames: a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(data)
    beside.replace(path)


def stored(architecture: str) -> bytes | None:
    """The stored image; None where there is none that can be read."""
    try:
        return read_image(architecture)
    except (OSError, zlib.error):
        return None


def differences(images: Mapping[str, bytes], description: dict[str, object]) -> Iterator[str]:
    """What is stored and should be otherwise, a line each."""
    for architecture, image in images.items():
        if stored(architecture) != image:
            yield f"{file_name(architecture)} is not what the sources give"
    try:
        known = read_manifest()
    except (OSError, ValueError) as error:
        yield f"manifest.json cannot be read: {error}"
        return
    yield from (f"manifest.json: {entry}" for entry in differing("", known, description))
    strangers = {path.name for path in IMAGES.iterdir()} - {file_name(a) for a in images} - {MANIFEST.name, "README.md"}
    yield from (f"{name} belongs to no architecture" for name in sorted(strangers))


def differing(path: str, known: object, expected: object) -> Iterator[str]:
    """The entries in which two JSON values differ."""
    if isinstance(known, dict) and isinstance(expected, dict):
        for key in sorted(known.keys() | expected.keys()):
            yield from differing(f"{path}.{key}" if path else key, known.get(key), expected.get(key))
    elif known != expected:
        yield path


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored images and write nothing")
    arguments = parser.parse_args()
    try:
        compiler, sources = Compiler(), read_sources()
        images = {architecture: compiler.compile(sources, architecture) for architecture in ARCHITECTURES}
    except ImagesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    description = manifest(sources, images)
    if arguments.check:
        return report(list(differences(images, description)))
    changed = write(images, description)
    print(f"{IMAGES.relative_to(ROOT)}: {', '.join(changed) or 'no image'} changed")
    return 0


def report(found: list[str]) -> int:
    """Prints the differences and what to run; the exit status."""
    for line in found:
        print(f"rust/cuda/images: {line}", file=sys.stderr)
    if found:
        print(f"error: the images are not current: {REBUILD}", file=sys.stderr)
        return 1
    print("rust/cuda/images: every image is what the sources give")
    return 0


if __name__ == "__main__":
    sys.exit(main())
