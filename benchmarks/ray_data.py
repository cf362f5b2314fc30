"""Measures Ray Data with one actor beside `Scorer.stream`, and the memory of two actors: see README.md."""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import report
import torch
from measure import Figures, add_options, memory
from transformers import AutoTokenizer
from workloads import log_normal, qwen2

import vhead.ray
from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.benchmark.document import Row
from vhead.benchmark.timing import load_average
from vhead.demo import demo_model_path

LAYERS, PROMPTS, COMPLETIONS, BATCH = 4, 12, 8, 48
RETURNS = ("values",)


class Measured(vhead.ray.BatchScorer):
    """Says in each row when its model was there, and how much memory its process has for itself alone."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        self._ready = time.time()

    def __call__(self, batch: Any) -> Any:
        table = super().__call__(batch)
        about = {"ready": self._ready, "private": memory("RssAnon"), "pid": os.getpid()}
        for name, value in about.items():
            table = table.append_column(name, pa.array([value] * len(table)))
        return table


def saved(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of Qwen2-0.5B's shape with a head of random weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(qwen2(LAYERS), v_head_init_strategy="normal")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(folder)
    return folder


def scored(rollouts: list[Rollout], model: Path, actors: int, threads: int, **options: Any) -> list[dict[str, Any]]:
    """The rows that actors give."""
    rows = [{"prompt_ids": one.prompt.tolist(), "completion_ids": one.completion.tolist()} for one in rollouts]
    data = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // BATCH))
    return data.map_batches(
        Measured,
        fn_constructor_kwargs={"model": str(model), "returns": RETURNS, "num_threads": threads, **options},
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=threads,
    ).take_all()


def times(options: argparse.Namespace, model: Path) -> Iterator[Row]:
    """Seconds of both in turns; Ray's from when its actor has loaded the model until the driver has the last row."""
    rollouts = log_normal(PROMPTS, COMPLETIONS)
    scorer = Scorer.from_pretrained(model, num_threads=options.threads)
    for at in range(options.rounds + 1):
        before, start = load_average(), time.perf_counter()
        for _ in scorer.stream(rollouts, RETURNS):
            pass
        stream = time.perf_counter() - start
        rows = scored(rollouts, model, 1, options.threads)
        actor = time.time() - rows[0]["ready"]
        if at:  # The first round warms up.
            about = {"load_before": before, "load_after": load_average()}
            yield {"implementation": "Scorer.stream", "seconds": stream, **about}
            yield {"implementation": "Ray Data, one actor", "seconds": actor, **about}


def memories(model: Path) -> Iterator[Row]:
    """Bytes that each of two actors has for itself alone."""
    rollouts = log_normal(PROMPTS, 1)
    for shared in (False, True):
        rows = scored(rollouts * BATCH, model, 2, 1, share_weights=shared)
        private = {row["pid"]: row["private"] for row in rows}
        yield {"share_weights": shared, "private": list(private.values())}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "ray-data", rounds=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = Figures(
        options, layers=LAYERS, prompts=PROMPTS, completions=COMPLETIONS, batch=BATCH, ray=ray.__version__
    )
    with tempfile.TemporaryDirectory() as folder:
        model = saved(Path(folder) / "model")
        ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False)
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        figures.put("weights", weights)
        figures.add("times", times(options, model))
        figures.add("memory", memories(model))
        ray.shutdown()
    figures.close(report.ray_data)


if __name__ == "__main__":
    _main()
