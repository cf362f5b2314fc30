"""Writes a page of tables beside figures: the goals that this project set itself, and what was measured.

    python benchmarks/report.py [DATA ...]

Without DATA, the pages of everything in results/. A file's name begins with what it is about, as the names there do;
any other file is taken for one of `vhead bench`. The measuring scripts write their pages themselves.
"""

import argparse
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import scoring_pages as scoring
from results import HeadFigures, median, ratio, select
from tables import GOALS, MEASURES, RESULTS, Data, Page, at_least, at_most, judged, source, table, write

from vhead.benchmark.document import Row

# --- The head --------------------------------------------------------------------------------------------------------

SHAPE = (8192, 2048)
DTYPES = ("float32", "bfloat16", "float16")
INFERENCE_GOALS = {"float32": 1.0, "bfloat16": 20.0, "float16": 20.0}
TRAINING_GOALS = {"float32": 12.0, "bfloat16": 20.0}
COLUMNS = ("trl", "torch", "vhead", "vhead.ops", "linear", "read")
DROPOUTS = (0.0, 0.1)
QUANTITIES = ("values", "grad_hidden", "grad_weight", "grad_bias")


def head(data: Data) -> Iterator[str]:
    """One run of `head.py` or `vhead bench`: a section for all that it has."""
    figures = HeadFigures(**data)
    yield source(figures.provenance)
    for section in (_bits, _head_goals, _head_times, _head_errors):
        lines = list(section(figures))
        yield from ("", *lines) if lines else ()


def _bits(figures: HeadFigures) -> Iterator[str]:
    if figures.comparisons:
        yield from table("| compared with the CPU | dtype | cases | numbers | that differ |")
    for row in figures.comparisons:
        yield f"| {row['what']} | {row['dtype']} | {row['cases']:,} | {row['elements']:,} | {row['differing']:,} |"
    for row in figures.checks:
        yield f"\n{row['check']}: {'holds' if row['passed'] else '**does not hold**: ' + row['detail']}."


def _head_goals(figures: HeadFigures) -> Iterator[str]:
    # Only where TRL's head and the goals' shape are among what was measured.
    rows = [*_speed_goals(figures), *_training_goals(figures), *_accuracy_goals(figures)]
    if rows:
        yield from (*GOALS, *rows)


def _speed_goals(figures: HeadFigures) -> Iterator[str]:
    for dtype in DTYPES:
        t = figures.milliseconds("inference", SHAPE, dtype)
        if {"trl", "vhead", "read"} <= set(t):
            yield at_least(f"inference {dtype}: speed over TRL", INFERENCE_GOALS[dtype], t["trl"] / t["vhead"])
            yield at_most(f"inference {dtype}: time over a reading pass", 1.3, t["vhead"] / t["read"])
    for dtype, goal in TRAINING_GOALS.items():
        t = figures.milliseconds("training", SHAPE, dtype)
        if {"trl", "vhead"} <= set(t):
            yield at_least(f"training {dtype}, dropout 0.1: speed over TRL", goal, t["trl"] / t["vhead"])


def _training_goals(figures: HeadFigures) -> Iterator[str]:
    for dtype in DTYPES:
        kept = figures.kept(SHAPE, dtype)
        if {"trl", "vhead"} <= set(kept):
            name = f"training {dtype}: bytes kept beyond the hidden states (TRL: {kept['trl']:,})"
            yield at_most(name, 8, kept["vhead"], " bytes, a seed")
    call = figures.milliseconds("call", (4, 16), "float32")
    if call:
        added = (call["vhead.ops"] - call["linear"]) * 1e3
        yield at_most("`ops.value_head` on [4, 16]: added to a call of `F.linear`", 3.0, added, " µs")


def _accuracy_goals(figures: HeadFigures) -> Iterator[str]:
    measures = {"max_error": "largest", "rms_error": "root mean square"}
    for what, (measure, name) in product(QUANTITIES, measures.items()) if figures.errors else ():
        errors = [figures.worst(dtype, dropout, what, measure) for dtype, dropout in product(DTYPES, DROPOUTS)]
        worst = max(each["vhead"] / each["trl"] for each in errors)
        yield at_most(f"{what}: {name} error over TRL's, worst case", 1.0, worst)


