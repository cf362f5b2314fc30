"""Writers, readers and kills against what saves heads and models: what a name leads to is always one whole save."""

import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.attack.scale import scaled
from vhead.checkpoints import replacing
from vhead.checkpoints.checkpoint import Checkpoint
from vhead.errors import VheadError
from vhead.formats import HeadWeights, LinearWeights, convert, load, save

# Processes that begin with what this one has imported already, and with no thread of its.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vhead.formats", "transformers.models.llama.modeling_llama"])

GOLDEN = Path(__file__).parent.parent / "formats" / "golden"
WRITERS = 3
KILLED = 9


def head_of(writer, number):
    """Heads whose bias tells which one they are; those of two writers lie differently in a file."""
    width, mark = 8 * (1 + writer), float(1000 * writer + number % 1000)
    weight = torch.randn(1, width, generator=torch.Generator().manual_seed(writer)) + mark
    return HeadWeights((LinearWeights(weight, torch.tensor([mark])),), "trl", "attack")


def is_whole(weight, bias):
    writer, number = divmod(int(bias), 1000)
    return writer in range(WRITERS) and torch.equal(weight, head_of(writer, number).weight)


# Races


def write_often(path, writer, count, save_one, results):
    failures = 0
    for number in range(count):
        try:
            save_one(head_of(writer, number), path)
        except (VheadError, OSError, RuntimeError, ValueError):
            failures += 1
    results.put(Counter(saves=count, failed_saves=failures))


def read_often(path, stop, load_one, results):
    seen = Counter()
    while not stop.is_set():
        seen["loads"] += 1
        try:
            seen["mixed"] += not is_whole(*load_one(path))
        except VheadError:
            seen["failed_loads"] += 1
    results.put(seen)


def save_whole(head, path):
    save(head, path, overwrite=True)


def load_whole(path):
    head = load(path)
    return head.weight, head.bias


