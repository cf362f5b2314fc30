"""Critics of trainers that put a head of their own beside a causal language model: xtuner, UniRL."""

from collections.abc import Iterator

from vhead.checkpoints.checkpoint import Checkpoint
from vhead.formats.huggingface import OPENRLHF_CLASSES
from vhead.formats.layout import Body, Format, LinearNames, Sighting, architecture, sightings

_VALUE_HEAD = "value_head"
_LINEAR = LinearNames("weight", "bias", bias_optional=True)
_PROJECTION = LinearNames("proj.weight", "proj.bias")


def _find_xtuner(checkpoint: Checkpoint) -> Iterator[Sighting]:
    """Older OpenRLHF has the same name, without a bias and in classes of its own."""
    name = architecture(checkpoint)
    for sighting in sightings(checkpoint, _VALUE_HEAD, (_LINEAR,), "{root} is a projection beside a language model"):
        has_bias = f"{sighting.root}.{_LINEAR.bias}" in sighting.found
        if has_bias or not (name in ("", *OPENRLHF_CLASSES) or "value_head_prefix" in checkpoint.config):
            yield sighting


def _find_unirl(checkpoint: Checkpoint) -> Iterator[Sighting]:
    yield from sightings(checkpoint, _VALUE_HEAD, (_PROJECTION,), "{root} holds a projection called proj")


XTUNER = Format(
    name="xtuner",
    frameworks="xtuner",
    find=_find_xtuner,
    layouts=((_LINEAR.below(_VALUE_HEAD),),),
    body=Body(base_only=True),
    notes="in the place of the language-model head; told from older OpenRLHF's by the class in the configuration",
)

UNIRL = Format(
    name="unirl",
    frameworks="UniRL",
    find=_find_unirl,
    layouts=((_PROJECTION.below(_VALUE_HEAD),),),
    body=Body(),
    notes="beside the language-model head; float32, and zeros before it is trained",
)
