"""Measures log-probabilities and entropies from hidden states against bare products, torch and TRL: see README.md.

TRL's function came with trl 1.16, which has no value head any more and is not this project's dependency. Where another
trl's files lie in a folder, `--trl FOLDER` loads that one module from there:

    pip download --no-deps --dest /tmp/trl trl==1.16.0 && unzip -q /tmp/trl/trl-1.16.0-*.whl -d /tmp/trl
    .venv/bin/python benchmarks/token_statistics.py --trl /tmp/trl
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import report
import torch
from measure import Figures, add_options, extra_bytes, in_fresh_process
from torch import Tensor

from vhead import ops
from vhead.benchmark.document import Row, dtype_name
from vhead.benchmark.timing import Work, clocked, load_average, turns

ROWS, COLUMNS, VOCABULARY = 2343, 896, 151_936
CANDIDATES, TOP = 32, 8
TRL_MODULE = Path("trl", "kernels", "chunked_logprob.py")
TRL_COLUMNS = 8192
# Tiles of the bare products; the fastest is the limit.
GEMM_TILES = ((ROWS, 8192), (ROWS, 4096), (ROWS, 2048), (1172, 1024))

Outcome = tuple[Tensor, Tensor]


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


def _ours(case: Case, **arguments: object) -> Outcome:
    return ops.token_logprobs(case.hidden, case.weight, case.targets, **arguments)


def _selecting(case: Case, *, candidates: int = 0, top: int = 0) -> Outcome:
    given = torch.arange(candidates * len(case.targets)).view(len(case.targets), candidates) * 7919 % len(case.weight)
    found = ops.token_statistics(
        case.hidden, case.weight, case.targets, candidates=given if candidates else None, top=top
    )
    return found.logprobs, found.entropy


def peers(trl: Path | None) -> dict[str, Callable[[Case], Outcome]]:
    """Everyone who computes the statistics."""
    found = {
        "vhead": _ours,
        f"vhead, {CANDIDATES} candidates": partial(_selecting, candidates=CANDIDATES),
        f"vhead, top {TOP}": partial(_selecting, top=TOP),
        "vhead, batch invariant": partial(_ours, batch_invariant=True),
    }
    theirs = {"trl": trl_chunked(trl)} if trl else {}
    return {**found, **theirs, "torch chunked": torch_chunked, "naive": naive}


def _times(dtype: torch.dtype, options: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(options.threads)
    case = Case.draw(dtype)
    products = Case(case.hidden.float(), case.weight.float(), case.targets)
    works: dict[str, Work] = {f"products {r} x {c}": partial(gemm, (r, c), products) for r, c in GEMM_TILES}
    works |= {name: partial(run, case) for name, run in peers(options.trl).items()}
    rows = {name: {"implementation": name, "seconds": [], "processor_seconds": []} for name in works}
    about = {"dtype": dtype_name(dtype), "load_before": load_average()}
    with torch.no_grad():
        for number, name in turns(works, options.rounds + 1):
            spent = clocked(works[name])
            if number:
                rows[name]["seconds"].append(spent["wall_s"])
                rows[name]["processor_seconds"].append(spent["processor_s"])
    return [row | about | {"load_after": load_average()} for row in rows.values()]


def memory(name: str, options: argparse.Namespace) -> Row:
    """Most memory that a call needs beyond its arguments."""
    torch.set_num_threads(options.threads)
    run = peers(options.trl)[name]
    with torch.no_grad():
        run(Case.draw(torch.float32, 8, 2048))  # Loads the libraries' own tables.
        extra = extra_bytes(partial(run, Case.draw(torch.float32)))
    return {"implementation": name, "mib": extra / 2**20}


def errors(options: argparse.Namespace) -> Iterator[Row]:
    """Root-mean-square differences from float64, on fewer rows."""
    torch.set_num_threads(options.threads)
    for dtype in (torch.float32, torch.bfloat16):
        case = Case.draw(dtype, 128)
        exact = ops.token_statistics_plain(case.hidden.double(), case.weight.double(), case.targets)
        for name, run in peers(options.trl).items():
            with torch.no_grad():
                found = dict(zip(("logprobs", "entropy"), run(case), strict=True))
            off = {what: (got - getattr(exact, what)).square().mean().sqrt().item() for what, got in found.items()}
            yield {"dtype": dtype_name(dtype), "implementation": name, **off}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "token-statistics", rounds=7)
    parser.add_argument("--trl", type=Path, help="folder with the files of trl >= 1.16")
    parser.add_argument("--half", action=argparse.BooleanOptionalAction, default=True, help="measure bfloat16 too")
    options = parser.parse_args()
    figures = Figures(options, shape=[ROWS, COLUMNS, VOCABULARY])
    for dtype in (torch.float32, torch.bfloat16) if options.half else (torch.float32,):
        figures.add("times", _times(dtype, options))
    figures.add("memory", (in_fresh_process(memory, name, options) for name in peers(options.trl)))
    figures.add("errors", errors(options))
    figures.close(report.token_statistics)


if __name__ == "__main__":
    _main()
