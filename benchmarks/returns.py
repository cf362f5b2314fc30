"""Measures advantages and returns against a loop and a chunked scan in torch, and against reading: see README.md."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import report
import torch
from measure import Figures, add_options
from torch import Tensor
from torch.nn import functional

from vhead import returns
from vhead.benchmark.document import Row
from vhead.benchmark.timing import Work, interleaved, load_average

SHAPE = (64, 8192)
GAMMA, LAM = 1.0, 0.95
CHUNK = 128

Outcome = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Random rewards and values [B, T], and a mask of turns: runs of 64 tokens, three of five of them the model's."""

    rewards: Tensor
    values: Tensor
    mask: Tensor

    @classmethod
    def draw(cls) -> "Case":
        """The same each time."""
        torch.manual_seed(0)
        runs = torch.rand(SHAPE[0], SHAPE[1] // 64) < 0.6
        return cls(torch.randn(SHAPE), torch.randn(SHAPE), runs.repeat_interleave(64, 1))


def loop(case: Case) -> Outcome:
    """One step of torch operations a column, which carries the state over masked ones."""
    state, value, found = torch.zeros(SHAPE[0]), torch.zeros(SHAPE[0]), []
    written = case.mask.float()
    for t in reversed(range(SHAPE[1])):
        m, own = written[:, t], case.values[:, t]
        stepped = case.rewards[:, t] + GAMMA * value - own + GAMMA * LAM * state
        state, value = stepped * m + state * (1 - m), own * m + value * (1 - m)
        found.append(state)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + case.values


def chunked(case: Case) -> Outcome:
    """Chunks by a product with powers of the decay, and a state from chunk to chunk, without a mask."""
    deltas = case.rewards + GAMMA * functional.pad(case.values[:, 1:], (0, 1)) - case.values
    places = torch.arange(CHUNK)
    distance = places[:, None] - places[None, :]
    powers = torch.where(distance >= 0, (GAMMA * LAM) ** distance.clamp(0).double(), 0.0).float()
    local = deltas.view(SHAPE[0], -1, CHUNK) @ powers
    decay = (GAMMA * LAM) ** torch.arange(CHUNK, 0, -1).double()
    state = torch.zeros(SHAPE[0], 1)
    for chunk in reversed(range(local.shape[1])):
        local[:, chunk] += decay.float() * state
        state = local[:, chunk, :1].clone()
    advantages = local.view(SHAPE)
    return advantages, advantages + case.values


def vhead_on(case: Case, convention: str = "vhead") -> Outcome:
    """The function of this package."""
    return returns.gae(case.rewards, case.values, mask=case.mask, gamma=GAMMA, lam=LAM, convention=convention)


def read(case: Case) -> int:
    """The inputs' bytes once, as integers."""
    return sum(int(array.view(torch.int64).sum()) for array in (case.rewards, case.values, case.mask))


def copy(case: Case) -> Outcome:
    """The inputs read and as many outputs written."""
    return case.rewards.clone(), case.values.clone()


PEERS: dict[str, Callable[[Case], object]] = {
    "loop in torch": loop,
    "chunked scan in torch": chunked,
    "vhead": vhead_on,
    "vhead, verl's convention": partial(vhead_on, convention="verl"),
    "read": read,
    "copy": copy,
}


def _times(options: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(options.threads)
    case, before = Case.draw(), load_average()
    works: dict[str, Work] = {name: partial(run, case) for name, run in PEERS.items()}
    for name, seconds in interleaved(works, options.rounds).items():
        yield {"implementation": name, "seconds": seconds, "load_before": before, "load_after": load_average()}


def _errors(options: argparse.Namespace) -> Iterator[Row]:
    """The largest difference from the loop in float64, relative to numbers above 1."""
    torch.set_num_threads(options.threads)
    case = Case.draw()
    exact = loop(Case(case.rewards.double(), case.values.double(), case.mask))[0]
    for name in ("loop in torch", "vhead"):
        off = (PEERS[name](case)[0].double() - exact).abs() / exact.abs().clamp(1)
        yield {"implementation": name, "max_error": off[case.mask].max().item()}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "returns", rounds=9)
    options = parser.parse_args()
    figures = Figures(options, shape=SHAPE)
    figures.add("times", _times(options))
    figures.add("errors", _errors(options))
    figures.close(report.returns)


if __name__ == "__main__":
    _main()