def _head_times(figures: HeadFigures) -> Iterator[str]:
    cases = sorted(figures.cases(), key=lambda case: case[:2])
    medians = {case: figures.milliseconds(*case) for case in cases}
    found = dict.fromkeys(name for times in medians.values() for name in times)
    names = sorted(found, key=lambda name: COLUMNS.index(name) if name in COLUMNS else len(COLUMNS))
    yield from table(f"| median, ms | hidden | dtype | {' | '.join(names)} |")
    for (mode, shape, dtype), times in medians.items():
        cells = " | ".join(f"{times[name]:.3g}" if name in times else "" for name in names)
        yield f"| {mode} | {list(shape)} | {dtype} | {cells} |"


def _head_errors(figures: HeadFigures) -> Iterator[str]:
    if not figures.errors:
        return
    names = ("trl", "torch", "vhead")
    yield from table(f"| error against float64, max (rms) | dtype | dropout | {' | '.join(names)} |")
    for what, dtype, dropout in product(QUANTITIES, DTYPES, DROPOUTS):
        worst, rms = (figures.worst(dtype, dropout, what, measure) for measure in ("max_error", "rms_error"))
        cells = " | ".join(f"{worst[name]:.2g} ({rms[name]:.2g})" for name in names)
        yield f"| {what} | {dtype} | {dropout:g} | {cells} |"


# --- Everything else -------------------------------------------------------------------------------------------------

LAYOUTS = ("single file", "shards of 500 MB")
LOADED_DTYPES = ("bfloat16, as stored", "float32, converted")
LOADERS = ("transformers", "vhead", "trl")


def loading(data: Data) -> Iterator[str]:
    """`loading.py`."""
    yield from (source(data["provenance"]), "", *GOALS)
    measures = {"time": "seconds", "peak extra memory": "peak_bytes"}
    for layout, dtype, (what, measure) in product(LAYOUTS, LOADED_DTYPES, measures.items()):
        rows = select(data["loads"], layout=layout, dtype=dtype)
        over = median(rows, measure, peer="vhead") / median(rows, measure, peer="transformers")
        name = f"{layout}, {dtype}: {what} over transformers"
        yield judged(name, "≤ 1.05×", f"{over:.3f}×", reached=over <= 1.05)
    yield from ("", *table("| median | dtype | peer | seconds | peak, GB | of it not backed by a file, GB |"))
    for layout, dtype, peer in product(LAYOUTS, LOADED_DTYPES, LOADERS):
        cells = _load_cells(select(data["loads"], layout=layout, dtype=dtype, peer=peer))
        yield f"| {layout} | {dtype} | {peer} | {cells} |"


def _load_cells(rows: list[Row]) -> str:
    errors = {row["error"] for row in rows if "error" in row}
    if errors:
        return f"{', '.join(sorted(errors))} | | "
    peak, anonymous = (median(rows, measure) / 1e9 for measure in ("peak_bytes", "anonymous_peak_bytes"))
    return f"{median(rows, 'seconds'):.2f} | {peak:.2f} | {anonymous:.2f}"


def generation(data: Data) -> Iterator[str]:
    """`generation.py`."""
    yield from (source(data["provenance"]), "")
    yield (
        "8 prompts of 64 tokens, 16 new tokens each, greedy; the shape of Qwen2-0.5B with 12 layers, float32, random "
        "weights."
    )
    yield from ("", *table("| | median, s | beyond plain generation |"))
    for row in data["times"]:
        yield f"| {row['implementation']} | {row['p50_us'] / 1e6:.3f} | {row['added']:+.1%} |"


def token_statistics(data: Data) -> Iterator[str]:
    """`token_statistics.py`."""
    times, p = data["times"], data["provenance"]
    loads = [row[key] for row in times for key in ("load_before", "load_after")]
    load = f"load average {min(loads):.1f} to {max(loads):.1f}"
    yield f"{source(p)} While measuring: {load}. [N, H] x V = {p['shape']}."
    yield from ("", *table("| figure, float32 | goal | measured | reached |"), *_statistics_goals(data))
    yield from ("", *table("| | dtype | median s | over the products | of processor time | memory MiB |"))
    mib = {(row["implementation"], "float32"): f"{row['mib']:.0f}" for row in data["memory"]}
    for row in times:
        name, dtype = row["implementation"], row["dtype"]
        over = " | ".join(f"{_over_products(times, row, clock):.2f}x" for clock in ("seconds", "processor_seconds"))
        yield f"| {name} | {dtype} | {statistics.median(row['seconds']):.2f} | {over} | {mib.get((name, dtype), '')} |"
    yield from ("", *table("| rms error against float64 | dtype | log-probability | entropy |"))
    for row in data["errors"]:
        yield f"| {row['implementation']} | {row['dtype']} | {row['logprobs']:.1e} | {row['entropy']:.1e} |"


