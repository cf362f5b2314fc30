"""Measures the scorer, and writes figures and their page.

    python benchmarks/scoring.py peers      # against vLLM, TRL's loop, and the machine
    python benchmarks/scoring.py ablations  # with its mechanisms off, one at a time
    python benchmarks/scoring.py peaks      # peak memory
    python benchmarks/scoring.py context    # what a visible pair of tokens costs as rollouts get longer
    python benchmarks/scoring.py overhead   # what it adds to the language model, on a model small enough to show it
    python benchmarks/scoring.py growth     # what a token costs as rollouts, vocabulary, sharing and lengths grow
    python benchmarks/scoring.py scale      # the memory of a process that scores a million rollouts

README.md here says what each does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import contestants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scoring_pages
import tables
import torch
from contestants import ALL_FIELDS, REWARD, VALUES, Contestant, ModelOnly, Score, VllmScore
from measure import Figures, add_options, extra_bytes, in_fresh_process, memory
from transformers import PreTrainedModel
from workloads import AXES, BASE, WORKLOADS, as_ids, short, sizes, small_llama, texts

from vhead import AutoModelForCausalLMWithValueHead, Rollout, Scorer
from vhead.benchmark.document import Row
from vhead.benchmark.timing import Work, clocked, load_average, turns
from vhead.cli.app import app
from vhead.demo import demo_model_path

LABELS = {VALUES: "values", ALL_FIELDS: "all fields", REWARD: "reward alone"}
# What is asked for in the measurements on the demo model.
DEMO_FIELDS = ("values", "logprobs", "reward")


# --- Against others, and with mechanisms off -------------------------------------------------------------------------

MEASURED_MEMORY = ("vhead", "sorted batches", "batch-invariant", "trl")


def peers(options: argparse.Namespace) -> None:
    """Time of the scorer, of what a user would take instead, and of the matrix products alone."""
    figures = _figures(options, "scoring")
    rows = WORKLOADS[options.workload].padded_rows
    figures.add("times", turns_taken(options, contestants.peers(rows, options.vllm_python), figures))
    _close(figures, scoring_pages.peers, options)


def ablations(options: argparse.Namespace) -> None:
    """Time of the scorer, as it is and with one mechanism off."""
    figures = _figures(options, "scoring-ablations")
    figures.add("times", turns_taken(options, contestants.ablations(), figures))
    _close(figures, scoring_pages.ablations, options)


def peaks(options: argparse.Namespace) -> None:
    """Peak memory of some contestants, each in a process of its own; other programs do not change it."""
    figures = _figures(options, "scoring-memory")
    figures.add("memory", _peak_rows(options))
    _close(figures, scoring_pages.peaks, options)


def _figures(options: argparse.Namespace, name: str) -> Figures:
    """With the workload's usual counts where others were not asked for, and a file for each workload and dtype."""
    workload = WORKLOADS[options.workload]
    for count in ("layers", "prompts", "completions"):
        if getattr(options, count) is None:
            setattr(options, count, getattr(workload, count))
    if options.output is None:
        options.output = tables.RESULTS / f"{name}-{options.workload}-{options.dtype}.json"
    about = {"dtype": options.dtype, "kind": options.workload, "model": workload.described, "layers": options.layers}
    return Figures(options, **about, padded_rows=workload.padded_rows, workload=sizes(_rollouts(options)))


def _close(figures: Figures, page: tables.Page, options: argparse.Namespace) -> None:
    figures.close(page)
    print(options.output.with_suffix(".md").read_text())


def _model_and_rollouts(options: argparse.Namespace) -> tuple[PreTrainedModel, list[Rollout]]:
    torch.set_num_threads(options.threads)
    body = WORKLOADS[options.workload].model(options.layers)
    return body.to(getattr(torch, options.dtype)), _rollouts(options)


def _rollouts(options: argparse.Namespace) -> list[Rollout]:
    return WORKLOADS[options.workload].rollouts(options.prompts, options.completions)


def _chosen(options: argparse.Namespace, found: Iterable[Contestant]) -> list[Contestant]:
    """Those that were asked for, or all.

    Raises:
        SystemExit: There is none of such a name.
    """
    by_name = {each.name: each for each in found}
    unknown = [name for name in options.contestants if name not in by_name]
    if unknown:
        raise SystemExit(f"--contestants: expected some of {', '.join(map(repr, by_name))}, got {unknown[0]!r}")
    return [by_name[name] for name in options.contestants or by_name]


