"""What every format is made of: where its tensors are found, how they are checked and read, what it can hold."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vhead.checkpoints.checkpoint import Checkpoint
from vhead.errors import HeadFileError, HeadMismatchError
from vhead.formats.head_settings import HeadSettings, from_metadata
from vhead.head_weights import HeadWeights, LinearWeights

# What compilers and trainers wrap around any module leaves its name wherever such a module is.
_PRIVATE_WRAPPERS = ("_checkpoint_wrapped_module", "_forward_module", "_fsdp_wrapped_module", "_orig_mod")
# What a trainer calls the model beside its policy, in a checkpoint that has both.
CRITICS = ("critic", "value_model")
# What is wrapped around a model leaves its name before the names of the model's tensors.
WRAPPERS = (
    *_PRIVATE_WRAPPERS,
    *CRITICS,
    "actor",
    "base_model",
    "model",
    "module",
    "policy",
    "pretrained_model",
)
PRIVATE_WRAPPER = re.compile(rf"(?<![^.])(?:(?:{'|'.join(_PRIVATE_WRAPPERS)})\.)+")
_WRAPPED = rf"(?:(?:{'|'.join(WRAPPERS)})\.)*"
_ANYTHING = r"(?:.+\.)?"

# Names that only a head has, wherever it is, and some that others have too, unless only wrappers are around them.
HEAD_LIKE = re.compile(
    r"(?:^|\.)(?:v|values?|rewards?|rm|critic|score|rank|ranking|regression|regressor|preference)_?heads?(?:\.|$)"
    rf"|^{_WRAPPED}score(?:\.|$)"
    rf"|^{_WRAPPED}(?:values?|rewards?|critic|scorer|ranker|ranking|regression|regressor)"
    r"(?:_(?:fc|function|layers?|linear|net|out|output|predictor|proj|projection))?"
    r"(?:\.(?:dense|fc|layers|linear|mlp|net|out|out_proj|proj|summary|[0-9]+))*\.(?:weight|bias)$"
)

# Two gigabytes as float32; two projections of today's widest models have half as many.
_MOST_ELEMENTS = 1 << 29

_FLOATS = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")


@dataclass(frozen=True)
class Detection:
    """What `detect` found, from names and shapes alone.

    Attributes:
        format: The format's name.
        reason: Why it is that one, in one sentence.
        tensors: The names of the head's tensors, sorted.
        body_prefix: What stands before the language model's own names: "" or for instance "pretrained_model.".
    """

    format: str
    reason: str
    tensors: tuple[str, ...]
    body_prefix: str


@dataclass(frozen=True)
class LinearNames:
    """The names of one projection's tensors.

    Attributes:
        weight: The weight's.
        bias: The bias's, or None where there is never one.
        bias_optional: Whether a head without the bias is one all the same.
    """

    weight: str
    bias: str | None = None
    bias_optional: bool = False

    def below(self, root: str) -> "LinearNames":
        """The same names inside the module `root`."""
        return LinearNames(f"{root}.{self.weight}", self.bias and f"{root}.{self.bias}", self.bias_optional)

    def required(self) -> set[str]:
        """The names that must be there."""
        return {self.weight} if self.bias is None or self.bias_optional else {self.weight, self.bias}

    def possible(self) -> set[str]:
        """The names that may be there."""
        return {self.weight} if self.bias is None else {self.weight, self.bias}


@dataclass(frozen=True)
class Sighting:
    """Tensors of a checkpoint that a format takes for its head.

    Attributes:
        root: The module that they belong to, unique in the checkpoint: `v_head`, `pretrained_model.v_head`.
        found: Every tensor of that module and its file, those that do not belong there included.
        layers: The full names that the format expects.
        reason: Why the format takes them for its head, in one sentence.
        ignored: Names that may be there too and hold no weights.
        refusal: Why this head cannot be read, or nothing.
    """

    root: str
    found: Mapping[str, str]
    layers: tuple[LinearNames, ...]
    reason: str
    ignored: frozenset[str] = frozenset()
    refusal: str = ""


@dataclass(frozen=True)
class Body:
    """How a format keeps the language model around its head.

    Attributes:
        architecture: The class in the configuration: a name, or "For..." for one that begins with the model's name.
        base_only: Whether the language-model head is left out.
        head_file: The file of its own that the head goes to, or None where it is merged into the model's.
        configure: What the head changes in the configuration.
        classifier: The class for a head that is read by a softmax, where it is another one.
    """

    architecture: str = "ForCausalLM"
    base_only: bool = False
    head_file: str | None = None
    configure: Callable[[HeadWeights], dict[str, Any]] = lambda _head: {}
    classifier: str | None = None

    def architecture_for(self, head: HeadWeights) -> str:
        """The class in the configuration for a head: a name, or "For..." for one that begins with the model's name."""
        return self.architecture if head.activation is None else self.classifier or self.architecture


