"""Measures log-probabilities and entropies from hidden states against bare products, torch and TRL: see README.md.

TRL's function came with trl 1.16, which has no value head any more and is not this project's dependency. Where another
trl's files lie in a folder, `--trl FOLDER` loads that one module from there:

    pip download --no-deps --dest /tmp/trl trl==1.16.0 && unzip -q /tmp/trl/trl-1.16.0-*.whl -d /tmp/trl
    .venv/bin/python benchmarks/token_statistics.py --trl /tmp/trl
"""

import argparse
import importlib.util
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measure import load_average, provenance
from torch import Tensor

from vhead import ops

RESULTS = Path(__file__).parent / "results" / "token-statistics.json"
ROWS, COLUMNS, VOCABULARY = 2343, 896, 151_936
TRL_MODULE = Path("trl", "kernels", "chunked_logprob.py")
TRL_COLUMNS = 8192
# Tiles of the bare products; the fastest is the limit.
GEMM_TILES = ((ROWS, 8192), (ROWS, 4096), (ROWS, 2048), (1172, 1024))
SPEED_GOAL, LIMIT_GOAL, MEMORY_GOAL_MIB = 1.7, 1.2, 64

Row = dict[str, object]
Outcome = tuple[Tensor, Tensor]
Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Hidden states [N, H], an lm_head [V, H] and targets [N], random."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor

    @classmethod
    def draw(cls, dtype: torch.dtype, rows: int = ROWS, vocabulary: int = VOCABULARY) -> "Case":
        """Logits of about unit variance."""
        torch.manual_seed(0)
        weight = (torch.randn(vocabulary, COLUMNS) / COLUMNS**0.5).to(dtype)
        return cls(torch.randn(rows, COLUMNS).to(dtype), weight, torch.randint(vocabulary, (rows,)))


def gemm(tile: tuple[int, int], case: Case) -> None:
    """All products, a tile at a time into one buffer, and nothing done with them."""
    rows, columns = tile
    buffer = torch.empty(rows * columns, dtype=case.hidden.dtype)
    for part in case.weight.split(columns):
        for hidden in case.hidden.split(rows):
            size = (len(hidden), len(part))
            torch.mm(hidden, part.t(), out=buffer[: size[0] * size[1]].view(size))


def naive(case: Case) -> Outcome:
    """All logits at once."""
    logp = torch.log_softmax((case.hidden @ case.weight.t()).float(), -1)
    return logp.gather(-1, case.targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def torch_chunked(case: Case) -> Outcome:
    """An online softmax over chunks of the vocabulary, in torch operations."""
    rows = len(case.hidden)
    peak, total, weighted = torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows)
    target = torch.zeros(rows)
    for start in range(0, len(case.weight), TRL_COLUMNS):
        z = (case.hidden @ case.weight[start : start + TRL_COLUMNS].t()).float()
        place = case.targets - start
        inside = (place >= 0) & (place < z.shape[1])
        found = z.gather(-1, place.clamp(0, z.shape[1] - 1)[:, None]).squeeze(-1)
        target = torch.where(inside, found, target)
        new = torch.maximum(peak, z.amax(-1))
        factor, e = (peak - new).exp(), (z - new[:, None]).exp()
        total, weighted = total * factor + e.sum(-1), weighted * factor + (e * z).sum(-1)
        peak = new
    log_total = peak + total.log()
    return target - log_total, log_total - weighted / total


