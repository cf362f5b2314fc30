"""Time and peak memory of `from_pretrained` on a checkpoint of 2 GB with a value head, beside transformers and TRL.

Peak memory belongs to a process, so that every load runs in a fresh one; the contestants take turns in random order.
"""

import argparse
import importlib
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from measure import Figures, add_options, extra_bytes, in_fresh_process, memory

import vhead
import report
from vhead.benchmark.document import Row
from vhead.benchmark.timing import load_average, turns
from vhead.benchmark.trl_head import trl_model

# 1.0 billion parameters in bfloat16.
SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 7168,
    "vocab_size": 32000,
}
SHARD_SIZES = dict(zip(report.LAYOUTS, ("10GB", "500MB"), strict=True))


def _write_checkpoints(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    body = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    model = vhead.AutoModelForCausalLMWithValueHead(body)
    for layout, shard_size in SHARD_SIZES.items():
        model.save_pretrained(folder / layout, max_shard_size=shard_size)


def measure(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """One row for each load; a round that is not counted warms the caches first."""
    cases = itertools.product(report.LAYOUTS, report.LOADED_DTYPES, report.LOADERS)
    for number, (layout, dtype, peer) in turns(cases, options.rounds + 1):
        result = in_fresh_process(load_once, peer, str(folder / layout), dtype.partition(",")[0], options.threads)
        if number:
            about = {"round": number, "layout": layout, "dtype": dtype, "peer": peer}
            yield about | result | {"load": load_average()}


def load_once(peer: str, folder: str, dtype: str, threads: int) -> Row:
    """Seconds and memory of one load, or the error that it ends with."""
    torch.set_num_threads(threads)
    # What a load would import on its way must not count.
    importlib.import_module("transformers.models.llama.modeling_llama")
    load = partial(model_class(peer).from_pretrained, folder, dtype=getattr(torch, dtype))
    row: Row = {}

    def timed() -> None:
        start = time.perf_counter()
        model = load()
        row["seconds"] = time.perf_counter() - start
        row["kept_bytes"] = sum(parameter.nbytes for parameter in model.parameters())

    before = memory("RssAnon")
    try:
        with AnonymousPeak() as anonymous:
            row["peak_bytes"] = extra_bytes(timed)
    except Exception as error:  # The page names what a peer cannot load.
        kind = type(error)
        return {"error": kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"}
    return row | {"anonymous_peak_bytes": anonymous.peak - before}


def model_class(peer: str) -> type:
    """The class whose `from_pretrained` is measured; both packages import it only here, when it is asked for."""
    if peer == "trl":
        return trl_model()
    return transformers.AutoModelForCausalLM if peer == "transformers" else vhead.AutoModelForCausalLMWithValueHead


class AnonymousPeak:
    """The most memory that no file backs, looked at every two milliseconds."""

    def __enter__(self) -> "AnonymousPeak":
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_details: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, memory("RssAnon"))
            if self._stop.wait(0.002):
                return


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "loading", rounds=9)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # For the processes that load.
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(_write_checkpoints, Path(folder))
        figures = Figures(options, shape=SHAPE)
        figures.add("loads", measure(Path(folder), options))
    figures.close(report.loading)


if __name__ == "__main__":
    _main()