def turns_taken(options: argparse.Namespace, found: Iterable[Contestant], figures: Figures) -> Iterator[Row]:
    """Wall and processor seconds of every contestant on every set of fields, which take turns."""
    chosen = _chosen(options, found)
    body, rollouts = _model_and_rollouts(options)
    made = {each.name: each.make(body, rollouts) for each in chosen}
    for score in made.values():
        if isinstance(score, VllmScore):
            figures.put("agreement", score.agreement)
    asked = [(each, fields) for each in chosen for fields in each.fields]
    for number, (each, fields) in turns(asked, options.rounds):
        if not each.slow or number < options.slow_rounds:
            before = load_average()
            row = {"round": number, "contestant": each.name, "fields": LABELS[fields]}
            row |= _clocked(made[each.name], fields)
            print(f"round {number}, {each.name}, {LABELS[fields]}: {row['wall_s']:.2f} s", flush=True)
            yield row | {"load_before": before, "load_after": load_average()}


def _clocked(score: Score, fields: tuple[str, ...]) -> Row:
    return score.clocked() if isinstance(score, VllmScore) else clocked(partial(score, fields))


def _peak_rows(options: argparse.Namespace) -> Iterator[Row]:
    asked = _chosen(options, _memory_contestants(options).values())
    for name, fields in [(each.name, fields) for each in asked for fields in each.fields]:
        extra = in_fresh_process(_memory_of, name, fields, options)
        print(f"{name}, {LABELS[fields]}: {extra / 2**20:.0f} MiB", flush=True)
        yield {"contestant": name, "fields": LABELS[fields], "extra_bytes": extra}


def _memory_contestants(options: argparse.Namespace) -> dict[str, Contestant]:
    found = (*contestants.ablations(), *contestants.peers(WORKLOADS[options.workload].padded_rows))
    return {each.name: each for each in found if each.name in MEASURED_MEMORY}


def _memory_of(name: str, fields: tuple[str, ...], options: argparse.Namespace) -> int:
    body, rollouts = _model_and_rollouts(options)
    score = _memory_contestants(options)[name].make(body, rollouts)
    # Every weight is touched, as pages of a model that was never run would count for its first user.
    for parameter in body.parameters():
        parameter.detach().sum()
    return extra_bytes(partial(score, fields))


CONTEXTS = (1024, 2048, 4096, 8192, 16_384)


def context(options: argparse.Namespace) -> None:
    """The cost of a visible pair of tokens, in attention alone, as rollouts get longer."""
    torch.set_num_threads(options.threads)
    figures = Figures(options)
    figures.add("times", _context_times(options))
    _close(figures, scoring_pages.context, options)