def trl_chunked(folder: Path) -> Callable[[Case], Outcome]:
    """TRL's function, from the module in `folder` alone."""
    spec = importlib.util.spec_from_file_location("trl_chunked_logprob", folder / TRL_MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(case: Case) -> Outcome:
        arguments = (case.hidden, case.weight, None, case.targets, 1.0, TRL_COLUMNS, None, 1.0, ("entropy",))
        return module.ChunkedLogProbFunction.apply(*arguments)[:2]

    return run


def ours(case: Case, **arguments: object) -> Outcome:
    """This package's."""
    return ops.token_logprobs(case.hidden, case.weight, case.targets, **arguments)


def peers(trl: Path | None) -> dict[str, Callable[[Case], Outcome]]:
    """Everyone who computes the statistics."""
    theirs = {"trl": trl_chunked(trl)} if trl else {}
    invariant = partial(ours, batch_invariant=True)
    return {
        "vhead": ours,
        "vhead, batch invariant": invariant,
        **theirs,
        "torch chunked": torch_chunked,
        "naive": naive,
    }


def time_all(trl: Path | None, dtype: torch.dtype, rounds: int, threads: int) -> list[Row]:
    """Everyone in turns, and the bare products in float32 tiles of several shapes."""
    torch.set_num_threads(threads)
    case = Case.draw(dtype)
    products = Case(case.hidden.float(), case.weight.float(), case.targets)
    works: dict[str, Work] = {f"products {r} x {c}": partial(gemm, (r, c), products) for r, c in GEMM_TILES}
    works |= {name: partial(run, case) for name, run in peers(trl).items()}
    before = load_average()
    with torch.no_grad():
        times = interleaved(works, rounds)
    about = {"dtype": _name(dtype), "load_before": before, "load_after": load_average()}
    return [{"implementation": name, **seconds, **about} for name, seconds in times.items()]


def interleaved(works: dict[str, Work], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds on the clock and on the processors of each call, one call a round and one before that is left out.

    Processor time is what a loaded machine leaves of the comparison: other processes' turns are not in it.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "processor_seconds": []} for name in works}
    order, shuffle = list(works), random.Random(0)  # noqa: S311, not a secret
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            wall, processor = time.perf_counter(), time.process_time()
            works[name]()
            if number:
                times[name]["seconds"].append(time.perf_counter() - wall)
                times[name]["processor_seconds"].append(time.process_time() - processor)
    return times


def memory(trl: Path | None, name: str, threads: int) -> Row:
    """Most memory that a call needs beyond its arguments, in a process of its own."""
    torch.set_num_threads(threads)
    run = peers(trl)[name]
    with torch.no_grad():
        run(Case.draw(torch.float32, 8, 2048))  # loads the libraries' own tables
        case = Case.draw(torch.float32)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
        run(case)
        return {"implementation": name, "mib": (_status_kib("VmHWM") - before) / 1024}


def errors(trl: Path | None, threads: int) -> list[Row]:
    """Root-mean-square differences from float64, on fewer rows."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        case = Case.draw(dtype, 128)
        double = Case(case.hidden.double(), case.weight.double(), case.targets)
        exact = ops.token_statistics_plain(double.hidden, double.weight, double.targets)
        for name, run in peers(trl).items():
            with torch.no_grad():
                logprobs, entropy = run(case)
            of = [
                (mine - true).square().mean().sqrt().item()
                for mine, true in zip((logprobs, entropy), exact, strict=False)
            ]
            rows.append({"dtype": _name(dtype), "implementation": name, "logprobs": of[0], "entropy": of[1]})
    return rows


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Times, memory and errors; each memory figure from a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    shape = [ROWS, COLUMNS, VOCABULARY]
    document: dict[str, object] = {"provenance": provenance(options.threads, options.rounds) | {"shape": shape}}
    dtypes = (torch.float32, torch.bfloat16) if options.half else (torch.float32,)
    document["times"] = [r for d in dtypes for r in time_all(options.trl, d, options.rounds, options.threads)]
    document["memory"] = []
    for name in peers(options.trl):
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
            document["memory"].append(process.submit(memory, options.trl, name, options.threads).result())
    document["errors"] = errors(options.trl, options.threads)
    return document


# --- Report ----------------------------------------------------------------------------------------------------------


def report(document: dict[str, object]) -> Iterator[str]:
    """The goals, and every figure."""
    p = document["provenance"]
    loads = [row[key] for row in document["times"] for key in ("load_before", "load_after")]
    yield (
        f"{p['cpu']}, {p['cores']} cores, {p['torch_threads']} threads; torch {p['torch']}, Python {p['python']}; "
        f"commit {p['commit'][:12]}{' with uncommitted sources' if p['uncommitted_sources'] else ''}, {p['date']}; "
        f"{p['rounds']} rounds; load average {min(loads):.1f} to {max(loads):.1f}. [N, H] x V = {p['shape']}."
    )
    yield from ("", "| figure, float32 | goal | measured | reached |", "|---|---|---|---|")
    yield from goals(document)
    yield from (
        "",
        "| | dtype | median s | over the products | of processor time | memory MiB |",
        "|---|---|---|---|---|---|",
    )
    memory_of = {row["implementation"]: row["mib"] for row in document["memory"]}
    for row in document["times"]:
        over = (f"{over_products(document, row, clock):.2f}x" for clock in ("seconds", "processor_seconds"))
        mib = memory_of.get(row["implementation"]) if row["dtype"] == "float32" else None
        cells = (row["implementation"], row["dtype"], f"{statistics.median(row['seconds']):.2f}", *over)
        yield f"| {' | '.join(cells)} | {'' if mib is None else f'{mib:.0f}'} |"
    yield from ("", "| rms error against float64 | dtype | log-probability | entropy |", "|---|---|---|---|")
    for row in document["errors"]:
        yield f"| {row['implementation']} | {row['dtype']} | {row['logprobs']:.1e} | {row['entropy']:.1e} |"


def goals(document: dict[str, object]) -> Iterator[str]:
    """Each goal and what was measured."""
    rows = {r["implementation"]: r for r in document["times"] if r["dtype"] == "float32"}
    for clock, of in (("seconds", "time"), ("processor_seconds", "processor time")):
        over = over_products(document, rows["vhead"], clock)
        name = f"{of} over the fastest bare products"
        yield goal(name, f"<= {LIMIT_GOAL}x", f"{over:.2f}x", reached=over <= LIMIT_GOAL)
        if "trl" in rows:
            speed = ratio(rows["trl"][clock], rows["vhead"][clock])
            name = f"speed over TRL 1.16's function, by {of}"
            yield goal(name, f">= {SPEED_GOAL}x", f"{speed:.2f}x", reached=speed >= SPEED_GOAL)
    mib = next(r["mib"] for r in document["memory"] if r["implementation"] == "vhead")
    yield goal("memory", f"<= {MEMORY_GOAL_MIB} MiB", f"{mib:.0f} MiB", reached=mib <= MEMORY_GOAL_MIB)


def goal(name: str, wanted: str, measured: str, *, reached: bool) -> str:
    """One line."""
    return f"| {name} | {wanted} | {measured} | {'yes' if reached else '**no**'} |"


def over_products(document: dict[str, object], row: Row, clock: str) -> float:
    """A contestant's time over that of the bare products in the tile that was fastest."""
    rows = [r for r in document["times"] if r["dtype"] == row["dtype"] and r["implementation"].startswith("products")]
    return ratio(row[clock], min((r[clock] for r in rows), key=statistics.median))


def ratio(mine: list[float], other: list[float]) -> float:
    """The median over rounds: what slows a round down slows all of it."""
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


def main() -> None:
    """Measures and writes data and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", type=Path, help="folder with the files of trl >= 1.16")
    parser.add_argument("--half", action=argparse.BooleanOptionalAction, default=True, help="measure bfloat16 too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    document = measure(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    heading = f"<!-- Written by benchmarks/token_statistics.py beside {options.output.name}. -->"
    options.output.with_suffix(".md").write_text("\n".join((heading, *report(document))) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