def stated_statistics(checkpoint: Checkpoint) -> tuple[float | None, float | None]:
    """The configuration's `mean` and `std`, where OpenRLHF states how to normalise rewards; conversions keep them."""
    config = checkpoint.config
    return number(config.get("mean")), number(config.get("std"))


def number(value: object) -> float | None:
    """A finite number, or None for anything else that a file may hold in its place."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def nothing_stated(_checkpoint: Checkpoint, _outputs: int) -> HeadSettings:
    """No settings: what a format states that has nothing beside a head's weights."""
    return HeadSettings()


@dataclass(frozen=True)
class Format:
    """One framework's way to store a head.

    Attributes:
        name: Its name in messages and on the command line.
        frameworks: Who writes it.
        find: Lists the sightings in a checkpoint, from names, shapes and the configuration alone.
        layouts: The names of the head's tensors as the framework writes them, for each number of projections.
        outputs: How many outputs a head may have; None: any number.
        intermediate: Between two projections, the multiple of H that the framework builds; None: any number.
        body: How a whole checkpoint is written; None: the head can be written, the language model cannot.
        statistics: Reads the mean and standard deviation of the rewards.
        settings: Reads what the checkpoint states about a head with so many outputs beside its weights; the metadata of
            the head's own file, where it says something, counts in its place.
        extras: The beginnings of the names of tensors that are neither the head's nor the language model's.
        notes: What else there is to know, for the documentation.
    """

    name: str
    frameworks: str
    find: Callable[[Checkpoint], Iterable[Sighting]]
    layouts: tuple[tuple[LinearNames, ...], ...]
    outputs: int | None = 1
    intermediate: int | None = None
    body: Body | None = None
    statistics: Callable[[Checkpoint], tuple[float | None, float | None]] = stated_statistics
    settings: Callable[[Checkpoint, int], HeadSettings] = nothing_stated
    extras: tuple[str, ...] = ()
    notes: str = ""

    @property
    def expected(self) -> str:
        """The tensors of a head of this format, for messages."""
        return " or ".join(expected_tensors(layers, self.outputs) for layers in self.layouts)


def expected_tensors(layers: Sequence[LinearNames], outputs: int | None) -> str:
    """The names and shapes of a head's tensors, for messages."""
    between = ["I"] if len(layers) == 2 else [f"I{place}" for place in range(1, len(layers))]
    sizes = [*between, outputs or "K"]
    return ", ".join(
        part
        for names, size, width in zip(layers, sizes, ["H", *between], strict=True)
        for part in (
            f"{names.weight} [{size}, {width}]",
            *([f"{names.bias} [{size}]{' (optional)' if names.bias_optional else ''}"] if names.bias else []),
        )
    )


def architecture(checkpoint: Checkpoint) -> str:
    """The class that the configuration names, or nothing."""
    names = checkpoint.config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def sightings(
    checkpoint: Checkpoint,
    container: str,
    layers: tuple[LinearNames, ...],
    reason: str,
    *,
    anywhere: bool = False,
) -> Iterator[Sighting]:
    """The modules called `container` that hold at least one tensor of a head with these layers.

    Args:
        checkpoint: Where to look.
        container: The module's name.
        layers: The tensors' names inside the module.
        reason: A sentence; `{root}` in it is the module's full name.
        anywhere: Whether any module may be around it, or only what wraps models.
    """
    pattern = re.compile(rf"({_ANYTHING if anywhere else _WRAPPED}{re.escape(container)})\.(.+)")
    modules: dict[str, dict[str, str]] = {}
    for name, file in checkpoint.weight_map.items():
        if match := pattern.fullmatch(name):
            modules.setdefault(match.group(1), {})[name] = file
    for root, found in modules.items():
        named = tuple(names.below(root) for names in layers)
        if any(names.possible() & found.keys() for names in named):
            yield Sighting(root, found, named, reason.format(root=root))


