"""The formats in the order in which they are tried, and how one of them is chosen for a checkpoint."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch

from vhead.checkpoints.checkpoint import Checkpoint, LocationArguments
from vhead.errors import HeadError, HeadMismatchError, HeadNotFoundError
from vhead.formats.critics import UNIRL, XTUNER
from vhead.formats.huggingface import OPENRLHF, SEQUENCE, TOKEN
from vhead.formats.layout import CRITICS, HEAD_LIKE, WRAPPERS, Detection, Format, Sighting, check_fits, mismatch, read
from vhead.formats.megatron import MEGATRON, NEMO, VERL_MEGATRON
from vhead.formats.reward_models import ARMORM, BEAVER, DEEPSPEED_CHAT, INTERNLM2, QWEN, TRLX
from vhead.formats.trl import LLAMA_FACTORY, TRL, VHEAD
from vhead.head_weights import HeadWeights

# Where two formats claim the same tensors, the first one in this order has them: those that a configuration tells apart
# stand before those that names alone do.
FORMATS: tuple[Format, ...] = (
    TRL,
    VHEAD,
    LLAMA_FACTORY,
    TRLX,
    INTERNLM2,
    DEEPSPEED_CHAT,
    XTUNER,
    UNIRL,
    OPENRLHF,
    QWEN,
    SEQUENCE,
    TOKEN,
    ARMORM,
    BEAVER,
    NEMO,
    MEGATRON,
    VERL_MEGATRON,
)

# The modules around a language model whose names transformers does not take off again; `model` is one of its own.
_BODY_WRAPPERS = frozenset({*WRAPPERS, "rwtransformer", "rwtranrsformer"} - {"model"})

# Files beside a model that hold a head, or a whole critic, and are read only where somebody names them.
_HEAD_FILE = re.compile(
    r".+\.nemo|model_optim_rng\.pt|(?!.*(?:optim|sched|rng|scaler))(?:.+[_.-])?"
    r"(?:v|values?|rewards?|rm|critic|score|rank|ranking|regression)(?:[_-]?(?:heads?|layer|model))?"
    r"(?:[_.-][\w.-]*)?\.(?:bin|ckpt|pt|pth|safetensors)"
)


def find_head(location: str | Path, **options: Unpack[LocationArguments]) -> HeadWeights | None:
    """Finds the trained value head of a checkpoint and reads its tensors, nothing else.

    Args:
        location: A folder, one file, or a hub repository's id; an existing path is never looked up on the hub.
        **options: Those of `vhead.checkpoints.checkpoint.LocationArguments`, as `from_pretrained` takes them.

    Returns:
        The head, or None for a plain language model that holds nothing like one.

    Raises:
        HeadMismatchError: The checkpoint holds something like a head that fits no known format, or more than one.
        HeadFileError: A file is truncated, malformed or hostile.
    """
    checkpoint = Checkpoint(location, **options)
    choice = choose(checkpoint)
    return read(checkpoint, choice[1], choice[0]) if choice else None


def load(path: str | Path, *, format: str | None = None, **options: Unpack[LocationArguments]) -> HeadWeights:
    """Reads the trained head of a checkpoint in any format.

    Args:
        path: A folder, one file, or a hub repository's id; an existing path is never looked up on the hub.
        format: The name of the only format to try. None: the one that the checkpoint shows signs of.
        **options: Those of `vhead.checkpoints.checkpoint.LocationArguments`, as `from_pretrained` takes them.

    Returns:
        Float32 weights, whatever the file's dtype, and where they are from.

    Raises:
        HeadNotFoundError: There is nothing like a head.
        HeadMismatchError: There is something like a head that fits no known format, or more than one head.
        HeadFileError: A file is truncated, malformed or hostile, or its weights are not finite.
        HeadError: There is no format of that name.
    """
    checkpoint = Checkpoint(path, **options)
    head_format, sighting = chosen(checkpoint, format)
    return read(checkpoint, sighting, head_format)


def detect(path: str | Path, *, format: str | None = None, **options: Unpack[LocationArguments]) -> Detection:
    """Says in which format a checkpoint's head is and why, from names, shapes and dtypes; no weights are read.

    Args and errors are those of `load`.
    """
    checkpoint = Checkpoint(path, **options)
    return detection_of(checkpoint, *chosen(checkpoint, format))


def detection_of(checkpoint: Checkpoint, head_format: Format, sighting: Sighting) -> Detection:
    """Describes a sighting that fits its format."""
    check_fits(checkpoint, sighting, head_format)
    return Detection(
        format=head_format.name,
        reason=f"{sighting.reason}, which makes it {head_format.name}",
        tensors=tuple(sorted(sighting.found.keys() - sighting.ignored)),
        body_prefix=body_prefix(body_names(checkpoint, head_format, sighting)),
    )


def format_named(name: str) -> Format:
    """The format that has this name.

    Raises:
        HeadError: There is none.
    """
    for head_format in FORMATS:
        if head_format.name == name:
            return head_format
    raise HeadError(f"format: expected one of {', '.join(known.name for known in FORMATS)}, got {name!r}")


def chosen(checkpoint: Checkpoint, name: str | None = None) -> tuple[Format, Sighting]:
    """The format of a checkpoint and what it takes for the head.

    Raises:
        HeadNotFoundError: There is nothing like a head.
        HeadMismatchError: There is something like a head that fits no known format, or more than one head.
        HeadError: There is no format of that name.
    """
    choice = choose(checkpoint, name)
    if choice is None:
        kind = "a trained value head" if name is None else f"a value head in the format {name}"
        raise HeadNotFoundError(f"{checkpoint.location}: expected {kind}, found none")
    return choice


def choose(checkpoint: Checkpoint, name: str | None = None) -> tuple[Format, Sighting] | None:
    """Chooses as `chosen` does, and gives None if there is nothing like a head."""
    candidates: dict[str, tuple[Format, Sighting]] = {}
    for head_format in FORMATS if name is None else (format_named(name),):
        for sighting in head_format.find(checkpoint):
            # The first format in the table's order keeps the tensors that a later one claims too.
            candidates.setdefault(sighting.root, (head_format, sighting))
    if len(candidates) > 1 and not _are_the_same(checkpoint, list(candidates.values())):
        raise _ambiguous(checkpoint, candidates)
    if candidates:
        return next(iter(candidates.values()))
    suspects = {tensor: file for tensor, file in checkpoint.weight_map.items() if HEAD_LIKE.search(tensor)}
    if suspects:
        expected = TRL.expected if name is None else format_named(name).expected
        raise mismatch(checkpoint, suspects, f"{expected}, or another format's names")
    _check_files(checkpoint)
    return None


def _check_files(checkpoint: Checkpoint) -> None:
    """Refuses a folder with a head in a file of its own that no format knows by its name."""
    folder = Path(checkpoint.location)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = sorted(name for name in names if _HEAD_FILE.fullmatch(name))
    if found:
        raise HeadMismatchError(
            f"{folder}: expected a head among the model's tensors and found none there, but {', '.join(found)} may "
            "hold one; name that file itself, head=... (--head), or move it out of the folder"
        )


def body_names(checkpoint: Checkpoint, head_format: Format, sighting: Sighting) -> list[str]:
    """The names of the language model's own tensors: those of the critic, where a policy lies beside it."""
    others = head_format.extras
    names = [name for name in checkpoint.weight_map if name not in sighting.found and not name.startswith(others)]
    parts = sighting.root.split(".")
    critic = next((index for index, part in enumerate(parts[:-1]) if part in CRITICS), None)
    prefix = "" if critic is None else ".".join([*parts[: critic + 1], ""])
    return [name for name in names if name.startswith(prefix)] or names