def _statistics_goals(data: Data) -> Iterator[str]:
    rows = {row["implementation"]: row for row in select(data["times"], dtype="float32")}
    for clock, of in (("seconds", "time"), ("processor_seconds", "processor time")):
        over = _over_products(data["times"], rows["vhead"], clock)
        yield judged(f"{of} over the fastest bare products", "<= 1.2x", f"{over:.2f}x", reached=over <= 1.2)
        if "trl" in rows:
            faster = _ratio(rows["trl"][clock], rows["vhead"][clock])
            name = f"speed over TRL 1.16's function, by {of}"
            yield judged(name, ">= 1.7x", f"{faster:.2f}x", reached=faster >= 1.7)
        for name, goal in (("vhead, 32 candidates", 1.15), ("vhead, top 8", 1.25)):
            if name in rows:
                over = _ratio(rows[name][clock], rows["vhead"][clock])
                yield judged(f"{of} of {name}, over vhead", f"<= {goal}x", f"{over:.2f}x", reached=over <= goal)
    mib = median(data["memory"], "mib", implementation="vhead")
    yield judged("memory", "<= 64 MiB", f"{mib:.0f} MiB", reached=mib <= 64)


def _over_products(times: list[Row], row: Row, clock: str) -> float:
    # The limit is the tile in which the bare products were fastest.
    products = (r[clock] for r in select(times, dtype=row["dtype"]) if r["implementation"].startswith("products"))
    return _ratio(row[clock], min(products, key=statistics.median))


def _ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def fitting(data: Data) -> Iterator[str]:
    """`fitting.py`."""
    times, p = data["times"], data["provenance"]
    yield f"{source(p)} Prompts with {p['completions']} completions, Qwen2-0.5B's shape with {p['layers']} layers."
    yield from ("", *GOALS)
    for dtype, tokens in dict.fromkeys((row["dtype"], row["tokens"]) for row in times):
        of = select(times, dtype=dtype, tokens=tokens)
        for measure, how in MEASURES.items():
            taken = ratio(of, measure, {"implementation": "fit"}, {"implementation": "score"})
            if taken is not None:
                what = f"time over scoring values of {tokens:,} tokens, {dtype.removeprefix('torch.')}, {how}"
                yield judged(what, "<= 1.1x", f"{taken:.3f}x", reached=taken <= 1.1)
    yield from ("", *table("| completion tokens | peak MiB of the process |"))
    for row in data["memory"]:
        yield f"| {row['tokens']:,} | {row['bytes'] / 2**20:,.0f} |"


def ray_data(data: Data) -> Iterator[str]:
    """`ray_data.py`."""
    p, times = data["provenance"], [row for row in data["times"] if row["implementation"] != "Scorer.stream"]
    streams = [row for row in data["times"] if row["implementation"] == "Scorer.stream"]
    shares = [stream["seconds"] / row["seconds"] for stream, row in zip(streams, times, strict=True)]
    yield (
        f"{source(p)} {p['prompts']} prompts x {p['completions']}, values, Qwen2-0.5B's shape with {p['layers']} "
        f"layers, batches of {p['batch']} rows, Ray {p['ray']}."
    )
    yield from ("", *table("| figure | goal | measured | reached |"))
    share = statistics.median(shares)
    yield judged("throughput of one actor over `Scorer.stream`", ">= 90%", f"{share:.1%}", reached=share >= 0.9)
    yield from ("", *table("| two actors | MiB of each alone | MiB of the weights |"))
    for row in data["memory"]:
        private = ", ".join(f"{size / 2**20:,.0f}" for size in row["private"])
        what = "share_weights=True" if row["share_weights"] else "without"
        yield f"| {what} | {private} | {data['weights'] / 2**20:,.0f} |"


