"""Publications as slime's version folders, read as an engine's `/pull_weights` reads them."""

import json
import shutil

import numpy as np
import pyarrow
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from tests.sync.conftest import Small, bits, train
from vhead import AutoModelForCausalLMWithValueHead
from vhead.demo import demo_model_path
from vhead.errors import PublicationError, PublicationMissingError, PublisherConflictError, SyncFileError
from vhead.sync import Publisher, export, publications

INDEX = "model.safetensors.index.json"


def folder_of(versions, version):
    return versions / f"weight_v{version:06d}"


def index_of(versions, version):
    return json.loads((folder_of(versions, version) / INDEX).read_text())


def is_delta(versions, version):
    return "delta_encoding" in index_of(versions, version)["metadata"]


class Engine:
    """What an engine has: a checkpoint on its own disk, and the version that it is of."""

    def __init__(self, versions, local):
        self.versions, self.local, self.version = versions, local, 0

    def pull(self, target):
        """From the newest whole version on, if that is newer than what it has, one version after the other."""
        start = target
        while start > self.version and is_delta(self.versions, start):
            start -= 1
        if start > self.version:
            shutil.rmtree(self.local, ignore_errors=True)
            shutil.copytree(folder_of(self.versions, start), self.local)
            self.version = start
        for version in range(self.version + 1, target + 1):
            self.change(version)

    def change(self, version):
        index = index_of(self.versions, version)
        metadata, mapped = index["metadata"], index["weight_map"]
        assert (int(metadata["version"]), int(metadata["base_version"])) == (version, self.version)
        assert (metadata["delta_encoding"], metadata["compression_format"]) == ("overwrite", "zstd")
        own = self.tensors()
        for name in sorted({*mapped.values()}):
            with safe_open(folder_of(self.versions, version) / name, "np") as file:
                assert {tensor for tensor in mapped if mapped[tensor] == name} == set(file.keys())
                for tensor in file.keys():  # noqa: SIM118, it is no dictionary
                    self.overwrite(own[tensor], file.get_tensor(tensor))
                    expected = file.metadata()[tensor]
                    assert checksum(metadata["checksum_format"], own[tensor]) == expected
        self.version = version

    def overwrite(self, own, compressed):
        changes = decompressed(compressed.tobytes())
        count = int.from_bytes(changes[:4], "little")
        places = np.frombuffer(changes[4 : 4 + 4 * count], "<u4")
        own[places] = np.frombuffer(changes[4 + 4 * count :], np.uint8)

    def tensors(self):
        """The bytes of each tensor, where they lie in the files."""
        found = {}
        for file in self.local.glob("*.safetensors"):
            length = int.from_bytes(file.read_bytes()[:8], "little")
            header = json.loads(file.read_bytes()[8 : 8 + length])
            data = np.memmap(file, np.uint8, "r+", offset=8 + length) if file.stat().st_size > 8 + length else None
            for name, tensor in header.items():
                if name != "__metadata__" and tensor["data_offsets"][0] < tensor["data_offsets"][1]:
                    found[name] = data[slice(*tensor["data_offsets"])]
        return found

    def weights(self):
        return {name: tensor for file in self.local.glob("*.safetensors") for name, tensor in load_file(file).items()}


def decompressed(frame):
    """The content of a zstd frame whose header says how long that is, as the reader's call needs it."""
    descriptor = frame[4]
    assert frame[:4] == bytes.fromhex("28b52ffd")
    assert descriptor >> 6 or descriptor & 0x20, "the frame does not say how long its content is"
    return pyarrow.input_stream(pyarrow.BufferReader(frame), compression="zstd").read()


def checksum(algorithm, own):
    if algorithm == "xxh3-128":
        return xxhash.xxh3_128(own.tobytes()).hexdigest()
    raise NotImplementedError(algorithm)


@pytest.fixture
def places(tmp_path):
    return tmp_path / "weights", tmp_path / "versions", tmp_path / "local"


@pytest.mark.parametrize("delta", [False, True])
def test_an_engine_that_pulls_versions_has_each_steps_weights(places, delta):
    weights, versions, local = places
    model, engine = Small(1), Engine(versions, local)
    publisher = Publisher(weights, delta=delta, full_every=3)
    for version, step in enumerate((10, 20, 21, 30, 40), 1):
        train(model, step)
        publisher.publish(model, step=step)
        assert export(weights, versions) == version
        assert is_delta(versions, version) == (version > 1)
        engine.pull(version)
        assert bits(engine.weights()) == {name: own for name, own in bits(model).items() if name != "first.weight"}
    late = Engine(versions, local.with_name("late"))
    late.pull(5)
    assert bits(late.weights()) == bits(engine.weights())


def test_a_version_of_changes_names_changed_tensors_alone_and_is_small(places):
    weights, versions, _ = places
    publisher = Publisher(weights)
    tensors = {"changed": torch.randn(500, 40), "same": torch.randn(500, 40)}
    publisher.publish(tensors, step=1)
    export(weights, versions)
    tensors["changed"][3, 4] += 1
    publisher.publish(tensors, step=2)
    export(weights, versions)
    assert set(index_of(versions, 2)["weight_map"]) == {"changed"}
    assert sum(file.stat().st_size for file in folder_of(versions, 2).iterdir()) < 2000


