"""What is published is what is applied, bit for bit, in place, in steps that rise."""

import json
import os
import pickle
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from tests.sync.conftest import Small, bits, train
from vhead import AutoModelForCausalLMWithValueHead
from vhead.demo import demo_model_path
from vhead.errors import (
    PublicationMismatchError,
    PublicationMissingError,
    PublisherConflictError,
    SyncError,
    SyncFileError,
    SyncStepError,
    WrongBaseError,
)
from vhead.sync import Follower, Publisher, collect, publications, verify


def test_weights_arrive_bit_for_bit_and_parameters_keep_their_storage(published):
    directory, model = published
    other = Small(2)
    addresses = [parameter.data_ptr() for parameter in other.parameters()]
    follower = Follower(directory)
    assert follower.apply(other) == follower.step == 1
    assert bits(other) == bits(model)
    assert [parameter.data_ptr() for parameter in other.parameters()] == addresses
    assert other.tied is other.first.weight
    assert follower.apply(other) is None


def test_autograd_notices_weights_that_change_between_forward_and_backward(published):
    other = Small(2)
    loss = other.first(other.first.weight.new_ones(2, 96)).square().sum() + other.first.weight.square().sum()
    Follower(published[0]).apply(other)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_full_publication_is_a_checkpoint_that_others_read(tmp_path):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path())
    torch.nn.init.normal_(model.v_head.summary.weight)
    Publisher(tmp_path).publish(model, step=7, metadata={"reward": 0.25})
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "step-00000007")
    assert bits(again) == bits(model)
    assert "v_head.summary.weight" in load_file(tmp_path / "step-00000007" / "model.safetensors")
    assert publications(tmp_path)[0].publication.metadata == {"reward": 0.25}


def test_a_head_alone_reaches_a_whole_model(tmp_path):
    model, other = (AutoModelForCausalLMWithValueHead.from_pretrained(demo_model_path()) for _ in range(2))
    torch.nn.init.normal_(model.v_head.summary.weight)
    before = bits(other.pretrained_model)
    published = Publisher(tmp_path).publish(model.v_head, step=1)
    assert published.parts == ("head",)
    assert Follower(tmp_path).apply(other) == 1
    assert bits(other.v_head) == bits(model.v_head)
    assert bits(other.pretrained_model) == before


def test_tensors_by_name_with_odd_characters(tmp_path):
    tensors = {'a "quoted"\n\\ ünï.weight': torch.randn(3, 2), "../../b": torch.randn(2)}
    Publisher(tmp_path).publish(tensors, step=1)
    others = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    Follower(tmp_path).apply(others)
    assert bits(others) == bits(tensors)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("full_every", [1, 4, 1000])
def test_changes_add_up_to_the_full_weights_for_early_and_late_followers(tmp_path, full_every, contiguous):
    model, early = Small(1, contiguous=contiguous), Small(2, contiguous=contiguous)
    publisher, follower = Publisher(tmp_path, delta=True, full_every=full_every, keep=2), Follower(tmp_path)
    for step in range(1, 12):
        train(model, step)
        publisher.publish(model, step=step)
        assert follower.apply(early) == step
        assert bits(early) == bits(model)
        late = Small(3, contiguous=contiguous)
        Follower(tmp_path).apply(late)
        assert bits(late) == bits(model)
    assert verify(tmp_path).step == 11


def test_a_hundred_deltas_equal_the_full_weights(tmp_path):
    model, other = Small(1), Small(2)
    publisher = Publisher(tmp_path, delta=True, full_every=1000)
    for step in range(101):
        train(model, step)
        publisher.publish(model, step=step)
    assert not publications(tmp_path)[-1].publication.is_full
    Follower(tmp_path).apply(other)
    assert bits(other) == bits(model)


def test_changes_to_weights_that_somebody_has_touched_are_not_put_over_them(tmp_path, caplog):
    model, other = Small(1, contiguous=True), Small(2, contiguous=True)
    publisher, follower = Publisher(tmp_path, delta=True), Follower(tmp_path)
    publisher.publish(model, step=1)
    follower.apply(other)
    train(other, 99)
    train(model, 2)
    publisher.publish(model, step=2)
    assert follower.apply(other) == 2
    assert bits(other) == bits(model)
    assert "all weights are read instead" in caplog.text