def _context_times(options: argparse.Namespace) -> Iterator[Row]:
    cases = [(dtype, tokens) for dtype in ("bfloat16", "float32") for tokens in CONTEXTS]
    works = {case: contestants.attention(case[1], getattr(torch, case[0])) for case in cases}
    for number, (dtype, tokens) in turns(cases, options.rounds):
        # Short ones as often as takes as long as a long one.
        times = max(1, (8192 // tokens) ** 2)
        before, seconds = load_average(), clocked(partial(_repeat, works[dtype, tokens], times))
        pairs = times * tokens * (tokens + 1) // 2
        print(f"round {number}, {dtype}, {tokens} tokens: {seconds['wall_s']:.2f} s", flush=True)
        row = {"round": number, "dtype": dtype, "tokens": tokens, "pairs": pairs, **seconds}
        yield row | {"load_before": before, "load_after": load_average()}


def _repeat(work: Work, times: int) -> None:
    for _ in range(times):
        work()


# --- What is added to the model --------------------------------------------------------------------------------------


def overhead(options: argparse.Namespace) -> None:
    """Times of the demo model alone, of the scorer around it, and of the command around that."""
    torch.set_num_threads(options.threads)
    scorer = _demo_scorer(options)
    rollouts = texts(options.prompts, options.completions)
    model = ModelOnly(scorer, [as_ids(rollout) for rollout in rollouts], DEMO_FIELDS)
    workload = {
        "rollouts": len(rollouts),
        "tokens": sum(len(r.prompt.encode()) + len(r.completion.encode()) for r in rollouts),
        "computed_tokens": model.tokens,
        "completion_tokens": sum(len(r.completion.encode()) for r in rollouts),
        "batches": model.batches,
    }
    with tempfile.TemporaryDirectory() as folder:
        works = _overhead_works(scorer, model, rollouts, Path(folder), options)
        if options.only:  # For profiling: nothing is written.
            list(_overhead_times({name: work for name, work in works.items() if options.only in name}, options))
            return
        figures = Figures(options, fields=DEMO_FIELDS, workload=workload)
        figures.add("times", _overhead_times(works, options))
    figures.close(scoring_pages.overhead)


def _demo_scorer(options: argparse.Namespace) -> Scorer:
    return Scorer.from_pretrained(demo_model_path(), device="cpu", num_threads=options.threads)


def _overhead_times(works: dict[str, Work], options: argparse.Namespace) -> Iterator[Row]:
    for number, name in turns(works, options.rounds):
        row = {"round": number, "contestant": name, **clocked(works[name])}
        print(f"round {number}, {name}: {row['wall_s']:.2f} s, {row['processor_s']:.2f} s", flush=True)
        yield row


def _overhead_works(
    scorer: Scorer, model: ModelOnly, rollouts: list[Rollout], folder: Path, options: argparse.Namespace
) -> dict[str, Work]:
    ids = [as_ids(rollout) for rollout in rollouts]
    jsonl, parquet = folder / "text.jsonl", folder / "ids.parquet"
    jsonl.write_text("".join(json.dumps({"prompt": r.prompt, "completion": r.completion}) + "\n" for r in rollouts))
    write_parquet(parquet, ids)
    return {
        "model": model.as_scored,
        "model, own attention": model.own_forward,
        "stream of ids": lambda: sum(1 for _ in scorer.stream(ids, DEMO_FIELDS)),
        "stream of text": lambda: sum(1 for _ in scorer.stream(rollouts, DEMO_FIELDS)),
        "text to Arrow": lambda: [chunk.to_arrow() for chunk in scorer.chunks(rollouts, DEMO_FIELDS)],
        # As a whole: the model's loading and self-check are in it, the start of Python is not.
        "command, text in JSON Lines": partial(app, command(jsonl, options.threads), standalone_mode=False),
        "command, ids in Parquet": partial(app, command(parquet, options.threads), standalone_mode=False),
    }


def command(source: Path, threads: int) -> list[str]:
    """`vhead score`, to a file of the same kind: what follows `vhead` on the command line."""
    options = ["--model", demo_model_path(), "--output", _scores_of(source), "--overwrite", "--quiet"]
    options += ["--returns", ",".join(DEMO_FIELDS), "--device", "cpu", "--num-threads", threads]
    return ["score", *map(str, [source, *options])]


def _scores_of(source: Path) -> Path:
    return source.with_stem("scores")


def write_parquet(path: Path, rollouts: Iterable[Rollout]) -> None:
    """The rollouts as a file, a group of rows at a time."""
    schema = pa.schema({"id": pa.int64(), "prompt_ids": pa.list_(pa.int32()), "completion_ids": pa.list_(pa.int32())})
    source = enumerate(rollouts)
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(source, 20_000)):
            columns = [[at for at, _ in group], [r.prompt for _, r in group], [r.completion for _, r in group]]
            writer.write_table(pa.table(columns, schema=schema))


# --- As something grows ----------------------------------------------------------------------------------------------


def growth(options: argparse.Namespace) -> None:
    """The cost of a token at every place of every axis."""
    figures = Figures(options, base=asdict(BASE))
    figures.add("times", _growth_times(options))
    figures.close(scoring_pages.growth)


def _growth_times(options: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(options.threads)
    cases = [
        (axis, at, grid, fields)
        for axis, grids in AXES.items()
        for at, grid in grids.items()
        for fields in (VALUES, ALL_FIELDS)
    ]
    scorers = {
        size: Scorer(AutoModelForCausalLMWithValueHead(small_llama(size)).eval(), num_threads=options.threads)
        for size in sorted({grid.vocabulary for _, _, grid, _ in cases})
    }
    for number, (axis, at, grid, fields) in turns(cases, options.rounds):
        seconds = clocked(partial(scorers[grid.vocabulary].score, grid.rollouts(), fields))
        yield {"round": number, "axis": axis, "at": at, "fields": LABELS[fields], "tokens": grid.tokens, **seconds}


# --- Long runs -------------------------------------------------------------------------------------------------------

GROUP, PROMPT, COMPLETION = 8, 12, 8
# What is made once, such as torch's buffers, is there after this part of the run.
WARM_UP = 0.1

Sample = dict[str, float]


def scale(options: argparse.Namespace) -> None:
    """Resident memory along a long stream in a process, and of `vhead score` on a long file."""
    workload = {"prompt": PROMPT, "completions": GROUP, "completion": [2, COMPLETION]}
    figures = Figures(options, fields=DEMO_FIELDS, workload=workload)
    runs = {"stream": (streamed, options.rollouts), "command": (commanded, options.parquet_rows)}
    for name, (run, asked) in runs.items():
        for samples in run(asked, options) if asked else ():
            figures.put(name, {"asked": asked, **slope(samples), "samples": samples})
        if asked:
            print(f"{name}: " + ", ".join(f"{key} {value:,.1f}" for key, value in slope(samples).items()), flush=True)
    figures.close(scoring_pages.scale)


class Samples:
    """How far a run has come, and how much memory its process holds, once a second."""

    def __init__(self, process: int) -> None:
        self.rows: list[Sample] = []
        self._process = process
        self._started = time.perf_counter()

    def take(self, rollouts: Callable[[], int], *, now: bool = False) -> bool:
        """One more, where it is time for it and the process is still there."""
        elapsed = time.perf_counter() - self._started
        if (elapsed < len(self.rows) and not now) or not (resident := memory("VmRSS", self._process)):
            return False
        # After the command's name, which is in brackets, come fields 3 and later; 14 and 15 are clock ticks.
        fields = Path(f"/proc/{self._process}/stat").read_text().rpartition(")")[2].split()
        processor = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        sample = {"rollouts": rollouts(), "wall_s": elapsed, "processor_s": processor, "rss_bytes": resident}
        self.rows.append(sample)
        return True


def slope(samples: list[Sample]) -> dict[str, float]:
    """The line through resident memory after the warm-up, and the rate of the whole run."""
    last = samples[-1]
    # At the end a file is put together, which is not what grows with its length.
    settled = [row for row in samples if WARM_UP * last["rollouts"] <= row["rollouts"] < last["rollouts"]] or samples
    progress = np.array([row["rollouts"] for row in settled])
    resident = np.array([row["rss_bytes"] for row in settled]) / 2**20
    rise = float(np.polyfit(progress, resident, 1)[0]) if np.ptp(progress) else 0.0
    return {
        "mib_per_million_rollouts": rise * 1e6,
        "mib_at_first": float(resident[0]),
        "mib_at_last": float(resident[-1]),
        "mib_at_most": max(row["rss_bytes"] for row in samples) / 2**20,
        "rollouts_per_s": last["rollouts"] / last["wall_s"],
        "wall_s": last["wall_s"],
    }


def streamed(asked: int, options: argparse.Namespace) -> Iterator[list[Sample]]:
    """`Scorer.stream` over rollouts that are made as they are read; the samples so far, again and again."""
    torch.set_num_threads(options.threads)
    scorer = _demo_scorer(options)
    samples = Samples(os.getpid())
    for score in scorer.stream(short(asked, GROUP, PROMPT, COMPLETION), DEMO_FIELDS):
        done = score.index + 1
        if samples.take(lambda done=done: done, now=done == asked):
            yield samples.rows


def commanded(asked: int, options: argparse.Namespace) -> Iterator[list[Sample]]:
    """`vhead score` from Parquet to Parquet in a process of its own; how far it is, it notes beside its output."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rollouts.parquet"
        journal = source.with_name(f".{_scores_of(source).name}.journal")
        write_parquet(source, short(asked, GROUP, PROMPT, COMPLETION))
        with subprocess.Popen([sys.executable, "-m", "vhead", *command(source, options.threads)]) as process:
            samples = Samples(process.pid)
            while process.poll() is None:
                if samples.take(lambda: json.loads(journal.read_text())["records"] if journal.exists() else 0):
                    yield samples.rows
                time.sleep(0.05)
        if process.returncode or pq.read_metadata(_scores_of(source)).num_rows != asked:
            raise RuntimeError(f"vhead score ended with {process.returncode}")
        samples.rows[-1]["rollouts"] = asked
        yield samples.rows


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    # With the counts that each has, and what they usually are.
    for measurement, name, counts in (
        (peers, None, {"rounds": 3, "slow_rounds": 1}),
        (ablations, None, {"rounds": 3, "slow_rounds": 1}),
        (peaks, None, {}),
        (context, "scoring-context", {"rounds": 3}),
        (overhead, "scoring-overhead", {"rounds": 5, "prompts": 512, "completions": 8}),
        (growth, "scoring-growth", {"rounds": 3}),
        (scale, "scoring-scale", {"rollouts": 1_000_000, "parquet_rows": 200_000}),
    ):
        subcommand = commands.add_parser(measurement.__name__, help=measurement.__doc__)
        add_options(subcommand, name, **counts)
        subcommand.set_defaults(measure=measurement)
        if name is None:
            _add_workload(subcommand)
        if measurement is peers:
            told = os.environ.get("VLLM_PYTHON")
            help_ = "an interpreter that has vLLM; else what VLLM_PYTHON says; without either, vLLM is left out"
            subcommand.add_argument("--vllm-python", type=Path, default=told and Path(told), help=help_)
        if measurement is overhead:
            subcommand.add_argument("--only", default="", help="contestants of such names, and nothing is written")
    options = parser.parse_args()
    options.measure(options)


def _add_workload(subcommand: argparse.ArgumentParser) -> None:
    """Model and rollouts, whose counts are the workload's unless given; where to write follows from both."""
    subcommand.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    subcommand.add_argument("--workload", choices=list(WORKLOADS), default="group")
    subcommand.add_argument("--contestants", nargs="+", default=(), metavar="NAME", help="these alone; else all")
    for count in ("layers", "prompts", "completions"):
        subcommand.add_argument(f"--{count}", type=int)


if __name__ == "__main__":
    _main()
