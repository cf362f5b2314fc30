"""What is timed: modes, shapes and dtypes, and how many bytes each must move."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vhead.benchmark.document import Row, dtype_name
from vhead.benchmark.peers import DROPOUT, Forward, Peer, Weights, saved_bytes
from vhead.benchmark.timing import Timer, Work, interleaved, load_average, quantiles, timer_of

MakePeers = Callable[[Weights], list[Peer]]

COPY = "copy"
# How often the bytes of the hidden states must cross the memory bus, reading and writing.
PASSES = {"inference": 1, "call": 1, "dropout": 1, "backward": 2, "training": 3, COPY: 2}


@dataclass(frozen=True)
class Case:
    """Hidden states [N, H] of one dtype on one device, the heads over them, and how time is taken."""

    hidden: Tensor
    weights: Weights
    peers: list[Peer]
    rounds: int
    timer: Timer

    @classmethod
    def draw(
        cls,
        shape: tuple[int, int],
        dtype: torch.dtype,
        make_peers: MakePeers,
        rounds: int,
        device: torch.device | None = None,
    ) -> "Case":
        """Standard normal hidden states, default weights."""
        device = device or torch.device("cpu")
        torch.manual_seed(0)
        weights = Weights.draw(shape[1], device)
        hidden = torch.randn(shape, device=device).to(dtype)
        return cls(hidden, weights, make_peers(weights), rounds, timer_of(device))

    @property
    def label(self) -> Row:
        """The columns that name this case."""
        return {"shape": list(self.hidden.shape), "dtype": dtype_name(self.hidden.dtype)}

    def without(self, ending: str) -> "Case":
        """The same without the peers whose names end so."""
        return replace(self, peers=[peer for peer in self.peers if not peer.name.endswith(ending)])


def time_inference(case: Case, yardsticks: Mapping[str, Work]) -> Iterator[Row]:
    """Forward in eval mode under `no_grad`, beside what shows the memory's speed."""
    with torch.no_grad():
        yield from timed(case, "inference", {**_forwards(case, 0.0), **yardsticks})


def time_dropout(case: Case) -> Iterator[Row]:
    """Forward with dropout under `no_grad`."""
    with torch.no_grad():
        yield from timed(case, "dropout", _forwards(case, DROPOUT))


def time_call(case: Case) -> Iterator[Row]:
    """Forward on an input so small that only the cost of a call is left; torch's own `linear` is the floor."""
    weight, bias = case.weights.weight.to(case.hidden.dtype), case.weights.bias.to(case.hidden.dtype)
    works = _forwards(case, 0.0)
    works["linear"] = partial(torch.nn.functional.linear, case.hidden, weight, bias)
    with torch.no_grad():
        yield from timed(case, "call", works)


def time_training(case: Case) -> Iterator[Row]:
    """Forward and backward with dropout: the gradients of hidden states, weight and bias, into fresh memory."""
    leaf, grad_values = _leaf(case), _grad_values(case)

    def step(forward: Forward, parameters: tuple[Tensor, Tensor]) -> object:
        values = forward(leaf)
        return torch.autograd.grad(values, (leaf, *parameters), grad_values.view_as(values))

    works = {peer.name: partial(step, peer.at(DROPOUT), peer.parameters) for peer in case.peers}
    yield from timed(case, "training", works)


def time_backward(case: Case) -> Iterator[Row]:
    """Backward alone, again and again on one graph of a forward with dropout."""
    leaf, grad_values = _leaf(case), _grad_values(case)

    def prepared(peer: Peer) -> Work:
        values = peer.at(DROPOUT)(leaf)
        inputs, grad = (leaf, *peer.parameters), grad_values.view_as(values)
        return lambda: torch.autograd.grad(values, inputs, grad, retain_graph=True)

    yield from timed(case, "backward", {peer.name: prepared(peer) for peer in case.peers})


def kept_bytes(case: Case) -> Iterator[Row]:
    """What a training forward keeps, beyond the hidden states and the parameters."""
    for peer in case.peers:
        saved = saved_bytes(peer, case.hidden, DROPOUT)
        yield {**case.label, "implementation": peer.name, "saved_bytes": saved}


def copying(hidden: Tensor) -> Work:
    """A copy of the hidden states into memory that is there already."""
    return partial(torch.empty_like(hidden).copy_, hidden)


def timed(case: Case, mode: str, works: Mapping[str, Work]) -> Iterator[Row]:
    """One row for each work: percentiles, and the speed at which the bytes moved that must."""
    before = load_average()
    for name, seconds in interleaved(works, case.rounds, timer=case.timer).items():
        row = {"mode": mode, **case.label, "implementation": name, **quantiles(seconds), "rounds": case.rounds}
        moved = case.hidden.nbytes * PASSES.get(name, PASSES[mode])
        row |= {"bytes": moved, "gb_per_s": moved / float(row["p50_us"]) / 1e3}
        yield row | {"load_before": before, "load_after": load_average()}


def _forwards(case: Case, dropout: float) -> dict[str, Work]:
    return {peer.name: partial(peer.at(dropout), case.hidden) for peer in case.peers}


def _leaf(case: Case) -> Tensor:
    return case.hidden.clone().requires_grad_()


def _grad_values(case: Case) -> Tensor:
    return torch.randn(case.hidden.shape[0], device=case.hidden.device)
