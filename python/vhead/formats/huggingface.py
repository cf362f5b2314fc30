"""The classification classes of transformers, which many trainers take for critics and reward models, and OpenRLHF."""

import re
from collections.abc import Iterator
from typing import Any

from vhead.checkpoints import ADAPTER_CONFIG
from vhead.checkpoints.checkpoint import Checkpoint
from vhead.errors import HeadFileError
from vhead.formats.head_settings import HeadSettings
from vhead.formats.layout import Body, Format, LinearNames, Sighting, architecture, sightings
from vhead.head_weights import HeadWeights

TOKEN_CLASSIFICATION = "ForTokenClassification"  # noqa: S105, the end of a class's name
SEQUENCE_CLASSIFICATION = "ForSequenceClassification"

OPENRLHF_CLASSES = ("RewardModel", "CriticModel")
_OPENRLHF_PREFIX = "score"
_OLDER_OPENRLHF_PREFIX = "value_head"

_LINEAR = LinearNames("weight", "bias", bias_optional=True)
_WITHOUT_BIAS = LinearNames("weight")


def _find_token_classification(checkpoint: Checkpoint) -> Iterator[Sighting]:
    name = architecture(checkpoint)
    reason = f"{{root}} is the projection of a {name or 'classification model'}"
    yield from sightings(checkpoint, "score", (_LINEAR,), reason)
    # Other classes call something else a classifier: a projection of pooled states, whose values would be wrong.
    if name.endswith(TOKEN_CLASSIFICATION):
        yield from sightings(checkpoint, "classifier", (_LINEAR,), reason)


def _find_sequence_classification(checkpoint: Checkpoint) -> Iterator[Sighting]:
    name = architecture(checkpoint)
    if name.endswith(SEQUENCE_CLASSIFICATION):
        yield from sightings(checkpoint, "score", (_LINEAR,), f"{{root}} is the projection of a {name}")


def _find_openrlhf(checkpoint: Checkpoint) -> Iterator[Sighting]:
    prefix = _value_head_prefix(checkpoint)
    if prefix is not None:
        reason = f"the configuration names {prefix} as value_head_prefix"
        yield from sightings(checkpoint, prefix, (_WITHOUT_BIAS,), reason)
    elif architecture(checkpoint) in OPENRLHF_CLASSES:
        reason = f"{{root}} is the projection of a {architecture(checkpoint)}"
        yield from sightings(checkpoint, _OPENRLHF_PREFIX, (_WITHOUT_BIAS,), reason)
    yield from sightings(
        checkpoint, _OLDER_OPENRLHF_PREFIX, (_WITHOUT_BIAS,), "{root} is what older OpenRLHF calls its projection"
    )


def _value_head_prefix(checkpoint: Checkpoint) -> str | None:
    prefix = checkpoint.config.get("value_head_prefix")
    if prefix is None or (isinstance(prefix, str) and re.fullmatch(r"[A-Za-z_]\w*", prefix)):
        return prefix
    raise HeadFileError(
        f"{checkpoint.describe('config.json')}: value_head_prefix: expected a module's name, got {prefix!r}"
    )


def _labels(head: HeadWeights) -> dict[str, Any]:
    names = [f"LABEL_{index}" for index in range(head.num_outputs)]
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        "num_labels": head.num_outputs,
    }


def _token_classification(head: HeadWeights) -> dict[str, Any]:
    labels = {**_labels(head), "token_classification_bias": True}
    # Several outputs of such a class are labels, unless the configuration says otherwise.
    is_regression = head.num_outputs > 1 and head.activation is None
    return {**labels, "problem_type": "regression"} if is_regression else labels


def _of_token_classification(checkpoint: Checkpoint, outputs: int) -> HeadSettings:
    """Whether a head gives labels, as TRL's PRMTrainer trains them: each token's, which a softmax makes probabilities.

    A classifier of sequences has labels too, and is never read at a token; a critic has one output.
    """
    config = checkpoint.config
    is_adapter = checkpoint.json_object(ADAPTER_CONFIG).get("task_type") == "TOKEN_CLS"
    is_classifier = architecture(checkpoint).endswith(TOKEN_CLASSIFICATION) or is_adapter
    if outputs > 1 and is_classifier and config.get("problem_type") != "regression":
        return HeadSettings(activation="softmax")
    return HeadSettings()


def _sequence_classification(head: HeadWeights) -> dict[str, Any]:
    # A server that sees one label and no problem type would put a sigmoid on it.
    return {**_labels(head), "problem_type": "regression"}


OPENRLHF = Format(
    name="openrlhf",
    frameworks="OpenRLHF",
    find=_find_openrlhf,
    layouts=((_WITHOUT_BIAS.below(_OPENRLHF_PREFIX),),),
    body=Body("RewardModel", base_only=True, configure=lambda _head: {"value_head_prefix": _OPENRLHF_PREFIX}),
    notes="`value_head_prefix` of the configuration is the module's name (`value_head` in older versions); "
    "`mean` and `std` of the configuration are kept",
)

SEQUENCE = Format(
    name="hf-sequence-classification",
    frameworks="TRL's RewardTrainer and PPOTrainer, ms-swift, verl, ROLL",
    find=_find_sequence_classification,
    layouts=((_WITHOUT_BIAS.below("score"),),),
    outputs=None,
    body=Body(SEQUENCE_CLASSIFICATION, base_only=True, configure=_sequence_classification),
    notes="K is `num_labels`",
)

TOKEN = Format(
    name="hf-token-classification",
    frameworks="TRL's PRMTrainer, verl (FSDP, VeOmni), AReaL (FSDP), ROLL",
    find=_find_token_classification,
    layouts=((_LINEAR.below("score"),),),
    outputs=None,
    body=Body(TOKEN_CLASSIFICATION, base_only=True, configure=_token_classification),
    settings=_of_token_classification,
    notes="K is `num_labels`; read also without a bias, and from `classifier`, as some classes call it; several labels "
    "are read by a softmax, unless `problem_type` is `regression`",
)
