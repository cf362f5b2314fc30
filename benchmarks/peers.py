"""The implementations that only the committed figures have, beside those of `vhead bench`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from vhead.benchmark.peers import Forward, Peer, Weights, vhead_module, vhead_op
from vhead.benchmark.trl_head import trl_head


def plain_torch(weights: Weights) -> Peer:
    """`F.dropout` and `F.linear` on hidden states upcast to float32."""
    weight, bias = weights.leaves()

    def at(dropout: float) -> Forward:
        return lambda hidden: linear(functional.dropout(hidden.float(), dropout, training=dropout > 0), weight, bias)

    return Peer("torch", at, (weight, bias))


def all_peers(weights: Weights) -> list[Peer]:
    """Every implementation on one set of weights."""
    return [make(weights) for make in (trl_head, plain_torch, vhead_module, vhead_op)]


def read_passes(hidden: Tensor) -> dict[str, Callable[[], Tensor]]:
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
