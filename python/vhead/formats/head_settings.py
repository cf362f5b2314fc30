"""What belongs to a head and is no weight, its support and its activation: where they are kept beside the weights.

A safetensors file of a head alone has them in its metadata, a checkpoint with a language model in its configuration.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from vhead.checkpoints.checkpoint import Checkpoint
from vhead.errors import HeadError, HeadFileError
from vhead.support import Support

SUPPORT, ACTIVATION = "v_head_support", "v_head_activation"

_METADATA = "v_head"
_HEAD = "v_head."


class HeadSettings(NamedTuple):
    """What a checkpoint states about its head.

    Attributes:
        support: The support of a distributional head, or None.
        activation: "softmax" for a classifier of each state, or None.
    """

    support: Support | None = None
    activation: Literal["softmax"] | None = None


class WithSettings(Protocol):
    """A head, as weights or as a module."""

    @property
    def support(self) -> Support | None:
        """The support of a distributional head, or None."""

    @property
    def activation(self) -> Literal["softmax"] | None:
        """What the outputs of a classifier are read by, or None."""


def in_metadata(head: WithSettings) -> dict[str, str]:
    """The entries of a safetensors file's metadata for a head; none for one that is its weights alone."""
    settings = in_config(head)
    return {_METADATA: json.dumps(settings)} if settings else {}


def in_config(head: WithSettings) -> dict[str, Any]:
    """The entries of a configuration for a head; none for one that is its weights alone."""
    settings = {SUPPORT: None if head.support is None else head.support.settings(), ACTIVATION: head.activation}
    return {name: value for name, value in settings.items() if value is not None}


def from_metadata(checkpoint: Checkpoint, file: str) -> HeadSettings:
    """What the metadata of a file states about the head in it.

    Raises:
        HeadFileError: It states something else than a support and an activation.
    """
    text, source = checkpoint.metadata(file).get(_METADATA), checkpoint.describe(file)
    if text is None:
        return HeadSettings()
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeadFileError(f"{source}: metadata {_METADATA}: expected a JSON object, got: {error!r}") from error
    if not isinstance(settings, dict):
        raise HeadFileError(f"{source}: metadata {_METADATA}: expected a JSON object, got a {type(settings).__name__}")
    return _checked(settings, source)


def from_config(checkpoint: Checkpoint) -> HeadSettings:
    """What the configuration of a checkpoint states about its head; that of a model's file lies beside it.

    Raises:
        HeadFileError: It states something else than a support and an activation.
    """
    # A file of a head alone may lie beside anything.
    if checkpoint.is_file and not all(_HEAD in name for name in checkpoint.weight_map):
        checkpoint = Checkpoint(str(Path(checkpoint.location).parent))
    return _checked(checkpoint.config, checkpoint.describe("config.json"))


def _checked(settings: Mapping[str, Any], source: str) -> HeadSettings:
    support, activation = settings.get(SUPPORT), settings.get(ACTIVATION)
    if activation not in (None, "softmax"):
        raise HeadFileError(f'{source}: {ACTIVATION}: expected null or "softmax", got {activation!r:.100}')
    if support is None:
        return HeadSettings(activation=activation)
    if activation is not None:
        raise HeadFileError(f"{source}: {ACTIVATION}: expected null beside a {SUPPORT}, got {activation!r}")
    try:
        return HeadSettings(Support.from_settings(support, f"{source}: {SUPPORT}"))
    except HeadError as error:
        raise HeadFileError(str(error)) from error