def save_under_one_name(head, path):
    """What saving did before: one name for the unfinished files of all writers."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    tensors = {"v_head.summary.weight": head.weight, "v_head.summary.bias": head.bias}
    if path.suffix == ".safetensors":
        save_file(tensors, unfinished)
    else:
        torch.save(tensors, unfinished)
    unfinished.replace(path)


def load_twice(path):
    """What loading did before: the file was opened anew for each tensor."""
    weight = Checkpoint(path).read("v_head.summary.weight", path.name)
    return weight, Checkpoint(path).read("v_head.summary.bias", path.name)


def race(path, count, save_one=save_whole, load_one=load_whole, readers=2):
    """Three writers and some readers of one file at once: what they saw, put together."""
    save_whole(head_of(0, 0), path)
    stop, results = PROCESSES.Event(), PROCESSES.Queue()
    writers = [
        PROCESSES.Process(target=write_often, args=(path, writer, count, save_one, results))
        for writer in range(WRITERS)
    ]
    watching = [PROCESSES.Process(target=read_often, args=(path, stop, load_one, results)) for _ in range(readers)]
    for process in (*watching, *writers):
        process.start()
    seen = sum((results.get(timeout=250) for _ in writers), Counter())
    stop.set()
    seen += sum((results.get(timeout=50) for _ in watching), Counter())
    for process in (*watching, *writers):
        process.join(50)
        assert process.exitcode == 0
    return seen


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_writers_and_readers_of_one_file_never_see_half_a_save(quick_folder, suffix):
    seen = race(quick_folder / f"head{suffix}", scaled(60, 5000))
    assert seen["saves"] == WRITERS * scaled(60, 5000)
    assert seen["loads"]
    assert (seen["failed_saves"], seen["failed_loads"], seen["mixed"]) == (0, 0, 0)
    assert [path.name for path in quick_folder.iterdir()] == [f"head{suffix}"]


def test_the_race_finds_one_name_for_all_writers(quick_folder):
    # Without readers: one that has mapped the file when it is cut short dies of it.
    # How the writers meet is a matter of luck: they race until it is seen, and not for ever.
    races = (race(quick_folder / "head.bin", 200, save_one=save_under_one_name, readers=0) for _ in range(50))
    assert any(seen["failed_saves"] > 0 for seen in races)


def test_the_race_finds_a_file_that_is_opened_twice(quick_folder):
    races = (race(quick_folder / "head.safetensors", 200, load_one=load_twice) for _ in range(50))
    assert any(seen["failed_loads"] + seen["mixed"] > 0 for seen in races)


# Kills


CHANGES = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "ctypes.dlopen")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class KillAt:
    """Ends this process before its `moment`-th operation that changes the file system, or counts them."""

    def __init__(self, moment):
        self.moment, self.count = moment, 0
        fsync = os.fsync
        os.fsync = lambda descriptor: (self.happens(), fsync(descriptor))[1]
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITING):
            self.happens()

    def happens(self):
        self.count += 1
        if self.count == self.moment:
            os._exit(KILLED)


def killed_at(moment, function, arguments):
    """Calls a function in a fork of this process that is killed; whether it lived to the end."""
    child = os.fork()
    if child == 0:
        try:
            kills = KillAt(moment)
            function(*arguments)
            os._exit(0 if kills.count < moment else 1)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == 0


def kill_often(make, function, arguments, observe, results):
    seen, moment, lived = [], 0, False
    while not lived:
        moment += 1
        make(arguments[0])
        lived = killed_at(moment, function, arguments)
        seen.append(observe(arguments[0]))
    results.put(seen)


def ends_of_kills(make, function, arguments, observe):
    """Calls a function again and again, each time killed a moment later than the last, until it lives to the end.

    Args:
        make: Makes what is there before each call, given the first argument.
        function: What is killed.
        arguments: Its arguments.
        observe: Says what is there after each call, given the first argument.

    Returns:
        What was observed, the last one after a call that was not killed.
    """
    results = PROCESSES.Queue()
    process = PROCESSES.Process(target=kill_often, args=(make, function, arguments, observe, results))
    process.start()
    seen = results.get(timeout=280)
    process.join(20)
    assert process.exitcode == 0
    return seen


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def models(quick_folder):
    """Two models' folders as a conversion leaves them, with a note of the user's in each, and where they are put."""
    made = {}
    for name in ("trl_sharded", "openrlhf"):
        convert(GOLDEN / name, quick_folder / name)
        (quick_folder / name / "notes.md").write_text("mine")
        made[name] = contents(quick_folder / name)
    return made["trl_sharded"], made["openrlhf"], quick_folder / "home" / "critic"


def old_model(home):
    shutil.rmtree(home.parent, ignore_errors=True)
    home.parent.mkdir()
    shutil.copytree(home.parent.parent / "trl_sharded", home)


def replace_by_new(home):
    convert(GOLDEN / "openrlhf", home, overwrite=True)


def replace_file_by_file(home):
    """What conversion did before: the old weights were deleted and the new files put beside what was left."""

    @contextmanager
    def in_place(path, *, overwrite):
        unfinished = path.with_name(".unfinished")
        unfinished.mkdir()
        yield unfinished
        shutil.rmtree(path)
        path.mkdir()
        for file in unfinished.iterdir():
            file.replace(path / file.name)

    import vhead.formats.conversion

    vhead.formats.conversion.replacing_folder = in_place
    replace_by_new(home)


def test_a_model_that_is_being_replaced_is_the_old_or_the_new_one_at_every_kill(models):
    old, new, home = models
    *ends, last = ends_of_kills(old_model, replace_by_new, (home,), contents)
    assert all(end in (old, new) for end in ends)
    assert old in ends
    assert new in ends
    assert last == new
    assert [path.name for path in home.parent.iterdir()] == ["critic"]


def test_the_kills_find_a_model_that_is_replaced_file_by_file(models):
    old, new, home = models
    ends = ends_of_kills(old_model, replace_file_by_file, (home,), contents)
    assert any(end not in (old, new) for end in ends)


def old_head(file):
    shutil.rmtree(file.parent, ignore_errors=True)
    file.parent.mkdir()
    save_whole(head_of(0, 1), file)


def replace_head(file):
    save_whole(head_of(1, 1), file)


def mark_of(file):
    return float(load(file).bias)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_head_that_is_being_replaced_is_the_old_or_the_new_one_at_every_kill(tmp_path, suffix):
    file = tmp_path / "home" / f"head{suffix}"
    *ends, last = ends_of_kills(old_head, replace_head, (file,), mark_of)
    assert set(ends) == {1.0, 1001.0}
    assert last == 1001.0


# Two conversions of one folder


def convert_often(source, destination, count, results):
    for _ in range(count):
        convert(source, destination, overwrite=True)
    results.put(count)


def test_two_conversions_into_one_folder_leave_one_of_them_whole(models):
    old, new, home = models
    old_model(home)
    results = PROCESSES.Queue()
    arguments = [(GOLDEN / name, home, scaled(3, 100), results) for name in ("trl_sharded", "openrlhf")]
    processes = [PROCESSES.Process(target=convert_often, args=each) for each in arguments]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert contents_at_once(home) in (old, new)
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(home) in (old, new)
    assert [path.name for path in home.parent.iterdir()] == ["critic"]


def contents_at_once(home):
    """The contents of the folder that the name leads to now, also when it loses its name while it is read."""
    while True:
        try:
            descriptor = os.open(home, os.O_RDONLY)
            try:
                found = contents(Path(f"/proc/self/fd/{descriptor}"))
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            continue
        if found == contents(home):
            return found


def test_what_a_kill_leaves_is_nobody_s_and_can_be_deleted(tmp_path):
    (tmp_path / ".critic.unfinished").mkdir()
    (tmp_path / ".critic.unfinished" / "thesis.txt").write_text("mine")
    convert(GOLDEN / "openrlhf", tmp_path / "critic")
    convert(GOLDEN / "trl_sharded", tmp_path / "critic", overwrite=True)
    assert (tmp_path / ".critic.unfinished" / "thesis.txt").read_text() == "mine"
    names = {replacing._beside(tmp_path / "critic").name for _ in range(1000)}
    assert len(names) == 1000