def test_changes_are_put_over_the_weights_in_use_and_read_nothing_else(tmp_path):
    model, other = Small(1, contiguous=True), Small(2, contiguous=True)
    publisher, follower = Publisher(tmp_path, delta=True), Follower(tmp_path)
    publisher.publish(model, step=1)
    follower.apply(other)
    train(model, 2)
    publisher.publish(model, step=2)
    shutil.rmtree(tmp_path / "step-00000001")
    assert follower.apply(other) == 2
    assert bits(other) == bits(model)
    with pytest.raises(WrongBaseError, match="step-00000001"):
        Follower(tmp_path).apply(Small(3))


def test_steps_go_back_only_where_that_is_asked_for(tmp_path):
    model, other = Small(1), Small(2)
    publisher, follower = Publisher(tmp_path), Follower(tmp_path)
    publisher.publish(model, step=1)
    first = bits(model)
    train(model, 1)
    publisher.publish(model, step=2)
    follower.apply(other)
    assert follower.apply(other, step=1) == 1
    assert bits(other) == first
    assert follower.apply(other) == 2
    with pytest.raises(SyncStepError, match="expected one above 2"):
        publisher.publish(model, step=2)
    latest = (tmp_path / "LATEST").read_bytes()
    train(model, 3)
    publisher.publish(model, step=3)
    follower.apply(other)
    (tmp_path / "LATEST").write_bytes(latest)
    with pytest.raises(SyncStepError, match="LATEST: expected step 3, which the model has, or a later one, got 2"):
        follower.apply(other)
    assert bits(other) == bits(model)


def test_of_two_publishers_one_wins_and_the_other_is_told(tmp_path):
    model = Small(1)
    first, second = Publisher(tmp_path), Publisher(tmp_path)
    first.publish(model, step=1)
    with pytest.raises(PublisherConflictError, match="another publisher has published 1"):
        second.publish(model, step=2)
    first.publish(model, step=2)
    assert Follower(tmp_path).apply(Small(2)) == 2


def test_a_publisher_that_writes_holds_off_another(tmp_path):
    model = Small(1)
    first, second = Publisher(tmp_path), Publisher(tmp_path)
    first._native.begin(1, [("a", "F32", [2], "model")], ["model"], "{}")
    with pytest.raises(PublisherConflictError, match="is writing"):
        second.publish(model, step=1)
    first._native.abandon()
    second.publish(model, step=1)


def test_a_model_with_other_tensors_is_told_which(published):
    directory, _ = published
    other = Small(2)
    other.more = torch.nn.Parameter(torch.randn(2))
    del other.half
    before = bits(other)
    with pytest.raises(PublicationMismatchError, match=r"half\.weight and no more"):
        Follower(directory).apply(other)
    wide = Small(2)
    wide.first = torch.nn.Linear(96, 65)
    wide.tied = wide.first.weight
    with pytest.raises(PublicationMismatchError, match="expected shape"):
        Follower(directory).apply(wide)
    assert bits(other) == before


def test_another_dtype_is_converted_only_where_that_is_asked_for(published):
    directory, model = published
    other = Small(2)
    other.first.to(torch.float64)
    other.tied = other.first.weight
    before = bits(other)
    with pytest.raises(PublicationMismatchError, match="expected F64"):
        Follower(directory).apply(other)
    assert bits(other) == before
    assert Follower(directory, convert=True).apply(other) == 1
    assert torch.equal(other.first.weight, model.first.weight.double())


