"""Publications in stores that fsspec reaches."""

import uuid

import fsspec
import pytest

from tests.sync.conftest import Small, bits, train
from vhead.errors import PublicationError, PublisherConflictError, SyncError, SyncFileError
from vhead.sync import Follower, Publisher


@pytest.fixture
def url():
    """An empty place in memory."""
    name = f"/{uuid.uuid4().hex}/run"
    yield f"memory:/{name}"
    files = fsspec.filesystem("memory")
    if files.exists(name):
        files.rm(name, recursive=True)


@pytest.mark.parametrize("delta", [False, True])
def test_weights_pass_through_a_store_for_early_and_late_followers(url, delta):
    model, early = Small(1, contiguous=True), Small(2, contiguous=True)
    publisher, follower = Publisher(url, delta=delta, full_every=3, keep=1), Follower(url)
    assert follower.apply(early) is None
    for step in range(1, 6):
        train(model, step)
        publisher.publish(model, step=step)
        assert follower.apply(early) == step
        assert follower.apply(early) is None
        late = Small(3)
        assert Follower(url).apply(late) == step
        assert bits(early) == bits(late) == bits(model)
    files = fsspec.filesystem("memory")
    kept = {path.rsplit("/", 1)[-1] for path in files.ls(url.removeprefix("memory:/"), detail=False)}
    assert kept == ({"LATEST", "step-00000004", "step-00000005"} if delta else {"LATEST", "step-00000005"})


def test_a_new_publisher_goes_on_and_an_old_one_is_told(url):
    first = Publisher(url)
    first.publish(Small(1), step=1)
    second = Publisher(url)
    assert second.step == 1
    second.publish(Small(2), step=2)
    with pytest.raises(PublisherConflictError, match="has published step-00000002"):
        first.publish(Small(3), step=3)
    other = Small(4)
    assert Follower(url).apply(other) == 2
    assert bits(other) == bits(Small(2))


def test_what_is_damaged_in_a_store_changes_nothing(url):
    Publisher(url).publish(Small(1), step=1)
    files, path = fsspec.filesystem("memory"), f"{url.removeprefix('memory:/')}/step-00000001/model.safetensors"
    whole = files.cat_file(path)
    other = Small(2)
    for broken in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        files.pipe_file(path, broken)
        with pytest.raises(PublicationError):
            Follower(url).apply(other)
    assert bits(other) == bits(Small(2))


def test_a_store_that_refuses_leaves_readers_what_they_had_and_is_tried_again(url, monkeypatch):
    publisher, follower, other = Publisher(url, delta=True), Follower(url), Small(2)
    model = Small(1)
    publisher.publish(model, step=1)
    follower.apply(other)
    first = bits(model)
    train(model, 1)
    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "put_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(SyncFileError, match="full"):
            publisher.publish(model, step=2)
    assert follower.apply(other) is None
    assert bits(other) == first
    train(model, 2)
    publisher.publish(model, step=3)
    assert follower.apply(other) == 3
    assert bits(other) == bits(model)


def test_a_file_url_is_the_folder(tmp_path):
    Publisher(f"file://{tmp_path}/weights").publish(Small(1), step=1)
    assert (tmp_path / "weights" / "LATEST").exists()
    assert Follower(tmp_path / "weights").apply(Small(2)) == 1


def test_a_store_that_fsspec_does_not_have_is_named():
    with pytest.raises(SyncError, match="nowhere://there: cannot be reached"):
        Follower("nowhere://there")
