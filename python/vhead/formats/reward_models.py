"""Heads of frameworks with a layout of their own: trlX, DeepSpeed-Chat, InternLM2, Qwen, ArmoRM, beaver."""

from collections.abc import Iterator, Mapping
from typing import Any

from vhead.checkpoints.checkpoint import Checkpoint
from vhead.formats.head_settings import HeadSettings
from vhead.formats.layout import Body, Format, LinearNames, Sighting, architecture, number, sightings
from vhead.head_weights import HeadWeights

_WITHOUT_BIAS = LinearNames("weight")
_TWO_LAYERS = (LinearNames("0.weight", "0.bias"), LinearNames("2.weight", "2.bias"))
_PROCESS_REWARD_MODEL = "ForProcessRewardModel"
_REGRESSION_LAYER = "regression_layer"
_REWARD_TRANSFORM = "reward_transform_matrix"
_VALUE_BRANCH = (LinearNames("lm_head.0.weight", "lm_head.0.bias"), LinearNames("lm_head.2.weight", "lm_head.2.bias"))


def _find_trlx(checkpoint: Checkpoint) -> Iterator[Sighting]:
    yield from sightings(checkpoint, "v_head", _TWO_LAYERS, "{root} holds two projections, 0 and 2", anywhere=True)
    for sighting in sightings(checkpoint, "v_head", _VALUE_BRANCH, "{root} is a branch of its own", anywhere=True):
        yield Sighting(
            sighting.root,
            sighting.found,
            sighting.layers,
            sighting.reason,
            refusal=f"{sighting.root} is a value branch with transformer blocks of its own "
            "(num_value_layers_unfrozen), which reads an earlier layer's states, not the last hidden state",
        )


def _find_internlm2(checkpoint: Checkpoint) -> Iterator[Sighting]:
    if architecture(checkpoint).startswith("InternLM"):
        reason = f"{{root}} is the projection of an {architecture(checkpoint)}"
        yield from sightings(checkpoint, "v_head", (_WITHOUT_BIAS,), reason)


def _find_deepspeed_chat(checkpoint: Checkpoint) -> Iterator[Sighting]:
    yield from sightings(checkpoint, "v_head", (_WITHOUT_BIAS,), "{root} is itself a projection", anywhere=True)


def _find_qwen(checkpoint: Checkpoint) -> Iterator[Sighting]:
    yield from sightings(checkpoint, "score", _TWO_LAYERS, "{root} holds two projections, 0 and 2")


def _of_qwen(checkpoint: Checkpoint, outputs: int) -> HeadSettings:
    """A process reward model gives the labels of each step; another one with several outputs gives rewards."""
    is_classifier = outputs > 1 and architecture(checkpoint).endswith(_PROCESS_REWARD_MODEL)
    return HeadSettings(activation="softmax" if is_classifier else None)


def _find_armorm(checkpoint: Checkpoint) -> Iterator[Sighting]:
    names = checkpoint.weight_map.keys()
    is_alone = checkpoint.is_file and names == _WITHOUT_BIAS.below(_REGRESSION_LAYER).required()
    if is_alone or architecture(checkpoint).endswith("ForRewardModelWithGating") or _REWARD_TRANSFORM in names:
        reason = "{root} is what reward models with a gate call their projection"
        yield from sightings(checkpoint, _REGRESSION_LAYER, (_WITHOUT_BIAS,), reason)


def _find_beaver(checkpoint: Checkpoint) -> Iterator[Sighting]:
    layers = (LinearNames("weight", "bias", bias_optional=True),)
    yield from sightings(checkpoint, "score_head", layers, "{root} is what safe-rlhf calls its projection")


def _beaver_statistics(checkpoint: Checkpoint) -> tuple[float | None, float | None]:
    """A reward is normalised by mean and deviation, a cost by the deviation alone, a critic's value not at all."""
    config = checkpoint.config
    kind = config.get("score_type", "reward")
    if not config.get("do_normalize") or kind == "critic":
        return None, None
    variance = _single(config, "var")
    mean = _single(config, "mean") if kind == "reward" else None
    return mean, variance**0.5 if variance is not None and variance >= 0 else None


def _single(config: Mapping[str, Any], name: str) -> float | None:
    """The number in a list of one; heads of several outputs have one for each, which nothing here asks for."""
    values = config.get(name)
    return number(values[0]) if isinstance(values, list) and len(values) == 1 else None


def _beaver(head: HeadWeights) -> dict[str, Any]:
    normalised = head.num_outputs == 1 and head.std is not None
    score = {"score_dim": head.num_outputs, "score_bias": True, "bias": True, "do_normalize": normalised}
    if not normalised or head.std is None:
        return score
    kind = "cost" if head.mean is None else "reward"
    return {**score, "score_type": kind, "mean": [head.mean or 0.0], "var": [head.std**2], "std": None}


TRLX = Format(
    name="trlx",
    frameworks="trlX, hydra models included",
    find=_find_trlx,
    layouts=(tuple(names.below("v_head") for names in _TWO_LAYERS),),
    intermediate=2,
    extras=("frozen_head.",),
    notes="I is 2H; a checkpoint's own names begin with `base_model.`; value branches with blocks of their own "
    "(`num_value_layers_unfrozen`) are refused",
)

INTERNLM2 = Format(
    name="internlm2",
    frameworks="InternLM2 reward models",
    find=_find_internlm2,
    layouts=((_WITHOUT_BIAS.below("v_head"),),),
    notes="told from DeepSpeed-Chat's by the configuration",
)

DEEPSPEED_CHAT = Format(
    name="deepspeed-chat",
    frameworks="DeepSpeed-Chat, trlX's reward model example",
    find=_find_deepspeed_chat,
    layouts=((_WITHOUT_BIAS.below("v_head"),),),
    notes="a checkpoint's own names begin with `rwtransformer.` (`rwtranrsformer.` in older versions)",
)

QWEN = Format(
    name="qwen",
    frameworks="Qwen2 and Qwen3 ForRewardModel and ForProcessRewardModel",
    find=_find_qwen,
    layouts=(tuple(names.below("score") for names in _TWO_LAYERS),),
    outputs=None,
    intermediate=1,
    body=Body(
        "ForRewardModel",
        base_only=True,
        configure=lambda head: {"num_labels": head.num_outputs},
        classifier=_PROCESS_REWARD_MODEL,
    ),
    settings=_of_qwen,
    notes="I is H, K is `num_labels`; the labels of a `ForProcessRewardModel` are read by a softmax",
)

ARMORM = Format(
    name="armorm",
    frameworks="ArmoRM, and other reward models with gating",
    find=_find_armorm,
    layouts=((_WITHOUT_BIAS.below(_REGRESSION_LAYER),),),
    outputs=None,
    extras=("gating.", _REWARD_TRANSFORM),
    notes="K objectives, 19 of ArmoRM; the gate that mixes them into one reward is not read",
)

BEAVER = Format(
    name="beaver",
    frameworks="safe-rlhf (beaver)",
    find=_find_beaver,
    layouts=((LinearNames("score_head.weight", "score_head.bias", bias_optional=True),),),
    outputs=None,
    body=Body("ForScore", base_only=True, configure=_beaver),
    statistics=_beaver_statistics,
    extras=("normalizer.",),
    notes="K is `score_dim`; `mean` and `var` of the configuration give mean and std where `do_normalize` is on",
)