def test_what_torch_has_to_copy_is_put_back_where_a_copy_fails(published, monkeypatch):
    directory, model = published
    other = Small(2)
    before = bits(other)
    import vhead.sync.follower as module

    bring = module._bring
    monkeypatch.setattr(module, "_bring", lambda *arguments: (bring(*arguments), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        Follower(directory).apply(other)
    assert bits(other) == before
    assert bits(other) != bits(model)


def test_nothing_published_is_nothing_new(tmp_path):
    assert Follower(tmp_path / "nowhere").apply(Small(1)) is None
    assert Follower(tmp_path).apply(Small(1)) is None
    with pytest.raises(PublicationMissingError):
        Follower(tmp_path).apply(Small(1), step=3)


def test_what_killed_publishers_left_is_removed_by_the_next(tmp_path):
    model = Small(1)
    Publisher(tmp_path).publish(model, step=1)
    (tmp_path / ".step-00000002.0123456789abcdef.unfinished").mkdir()
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / "half").write_text("half")
    (tmp_path / "mine.txt").write_text("mine")
    Publisher(tmp_path).publish(model, step=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "LATEST", ".publisher", "mine.txt", "step-00000001", "step-00000002",
    }  # fmt: skip
    (tmp_path / ".step-00000003.0123456789abcdef.unfinished").mkdir()
    assert collect(tmp_path, keep=1) == ([1], [".step-00000003.0123456789abcdef.unfinished"])


def test_a_publication_that_is_removed_while_it_is_read_is_read_to_its_end(tmp_path):
    from vhead import _native

    model, other = Small(1), Small(2)
    publisher = Publisher(tmp_path, keep=1)
    publisher.publish(model, step=1)
    first = bits(model)
    stage = _native.SyncStage.open(tmp_path, None, None, tmp_path, in_place=False)
    train(model, 1)
    publisher.publish(model, step=2)
    assert not (tmp_path / "step-00000001").exists()
    while stage.next is not None:
        stage.verify_next(None)
    from vhead.sync.matching import matched
    from vhead.sync.weights import as_bytes, weights_of

    match = matched(stage, weights_of(other), convert=False)
    stage.install([(place, as_bytes(weight.tensor)) for place, weight in match.direct])
    assert bits({"w": other.first.weight})["w"] == first["first.weight"]


def test_metadata_that_json_does_not_have_is_refused_before_anything_is_written(tmp_path):
    publisher = Publisher(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        publisher.publish(Small(1), step=1, metadata={"loss": float("nan")})
    assert not publications(tmp_path)


def test_a_full_disk_leaves_readers_what_they_had(published, monkeypatch):
    directory, model = published
    other = Small(2)
    follower = Follower(directory)
    follower.apply(other)
    publisher = Publisher(directory)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SyncFileError) as caught:
            publisher.publish(Small(3), step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert follower.apply(other) is None
    assert bits(other) == bits(model)
    publisher.publish(Small(3), step=2)
    assert follower.apply(other) == 2


def test_a_reader_in_another_thread_never_meets_a_swap(published):
    from vhead.sync.swapping import TURNS

    directory, _ = published
    other, done = Small(2), []
    follower = Follower(directory)
    with TURNS.reading():
        thread = threading.Thread(target=lambda: done.append(follower.apply(other)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert bits(other) == bits(Small(2))
    thread.join(30)
    assert done == [1]


def test_a_directory_that_vanishes_is_nothing_new_and_one_that_comes_back_is_followed(published):
    directory, model = published
    other, follower = Small(2), Follower(directory)
    follower.apply(other)
    directory.rename(directory.with_name("gone"))
    assert follower.apply(other) is None
    with pytest.raises(PublicationMissingError):
        follower.apply(other, step=1)
    with pytest.raises(PublicationMissingError):
        publications(directory)
    assert bits(other) == bits(model)
    directory.with_name("gone").rename(directory)
    train(model, 2)
    Publisher(directory).publish(model, step=2)
    assert follower.apply(other) == 2


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda latest: latest.symlink_to(latest.name)])
def test_a_latest_that_is_no_file_is_refused_and_waited_for_by_nobody(published, make):
    directory, model = published
    other, follower = Small(2), Follower(directory)
    follower.apply(other)
    (directory / "LATEST").unlink()
    make(directory / "LATEST")
    with pytest.raises(SyncError, match="LATEST"):
        follower.apply(other)
    assert (follower.step, bits(other)) == (1, bits(model))


def test_clocks_that_jump_are_not_asked(published):
    directory, model = published
    other, follower, publisher = Small(2), Follower(directory), Publisher(directory, keep=2)
    for step, time in enumerate((2**32, 0, 10**9, 1), 2):
        train(model, step)
        publisher.publish(model, step=step)
        for path in (directory, *directory.rglob("*")):
            os.utime(path, (time, time))
        assert follower.apply(other) == step
        assert bits(other) == bits(model)
    assert [entry.step for entry in publications(directory)] == [4, 5]


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "weights"):
        with pytest.raises(SyncFileError, match="file"):
            Publisher(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_only_to_be_read_is_named_and_followed(published):
    directory, model = published
    publisher, other = Publisher(directory), Small(2)
    directory.chmod(0o555)
    try:
        with pytest.raises(SyncFileError, match="ermission"):
            publisher.publish(model, step=2)
        assert Follower(directory).apply(other) == 1
    finally:
        directory.chmod(0o755)
    assert bits(other) == bits(model)


def test_manifests_are_json(published):
    manifest = json.loads((published[0] / "step-00000001" / "manifest.json").read_text())
    assert manifest["schema"] == "vhead.sync/1"
    assert manifest["tensors"]["tied"]["shape"] == [64, 96]
