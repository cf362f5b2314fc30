"""What a configuration may ask for: as much as its checkpoint has the weights of, and nothing that runs code.

A configuration of a few bytes can name a billion layers or a vocabulary that fills every memory. Before anything is
made of it, the numbers that drive loops are looked at; while a model is built, what it registers is counted.
"""

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from vhead.checkpoints.checkpoint import Checkpoint
from vhead.errors import BodyMismatchError, LoadError

# What configurations and models make one object for each of.
_COUNTS = re.compile(
    r"(?:layer|block|head|expert|label|codebook|group|stage|depth|level|attention_type|hash(?:es|_functions)?)s?$"
)
# What an adapter adds beside every layer or before every prompt, and a tokenizer to its vocabulary.
_ADDITIONS = frozenset({"r", "num_virtual_tokens", "extra_ids"})
_LAYERS = re.compile(r"n_layers?|num_(?:\w+_)?layers|(?:encoder|decoder)_layers")
_ALL_LAYERS = frozenset({"n_layer", "n_layers", "num_hidden_layers", "num_layers"})
# What models make tables for.
_POSITIONS = re.compile(
    r"max_(?:\w+_)?position_embeddings|max_(?:target_)?positions|n_positions|n_ctx|max_seq(?:uence)?_len(?:gth)?"
)
_MOST_OF_A_COUNT = 100_000
_MOST_POSITIONS = 1 << 28

# Weights of two bits take the eighth part of those of 16, and a head for the vocabulary may be tied or left out.
_ELEMENTS_PER_BYTE = 16
# A model of tests is all vocabulary and positions.
_FREE_ELEMENTS = 1 << 24
_FREE_BUFFER_ELEMENTS = 1 << 32
_FREE_TENSORS = 1_000
_TENSORS_PER_TENSOR = 4


def check_config(config: Mapping[str, object], source: str, *, runs_code: bool = False) -> None:
    """Checks what a configuration's file states, before an object is made of it.

    Args:
        config: The configuration, parts of it in dictionaries of their own.
        source: Where it is from, for messages.
        runs_code: Whether the user allows code that the checkpoint names.

    Raises:
        LoadError: A number is out of all proportion, or an attention implementation is code from the hub.
    """
    waiting: list[tuple[str, object]] = list(config.items())
    while waiting:
        path, value = waiting.pop()
        name = path.rpartition(".")[2].partition("[")[0]
        if isinstance(value, Mapping):
            waiting += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{path}[{place}]", inner) for place, inner in enumerate(value)]
        elif isinstance(value, int):
            _check_number(name, value, f"{source}: {path}")
        # Also where a dictionary names one for each part of the model.
        elif "attn_implementation" in path and isinstance(value, str) and "/" in value and not runs_code:
            raise LoadError(
                f"{source}: {path}: {value!r} is code from the hub, which runs only if you pass trust_remote_code=True"
            )


def is_layer_count(name: str) -> bool:
    """Whether a setting of a configuration is how many layers a model has."""
    return _LAYERS.fullmatch(name) is not None


def _check_number(name: str, value: int, where: str) -> None:
    counts = name in _ADDITIONS or _COUNTS.search(name)
    most = _MOST_OF_A_COUNT if counts else _MOST_POSITIONS if _POSITIONS.fullmatch(name) else None
    if most is not None and value > most:
        raise LoadError(f"{where}: expected at most {most:,}, got {value:,}")
    # A model may have no layers of one kind, but it has some layers.
    least = int(name in _ALL_LAYERS)
    if value < least and is_layer_count(name):
        raise LoadError(f"{where}: expected {least} or more layers, got {value:,}")


@contextmanager
def bounded_by(checkpoint: Checkpoint) -> Iterator[None]:
    """Stops building a model as soon as it has several times what its checkpoint holds weights for.

    Torch tells of every parameter and buffer that this thread registers while the block runs.

    Raises:
        BodyMismatchError: The model that is built is too large.
    """
    handles = [
        register_module_parameter_registration_hook(_Counter(checkpoint, "parameters", _FREE_ELEMENTS)),
        register_module_buffer_registration_hook(_Counter(checkpoint, "buffers", _FREE_BUFFER_ELEMENTS)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Counter:
    """Counts what the thread that made it registers, each name of a module once."""

    def __init__(self, checkpoint: Checkpoint, what: str, free_elements: int) -> None:
        self._checkpoint, self._what, self._free_elements = checkpoint, what, free_elements
        self._thread = threading.get_ident()
        self._seen: set[tuple[int, str]] = set()
        self._elements = 0

    def __call__(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        key = (id(module), name)
        if tensor is None or key in self._seen or threading.get_ident() != self._thread:
            return
        self._seen.add(key)
        self._elements += tensor.numel()
        most_elements, most_tensors = self._limits
        if self._elements > most_elements or len(self._seen) > most_tensors:
            raise BodyMismatchError(
                f"{self._checkpoint.location}: the configuration asks for a larger model than the checkpoint has "
                f"weights for: {len(self._seen):,} {self._what} with {self._elements:,} elements had been made when "
                f"this was noticed, and the checkpoint has {len(self._checkpoint.weight_map):,} tensors"
            )

    @cached_property
    def _limits(self) -> tuple[float, float]:
        """The most elements and tensors; known when a repository's files have been downloaded, which comes first."""
        held = self._checkpoint.held_bytes()
        if held is None:
            return math.inf, math.inf
        most_tensors = _TENSORS_PER_TENSOR * len(self._checkpoint.weight_map) + _FREE_TENSORS
        return _ELEMENTS_PER_BYTE * held + self._free_elements, most_tensors
