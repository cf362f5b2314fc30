"""Publications that are broken, publishers and followers that are killed, swaps that are interrupted.

The same checks are tried on two ways that others go, and must catch both: copying tensor by tensor in place, and
exclusive-or deltas, which applied twice give the old weights back.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

from tests.attack.scale import scaled
from vhead.errors import VheadError
from vhead.sync import Follower, Publisher, publications

SHAPES = {"body.weight": (64, 48), "body.bias": (64,), "v_head.summary.weight": (1, 64)}


class Versions:
    """The weights of each step: those of the step before with a few elements changed."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.known = [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}]

    def of(self, step):
        while len(self.known) <= step:
            generator = torch.Generator().manual_seed(len(self.known))
            after = {name: tensor.clone() for name, tensor in self.known[-1].items()}
            for tensor in after.values():
                tensor.view(-1)[torch.randint(tensor.numel(), (3,), generator=generator)] += 1
            self.known.append(after)
        return self.known[step]

    def step_of(self, weights, steps):
        """Which of these steps the weights are of; None: they are a mixture, or none of these."""
        return next((step for step in steps if same(weights, self.of(step))), None)


def same(one, other):
    return all(torch.equal(tensor.view(torch.int32), other[name].view(torch.int32)) for name, tensor in one.items())


def copied(weights):
    return {name: tensor.clone() for name, tensor in weights.items()}


# Corruptions


def damaged(folder, chance):
    """Damages something of what is in a folder; gives what undoes it, or None where nothing has changed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".publisher")
    file, other = chance.choice(files), chance.choice(files)
    before, beside = file.read_bytes(), other.read_bytes()
    kind = chance.choice(["flip", "flip", "cut", "longer", "swap", "missing", "link", "forged"])
    if kind == "flip":
        broken = bytearray(before)
        broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        file.write_bytes(broken)
    elif kind == "cut":
        file.write_bytes(before[: chance.randrange(len(before))])
    elif kind == "longer":
        file.write_bytes(before + chance.randbytes(chance.randint(1, 9)))
    elif kind == "swap":
        file.write_bytes(beside)
        other.write_bytes(before)
    elif kind == "missing":
        file.unlink()
    elif kind == "link":
        file.rename(folder.parent / "elsewhere")
        file.symlink_to(folder.parent / "elsewhere")
    elif file.name == "manifest.json":
        file.write_text(forged(json.loads(before), chance))

    def undo():
        with suppress(FileNotFoundError):
            file.unlink()
        file.write_bytes(before)
        other.write_bytes(beside if other != file else before)

    changed = kind in ("missing", "link") or file.read_bytes() != before
    # A manifest's name that leads to the same bytes elsewhere is refused too, and so is that of `LATEST`.
    return undo if changed else undo() or None


def forged(manifest, chance):
    tensor = chance.choice(sorted(manifest["tensors"]))
    change = chance.choice(["digest", "shape", "file", "extra", "less", "size", "schema", "step"])
    if change == "digest":
        manifest["tensors"][tensor]["digest"] = "0" * 64
    elif change == "shape":
        manifest["tensors"][tensor]["shape"] = [1 << 62, 1 << 62]
    elif change == "file":
        manifest["tensors"][tensor]["file"] = "../../etc/passwd"
    elif change == "extra":
        manifest["tensors"]["one.more"] = manifest["tensors"][tensor]
    elif change == "less":
        del manifest["tensors"][tensor]
    elif change == "size":
        next(iter(manifest["files"].values()))["bytes"] = 1 << 63
    elif change == "schema":
        manifest["schema"] = "vhead.sync/999"
    else:
        manifest["step"] += 1
    return json.dumps(manifest)


def corruptions(folder, old, bring, count, seed=0):
    """Damages a directory again and again; how often what was brought in then was not refused, or weights changed."""
    chance, tried, wrong = random.Random(seed), 0, 0
    while tried < count:
        undo = damaged(folder, chance)
        if undo is None:
            continue
        tried += 1
        weights = copied(old)
        step = None
        with suppress(Exception):
            step = bring(folder, weights)
        # Without `LATEST`, nothing has been published.
        wrong += step is not None or not same(weights, old)
        undo()
    return wrong


def in_place(folder, weights):
    """What others do: the newest folder's tensors, one after the other, over the weights in use."""
    name = (folder / "LATEST").read_text().split()[0]
    for tensor_name, tensor in load_file(folder / name / "model.safetensors").items():
        weights[tensor_name].copy_(tensor)


@pytest.mark.parametrize("delta", [False, True])
def test_no_corruption_gets_in(quick_folder, delta):
    versions, folder = Versions(), quick_folder / "weights"
    publisher = Publisher(folder, delta=delta, keep=1)
    for step in (1, 2, 3):
        publisher.publish(versions.of(step), step=step)
    wrong = corruptions(folder, versions.of(0), lambda at, weights: Follower(at).apply(weights), scaled(300, 5000))
    assert wrong == 0
    weights = copied(versions.of(0))
    assert Follower(folder).apply(weights) == 3
    assert same(weights, versions.of(3))


def test_the_corruptions_find_a_loader_that_copies_in_place(quick_folder):
    versions, folder = Versions(), quick_folder / "weights"
    Publisher(folder).publish(versions.of(1), step=1)
    assert corruptions(folder, versions.of(0), in_place, 100) > 0


# Kills