def test_checksums_are_blake3_where_that_is_asked_for(places):
    weights, versions, _ = places
    model, publisher = Small(1), Publisher(weights)
    for step in (1, 2):
        train(model, step)
        publisher.publish(model, step=step)
        export(weights, versions, checksum="blake3")
    assert index_of(versions, 2)["metadata"]["checksum_format"] == "blake3"
    manifest = json.loads((weights / "step-00000002" / "manifest.json").read_text())
    with safe_open(folder_of(versions, 2) / "model-00000-of-00001.safetensors", "np") as file:
        checksums = file.metadata()
        assert set(checksums) == set(file.keys())
    assert all(digest == manifest["tensors"][name]["digest"] for name, digest in checksums.items())


def test_the_reader_finds_changes_that_are_damaged(places):
    weights, versions, local = places
    model, publisher, engine = Small(1), Publisher(weights), Engine(versions, local)
    for step in (1, 2):
        train(model, step)
        publisher.publish(model, step=step)
        export(weights, versions)
    engine.pull(1)
    for own in engine.tensors().values():
        own[:] ^= 1
    with pytest.raises(AssertionError):
        engine.pull(2)


def test_a_whole_version_is_a_checkpoint_that_others_read(places):
    weights, versions, _ = places
    model = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path())
    torch.nn.init.normal_(model.v_head.summary.weight)
    Publisher(weights).publish(model, step=7)
    assert export(weights, versions) == 1
    again = AutoModelForCausalLMWithValueHead.from_pretrained(folder_of(versions, 1))
    assert bits(again) == bits(model)


def test_weights_that_have_not_changed_are_a_version_without_tensors(places):
    weights, versions, local = places
    model, publisher, engine = Small(1), Publisher(weights), Engine(versions, local)
    for step in (1, 2):
        publisher.publish(model, step=step)
        export(weights, versions)
    assert {path.name for path in folder_of(versions, 2).iterdir()} == {INDEX}
    engine.pull(2)
    assert bits(engine.weights()) == {name: own for name, own in bits(model).items() if name != "first.weight"}


def test_a_publication_that_the_last_version_is_of_is_not_written_again(places):
    weights, versions, _ = places
    Publisher(weights).publish(Small(1), step=1)
    assert [export(weights, versions) for _ in range(3)] == [1, 1, 1]
    assert export(weights, versions, full=True) == 2
    assert not is_delta(versions, 2)


def test_a_version_is_whole_where_the_base_is_gone_or_of_other_tensors(places):
    weights, versions, _ = places
    publisher = Publisher(weights, keep=1)
    publisher.publish({"a": torch.randn(3)}, step=1)
    export(weights, versions)
    publisher.publish({"a": torch.randn(3)}, step=2)
    assert not (weights / "step-00000001").exists()
    assert export(weights, versions) == 2
    other = Publisher(weights, keep=5)
    other.publish({"a": torch.randn(4)}, step=3)
    assert export(weights, versions) == 3
    assert not any(is_delta(versions, version) for version in (1, 2, 3))


def test_an_older_step_is_exported_where_that_is_asked_for(places):
    weights, versions, local = places
    model, publisher, engine = Small(1), Publisher(weights), Engine(versions, local)
    publisher.publish(model, step=1)
    first = bits(model)
    train(model, 2)
    publisher.publish(model, step=2)
    export(weights, versions)
    assert export(weights, versions, step=1) == 2
    engine.pull(2)
    assert bits(engine.weights()) == {name: own for name, own in first.items() if name != "first.weight"}


def test_an_export_that_fails_leaves_no_version(places):
    weights, versions, _ = places
    publisher = Publisher(weights)
    with pytest.raises(PublicationMissingError, match="LATEST"):
        export(weights, versions)
    publisher.publish(Small(1), step=1)
    file = weights / "step-00000001" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(PublicationError, match="other bytes"):
        export(weights, versions)
    assert {path.name for path in versions.iterdir()} <= {".publisher"}


def test_what_cannot_be_exported_is_named(places):
    weights, versions, _ = places
    model = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path())
    Publisher(weights).publish(model.v_head, step=1)
    with pytest.raises(ValueError, match="expected a publication of a whole model, got one of head"):
        export(weights, versions)
    with pytest.raises(ValueError, match="layout: expected 'slime'"):
        export(weights, versions, layout="other")
    with pytest.raises(ValueError, match="checksum: expected"):
        export(weights, versions, checksum="adler32")
    (versions.parent / "file").write_text("")
    with pytest.raises(SyncFileError, match="file"):
        export(weights, versions.parent / "file")


def test_two_exports_at_a_time_are_told_apart(places):
    import fcntl

    weights, versions, _ = places
    Publisher(weights).publish(Small(1), step=1)
    versions.mkdir()
    with open(versions / ".publisher", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PublisherConflictError, match="is writing"):
            export(weights, versions)
    assert export(weights, versions) == 1
    assert publications(weights)[0].step == 1
