"""Heads of trainers on Megatron: NeMo, slime, AReaL, and what verl exports from it.

Megatron puts a head where a language model has its output layer, so that only the shape tells which one it is: a head
has one row, an output layer has a row per token of the vocabulary.
"""

from collections.abc import Iterator

from vhead.checkpoints.checkpoint import Checkpoint
from vhead.formats.layout import HEAD_LIKE, Body, Format, LinearNames, Sighting, sightings

AREAL_FILE = "value_head.pt"

_LINEAR = LinearNames("weight", "bias", bias_optional=True)
_WITHOUT_BIAS = LinearNames("weight")
_WITH_BIAS = LinearNames("weight", "bias")

# Transformer Engine keeps something beside each module's weights, empty where nothing is in 8 bits.
_EXTRA_STATE = "_extra_state"


def _find_output_layer(checkpoint: Checkpoint) -> Iterator[Sighting]:
    for sighting in sightings(
        checkpoint, "output_layer", (_LINEAR,), "{root} has one row, where tokens would have many"
    ):
        if _is_head(checkpoint, sighting):
            yield _with_extra_state(sighting, f"{sighting.root}.{_EXTRA_STATE}")
    yield from _alone(checkpoint)


def _alone(checkpoint: Checkpoint) -> Iterator[Sighting]:
    """A module's own state dict, as AReaL saves that of the output layer: its names have no root."""
    if checkpoint.is_file:
        names = checkpoint.weight_map
        if names and names.keys() <= {"weight", "bias", _EXTRA_STATE}:
            root = next(iter(names.values()))
            yield _with_extra_state(
                Sighting(root, names, (_LINEAR,), "the file holds one projection, weight and bias"), _EXTRA_STATE
            )
    elif checkpoint.is_local and checkpoint.path(AREAL_FILE) is not None:
        reason = f"there is a file {AREAL_FILE}, in which the output layer lies alone"
        yield _with_extra_state(Sighting(AREAL_FILE, checkpoint.names_in(AREAL_FILE), (_LINEAR,), reason), _EXTRA_STATE)


def _find_verl(checkpoint: Checkpoint) -> Iterator[Sighting]:
    yield from sightings(checkpoint, "reward_head", (_WITHOUT_BIAS,), "{root} is what verl calls a reward model's head")
    # Looking at the shape opens a file, for nothing where the head is called a head.
    if any(HEAD_LIKE.search(name) for name in checkpoint.weight_map):
        return
    for sighting in sightings(
        checkpoint, "lm_head", (_WITHOUT_BIAS,), "{root} has one row, where tokens would have many"
    ):
        if _is_head(checkpoint, sighting):
            yield sighting


def _is_head(checkpoint: Checkpoint, sighting: Sighting) -> bool:
    weight = sighting.layers[0].weight
    if weight not in sighting.found or checkpoint.config.get("vocab_size") == 1:
        return False
    return checkpoint.shape(weight, sighting.found[weight])[:1] == (1,)


def _find_nemo(checkpoint: Checkpoint) -> Iterator[Sighting]:
    for sighting in sightings(checkpoint, "rm_head", (_WITH_BIAS,), "{root} is what NeMo calls a reward model's head"):
        yield _with_extra_state(sighting, f"{sighting.root}.{_EXTRA_STATE}")


def _with_extra_state(sighting: Sighting, name: str) -> Sighting:
    return Sighting(sighting.root, sighting.found, sighting.layers, sighting.reason, frozenset({name}))


MEGATRON = Format(
    name="megatron",
    frameworks="slime, AReaL (Megatron), NeMo-RL (Megatron), RLinf",
    find=_find_output_layer,
    layouts=((_LINEAR.below("output_layer"),),),
    notes=f"the head only; AReaL's `{AREAL_FILE}` names the same tensors `weight` and `bias`",
)

VERL_MEGATRON = Format(
    name="verl-megatron",
    frameworks="verl (Megatron), exported for transformers",
    find=_find_verl,
    layouts=((_WITHOUT_BIAS.below("lm_head"),),),
    body=Body(base_only=True, configure=lambda _head: {"tie_word_embeddings": False}),
    notes="told from a language model's head by its single row; `reward_head.weight` is read too",
)

NEMO = Format(
    name="nemo",
    frameworks="NeMo-Aligner",
    find=_find_nemo,
    layouts=((_WITH_BIAS.below("rm_head"),),),
    outputs=None,
    notes="the head only; K attributes; also from a `.nemo` archive with a single `model_weights.ckpt`",
)
