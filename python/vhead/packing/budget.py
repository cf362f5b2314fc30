"""How many tokens a batch has where nobody says so: tried on one layer of the model, and noted for the next time.

The note is a small file in the user's cache folder, so that runs on one machine batch alike; where it cannot be
written, each process tries anew.
"""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vhead.checkpoints.replacing import replacing_file
from vhead.env import token_budget
from vhead.packing import limits
from vhead.packing.strategies import Body, Strategy
from vhead.packing.trees import Tokens

_USUAL = {"cpu": 2048}
_USUAL_DEVICE = 16384
# Of the usual size: those that are tried.
_FACTORS = (0.5, 1.0, 2.0)
# Another size has to be faster by this factor: less is the difference of two measurements.
_FASTER = 1.1
_SEQUENCE = 256
_PATIENCE_S = 1.5
_ROUNDS = 2
# What two activations of the widest projection may take on a CPU.
_MOST_BYTES = 96 * 2**20
_FILE = "token-budgets.json"

# What this process has found, by the model and the machine.
_found: dict[str, int] = {}


@dataclass(frozen=True)
class TokenBudget:
    """The tokens of a batch, and why so many; plain data.

    Attributes:
        tokens: How many.
        reason: Why.
    """

    tokens: int
    reason: str

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.reason}"


def chosen(body: Body, strategy: Strategy[Any], asked: int | None) -> TokenBudget:
    """As many as asked for, or as the environment says, or as were the fastest on this machine.

    Args:
        body: The language model, in evaluation mode and without gradients.
        strategy: How rollouts of usual length are batched.
        asked: What the user asks for; None: nothing.
    """
    if asked is not None:
        return TokenBudget(asked, "as asked for")
    if (named := token_budget()) is not None:
        return TokenBudget(named, "as VHEAD_TOKEN_BUDGET says")
    usual = _USUAL.get(body.device.type, _USUAL_DEVICE)
    if not strategy.heeds_budget:
        return TokenBudget(usual, "of which batches of one sequence make no use")
    key = _key(body, strategy)
    known = _found.get(key) or _noted().get(key)
    if known is None:
        known = _fastest(body, strategy, usual)
        _note(key, known)
    _found[key] = known
    if known == usual:
        return TokenBudget(usual, "the usual size, which no other one has beaten here")
    return TokenBudget(known, f"measured here to be faster than the usual {usual}")


def _fastest(body: Body, strategy: Strategy[Any], usual: int) -> int:
    """The size that takes the least time a token; the usual one where it is as good, or trying takes too long."""
    sizes = [int(usual * factor) for factor in _FACTORS]
    sizes = [size for size in sizes if size <= usual or _fits(body, size)]
    until = time.perf_counter() + _PATIENCE_S
    try:
        with _one_layer(body.model):
            seconds = {size: _seconds(body, strategy, size, until) for size in sizes}
    except Exception:  # Whatever a model raises means that one of its layers cannot be tried, or is too large to be.
        return usual
    if time.perf_counter() > until:
        return usual
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[usual] > _FASTER * seconds[best] else usual


def _seconds(body: Body, strategy: Strategy[Any], size: int, until: float) -> float:
    """The least time that a token of a batch of this size takes, in some rounds or in those that there is time for."""
    batch = next(iter(strategy.batches(_sequences(body, size), [1] * (size // _SEQUENCE + 1), size)))
    least = math.inf
    # What is made once, such as buffers, is made in the first round.
    for number in range(_ROUNDS + 1):
        start = time.perf_counter()
        if start > until:
            break
        # The device is waited for.
        float(strategy.states(batch)[-1, -1])
        if number:
            least = min(least, (time.perf_counter() - start) / batch.tokens)
    return least


def _sequences(body: Body, tokens: int) -> Sequence[Tokens]:
    rng = np.random.default_rng(0)
    length = min(limits.context_length(body.model) or _SEQUENCE, _SEQUENCE)
    drawn = rng.integers(0, limits.vocabulary_size(body.model), (max(1, tokens // length), length))
    return list(drawn)


def _fits(body: Body, size: int) -> bool:
    """Whether a larger batch stays small beside the memory of a CPU."""
    widest = max((m.out_features for m in _inside(body.model) if isinstance(m, nn.Linear)), default=0)
    return body.device.type != "cpu" or 2 * size * widest * body.dtype.itemsize <= _MOST_BYTES


def _inside(model: Any) -> Iterator[nn.Module]:
    output = model.get_output_embeddings()
    return (module for module in model.modules() if module is not output)


@contextmanager
def _one_layer(model: Any) -> Iterator[None]:
    """Leaves a model its first layer while the block runs.

    Raises:
        NotImplementedError: It has no list of layers.
    """
    count = getattr(limits.text_config(model.config), "num_hidden_layers", None)
    holders = ((holder, name, own) for holder in model.modules() for name, own in holder.named_children())
    found = next((each for each in holders if isinstance(each[2], nn.ModuleList) and len(each[2]) == count), None)
    if found is None:
        raise NotImplementedError(f"{type(model).__name__} has no list of layers")
    holder, name, own = found
    try:
        holder._modules[name] = nn.ModuleList([own[0]])
        yield
    finally:
        holder._modules[name] = own


def _key(body: Body, strategy: Strategy[Any]) -> str:
    """What tells a model, a machine, and how the one runs on the other."""
    config: dict[str, Any] = body.model.config.to_dict()  # type: ignore[operator, union-attr]
    device = body.device
    about = {
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        "model": type(body.model).__name__,
        "runs": [str(body.dtype), strategy.name, body.fused.described(body.model)],
        "machine": [platform.node(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": [version("vhead"), torch.__version__],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vhead" / _FILE


def _noted() -> dict[str, int]:
    """What was found before; nothing where there is no such file, or one that nobody can read."""
    with suppress(OSError, RuntimeError, ValueError, RecursionError):
        noted = json.loads(_path().read_text())
        if isinstance(noted, dict):
            return {key: size for key, size in noted.items() if type(size) is int and size > 0}
    return {}


def _note(key: str, size: int) -> None:
    """Notes it for the next process; of two at once, the first one's note may be lost, and is then found anew."""
    with suppress(OSError, RuntimeError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as file:
            file.write(json.dumps(_noted() | {key: size}, indent=1).encode())