def returns(data: Data) -> Iterator[str]:
    """`returns.py`."""
    times, p = {row["implementation"]: row["seconds"] for row in data["times"]}, data["provenance"]
    yield f"{source(p)} [B, T] = {p['shape']}, float32, with a mask."
    yield from ("", *table("| figure | goal | measured | reached |"))
    for name, goal in (("loop in torch", 100.0), ("chunked scan in torch", 5.0)):
        yield at_least(f"speed over the {name}", goal, _ratio(times[name], times["vhead"]))
    over = _ratio(times["vhead"], times["read"])
    yield judged("time over reading the inputs once", "<= 1.5x", f"{over:.2f}x", reached=over <= 1.5)
    error = median(data["errors"], "max_error", implementation="vhead")
    yield judged("largest error against float64", "<= 1e-6", f"{error:.1e}", reached=error <= 1e-6)
    yield from ("", *table("| | median ms |"))
    for name, seconds in times.items():
        yield f"| {name} | {statistics.median(seconds) * 1e3:.2f} |"


IDLE, BUSY = MACHINES = ("as it is", "one core taken")
OWN_CHOICE, ONE_THREAD = THREADS = ("its own choice", "one thread")


def busy_machine(data: Data) -> Iterator[str]:
    """`busy_machine.py`."""
    times, p = data["times"], data["provenance"]
    yield f"{source(p)} `vhead score` of {p['rollouts']:,} short rollouts, from the start of Python to its end."
    yield from ("", *GOALS)
    taken, idle = {"machine": BUSY, "threads": OWN_CHOICE}, {"machine": IDLE, "threads": ONE_THREAD}
    over = ratio(times, "seconds", taken, idle)
    yield at_most("time with one core taken over the time of one thread without that", 1.3, over)
    yield from ("", *table("| machine | threads | median s | least s | most s |"))
    for machine, threads in product(MACHINES, THREADS):
        seconds = [row["seconds"] for row in select(times, machine=machine, threads=threads)]
        figures = (statistics.median(seconds), min(seconds), max(seconds))
        yield f"| {machine} | {threads} | {' | '.join(f'{each:.2f}' for each in figures)} |"


def agents(data: Data) -> Iterator[str]:
    """`agents.py`."""
    rows, p = data["times"], data["provenance"]
    yield f"{source(p)} {p['layers']} layers of Qwen2-0.5B's shape, float32."
    yield from ("", *table("| figure | goal | measured | reached |"))

    def seconds(figure: str, name: str, clock: str) -> list[float]:
        return [row[clock] for row in select(rows, figure=figure) if row.get("implementation") == name]

    for clock, of in (("wall_s", "time"), ("processor_s", "processor time")):
        for figure, name, base, goal in AGENT_RATIOS:
            over = _ratio(seconds(figure, name, clock), seconds(figure, base, clock))
            yield judged(f"{of} of {figure}, {name} over {base}", f"<= {goal}x", f"{over:.2f}x", reached=over <= goal)
        faster = _ratio(seconds("trace", "turn by turn", clock), seconds("trace", "one pass", clock))
        yield at_least(f"speed of a trace of {p['turns']} turns over turn by turn, by {of}", 5.0, faster)
        taken = statistics.median(seconds("compare", "compare", clock))
        yield judged(f"{of} of compare, {p['tokens']} tokens", "< 2 s", f"{taken:.2f} s", reached=taken < 2)
    (apart,) = (row["max_difference"] for row in rows if "max_difference" in row)
    yield judged("largest difference from turn by turn", "<= 1e-5", f"{apart:.1e}", reached=apart <= 1e-5)


# What is measured, against what, and how much longer it may take.
AGENT_RATIOS = (
    ("heads", "more", "one", 1.05),
    ("candidates", "candidates", "sampled", 1.15),
    ("candidates", "top", "sampled", 1.25),
)


SERVING_MEASURES = ("seconds", "server_s", "own_s", "clients_s", "load")


def serving(data: Data) -> Iterator[str]:
    """`serving.py`."""
    p = data["provenance"]
    yield (
        f"{source(p)} {p['clients']} clients. Qwen2-0.5B's shape with {p['layers']} layers in {p['dtype']}, values of "
        f"{p['work']['rollouts']} rollouts; the bundled model: {p['bundled_work']['rollouts']} rollouts."
    )
    yield from ("", *GOALS)
    for unit, goal in (("groups", 0.9), ("rollouts", 0.8)):
        for body in ("Arrow", "JSON"):
            over = ratio(data["qwen2"], "seconds", {"unit": "stream"}, {"unit": unit, "body": body})
            yield at_least(f"throughput over `Scorer.stream`, requests of {unit}, {body}", goal, over)
    for model, body, goal in (("qwen2", "Arrow", 0.05), ("qwen2", "JSON", 0.12), ("bundled", "Arrow", 0.3)):
        share = median(data[model], "own_share", unit="groups", body=body)
        yield at_most(f"what is not the model's of the server's processor time: {model}, groups, {body}", goal, share)
    if "vllm" in data:
        over = ratio(data["vllm"], "seconds", {"server": "vLLM"}, {"server": "vhead"})
        yield at_least("requests/s over vLLM's `/pooling`, groups", 2.5, over)
    for model in ("qwen2", "bundled"):
        headings = "| requests | body | median s | server's processor s | its own part | clients' processor s | load |"
        yield from ("", f"{model}:", "", *table(headings))
        for unit, body in dict.fromkeys((row["unit"], row["body"]) for row in data[model]):
            rows = select(data[model], unit=unit, body=body)
            figures = (statistics.median(row.get(m, 0) for row in rows) for m in SERVING_MEASURES)
            yield f"| {unit} | {body} | {' | '.join(f'{figure:.2f}' for figure in figures)} |"