def read(checkpoint: Checkpoint, sighting: Sighting, head_format: Format) -> HeadWeights:
    """Reads a head after everything about it that headers tell has been checked.

    Raises:
        HeadMismatchError: A tensor is missing or one too many, or has another shape or dtype than a head's.
        HeadFileError: A file is broken, or a tensor in it is not finite.
    """
    check_fits(checkpoint, sighting, head_format)
    mean, std = head_format.statistics(checkpoint)
    support, activation = _settings(checkpoint, sighting, head_format)
    file = sighting.found[sighting.layers[0].weight]
    return HeadWeights(
        layers=tuple(_read_layer(checkpoint, sighting, names) for names in sighting.layers),
        format=head_format.name,
        source=f"{checkpoint.describe(file)} ({head_format.name})",
        mean=mean,
        std=std,
        support=support,
        activation=activation,
    )


def _settings(checkpoint: Checkpoint, sighting: Sighting, head_format: Format) -> HeadSettings:
    last = sighting.layers[-1].weight
    outputs = checkpoint.shape(last, sighting.found[last])[0]
    stated = from_metadata(checkpoint, sighting.found[last])
    return stated if any(stated) else head_format.settings(checkpoint, outputs)


def check_fits(checkpoint: Checkpoint, sighting: Sighting, head_format: Format) -> None:
    """Checks names, shapes and dtypes.

    Raises:
        HeadMismatchError: They are not those of a head of this format.
    """
    if sighting.refusal:
        raise HeadMismatchError(f"{checkpoint.location}: {sighting.refusal}")
    expected = expected_tensors(sighting.layers, head_format.outputs)
    required = {name for names in sighting.layers for name in names.required()}
    possible = {name for names in sighting.layers for name in names.possible()} | sighting.ignored
    if not required <= sighting.found.keys() <= possible:
        raise mismatch(checkpoint, sighting.found, expected)
    width: int | None = None
    for names in sighting.layers:
        shape = checkpoint.shape(names.weight, sighting.found[names.weight])
        fits = len(shape) == 2 and min(shape) > 0 and width in (None, shape[1]) and math.prod(shape) <= _MOST_ELEMENTS
        if fits and names.bias is not None and names.bias in sighting.found:
            fits = checkpoint.shape(names.bias, sighting.found[names.bias]) == shape[:1]
        if not fits:
            raise mismatch(checkpoint, sighting.found, expected)
        width = shape[0]
    if head_format.outputs not in (None, width):
        raise mismatch(checkpoint, sighting.found, expected)
    _check_dtypes(checkpoint, sighting)
    support = _settings(checkpoint, sighting, head_format).support
    if support is not None and support.bins != width:
        raise HeadMismatchError(
            f"{checkpoint.location}: the checkpoint states a support of {support.bins} bins for a head of {width} "
            f"outputs: found {sighting.layers[-1].weight}, expected as many outputs as bins"
        )


def mismatch(checkpoint: Checkpoint, found: Mapping[str, str], expected: str) -> HeadMismatchError:
    """The error for something like a head that does not fit."""
    listing = ", ".join(f"{name} {list(checkpoint.shape(name, file))}" for name, file in sorted(found.items()))
    return HeadMismatchError(
        f"{checkpoint.location}: the checkpoint holds something like a value head that does not fit: "
        f"found {listing or 'nothing'}; expected {expected}. "
        "If you want a new head all the same, load the language model yourself and pass that object."
    )


def _check_dtypes(checkpoint: Checkpoint, sighting: Sighting) -> None:
    for name in sorted(sighting.found.keys() - sighting.ignored):
        dtype = checkpoint.info(name, sighting.found[name]).dtype
        if dtype not in _FLOATS:
            raise HeadMismatchError(
                f"{checkpoint.describe(sighting.found[name])}: {name}: "
                f"expected a floating-point dtype of 16 to 64 bits, got {dtype}"
            )


def _read_layer(checkpoint: Checkpoint, sighting: Sighting, names: LinearNames) -> LinearWeights:
    weight = _read_finite(checkpoint, names.weight, sighting.found[names.weight])
    if names.bias is None or names.bias not in sighting.found:
        return LinearWeights(weight)
    return LinearWeights(weight, _read_finite(checkpoint, names.bias, sighting.found[names.bias]))


def _read_finite(checkpoint: Checkpoint, name: str, file_name: str) -> Tensor:
    tensor = checkpoint.read(name, file_name).to(torch.float32)
    if not tensor.isfinite().all():
        raise HeadFileError(f"{checkpoint.describe(file_name)}: {name}: expected finite weights, found NaN or infinity")
    return tensor
