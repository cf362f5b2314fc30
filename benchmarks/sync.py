"""Measures how weights are handed over: see README.md."""

import argparse
import multiprocessing
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from measure import Figures, add_options, in_fresh_process, memory
from torch import Tensor
from workloads import log_normal, qwen2, small_llama

from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer, _native
from vhead.benchmark.document import Row
from vhead.benchmark.timing import load_average
from vhead.demo import demo_model_path
from vhead.scoring.sharing import share_weights
from vhead.sync import Follower, Publisher, verify

PLACES = {"tmpfs": "/dev/shm", "disk": None}  # noqa: S108, what is in it has random names
HEAD, BODY_TENSORS, WORKERS, SHARED_LAYERS = 2048, 16, 4, 2
CHANGED = 0.01
TURN_S, TURNS = 1.0, 4
FLUSHED = 3  # files, and as many folders: what a publication of a head flushes

Times = dict[str, list[tuple[float, float]]]


@contextmanager
def _folder(place: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=PLACES[place]) as folder:
        yield Path(folder)


def _times(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of this process' processor time: on a busy machine, the second say what a core does."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - used


def _row(what: str, times: list[tuple[float, float]], **about: object) -> Row:
    by_clock, processor = ([time[which] for time in times] for which in (0, 1))
    return {"what": what, "seconds": by_clock, "processor": processor, "load": load_average(), **about}


def _flushes(folder: Path) -> None:
    """As many small files and folders as publishing a head flushes, one after the other."""
    opened = [folder / f"flushed-{number}" for number in range(FLUSHED)]
    for place in (*opened, *[folder] * FLUSHED):
        flags = os.O_RDONLY if place == folder else os.O_WRONLY | os.O_CREAT
        file = os.open(place, flags)
        if place != folder:
            os.write(file, b"0" * 4096)
        os.fsync(file)
        os.close(file)
    for place in opened:
        place.unlink()


def _head(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds of publishing and of applying a head."""
    for place in PLACES:
        with _folder(place) as folder:
            tensors = {"v_head.summary.weight": torch.randn(1, HEAD), "v_head.summary.bias": torch.randn(1)}
            own = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
            publisher, follower = Publisher(folder), Follower(folder)
            times: Times = {"publish": [], "apply": [], "flushes": []}
            for step in range(10 * options.rounds):
                times["publish"].append(_times(partial(publisher.publish, tensors, step=step)))
                times["apply"].append(_times(partial(follower.apply, own)))
                times["flushes"].append(_times(partial(_flushes, folder)))
            for what, measured in times.items():
                yield _row(what, measured, place=place)


def _body(mebibytes: int) -> dict[str, Tensor]:
    elements = mebibytes * 2**20 // 2 // BODY_TENSORS
    drawn = torch.randint(-(2**14), 2**14, (elements,), dtype=torch.int16).view(torch.bfloat16)
    return {f"layers.{number}.weight": drawn.roll(number) for number in range(BODY_TENSORS)}


def _copied(publication: Path, folder: Path) -> None:
    """What publishing is compared with: a copy that is on the disk before it counts."""
    copy = folder / "copy"
    subprocess.run(["cp", publication / "model.safetensors", copy], check=True)
    subprocess.run(["sync", copy], check=True)
    copy.unlink()


def _read(publication: Path) -> None:
    """What a digest is compared with: reading alone."""
    room = memoryview(bytearray(1 << 20))
    with open(publication / "model.safetensors", "rb", buffering=0) as file:
        while file.readinto(room):
            pass


def _staged(folder: Path, have: tuple[int, str] | None, weights: dict[str, Tensor]) -> list[tuple[float, float]]:
    """What reading and verifying what is new takes, and what swapping it in does."""
    arrays = [tensor.view(torch.uint8).numpy() for _, tensor in sorted(weights.items())]

    def verified() -> "_native.SyncStage":
        stage = _native.SyncStage.open(folder, None, have, Path(tempfile.gettempdir()), in_place=False)
        while stage is not None and stage.next is not None:
            stage.verify_next(arrays[stage.next] if stage.is_over_weights_in_use else None)
        if stage is None:
            raise RuntimeError("nothing new")
        return stage

    stages: list[_native.SyncStage] = []
    read = _times(lambda: stages.append(verified()))
    return [read, _times(lambda: stages[0].install(list(enumerate(arrays))))]


def _whole(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds of what is done with a whole body, and of what it is compared with, in turns."""
    torch.set_num_threads(1)
    body, other = _body(options.mebibytes), _body(options.mebibytes)
    sizes = {"bytes": sum(tensor.nbytes for tensor in body.values())}
    copies = {name: tensor.clone() for name, tensor in body.items()}
    with _folder("disk") as folder:
        publisher = Publisher(folder, keep=1)
        times: Times = {}
        for step in range(options.rounds + 1):
            turn = {"publish": _times(partial(publisher.publish, body, step=step))}
            place = folder / f"step-{step:08d}"
            turn["cp"] = _times(partial(_copied, place, folder))
            turn["read"] = _times(partial(_read, place))
            turn["digest"] = _times(partial(verify, folder))
            turn["read and verify"], turn["swap"] = _staged(folder, None, other)
            turn["memory copy"] = _times(lambda: [np.copyto(_bytes(copies[n]), _bytes(body[n])) for n in body])
            for what, taken in turn.items() if step else ():
                times.setdefault(what, []).append(taken)
        for what, measured in times.items():
            yield _row(what, measured, **sizes)
        yield _row("anonymous memory", [], bytes=_anonymous(lambda: Follower(folder).apply(other)))


def _bytes(tensor: Tensor) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return tensor.view(torch.uint8).numpy()


def _anonymous(work: Callable[[], object]) -> int:
    """By how much this process' anonymous memory rises at most while it works."""
    before, most, done = memory("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(0, most - before)


def _changes(options: argparse.Namespace) -> Iterator[Row]:
    """Bytes and seconds of publishing and applying what has changed."""
    torch.set_num_threads(1)
    body = _body(options.mebibytes)
    size = sum(tensor.nbytes for tensor in body.values())
    with _folder("disk") as folder:
        publisher, follower = Publisher(folder, delta=True, keep=1), Follower(folder)
        publisher.publish(body, step=0)
        own = {name: torch.zeros_like(tensor) for name, tensor in body.items()}
        follower.apply(own)
        times: Times = {"publish": [], "verify": [], "swap": [], "memory copy": []}
        share = 0.0
        for step in range(1, options.rounds + 1):
            for tensor in body.values():
                places = torch.randint(len(tensor), (int(CHANGED * len(tensor)),))
                tensor.view(torch.int16)[places] ^= torch.randint(1, 2**10, places.shape, dtype=torch.int16)
            have = follower.publication
            times["publish"].append(_times(partial(publisher.publish, body, step=step)))
            share = sum(path.stat().st_size for path in (folder / f"step-{step:08d}").iterdir()) / size
            assert have is not None  # noqa: S101, a full one was applied
            staged = _staged(folder, (have.step, have.digest), {name: tensor.clone() for name, tensor in own.items()})
            for what, taken in zip(("verify", "swap"), staged, strict=True):
                times[what].append(taken)
            follower.apply(own)
            room = np.empty_like(_bytes(body["layers.0.weight"]))
            times["memory copy"].append(
                _times(lambda room=room: [np.copyto(room, _bytes(tensor)) for tensor in body.values()])
            )
        for what, measured in times.items():
            yield _row(what, measured, bytes=size, share=share)


def _reloads(options: argparse.Namespace) -> Iterator[Row]:
    """Rollouts a second while a head is published each second, and while none is."""
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(small_llama(256)).eval()
    rollouts = [type(rollout)([t % 256 for t in rollout.prompt], [t % 256 for t in rollout.completion])
                for rollout in log_normal(4, 4)]  # fmt: skip
    with _folder("disk") as folder:
        publisher = Publisher(folder, parts=("head",))
        publisher.publish(model, step=0)
        scorer, step = Scorer(model, follow=folder), 0
        for number in range(2 * TURNS * options.rounds):
            publishes, began, used, scored = number % 2 == 1, time.perf_counter(), time.process_time(), 0
            if publishes:
                step += 1
                publisher.publish({n: t + 1 for n, t in _head_of(model).items()}, step=step)
            while time.perf_counter() - began < TURN_S:
                scored += len(scorer.score(rollouts, ("values",)))
            rates = {"rollouts_per_s": scored / (time.perf_counter() - began)}
            rates["rollouts_per_processor_s"] = scored / (time.process_time() - used)
            yield {"publishes": publishes, "load": load_average(), **rates}


def _head_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("v_head.")}


def _worker(folder: Path, together: Any, results: Any) -> None:
    """Scores, and says by how much its share of the machine's memory has risen beside activations; then with a copy."""
    torch.set_num_threads(1)
    # What an interpreter takes for itself, it takes now.
    Scorer.from_pretrained(demo_model_path()).score([Rollout([5, 6], [7, 8])], ("values",))
    together.wait()
    before, _ = _proportional()
    together.wait()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder, dtype=torch.bfloat16).eval()
    share_weights(model, folder)
    together.wait()
    _, loaded = _proportional()
    Scorer(model).score(log_normal(1, 2), ("values",))
    together.wait()
    shared, own = _proportional()
    activations = max(0, own - loaded)
    together.wait()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    together.wait()
    results.put((shared - before - activations, _proportional()[0] - before - activations, activations))
    together.wait()


def _proportional() -> tuple[int, int]:
    """Bytes of this process' share of the machine's memory, and how many of them are of no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {name: 1024 * int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return found["Pss"], found["Pss_Anon"]


def _rises(folder: Path) -> list[int]:
    """Of all workers together."""
    fork = multiprocessing.get_context("fork")
    together, results = fork.Barrier(WORKERS), fork.Queue()
    workers = [fork.Process(target=_worker, args=(folder, together, results)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return [sum(each) for each in zip(*found, strict=True)]


def _shared(_: argparse.Namespace) -> Iterator[Row]:
    """The proportional memory of workers on one body, and beside it what they compute in."""
    with _folder("disk") as folder:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(qwen2(SHARED_LAYERS).to(torch.bfloat16))
        torch.nn.init.normal_(model.v_head.summary.weight)
        model.save_pretrained(folder)
        body = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        del model
        shared, copied, activations = in_fresh_process(_rises, folder)
        for share, rise in ((True, shared), (False, copied)):
            about = {"workers": WORKERS, "activation_bytes": activations, "body_bytes": body}
            yield {"share": share, "proportional_bytes": rise, **about}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "sync", rounds=3, mebibytes=1024)
    options = parser.parse_args()
    figures = Figures(options, changed=CHANGED, mebibytes=options.mebibytes)
    figures.add("head", _head(options))
    figures.add("body", _whole(options))
    figures.add("changes", _changes(options))
    figures.add("reloads", _reloads(options))
    figures.add("shared", _shared(options))
    figures.close(report.sync)


if __name__ == "__main__":
    _main()
