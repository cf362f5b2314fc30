"""Time and peak memory of `from_pretrained` on a checkpoint of 2 GB with a value head, beside transformers and TRL.

Peak memory belongs to a process, so that every load runs in a fresh one; the contestants take turns in random order.
"""

# ruff: noqa: PLC0415, each process imports what it measures and nothing else
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from measure import ROOT, load_average, provenance

RESULTS = ROOT / "benchmarks" / "results" / "loading.json"
SOURCES = [
    f"python/vhead/{name}"
    for name in ("auto_classes.py", "checkpoint.py", "formats", "loading.py", "modeling.py", "tensor_files.py")
]

# 1.0 billion parameters in bfloat16.
SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 7168,
    "vocab_size": 32000,
}
LAYOUTS = {"single file": "10GB", "shards of 500 MB": "500MB"}
# As stored, safetensors' pages are mapped and not read before they are used; a conversion reads them all.
DTYPES = ("bfloat16, as stored", "float32, converted")
CASES = [(layout, dtype) for layout in LAYOUTS for dtype in DTYPES]
PEERS = ("transformers", "vhead", "trl")
GOAL = 1.05

Row = dict[str, object]


def main() -> None:
    """Measures and writes the data and its report, or loads once for the process that measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--load", nargs=3, metavar=("PEER", "FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load_once(*options.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder))
        source = provenance(options.threads, options.rounds) | {"load_before": load_average()}
        rows = list(measure(Path(folder), options.rounds, options.threads))
    source |= {"load_after": load_average(), "uncommitted_sources": uncommitted(), "shape": SHAPE}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"provenance": source, "loads": rows}, indent=1) + "\n")
    options.output.with_suffix(".md").write_text("\n".join(report(source, rows)) + "\n")
    print(f"wrote {options.output}")


def write_checkpoints(folder: Path) -> None:
    """Writes the same random language model with a head in every layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from vhead import AutoModelForCausalLMWithValueHead

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLMWithValueHead(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    for layout, shard_size in LAYOUTS.items():
        model.save_pretrained(folder / layout, max_shard_size=shard_size)


def measure(folder: Path, rounds: int, threads: int) -> Iterator[Row]:
    """One row for each load; a round that is not counted warms the caches first."""
    shuffle = random.Random(0)  # noqa: S311, not a secret
    cases = [(layout, dtype, peer) for layout in LAYOUTS for dtype in DTYPES for peer in PEERS]
    for number in range(rounds + 1):
        shuffle.shuffle(cases)
        for layout, dtype, peer in cases:
            result = in_fresh_process(peer, folder / layout, dtype, threads)
            if number:
                yield {
                    "round": number,
                    "layout": layout,
                    "dtype": dtype,
                    "peer": peer,
                    **result,
                    "load": load_average(),
                }


def in_fresh_process(peer: str, folder: Path, dtype: str, threads: int) -> Row:
    """Loads in a new interpreter; an error's name is the result where it fails."""
    command = [sys.executable, __file__, "--load", peer, str(folder), dtype.partition(",")[0]]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1].partition(":")[0]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def load_once(peer: str, folder: str, dtype: str) -> Row:
    """Seconds and memory of one load; what is imported on the way has been imported before."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    model_class = class_of(peer)
    before = memory()
    with AnonymousPeak() as anonymous:
        start = time.perf_counter()
        model = model_class.from_pretrained(folder, dtype=getattr(torch, dtype))
        seconds = time.perf_counter() - start
    after = memory()
    return {
        "seconds": seconds,
        "peak_bytes": after["VmHWM"] - before["VmRSS"],
        "anonymous_peak_bytes": anonymous.peak - before["RssAnon"],
        "kept_bytes": sum(p.nbytes for p in model.parameters()),
    }


def class_of(peer: str) -> type:
    """The class whose `from_pretrained` is measured."""
    if peer == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM
    if peer == "vhead":
        from vhead import AutoModelForCausalLMWithValueHead

        return AutoModelForCausalLMWithValueHead
    from trl.experimental.ppo import AutoModelForCausalLMWithValueHead as TrlModel

    return TrlModel


def memory() -> dict[str, int]:
    """This process' memory in bytes: now resident, the most that was, and the part that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")}


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
            self.peak = max(self.peak, memory()["RssAnon"])
            if self._stop.wait(0.002):
                return


def uncommitted() -> bool:
    """Whether what was measured is not what the commit says."""
    command = ["git", "status", "--porcelain", "--", *SOURCES, "benchmarks/loading.py"]
    return bool(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip())


def report(source: Row, rows: list[Row]) -> Iterator[str]:
    """The medians, and the goal."""
    yield "<!-- Written by benchmarks/loading.py from loading.json. -->"
    yield (
        f"{source['cpu']}, {source['cores']} cores, {source['torch_threads']} threads; torch {source['torch']}, "
        f"transformers {source['transformers']}, trl {source['trl']}, Python {source['python']}; "
        f"commit {str(source['commit'])[:12]}{' with uncommitted sources' if source['uncommitted_sources'] else ''}, "
        f"{source['date']}; {source['rounds']} rounds; "
        f"load average {source['load_before']:.1f} before, {source['load_after']:.1f} after."
    )
    yield from ("", "| figure | goal | measured | reached |", "|---|---|---|---|")
    for layout, dtype in CASES:
        for name, field in (("time", "seconds"), ("peak extra memory", "peak_bytes")):
            ratio = median(rows, layout, dtype, "vhead", field) / median(rows, layout, dtype, "transformers", field)
            reached = "yes" if ratio <= GOAL else "**no**"
            yield f"| {layout}, {dtype}: {name} over transformers | ≤ {GOAL}× | {ratio:.3f}× | {reached} |"
    yield from ("", "| median | dtype | peer | seconds | peak, GB | of it not backed by a file, GB |", "|---" * 6 + "|")
    for layout, dtype in CASES:
        for peer in PEERS:
            yield f"| {layout} | {dtype} | {peer} | {cells(rows, layout, dtype, peer)} |"


def cells(rows: list[Row], *case: str) -> str:
    """The medians of one peer in one case, or the error that it ended with."""
    errors = {str(row["error"]) for row in of(rows, *case) if "error" in row}
    if errors:
        return f"{', '.join(sorted(errors))} | | "
    seconds = median(rows, *case, "seconds")
    peaks = [median(rows, *case, field) / 1e9 for field in ("peak_bytes", "anonymous_peak_bytes")]
    return f"{seconds:.2f} | {peaks[0]:.2f} | {peaks[1]:.2f}"


def of(rows: list[Row], *case: str) -> list[Row]:
    """The loads of one peer in one case: layout, dtype, peer."""
    return [row for row in rows if (row["layout"], row["dtype"], row["peer"]) == case]


def median(rows: list[Row], layout: str, dtype: str, peer: str, field: str) -> float:
    """The median of a figure over the rounds."""
    return statistics.median(float(row[field]) for row in of(rows, layout, dtype, peer))


if __name__ == "__main__":
    main()
