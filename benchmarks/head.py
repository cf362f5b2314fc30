"""Measures the head against TRL's, plain torch, and a pass that only reads the same bytes: see README.md here."""

import argparse
from collections.abc import Iterator

import torch
from measure import Figures, add_options, in_fresh_process
from torch import Tensor
from torch.nn import functional

import report
from vhead import ops
from vhead.benchmark.cases import Case, kept_bytes, time_call, time_inference, time_training
from vhead.benchmark.document import Row
from vhead.benchmark.peers import DROPOUT, Forward, Peer, Weights, function_peer, vhead_module, vhead_op
from vhead.benchmark.timing import Work
from vhead.benchmark.trl_head import trl_head

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((8192, 2048), (8192, 896), (8192, 4096), (1, 2048), (1, 4096))
TRAINED_SHAPES = SHAPES[:3]
TINY = (4, 16)
SEEDS = (1, 2, 3)
# The bias's gradient is a single number, and one draw says nothing about its error.
BIAS_DRAWS = 300


def measure(dtype: torch.dtype, rounds: int, threads: int) -> dict[str, list[Row]]:
    """Every case of one dtype, in a process of its own."""
    torch.set_num_threads(threads)
    times = [row for shape in SHAPES for row in _timings(shape, dtype, rounds)]
    times += time_call(Case.draw(TINY, dtype, all_peers, rounds))
    case = Case.draw(SHAPES[0], dtype, all_peers, rounds)
    return {"times": times, "saved": list(kept_bytes(case)), "errors": list(errors(case))}


def _timings(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    case = Case.draw(shape, dtype, all_peers, rounds)
    yield from time_inference(case, read_passes(case.hidden))
    if shape in TRAINED_SHAPES:
        yield from time_training(case)
    print(dtype, shape, "measured", flush=True)


def all_peers(weights: Weights) -> list[Peer]:
    """Every implementation on one set of weights."""
    return [make(weights) for make in (trl_head, plain_torch, vhead_module, vhead_op)]


def plain_torch(weights: Weights) -> Peer:
    """`F.dropout` and `F.linear` on hidden states upcast to float32."""

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
        return functional.linear(functional.dropout(hidden.float(), dropout, training=dropout > 0), weight, bias)

    return function_peer("torch", compute, weights)


def read_passes(hidden: Tensor) -> dict[str, Work]:
    """Ways to read every byte of contiguous hidden states and write next to nothing; the fastest is the limit.

    They look at the bytes as other types, so that no conversion and no NaN slows the pass down.
    """
    rows = hidden.shape[0]
    words, doubles = hidden.view(torch.int32).view(rows, -1), hidden.view(torch.float64).flatten()
    return {
        "read: max of int32 by row": lambda: words.amax(1),
        "read: sum of int64 by row": lambda: hidden.view(torch.int64).view(rows, -1).sum(1),
        "read: float64 dot product": lambda: torch.dot(doubles, doubles),
        "read: max of int16 by row": lambda: hidden.view(torch.int16).view(rows, -1).amax(1),
    }


def errors(case: Case) -> Iterator[Row]:
    """Largest and root-mean-square differences from float64, without dropout and with each peer's own mask."""
    narrow = case.hidden[:, : TINY[1]].contiguous()
    for dropout in (0.0, DROPOUT):
        for peer in all_peers(Weights.draw(TINY[1])):
            label = {**case.label, "dropout": dropout, "seed": None, "implementation": peer.name}
            yield label | bias_error(peer, narrow, dropout)
        for seed in SEEDS:
            for peer in case.peers:
                label = {**case.label, "dropout": dropout, "seed": seed, "implementation": peer.name}
                yield from (label | row for row in _errors_of(peer, case, dropout, seed))


def _errors_of(peer: Peer, case: Case, dropout: float, seed: int) -> Iterator[Row]:
    grad_values = grads(case.hidden, seed)
    mask = scaled_mask(peer.name, case.hidden, dropout, seed) if dropout else 1.0
    weight, bias = (tensor.double().requires_grad_() for tensor in (case.weights.weight, case.weights.bias))
    torch.manual_seed(seed)
    got = outcome(peer.at(dropout), case.hidden, peer.parameters[0], grad_values)
    want = outcome(lambda hidden: (hidden * mask) @ weight.flatten() + bias, case.hidden.double(), weight, grad_values)
    yield from map(_difference, ("values", "grad_hidden", "grad_weight"), got, want)


def outcome(forward: Forward, hidden: Tensor, weight: Tensor, grad_values: Tensor) -> tuple[Tensor, ...]:
    """Values, and the gradients of hidden states and weight."""
    leaf = hidden.clone().requires_grad_()
    values = forward(leaf)
    return values.detach(), *torch.autograd.grad(values, (leaf, weight), grad_values.view_as(values).to(values.dtype))


def scaled_mask(name: str, hidden: Tensor, dropout: float, seed: int) -> Tensor:
    """The mask and scale, in float64, that this implementation draws after `manual_seed(seed)`."""
    torch.manual_seed(seed)
    if name in ("trl", "torch"):  # They drop in the hidden dtype, and after the upcast.
        ones = torch.ones_like(hidden, dtype=hidden.dtype if name == "trl" else torch.float32)
        return (functional.dropout(ones, dropout) != 0).double() / (1 - dropout)
    # The gradient of the sum of the values, for weights of one, in the plain twin.
    leaf = torch.ones_like(hidden, dtype=torch.float64).requires_grad_()
    ops.value_head_plain(leaf, torch.ones(hidden.shape[1], dtype=torch.float64), dropout_p=dropout).sum().backward()
    return leaf.grad


def bias_error(peer: Peer, hidden: Tensor, dropout: float) -> Row:
    """That of the bias's gradient over many draws."""
    got, want = [], []
    for seed in range(BIAS_DRAWS):
        grad_values = grads(hidden, seed)
        values = peer.at(dropout)(hidden)
        got += torch.autograd.grad(values, peer.parameters[1], grad_values.view_as(values))
        want.append(grad_values.double().sum())
    return _difference("grad_bias", torch.cat(got), torch.stack(want))


def grads(hidden: Tensor, seed: int) -> Tensor:
    """A gradient of the values, a function of the seed alone."""
    return torch.randn(hidden.shape[0], generator=torch.Generator().manual_seed(seed))


def _difference(name: str, got: Tensor, want: Tensor) -> Row:
    off = got.double().flatten() - want.flatten()
    return {"what": name, "max_error": off.abs().max().item(), "rms_error": off.square().mean().sqrt().item()}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "head", rounds=21)
    options = parser.parse_args()
    figures = Figures(options)
    for dtype in DTYPES:
        for name, rows in in_fresh_process(measure, dtype, options.rounds, options.threads).items():
            figures.add(name, rows)
    figures.close(report.head)


if __name__ == "__main__":
    _main()