def sync(data: Data) -> Iterator[str]:
    """`sync.py`."""
    p = data["provenance"]
    yield f"{source(p)} Bodies of {p['mebibytes']} MiB of bfloat16 in 16 tensors; {p['changed']:.0%} of it changed."
    yield from ("", *table("| figure | goal | measured | reached |"))
    for row in data["head"]:
        taken, used = (statistics.median(row[key]) * 1e3 for key in ("seconds", "processor"))
        measured = f"{taken:.3g} ms ({used:.3g} of the processor)"
        if row["what"] == "flushes":
            yield f"| six flushes alone, {row['place']} | | {measured} | |"
        else:
            goal = 5 if row["what"] == "publish" else 2
            yield judged(f"{row['what']} a head, {row['place']}", f"≤ {goal} ms", measured, reached=taken <= goal)
    yield from _sync_whole({row["what"]: row for row in data["body"]})
    yield from _sync_changes({row["what"]: row for row in data["changes"]})
    for what, key in (("s", "rollouts_per_s"), ("processor s", "rollouts_per_processor_s")):
        rates = [[row[key] for row in data["reloads"] if row["publishes"] == publishes] for publishes in (True, False)]
        yield at_least(f"rollouts/{what} with a head a second, over none", 0.99, _ratio(*rates))
    for row in data["shared"]:
        share = row["proportional_bytes"] / row["body_bytes"]
        name = f"memory of {row['workers']} workers over one body"
        if row["share"]:
            beside = f"{row['activation_bytes'] / 2**20:.0f} MiB of activations left out"
            yield at_most(f"{name}, {beside}", 1.15, share)
        else:
            yield f"| {name}, each with a copy | | {share:.3g}× | |"
    yield from ("", *table("| | median ms | processor ms | load |"))
    for row in (*data["body"], *data["changes"]):
        if row["seconds"]:
            kind = "changes" if "share" in row else "full"
            taken, used = (statistics.median(row[key]) * 1e3 for key in ("seconds", "processor"))
            yield f"| {kind}: {row['what']} | {taken:.0f} | {used:.0f} | {row['load']:.1f} |"


def _sync_whole(rows: dict[str, Data]) -> Iterator[str]:
    times = {what: row["seconds"] for what, row in rows.items()}
    beside = [copy + digest for copy, digest in zip(times["cp"], times["digest"], strict=True)]
    yield at_least("publishing: cp, sync and digest over it", 0.8, _ratio(beside, times["publish"]))
    yield at_least("swap: a memory copy over it", 0.8, _ratio(times["memory copy"], times["swap"]))
    yield _rate("reading and digest, one core", 1.5, rows["digest"]["bytes"], rows["digest"])
    extra = rows["anonymous memory"]["bytes"] / 2**20
    yield at_most("extra anonymous memory of apply", 64, extra, " MiB")


def _rate(name: str, goal: float, size: int, row: Data) -> str:
    """A row for bytes a second of processor time, with those by the clock."""
    rate, by_clock = (size / statistics.median(row[key]) / 1e9 for key in ("processor", "seconds"))
    return judged(name, f"≥ {goal:g} GB/s", f"{rate:.2f} GB/s ({by_clock:.2f} by the clock)", reached=rate >= goal)


def _sync_changes(rows: dict[str, Data]) -> Iterator[str]:
    size, times = rows["publish"]["bytes"], {what: row["seconds"] for what, row in rows.items()}
    yield at_most("bytes of changes over those of all", 0.04, rows["publish"]["share"])
    yield _rate("publishing changes, of scanned pairs", 2, 2 * size, rows["publish"])
    yield at_least(
        "swap of changes: a memory copy of the body over it", 0.5, _ratio(times["memory copy"], times["swap"])
    )