def publish_on(folder, versions, chance):
    publisher = Publisher(folder, delta=chance.random() < 0.5, full_every=3, keep=chance.randint(1, 3))
    step = -1 if publisher.step is None else publisher.step
    while True:
        step += 1
        publisher.publish(versions.of(step), step=step)


def follow_on(folder, versions, chance):
    weights = copied(versions.of(0))
    follower = Follower(folder)
    while True:
        follower.apply(weights, step=chance.choice([None, *(entry.step for entry in publications(folder))]))
        if versions.step_of(weights, [follower.step]) is None:
            os._exit(1)


def forked(work, *arguments):
    child = os.fork()
    if child == 0:
        with suppress(VheadError):
            work(*arguments)
        os._exit(2)
    return child


def killed_often(folder, work, count):
    """Kills a child at random moments; what a fresh follower finds then."""
    versions, chance, mixed, reversed_, last, others = Versions(), random.Random(1), 0, 0, -1, 0
    versions.of(scaled(400, 6000))
    for _ in range(count):
        child = forked(work, folder, versions, random.Random(chance.random()))
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        others += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL
        weights = copied(versions.of(0))
        step = Follower(folder).apply(weights)
        if step is not None:
            mixed += not same(weights, versions.of(step))
            reversed_ += step < last
            last = step
    return mixed, reversed_, last, others


@pytest.fixture(scope="module")
def outcome_of():
    """Runs a function in a process of one thread, from which children can be forked; importing torch takes long."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result(scaled(250, 3000))


def test_a_killed_publisher_leaves_the_old_weights_or_the_new_ones(quick_folder, outcome_of):
    folder = quick_folder / "weights"
    mixed, reversed_, last, _ = outcome_of(killed_often, folder, publish_on, scaled(60, 1000))
    assert (mixed, reversed_) == (0, 0)
    assert last > 0
    publisher = Publisher(folder, keep=1)
    publisher.publish(Versions().of(0), step=last + 1)
    assert {path.name for path in folder.iterdir()} == {"LATEST", ".publisher", f"step-{last + 1:08d}"}


def test_a_killed_follower_leaves_nothing_behind(quick_folder, outcome_of):
    folder = quick_folder / "weights"
    publisher = Publisher(folder, delta=True, full_every=3)
    for step in range(6):
        publisher.publish(Versions().of(step), step=step)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    mixed, reversed_, last, others = outcome_of(killed_often, folder, follow_on, scaled(30, 1000))
    assert (mixed, reversed_, last, others) == (0, 0, 5, 0)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# Interrupts


class Alarm(BaseException):
    """What the handler of a signal raises, as that of Ctrl-C does."""


def ring(*_):
    raise Alarm


def interrupted_often(folder, loader, count):
    """Interrupts a loader at random moments; how often the weights were a mixture, or not of the step that it says."""
    versions, chance = Versions(), random.Random(2)
    signal.signal(signal.SIGALRM, ring)
    publisher = Publisher(folder)
    for step in (1, 2):
        publisher.publish(versions.of(step), step=step)
    load, weights, wrong, rung = loader(folder), copied(versions.of(0)), 0, 0
    for turn in range(count):
        said = None
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 3e-3))
            said = load(weights, 1 + turn % 2)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except (Alarm, ValueError):
            # What is raised within another package's code may come out as an error of its own.
            rung += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        found = versions.step_of(weights, [0, 1, 2])
        wrong += found is None or (said is not None and found != said)
    return wrong, rung


def following(folder):
    follower = Follower(folder)
    return lambda weights, step: follower.apply(weights, step=step) or follower.step


def copying_in_place(folder):
    def load(weights, step):
        for name, tensor in load_file(folder / f"step-{step:08d}" / "model.safetensors").items():
            for row, new in zip(weights[name], tensor, strict=True):
                row.copy_(new)
        return step

    return load


def test_an_interrupted_swap_leaves_one_version_or_the_other(quick_folder, outcome_of):
    wrong, rung = outcome_of(interrupted_often, quick_folder / "weights", following, scaled(150, 5000))
    assert wrong == 0
    assert rung > 0


def test_the_interrupts_find_a_loader_that_copies_in_place(quick_folder, outcome_of):
    wrong, _ = outcome_of(interrupted_often, quick_folder / "weights", copying_in_place, 200)
    assert wrong > 0


# Deltas that are applied again


def applied_again(folder, apply, versions):
    """Applies the changes of step 2 twice to the weights of step 1; whether those of step 2 are there."""
    weights = copied(versions.of(1))
    for _ in range(2):
        apply(folder, weights)
    return same(weights, versions.of(2))


def test_changes_that_are_applied_again_change_nothing(quick_folder):
    versions, folder = Versions(), quick_folder / "weights"
    publisher = Publisher(folder, delta=True)
    for step in (1, 2):
        publisher.publish(versions.of(step), step=step)
    assert not publications(folder)[-1].publication.is_full
    assert applied_again(folder, lambda at, weights: Follower(at).apply(weights, step=2), versions)


def test_the_check_finds_an_exclusive_or_that_is_applied_again(quick_folder):
    versions = Versions()
    old, new = versions.of(1), versions.of(2)
    delta = {name: old[name].view(torch.int32) ^ new[name].view(torch.int32) for name in old}

    def apply(_, weights):
        for name, tensor in weights.items():
            tensor.view(torch.int32).bitwise_xor_(delta[name])

    weights = copied(old)
    apply(quick_folder, weights)
    assert same(weights, new)
    assert not applied_again(quick_folder, apply, versions)
    shutil.rmtree(quick_folder)
