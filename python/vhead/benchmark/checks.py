"""What must hold on a device beside equal bits: initial weights, seeds, streams, CUDA graphs, token statistics."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from vhead.benchmark.comparison import Inputs, Plan, Setting, differing, outcomes
from vhead.benchmark.document import Row
from vhead.benchmark.machine import why_not_native
from vhead.ops import init_linear_, init_normal_, token_statistics, token_statistics_plain, value_head

# Says what does not hold; None where it does.
Check: TypeAlias = Callable[[torch.device], str | None]

_CPU = torch.device("cpu")
_REPLAYS = 3
# How many of the likeliest tokens are looked at.
_TOP = 20
_PLAN = Plan(rows=300, columns=(1024,))
_SETTING = Setting(torch.bfloat16, 300, 1024, special=False, outputs=1, layout="contiguous", dropout_p=0.5)


def run_checks(device: torch.device) -> Iterator[Row]:
    """One row for each check; one that fails with an error does not keep the others from running."""
    for name, check in (CHECKS | (CUDA_CHECKS if device.type == "cuda" else {})).items():
        try:
            problem = check(device)
        except Exception as error:  # a report on a machine that nobody here can reach must be whole
            problem = f"{type(error).__name__}: {error}"
        yield {"check": name, "passed": problem is None, "detail": problem}


def kernels_run(device: torch.device) -> str | None:
    """The head's own kernels run there, not plain torch."""
    reason = why_not_native(device)
    return reason and f"plain torch runs there: {reason}"


def same_initial_weights(device: torch.device) -> str | None:
    """The numbers that a head starts with are the CPU's for the same seed of torch."""

    def fresh(where: torch.device, fill: Callable[[Tensor, Tensor], None]) -> Tensor:
        torch.manual_seed(7)
        weight, bias = torch.empty(3, 1001, device=where), torch.empty(3, device=where)
        fill(weight, bias)
        return torch.cat((weight.flatten(), bias)).cpu()

    for name, fill in {"linear": init_linear_, "normal": lambda w, b: init_normal_(w, b, 0.02)}.items():
        count = int(differing(fresh(_CPU, fill), fresh(device, fill)).sum())
        if count:
            return f"{name}: {count} numbers differ from the CPU's"
    return None


def seeds_are_torch_s(device: torch.device) -> str | None:
    """The mask follows `torch.manual_seed`, and the next call draws another one."""
    hidden, weight = torch.randn(64, 512, device=device), torch.randn(1, 512, device=device)

    def drawn(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        first, second = (value_head(hidden, weight, dropout_p=0.5).cpu() for _ in range(2))
        return first, second

    first, second = drawn(1)
    if differing(first, drawn(1)[0]).any():
        return "the same seed gave another mask"
    if not differing(first, second).any():
        return "two calls drew the same mask"
    return None if differing(first, drawn(2)[0]).any() else "two seeds gave the same mask"


def statistics_are_close(device: torch.device) -> str | None:
    """Token statistics are as near to float64 as those from all logits at once, but for another order of sums.

    So are the log-probabilities of candidates, and of the likeliest tokens.
    """
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(130, 256, generator=generator), torch.randn(5003, 256, generator=generator) / 16
    targets, candidates = (torch.randint(5003, size, generator=generator) for size in ((130,), (130, 40)))
    for dtype in (torch.float32, torch.bfloat16):
        inputs = hidden.to(dtype), weight.to(dtype), targets
        exact = token_statistics_plain(inputs[0].double(), inputs[1].double(), targets, candidates=candidates, top=_TOP)
        there = tuple(x.to(device) for x in inputs)
        ours, plain = (
            compute(*there, candidates=candidates.to(device), top=_TOP)
            for compute in (token_statistics, token_statistics_plain)
        )
        for name in ("logprobs", "entropy", "candidate_logprobs", "top_logprobs"):
            error, usual = (_largest(getattr(found, name), getattr(exact, name)) for found in (ours, plain))
            if not error <= 4 * usual + 1e-6:
                return f"{name} in {dtype}: off by {error:.3g}, all logits at once by {usual:.3g}"
    return None


def _largest(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double().cpu() - exact).abs().max())


def runs_on_the_current_stream(device: torch.device) -> str | None:
    """On a side stream, the head waits for what was asked of that stream before."""
    inputs = Inputs.draw(_PLAN, torch.bfloat16, 1024, special=False)
    there, late = inputs.to(device), torch.zeros_like(inputs.flat, device=device)
    slow = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize(device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for _ in range(20):
            slow = slow @ slow
        late.copy_(there.flat)
        found = _found(replace(there, flat=late))
    side.synchronize()
    return difference(_found(inputs), found)


def replays_draw_new_masks(device: torch.device) -> str | None:
    """A captured CUDA graph draws a new seed each time it is replayed, and uses that one forward and backward."""
    inputs = Inputs.draw(_PLAN, torch.bfloat16, 1024, special=False)
    return judge_replays(_replays(inputs.to(device), device), lambda seed: _found(inputs, seed))


def _replays(there: Inputs, device: torch.device) -> list[tuple[int, dict[str, Tensor]]]:
    """The seed that each replay drew on the device, and what it computed."""

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
        return seed, _found(there, seed) | {"drawn inside": _values(there)}

    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()  # what is loaded or allocated once must not be part of the graph
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed, found = step()
    replays = []
    for _ in range(_REPLAYS):
        graph.replay()
        torch.cuda.synchronize(device)
        replays.append((int(seed.item()), {what: tensor.cpu() for what, tensor in found.items()}))
    return replays


def judge_replays(
    replays: Sequence[tuple[int, dict[str, Tensor]]], expected: Callable[[int], dict[str, Tensor]]
) -> str | None:
    """What is wrong with replays of a graph, given what the CPU computes for a seed."""
    if len({seed for seed, _ in replays}) < len(replays):
        return "two replays drew the same seed"
    drawn = [found["drawn inside"] for _, found in replays]
    if not all(differing(a, b).any() for a, b in pairwise(drawn)):
        return "two replays without a given seed used the same mask"
    problems = (difference(expected(seed), found) for seed, found in replays)
    return next((problem for problem in problems if problem), None)


def difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """Which of the expected tensors differ, and in how many elements; None where none does."""
    counts = {what: int(differing(tensor, found[what].cpu()).sum()) for what, tensor in expected.items()}
    wrong = [f"{what}: {count} elements differ from the CPU's" for what, count in counts.items() if count]
    return "; ".join(wrong) or None


def _found(inputs: Inputs, seed: int | Tensor = 1) -> dict[str, Tensor]:
    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **mask: float) -> Tensor:
        return value_head(hidden, weight, bias, dropout_p=mask["dropout_p"], seed=seed)

    return outcomes(head, _rows(inputs), inputs, _SETTING)


def _rows(inputs: Inputs) -> Tensor:
    return inputs.flat[: _SETTING.rows * _SETTING.columns].view(_SETTING.rows, _SETTING.columns)


def _values(inputs: Inputs) -> Tensor:
    return value_head(_rows(inputs), inputs.weight[:1], dropout_p=0.5)


CHECKS: dict[str, Check] = {
    "the head's own kernels run": kernels_run,
    "initial weights are the CPU's": same_initial_weights,
    "masks follow torch.manual_seed": seeds_are_torch_s,
    "token statistics are as exact as from all logits": statistics_are_close,
}
CUDA_CHECKS: dict[str, Check] = {
    "the head runs on the current stream": runs_on_the_current_stream,
    "each replay of a CUDA graph draws a new mask": replays_draw_new_masks,
}