def update(data: Data) -> Iterator[str]:
    """`update.py`."""
    times, memory, p = data["times"], data.get("memory", []), data["provenance"]
    work = p["workload"]
    yield source(p)
    yield (
        f"Qwen2-0.5B's shape with {p['layers']} layers, random weights; {work['rollouts']} rollouts: "
        f"{work['tokens']:,} tokens, {work['unique_tokens']:,} of them unique, {work['completion_tokens']:,} of "
        "completions; forward and backward of a policy's and a value loss."
    )
    dtypes = tuple(dict.fromkeys(row["dtype"] for row in times))
    yield from ("", *GOALS)
    for dtype in dtypes:
        yield from _update_goals(select(times, dtype=dtype), select(memory, dtype=dtype), dtype)
    columns = " | ".join(f"{dtype}, s | processor s | MiB above model and gradients" for dtype in dtypes)
    yield from ("", *table(f"| | {columns} |"))
    for name in dict.fromkeys(row["contestant"] for row in times):
        cells = (_update_cell(times, memory, {"contestant": name, "dtype": dtype}) for dtype in dtypes)
        yield f"| {UPDATES[name]} | {' | '.join(cells)} |"


UPDATES = {
    "vhead": "`vhead.TrainingPass`",
    "vhead, in place": "the same with `accumulate_in_place=True`",
    "padded loop, 4": "padded loop of TRL's class, 4 rows",
    "padded loop, 8": "padded loop of TRL's class, 8 rows",
    "sorted loop, 4": "the same sorted by length, 4 rows",
    "bare products": "the matrix products alone",
    "states kept": "4 updates of a critic, body frozen, its states kept",
    "full passes": "4 updates of a critic, body frozen, run each time",
}
# How often faster than each `vhead` is to be.
UPDATE_GOALS = {"padded loop, 4": 4.0, "padded loop, 8": 4.0, "sorted loop, 4": 2.5, "bare products": 0.75}


def _update_goals(times: list[Row], memory: list[Row], dtype: str) -> Iterator[str]:
    for measure, how in MEASURES.items():
        for name, goal in UPDATE_GOALS.items():
            faster = ratio(times, measure, {"contestant": name}, {"contestant": "vhead"})
            if faster is not None:
                yield at_least(f"{dtype}: speed over the {name}, {how}", goal, faster)
        saved = ratio(times, measure, {"contestant": "full passes"}, {"contestant": "states kept"})
        if saved is not None:
            yield at_least(f"{dtype}: a frozen body's states kept for 4 updates, {how}", 3.0, saved)
    for own, name in product(("vhead", "vhead, in place"), ("padded loop, 4", "padded loop, 8")):
        ours, peer = (median(memory, "extra_bytes", contestant=each) for each in (own, name))
        if ours is not None and peer is not None:
            yield at_least(f"{dtype}: less peak memory of {own} than of the {name}", 6.0, peer / ours)


def _update_cell(times: list[Row], memory: list[Row], key: Row) -> str:
    wall, processor = (median(times, measure, **key) for measure in MEASURES)
    extra = median(memory, "extra_bytes", **key)
    return f"{wall:.2f} | {processor:.2f} | {'' if extra is None else f'{extra / 2**20:,.0f}'}"


PAGES: dict[str, Page] = {
    "agents": agents,
    "busy-machine": busy_machine,
    "fitting": fitting,
    "generation": generation,
    "head": head,
    "loading": loading,
    "ray-data": ray_data,
    "returns": returns,
    "scoring": scoring.peers,
    "scoring-ablations": scoring.ablations,
    "scoring-context": scoring.context,
    "scoring-growth": scoring.growth,
    "scoring-memory": scoring.peaks,
    "scoring-overhead": scoring.overhead,
    "scoring-scale": scoring.scale,
    "serving": serving,
    "sync": sync,
    "token-statistics": token_statistics,
    "update": update,
}


def page_for(path: Path) -> Page:
    """By the longest name that the file's begins with: `head-reused-memory` is about the head."""
    names = [name for name in PAGES if path.stem.startswith(name)]
    return PAGES[max(names, key=len, default="head")]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="*", default=sorted(RESULTS.glob("*.json")))
    for path in parser.parse_args().data:
        write(path, page_for(path))


if __name__ == "__main__":
    _main()
