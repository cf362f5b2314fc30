"""Measures how weights are handed over: see README.md."""

import argparse
import multiprocessing
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
from measure import Figures, add_options, memory
from torch import Tensor
from workloads import log_normal, qwen2, small_llama

from vhead import AutoModelForCausalLMWithValueHead, Scorer, _native
from vhead.benchmark.document import Row
from vhead.benchmark.timing import load_average
from vhead.scoring.options import ScorerOptions
from vhead.sync import Follower, Publisher, verify

PLACES = {"tmpfs": "/dev/shm", "disk": None}  # noqa: S108, what is in it has random names
HEAD, BODY_TENSORS, WORKERS, SHARED_LAYERS = 2048, 16, 4, 4
CHANGED = 0.01
RELOADS_S = 5.0


@contextmanager
def _folder(place: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=PLACES[place]) as folder:
        yield Path(folder)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _row(what: str, seconds: list[float], **about: object) -> Row:
    return {"what": what, "seconds": seconds, "load": load_average(), **about}


def _head(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds of publishing and of applying a head."""
    for place in PLACES:
        with _folder(place) as folder:
            tensors = {"v_head.summary.weight": torch.randn(1, HEAD), "v_head.summary.bias": torch.randn(1)}
            own = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
            publisher, follower = Publisher(folder), Follower(folder)
            published, applied = [], []
            for step in range(10 * options.rounds):
                published.append(_seconds(partial(publisher.publish, tensors, step=step)))
                applied.append(_seconds(partial(follower.apply, own)))
            yield _row("publish", published, place=place)
            yield _row("apply", applied, place=place)


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


def _staged(folder: Path, have: tuple[int, str] | None, weights: dict[str, Tensor]) -> tuple[float, float]:
    """Seconds of reading and verifying what is new, and of swapping it in."""
    arrays = [tensor.view(torch.uint8).numpy() for _, tensor in sorted(weights.items())]

    def verified() -> "_native.SyncStage":
        stage = _native.SyncStage.open(folder, None, have, Path(tempfile.gettempdir()), in_place=False)
        while stage is not None and stage.next is not None:
            stage.verify_next(arrays[stage.next] if stage.is_over_weights_in_use else None)
        if stage is None:
            raise RuntimeError("nothing new")
        return stage

    began = time.perf_counter()
    stage = verified()
    seconds = time.perf_counter() - began
    return seconds, _seconds(lambda: stage.install(list(enumerate(arrays))))


def _whole(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds of what is done with a whole body, and of what it is compared with, in turns."""
    torch.set_num_threads(1)
    body, other = _body(options.mebibytes), _body(options.mebibytes)
    sizes = {"bytes": sum(tensor.nbytes for tensor in body.values())}
    copies = {name: tensor.clone() for name, tensor in body.items()}
    with _folder("disk") as folder:
        publisher = Publisher(folder, keep=1)
        times: dict[str, list[float]] = {}
        for step in range(options.rounds + 1):
            turn = {"publish": _seconds(partial(publisher.publish, body, step=step))}
            place = folder / f"step-{step:08d}"
            turn["cp"] = _seconds(partial(_copied, place, folder))
            turn["digest"] = _seconds(partial(verify, folder))
            turn["read and verify"], turn["swap"] = _staged(folder, None, other)
            turn["memory copy"] = _seconds(lambda: [np.copyto(_bytes(copies[n]), _bytes(body[n])) for n in body])
            for what, seconds in turn.items() if step else ():
                times.setdefault(what, []).append(seconds)
        for what, seconds in times.items():
            yield _row(what, seconds, **sizes)
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
        times: dict[str, list[float]] = {"publish": [], "verify": [], "swap": [], "memory copy": []}
        share = 0.0
        for step in range(1, options.rounds + 1):
            for tensor in body.values():
                places = torch.randint(len(tensor), (int(CHANGED * len(tensor)),))
                tensor.view(torch.int16)[places] ^= torch.randint(1, 2**10, places.shape, dtype=torch.int16)
            have = follower.publication
            times["publish"].append(_seconds(partial(publisher.publish, body, step=step)))
            share = sum(path.stat().st_size for path in (folder / f"step-{step:08d}").iterdir()) / size
            assert have is not None  # noqa: S101, a full one was applied
            staged = _staged(folder, (have.step, have.digest), {name: tensor.clone() for name, tensor in own.items()})
            for what, seconds in zip(("verify", "swap"), staged, strict=True):
                times[what].append(seconds)
            follower.apply(own)
            room = np.empty_like(_bytes(body["layers.0.weight"]))
            times["memory copy"].append(
                _seconds(lambda room=room: [np.copyto(room, _bytes(tensor)) for tensor in body.values()])
            )
        for what, seconds in times.items():
            yield _row(what, seconds, bytes=size, share=share)


def _reloads(options: argparse.Namespace) -> Iterator[Row]:
    """Rollouts a second while a head is published each second, and while none is."""
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(small_llama(256)).eval()
    rollouts = [type(rollout)([t % 256 for t in rollout.prompt], [t % 256 for t in rollout.completion])
                for rollout in log_normal(4, 4)]  # fmt: skip
    with _folder("disk") as folder:
        publisher = Publisher(folder, parts=("head",))
        publisher.publish(model, step=0)
        scorer = Scorer(model, follow=folder)
        step = 0
        for number in range(2 * options.rounds):
            publishes, began, scored, last = number % 2 == 1, time.perf_counter(), 0, 0.0
            while (passed := time.perf_counter() - began) < RELOADS_S:
                if publishes and passed - last >= 1:
                    last, step = passed, step + 1
                    publisher.publish({n: t + 1 for n, t in _head_of(model).items()}, step=step)
                scored += len(scorer.score(rollouts, ("values",)))
            rate = scored / (time.perf_counter() - began)
            yield {"publishes": publishes, "rollouts_per_s": rate, "load": load_average()}


def _head_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("v_head.")}


def _worker(folder: str, results: Any, together: Any, options: ScorerOptions) -> None:
    """Scores, and says by how much that has raised this process' share of the machine's memory."""
    torch.set_num_threads(1)
    before = _proportional()
    scorer = Scorer.from_pretrained(folder, **options)
    scorer.score(log_normal(1, 2), ("values",))
    together.wait()
    results.put(_proportional() - before)
    together.wait()


def _proportional() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _shared(options: argparse.Namespace) -> Iterator[Row]:
    """The proportional memory of workers on one body, with what they compute in."""
    spawn = multiprocessing.get_context("spawn")
    with _folder("disk") as folder:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(qwen2(SHARED_LAYERS).to(torch.bfloat16))
        torch.nn.init.normal_(model.v_head.summary.weight)
        model.save_pretrained(folder)
        body = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        del model
        for share in (False, True):
            results, together = spawn.Queue(), spawn.Barrier(WORKERS)
            arguments = (str(folder), results, together, {"share_weights": share})
            workers = [spawn.Process(target=_worker, args=arguments) for _ in range(WORKERS)]
            for worker in workers:
                worker.start()
            found = [results.get(timeout=300) for _ in workers]
            for worker in workers:
                worker.join()
            yield {"share": share, "workers": WORKERS, "proportional_bytes": sum(found), "body_bytes": body}


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
