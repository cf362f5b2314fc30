"""A head that was written in a format comes back bit for bit, or the format says what it cannot hold."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from vhead import CandleValueHead, Support
from vhead.checkpoints import tensor_files
from vhead.checkpoints.checkpoint import Checkpoint
from vhead.errors import HeadError
from vhead.formats import FORMATS, HeadWeights, LinearWeights, load, save


def random_head(outputs=1, intermediate=None, bias=True):
    generator = torch.Generator().manual_seed(outputs)

    def layer(inputs, size):
        weight = torch.randn(size, inputs, generator=generator)
        return LinearWeights(weight, torch.randn(size, generator=generator) if bias else None)

    layers = (layer(8, outputs),) if intermediate is None else (layer(8, intermediate), layer(intermediate, outputs))
    return HeadWeights(layers=layers, format="test", source="test")


def intermediate_of(head_format, layers):
    """An intermediate size that the format takes, for heads of H = 8."""
    return None if len(layers) == 1 else 8 * (head_format.intermediate or 3)


def fitting(head_format):
    """Heads of every kind that a format can hold."""
    for layers in head_format.layouts:
        has_bias = layers[-1].bias is not None
        for outputs in (1,) if head_format.outputs == 1 else (1, 3):
            yield random_head(outputs, intermediate_of(head_format, layers), bias=has_bias)
            if has_bias and all(names.bias_optional for names in layers):
                yield random_head(outputs, bias=False)


FITTING = [(f.name, index) for f in FORMATS for index, _ in enumerate(fitting(f))]
BY_NAME = {head_format.name: head_format for head_format in FORMATS}
WITHOUT_BIAS = [f.name for f in FORMATS if f.layouts[0][0].bias is None]


def same_head(one, other):
    return len(one.layers) == len(other.layers) and all(
        torch.equal(a.weight, b.weight) and torch.equal(a.bias_or_zeros, b.bias_or_zeros)
        for a, b in zip(one.layers, other.layers, strict=True)
    )


@pytest.mark.parametrize("file", ["head.safetensors", "head.bin", "head.pt"])
@pytest.mark.parametrize(("name", "index"), FITTING)
def test_round_trip(tmp_path, name, index, file):
    head = list(fitting(BY_NAME[name]))[index]
    assert save(head, tmp_path / file, name) == tmp_path / file
    assert [path.name for path in tmp_path.iterdir()] == [file]
    # A file alone has no configuration to say whose bias-free head it is; its tensors are the same in any case.
    assert same_head(load(tmp_path / file), head)


@pytest.mark.parametrize("name", WITHOUT_BIAS)
def test_a_bias_does_not_go_into_a_format_without_one_unless_it_is_zero(tmp_path, name):
    head = random_head()
    with pytest.raises(HeadError, match=f"{name} has no place for a bias beside .*, and this head's is not zero: "):
        save(head, tmp_path / "head.safetensors", name)
    assert not list(tmp_path.iterdir())
    weight = head.layers[0].weight
    zero = HeadWeights((LinearWeights(weight, torch.zeros(1)),), "test", "test")
    save(zero, tmp_path / "head.safetensors", name)
    assert torch.equal(load(tmp_path / "head.safetensors").weight, weight)


@pytest.mark.parametrize("name", ["trl", "llama-factory", "nemo", "vhead"])
def test_a_missing_bias_becomes_zeros_where_the_format_wants_one(tmp_path, name):
    head = random_head(bias=False)
    save(head, tmp_path / "head.safetensors", name)
    written = load_file(tmp_path / "head.safetensors")
    assert [value.tolist() for key, value in written.items() if key.endswith("bias")] == [[0.0]]


@pytest.mark.parametrize("name", [f.name for f in FORMATS])
def test_what_does_not_fit_is_said(tmp_path, name):
    head_format = BY_NAME[name]
    projections = {len(layers) for layers in head_format.layouts}
    for count, intermediate in ((1, None), (2, 16)):
        if count not in projections:
            with pytest.raises(HeadError, match=f"{name} cannot hold a head of {count} projections; vhead holds"):
                save(random_head(intermediate=intermediate, bias=False), tmp_path / "head.bin", name)
    if head_format.outputs == 1:
        intermediate = None if 1 in projections else 16
        with pytest.raises(HeadError, match=f"{name} holds heads of one output; this head has 3; vhead holds"):
            save(random_head(3, intermediate), tmp_path / "head.bin", name)
    if head_format.intermediate is not None:
        with pytest.raises(HeadError, match=f"{name} has {8 * head_format.intermediate} elements between its proj"):
            save(random_head(intermediate=7), tmp_path / "head.bin", name)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_when_asked(tmp_path):
    save(random_head(), tmp_path / "head.safetensors")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(random_head(), tmp_path / "head.safetensors")
    other = HeadWeights((LinearWeights(torch.ones(1, 8), torch.ones(1)),), "test", "test")
    save(other, tmp_path / "head.safetensors", overwrite=True)
    assert load(tmp_path / "head.safetensors").weight.tolist() == [[1.0] * 8]


def test_a_folder_gets_the_file_that_the_framework_looks_for(tmp_path):
    head = random_head()
    assert save(head, tmp_path, "llama-factory") == tmp_path / "value_head.safetensors"
    assert load(tmp_path).format == "llama-factory"
    assert same_head(load(tmp_path), head)


@pytest.mark.parametrize("path", ["", "head", "head.txt"])
def test_other_paths_are_refused(tmp_path, path):
    with pytest.raises(HeadError, match=r"trl expects a file \(\.safetensors, \.bin, \.pt, \.pth\)"):
        save(random_head(), tmp_path / path, "trl")


def test_an_unknown_format(tmp_path):
    with pytest.raises(HeadError, match=r"format: expected one of trl, .*, got 'lrt'"):
        save(random_head(), tmp_path / "head.bin", "lrt")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    save(random_head(), tmp_path / "head.safetensors")
    before = (tmp_path / "head.safetensors").read_bytes()
    monkeypatch.setattr("vhead.formats.writing.to_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save(random_head(), tmp_path / "head.safetensors", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]
    assert (tmp_path / "head.safetensors").read_bytes() == before


@pytest.mark.parametrize("file", ["head.safetensors", "head.bin"])
def test_a_file_that_is_replaced_while_it_is_read_gives_the_head_that_it_held(tmp_path, file):
    first, second = random_head(), random_head(bias=False)
    checkpoint = Checkpoint(save(first, tmp_path / file))
    weight = checkpoint.read("v_head.summary.weight", file)
    save(second, tmp_path / file, overwrite=True)
    assert torch.equal(weight, first.weight)
    assert torch.equal(checkpoint.read("v_head.summary.bias", file), first.bias)
    # The same read by a checkpoint that is made later, which would mix two saves.
    assert torch.equal(Checkpoint(tmp_path / file).read("v_head.summary.bias", file), torch.zeros(1))


@pytest.mark.parametrize("library", ["safe_open", "torch.load"])
def test_a_file_that_is_replaced_while_it_is_opened_is_one_of_the_two(tmp_path, monkeypatch, library):
    """The libraries open a file by its name, when it may have been replaced since it was looked at."""
    file = "head.safetensors" if library == "safe_open" else "head.bin"
    first, second = random_head(), random_head(intermediate=16)
    save(first, tmp_path / file)
    opened = getattr(tensor_files, library) if library == "safe_open" else torch.load

    def open_late(name, **arguments):
        save(second, tmp_path / file, "vhead", overwrite=True)
        return opened(name, **arguments)

    monkeypatch.setattr(f"vhead.checkpoints.tensor_files.{library}", open_late)
    assert same_head(load(tmp_path / file), first)
    monkeypatch.undo()
    assert same_head(load(tmp_path / file), second)


def test_a_name_too_long_to_be_added_to_can_be_saved(tmp_path):
    name = "ä" * 120 + ".safetensors"
    save(random_head(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_no_file_is_never_replaced(tmp_path):
    save(random_head(), tmp_path / "elsewhere.bin")
    before = (tmp_path / "elsewhere.bin").read_bytes()
    (tmp_path / "link.bin").symlink_to("elsewhere.bin")
    os.mkfifo(tmp_path / "pipe.bin")
    for name, found in (("link", "a link"), ("pipe", "no regular file")):
        with pytest.raises(FileExistsError, match=f"{name}.bin: expected a file to replace or nothing, found {found}"):
            save(random_head(), tmp_path / f"{name}.bin", overwrite=True)
    assert (tmp_path / "elsewhere.bin").read_bytes() == before
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "pipe.bin").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere.bin", "link.bin", "pipe.bin"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        save(random_head(), tmp_path / "nowhere" / "head.bin")


@pytest.mark.parametrize("file", ["head.safetensors", "head.bin"])
def test_a_file_has_the_permissions_that_others_have(tmp_path, file):
    (tmp_path / "other").touch()
    save(random_head(), tmp_path / file)
    assert (tmp_path / file).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    steps = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("synced"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("named"), rename(*paths)))
    save(random_head(), tmp_path / "head.bin")
    assert steps == ["synced", "named", "synced"]


@pytest.mark.parametrize(("name", "outputs"), [("trl", 1), ("vhead", 3)])
def test_the_head_without_torch_reads_what_is_written(tmp_path, name, outputs):
    head = random_head(outputs)
    candle = CandleValueHead.load(save(head, tmp_path / "head.safetensors", name))
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    values = torch.from_numpy(candle(states.numpy())).reshape(5, outputs)
    expected = states @ head.weight.T + head.bias
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_the_head_without_torch_refuses_two_projections(tmp_path):
    file = save(random_head(1, 16), tmp_path / "head.safetensors", "vhead")
    with pytest.raises(HeadError, match=r"summary\.0\.weight"):
        CandleValueHead.load(file)


def test_a_model_s_file_is_read_by_the_configuration_beside_it_and_a_head_alone_is_not(tmp_path):
    head = {"v_head.summary.weight": torch.randn(5, 8), "v_head.summary.bias": torch.randn(5)}
    save_file({**head, "model.norm.weight": torch.randn(8)}, tmp_path / "model.safetensors")
    save_file(head, tmp_path / "alone.safetensors")
    settings = {"low": -1.0, "high": 1.0, "bins": 5, "kind": "two_hot"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "v_head_support": settings}))
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert load(place).support == Support(-1.0, 1.0, 5, kind="two_hot")
    assert load(tmp_path / "alone.safetensors").support is None
