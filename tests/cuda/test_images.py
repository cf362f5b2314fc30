"""The stored images are what the sources give, and the tool that says so sees every way in which they are not."""

import itertools
import json
import zlib
from importlib.metadata import PackageNotFoundError

import pytest

from tests.cuda.emulation import ptx_images

DTYPES = ["float32", "bfloat16", "float16"]
HEAD = {
    *map(
        "_".join,
        itertools.product(
            ["vhead_value_head", "vhead_value_head_backward", "vhead_value_head_backward_weight"],
            DTYPES,
            ["vector", "scalar"],
        ),
    ),
    *map("_".join, itertools.product(["vhead_value_head_rows"], DTYPES)),
}


@pytest.fixture
def tool(monkeypatch):
    return ptx_images.tool("cuda_images")


@pytest.fixture
def folder(tool, tmp_path, monkeypatch):
    """A copy of the stored images, for tests that damage them."""
    for path in tool.IMAGES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(tool, "IMAGES", tmp_path)
    monkeypatch.setattr(tool, "MANIFEST", tmp_path / "manifest.json")
    return tmp_path


@pytest.fixture
def stored(tool):
    return {architecture: tool.read_image(architecture) for architecture in tool.ARCHITECTURES}


def test_the_manifest_is_of_these_sources_and_images(tool, stored) -> None:
    assert list(tool.differences(stored, tool.manifest(tool.read_sources(), stored))) == []


@ptx_images.needs_compiler
def test_the_ptx_is_what_the_sources_give(tool) -> None:
    """`make cuda-test` compiles every architecture; here the one that is executed."""
    compiled = tool.Compiler().compile(tool.read_sources(), ptx_images.ARCHITECTURE)
    assert compiled == tool.read_image(ptx_images.ARCHITECTURE)


def test_every_kernel_is_there(tool) -> None:
    named = set(tool.read_manifest()["kernels"])
    wanted = HEAD | {f"{name}_dropout" for name in HEAD} | {"vhead_value_head_add_chunks", "vhead_value_head_add_rows"}
    assert wanted <= named


def test_no_constant_becomes_a_rounding_of_its_own(tool, stored) -> None:
    """ptxas fuses a product and a sum where PTX leaves the rounding open, and flushes subnormals where it says so."""
    text = stored[ptx_images.ARCHITECTURE].decode()
    for what in ("mul.f32", "add.f32", "sub.f32", "mul.f64", "add.f64", ".ftz", ".approx"):
        assert what not in text, what
    assert "fma.rn.f32" in text


def test_images_are_pinned_to_one_compiler(tool) -> None:
    requirements = (ptx_images.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert requirements.count(f'"{tool.PACKAGE}=={tool.VERSION}; sys_platform') == 1
    assert tool.read_manifest()["compiler"] == f"{tool.PACKAGE}=={tool.VERSION}"


def test_a_changed_image_is_named(tool, stored, folder) -> None:
    damaged = bytearray(stored["sm_90"])
    damaged[100] ^= 1
    (folder / "sm_90.cubin.zlib").write_bytes(zlib.compress(bytes(damaged)))
    (folder / "sm_80.cubin.zlib").write_bytes(b"no zlib stream")
    (folder / "sm_100.cubin.zlib").unlink()
    (folder / "sm_75.cubin.zlib").write_bytes(b"")
    assert list(tool.differences(stored, tool.read_manifest())) == [
        "sm_80.cubin.zlib is not what the sources give",
        "sm_90.cubin.zlib is not what the sources give",
        "sm_100.cubin.zlib is not what the sources give",
        "sm_75.cubin.zlib belongs to no architecture",
    ]


def test_a_changed_source_is_named(tool, stored, folder) -> None:
    changed = tool.read_manifest()
    changed["sources"] |= {"value_head.cu": tool.digest(b""), "new.cuh": tool.digest(b"")}
    found = list(tool.differences(stored, changed))
    assert found == ["manifest.json: sources.new.cuh", "manifest.json: sources.value_head.cu"]
    (folder / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in next(tool.differences(stored, changed))


def test_writing_mends_what_differs(tool, stored, folder, capsys) -> None:
    (folder / "sm_120.cubin.zlib").unlink()
    description = tool.read_manifest()
    assert tool.write(stored, description) == ["sm_120.cubin.zlib"]
    assert list(tool.differences(stored, description)) == []
    assert json.loads((folder / "manifest.json").read_text()) == description
    assert tool.report([]) == 0
    assert tool.report(["sm_90.cubin.zlib is not what the sources give"]) == 1
    assert capsys.readouterr().err.endswith("error: the images are not current: make cuda-images\n")


def test_a_missing_or_other_compiler_is_named(tool, monkeypatch) -> None:
    monkeypatch.setattr(tool.importlib.metadata, "version", lambda _: "12.8.93")
    with pytest.raises(
        tool.ImagesError, match=r"^the images are made by .*==12.9.86, found 12.8.93: pip install .*==12.9.86$"
    ):
        tool.Compiler()

    def missing(_):
        raise PackageNotFoundError

    monkeypatch.setattr(tool.importlib.metadata, "version", missing)
    with pytest.raises(
        tool.ImagesError, match=r"^NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12==12.9.86$"
    ):
        tool.Compiler()


@ptx_images.needs_compiler
def test_a_source_that_does_not_compile_is_shown(tool) -> None:
    with pytest.raises(tool.ImagesError, match=r"(?s)^sm_90: part.cuh\(1\): error: .*undeclared"):
        tool.Compiler().compile({tool.UNIT: b'#include "part.cuh"', "part.cuh": b"int x = undeclared;"}, "sm_90")