def body_prefix(names: Sequence[str]) -> str:
    """What stands before every name of a language model's tensors, and transformers does not expect there."""
    prefix = ""
    while names:
        first = names[0].removeprefix(prefix).partition(".")[0]
        if first not in _BODY_WRAPPERS or not all(name.startswith(f"{prefix}{first}.") for name in names):
            break
        prefix += f"{first}."
    return prefix


def _are_the_same(checkpoint: Checkpoint, candidates: list[tuple[Format, Sighting]]) -> bool:
    """Whether the candidates are copies of one head, as an adapter's folder may hold one in each of two files."""
    first, *others = (read(checkpoint, sighting, head_format) for head_format, sighting in candidates)
    return all(same_weights(first, other) for other in others)


def same_weights(one: HeadWeights, other: HeadWeights) -> bool:
    """Whether two heads have the same weights and support, a bias of zeros counting as none."""
    shapes = [[layer.weight.shape for layer in head.layers] for head in (one, other)]
    pairs = zip(one.layers, other.layers, strict=False)
    return (
        shapes[0] == shapes[1]
        and one.support == other.support
        and all(torch.equal(a.weight, b.weight) and torch.equal(a.bias_or_zeros, b.bias_or_zeros) for a, b in pairs)
    )


def _ambiguous(checkpoint: Checkpoint, candidates: dict[str, tuple[Format, Sighting]]) -> HeadMismatchError:
    listing = "; ".join(f"{root} ({head_format.name}: {s.reason})" for root, (head_format, s) in candidates.items())
    return HeadMismatchError(
        f"{checkpoint.location}: expected one value head, found {len(candidates)}: {listing}. "
        "Say which format you mean (format=... of vhead.formats.load, --from of vhead convert), or remove the other"
    )
