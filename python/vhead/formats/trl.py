"""TRL's layout, LLaMA-Factory's file of it, and what this package writes for heads that TRL has no names for."""

from collections.abc import Iterator

from vhead.checkpoints.checkpoint import Checkpoint
from vhead.formats.head_settings import from_config, in_config
from vhead.formats.layout import Body, Format, LinearNames, Sighting, sightings

WEIGHT_KEY = "v_head.summary.weight"
BIAS_KEY = "v_head.summary.bias"

LLAMA_FACTORY_FILES = ("value_head.safetensors", "value_head.bin")

_SUMMARY = LinearNames("summary.weight", "summary.bias")
_TWO_LAYERS = (
    LinearNames("summary.0.weight", "summary.0.bias"),
    LinearNames("summary.2.weight", "summary.2.bias"),
)
_REASON = "{root} holds a projection called summary"
_TWO_LAYERS_REASON = "{root}.summary holds two projections, 0 and 2"


def _find_trl(checkpoint: Checkpoint) -> Iterator[Sighting]:
    for sighting in sightings(checkpoint, "v_head", (_SUMMARY,), _REASON, anywhere=True):
        if not _has_several_outputs(checkpoint, sighting):
            yield sighting


def _find_vhead(checkpoint: Checkpoint) -> Iterator[Sighting]:
    for sighting in sightings(checkpoint, "v_head", (_SUMMARY,), _REASON + " of several outputs", anywhere=True):
        if _has_several_outputs(checkpoint, sighting):
            yield sighting
    yield from sightings(checkpoint, "v_head", _TWO_LAYERS, _TWO_LAYERS_REASON, anywhere=True)
    yield from (found for found in _in_head_file(checkpoint) if _is_ours(checkpoint, found))


def _find_llama_factory(checkpoint: Checkpoint) -> Iterator[Sighting]:
    """LLaMA-Factory splits the head into a file of its own, beside the model or the adapter, and so reads it."""
    yield from (found for found in _in_head_file(checkpoint) if not _is_ours(checkpoint, found))


def _in_head_file(checkpoint: Checkpoint) -> Iterator[Sighting]:
    file = next((name for name in LLAMA_FACTORY_FILES if checkpoint.path(name) is not None), None)
    if file is not None and not checkpoint.is_file:
        found = checkpoint.names_in(file)
        layers = _TWO_LAYERS if any(names.below("v_head").weight in found for names in _TWO_LAYERS) else (_SUMMARY,)
        names = tuple(names.below("v_head") for names in layers)
        yield Sighting(file, found, names, f"there is a file {file}, in which heads lie alone")


def _is_ours(checkpoint: Checkpoint, sighting: Sighting) -> bool:
    """Whether the head is one that TRL has no names for."""
    return len(sighting.layers) > 1 or _has_several_outputs(checkpoint, sighting)


def _has_several_outputs(checkpoint: Checkpoint, sighting: Sighting) -> bool:
    weight = sighting.layers[0].weight
    if weight not in sighting.found:
        return False
    shape = checkpoint.shape(weight, sighting.found[weight])
    return len(shape) == 2 and shape[0] > 1


TRL = Format(
    name="trl",
    frameworks="TRL 0.9 to 1.12, ROLL, Skywork's PRMs, and this package",
    find=_find_trl,
    layouts=((_SUMMARY.below("v_head"),),),
    body=Body(),
    notes="merged into the model's weights; beside an adapter, alone in `pytorch_model.bin`",
)

LLAMA_FACTORY = Format(
    name="llama-factory",
    frameworks="LLaMA-Factory, ROLL",
    find=_find_llama_factory,
    layouts=((LinearNames(WEIGHT_KEY, BIAS_KEY),),),
    body=Body(head_file=LLAMA_FACTORY_FILES[0]),
    notes="in `value_head.safetensors` or, where there is none, `value_head.bin`, beside the model or the adapter",
)

VHEAD = Format(
    name="vhead",
    frameworks="this package",
    find=_find_vhead,
    layouts=((_SUMMARY.below("v_head"),), tuple(names.below("v_head") for names in _TWO_LAYERS)),
    outputs=None,
    body=Body(configure=in_config),
    settings=lambda checkpoint, _outputs: from_config(checkpoint),
    notes="TRL's names for heads of several outputs; with two projections, `summary.0` and `summary.2`; the support of "
    "a distributional head (K is its number of bins) and the softmax of a classifier are in the configuration, or "
    "where a file holds the head alone, in its metadata",
)
