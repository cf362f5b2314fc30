"""The language model of a checkpoint: with which class and arguments it is loaded, and what the checkpoint lacked."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from vhead.backbone.hidden_states import without_adapter
from vhead.checkpoints import ADAPTER_CONFIG
from vhead.checkpoints.checkpoint import Checkpoint, LocationArguments, quiet_about
from vhead.checkpoints.config_bounds import bounded_by, check_config, is_layer_count
from vhead.errors import AdapterError, BodyMismatchError, HeadMismatchError, LoadError, loading
from vhead.formats import VERL_MEGATRON, HeadWeights
from vhead.formats import load as load_head
from vhead.formats.layout import CRITICS, HEAD_LIKE, PRIVATE_WRAPPER, mismatch, read
from vhead.formats.registry import body_prefix, choose, detection_of
from vhead.heads import HeadArguments, hidden_size_of
from vhead.modeling import adapters
from vhead.modeling.auto_classes import class_for, stated_config

logger = logging.getLogger("vhead")

# Whether transformers looks up every tensor of a checkpoint in the device map, also those that are not the model's.
_PLACES_EVERY_TENSOR = Version(transformers.__version__) < Version("4.57")

# Whether transformers renames a checkpoint's weights before it looks for its own prefix in them.
_MAPS_NAMES = Version(transformers.__version__) >= Version("5")

# The numbers of layers in the names of tensors.
_NUMBERS = re.compile(r"(?<![^.])[0-9]+(?=\.)")

# The parts of a head's names that stand below the module which is the head.
_BELOW_HEAD = re.compile(r"summary|proj|[0-9]+")

# The prefix of the language model's names in `vhead.modeling.pretrained`'s checkpoints, and in raw saves of a wrapper.
_BODY_OF_PRETRAINED = "pretrained_model."

# What a base model has in common with an adapter that was trained on it: the place of neither.
_SHARED_LOCATION = ("cache_dir", "force_download", "local_files_only", "token")
# What tells apart the files of one model: an adapter has none of it.
_OF_MODEL_FILES = frozenset({"use_safetensors", "variant"})

# What asks for a quantised model without a configuration of its quantisation; transformers 5 takes none of it.
_QUANTIZATION_FLAGS = ("load_in_8bit", "load_in_4bit")
_QUANTIZATION_SETTINGS = ("bnb_4bit_", "llm_int8_")

# What trainers call the model beside a critic, whose tensors a checkpoint of both holds as well.
_POLICIES = ("actor", "policy")


@dataclass(frozen=True)
class LoadArguments:
    """The keyword arguments of `from_pretrained`, divided by whom they are for.

    Attributes:
        head: The value head's.
        model: transformers'; those that say where the files are among them.
        head_location: Where the head is, if not in the checkpoint itself.
        peft_config: The configuration of an adapter to put on.
        reward_adapter: The folder or the hub repository of a reward adapter.
        reward_adapter_name: What the reward adapter is called inside the model.
        is_trainable: Whether an adapter that is loaded trains on.
        k_bit: Those of `peft.prepare_model_for_kbit_training`.
    """

    head: HeadArguments
    model: Mapping[str, Any]
    head_location: str | Path | None = None
    peft_config: object | None = None
    reward_adapter: str | None = None
    reward_adapter_name: str = "reward_adapter"
    is_trainable: bool = False
    k_bit: Mapping[str, Any] | None = None

    @classmethod
    def divide(cls, arguments: Mapping[str, Any], head_names: Iterable[str]) -> "LoadArguments":
        """Divides keyword arguments; each is for exactly one.

        Raises:
            AdapterError: One that is about adapters is not what it must be.
        """
        own_names = ("peft_config", "reward_adapter", "reward_adapter_name", "is_trainable")
        own: Any = {name: arguments[name] for name in own_names if arguments.get(name) is not None}
        head: Any = {name: value for name, value in arguments.items() if name in head_names}
        model = {name: value for name, value in arguments.items() if name not in (*own_names, "head", *head)}
        divided = cls(head=head, model=model, head_location=arguments.get("head"), **own)
        if not isinstance(divided.reward_adapter, str | os.PathLike | None):
            raise AdapterError(f"reward_adapter: expected a folder or a hub id, got {divided.reward_adapter!r}")
        return divided if divided.peft_config is None else divided._with_peft_config()

    def _with_peft_config(self) -> "LoadArguments":
        adapters.check_peft_config(self.peft_config)
        names = adapters.k_bit_argument_names()
        k_bit = {name: value for name, value in self.model.items() if name in names}
        return replace(self, model={n: v for n, v in self.model.items() if n not in names}, k_bit=k_bit)

    @property
    def location(self) -> LocationArguments:
        """The arguments that say where the files are."""
        return location_arguments(self.model)

    @property
    def adapter_location(self) -> LocationArguments:
        """The arguments that say where an adapter's files are."""
        return self._where(LocationArguments.__annotations__.keys() - _OF_MODEL_FILES)

    @property
    def reward_location(self) -> LocationArguments:
        """The arguments that hold for the reward adapter too, although it is somewhere else."""
        return self._where(_SHARED_LOCATION)

    def _where(self, names: Iterable[str]) -> LocationArguments:
        return location_arguments({name: self.model[name] for name in names if name in self.model})

    def of_base(self, adapter: adapters.Adapter) -> dict[str, Any]:
        """The arguments for the language model below an adapter, whose revision and subfolder are not the adapter's."""
        model = {name: value for name, value in self.model.items() if name not in ("revision", "subfolder")}
        return model if adapter.base_revision is None else {**model, "revision": adapter.base_revision}


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held.

    Attributes:
        body: The language model, with the adapter if there is one, in evaluation mode.
        head: The value head, or None.
        untrained: The names of the parameters that the checkpoint lacked, as the language model has them.
    """

    body: nn.Module
    head: HeadWeights | None
    untrained: frozenset[str]


def load(
    auto_class: Any,
    location: str,
    model_args: tuple[object, ...],
    arguments: LoadArguments,
    device: int | str,
) -> Loaded:
    """Loads a language model's checkpoint, or an adapter's and then that of its language model.

    The head comes first, so that a head that does not fit is an error before gigabytes have been read.

    Args:
        auto_class: The auto class that is to load the language model; a multimodal one does where this one cannot.
        location: A folder, or a hub repository's id.
        model_args: Passed to transformers.
        arguments: The keyword arguments of `from_pretrained`.
        device: Where a quantised model is put that comes without a `device_map`.

    Raises:
        AdapterError: The adapter is malformed, or names no language model or one that is not there.
        BodyMismatchError: The weights are not the model's: their names carry a prefix that transformers does not know,
            layers are left over, or the configuration asks for more than there are weights for.
        HeadMismatchError: The checkpoint holds something like a head that does not fit.
        HeadNotFoundError: There is no head where `head_location` says that one is.
        HeadFileError: A file is truncated, malformed, hostile, or none of the checkpoint's.
        LoadError: There is no such folder and no such repository, or another package cannot load what is there.
    """
    if not {"config", "gguf_file"} & arguments.model.keys():
        Checkpoint(location, **arguments.location).require()
    with loading(location):
        adapter = adapters.find_adapter(Checkpoint(location, **arguments.adapter_location))
        if adapter is not None:
            return _load_with_adapter(
                auto_class, location, model_args, adapter=adapter, arguments=arguments, device=device
            )
        checkpoint = Checkpoint(location, **arguments.location)
        checkpoint.check()
        found = _find_head(checkpoint, arguments)
        body, untrained = _load_body(auto_class, location, *model_args, device=device, found=found, **arguments.model)
        return Loaded(_with_new_adapter(body, arguments), found.head, untrained)


def _load_with_adapter(
    auto_class: Any,
    location: str,
    model_args: tuple[object, ...],
    *,
    adapter: adapters.Adapter,
    arguments: LoadArguments,
    device: int | str,
) -> Loaded:
    if adapter.base is None:
        raise AdapterError(f"{location}: base_model_name_or_path: expected the adapter's language model, got nothing")
    if arguments.peft_config is not None:
        logger.warning("peft_config: not used, since %s has an adapter already", location)
    checkpoint = Checkpoint(location, **arguments.adapter_location)
    checkpoint.check()
    found = _find_head(checkpoint, arguments)
    of_base = arguments.of_base(adapter)
    base = Checkpoint(adapter.base, **location_arguments(of_base))
    _require_base(base, adapter, location)
    base.check()
    # The language model may be a critic, whose head the adapter's takes the place of.
    beside = _Found(found.head)
    body, untrained = _load_body(auto_class, adapter.base, *model_args, device=device, found=beside, **of_base)
    has_head = found.head is not None
    with_adapter = adapters.put_on(body, adapter, is_trainable=arguments.is_trainable, has_head=has_head)
    return Loaded(with_adapter.train(body.training), found.head, untrained)


def _require_base(base: Checkpoint, adapter: adapters.Adapter, location: str) -> None:
    """Checks that an adapter's language model is there; the error names the adapter, and where to write a new place."""
    try:
        base.require()
    except LoadError as error:
        raise AdapterError(
            f"{location}: base_model_name_or_path: expected the adapter's language model: {error}; if it was moved, "
            f"name its new place in {adapter.folder / ADAPTER_CONFIG}"
        ) from error


@dataclass(frozen=True)
class _Found:
    """A checkpoint's head, if it has one, and what that means for loading the rest.

    Attributes:
        head: The head.
        modules: The names of its modules, about which transformers need not report.
        body_prefix: What stands before the names of the language model's own weights.
    """

    head: HeadWeights | None = None
    modules: tuple[str, ...] = ("v_head",)
    body_prefix: str = ""

    @property
    def is_output_layer(self) -> bool:
        """Whether the head lies where the language model has its output layer."""
        return self.head is not None and self.head.format == VERL_MEGATRON


def _find_head(checkpoint: Checkpoint, arguments: LoadArguments) -> _Found:
    """Finds and reads a checkpoint's head; that it is of another kind than the one asked for is an error."""
    choice = choose(checkpoint) if arguments.head_location is None else None
    if choice is None:
        names = [name for name in checkpoint.weight_map if not HEAD_LIKE.search(name)]
        return _Found(read_head(arguments), body_prefix=body_prefix(names))
    detection, head = detection_of(checkpoint, *choice), read(checkpoint, choice[1], choice[0])
    head = _as_asked(head, arguments.head)
    paths = [name.split(".")[:-1] for name in detection.tensors]
    modules = {next((part for part in reversed(path) if not _BELOW_HEAD.fullmatch(part)), "") for path in paths}
    is_critic = any(part in CRITICS for part in detection.body_prefix.split("."))
    return _Found(head, (*modules, *(_POLICIES if is_critic else ())), detection.body_prefix)


def read_head(arguments: LoadArguments) -> HeadWeights | None:
    """The head that is somewhere else than in the checkpoint, or None where none is named.

    Raises:
        HeadNotFoundError: There is none where it is said to be.
        HeadMismatchError: It is of another kind than the one asked for, or has another support.
    """
    if arguments.head_location is None:
        return None
    return _as_asked(load_head(arguments.head_location, **arguments.reward_location), arguments.head)


def _as_asked(head: HeadWeights, asked: HeadArguments) -> HeadWeights:
    """The head, with the support that is asked for if its checkpoint states none; refused if it is another one."""
    support = asked.get("support")
    if support is not None and head.support is None and head.num_outputs == support.bins:
        head = replace(head, support=support)
    if support not in (None, head.support):
        found = head.support or f"a head of {head.num_outputs} outputs without one"
        raise HeadMismatchError(f"{head.source}: support: expected {support}, found {found}")
    for name in ("num_outputs", "intermediate_size"):
        if asked.get(name, getattr(head, name)) != getattr(head, name):
            raise HeadMismatchError(f"{head.source}: {name}: expected {asked.get(name)}, found {getattr(head, name)}")
    return head


def prepare_given(body: nn.Module, arguments: LoadArguments) -> nn.Module:
    """Puts the new adapter that is asked for on a language model that is loaded already."""
    if arguments.model:
        logger.warning("%s: not used, since the language model is loaded already", ", ".join(arguments.model))
    if arguments.peft_config is not None and hasattr(body, "get_base_model"):
        logger.warning("peft_config: not used, since the model has an adapter already")
        return body
    return _with_new_adapter(body, arguments)


def _with_new_adapter(body: nn.Module, arguments: LoadArguments) -> nn.Module:
    """The model with the new adapter that is asked for, if one is; in the mode that it was in."""
    if arguments.peft_config is None:
        return body
    return adapters.add_new(body, arguments.peft_config, **(arguments.k_bit or {})).train(body.training)


def _load_body(
    auto_class: Any,
    location: str,
    *model_args: object,
    device: int | str,
    found: _Found = _Found(),
    **arguments: Any,
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Loads a language model; says which of its parameters the checkpoint lacked."""
    checkpoint, config = Checkpoint(location, **location_arguments(arguments)), stated_config(location, arguments)
    # Left out, transformers would ask on standard input.
    arguments["trust_remote_code"] = trusted = arguments.get("trust_remote_code") is True
    check_config(config, checkpoint.describe("config.json"), runs_code=trusted)
    arguments = {**_with_device_map(_with_quantization(arguments), device), "output_loading_info": True}
    with loading(location), bounded_by(checkpoint):
        if found.body_prefix == _BODY_OF_PRETRAINED and config.get("model_type") == "vhead":
            # It holds the model beside the head, which is read as any other, and is whole or not loaded at all.
            return auto_class.from_pretrained(location, *model_args, **arguments)[0].pretrained_model, frozenset()
        arguments |= _arguments_around(found, checkpoint, arguments)
        with quiet_about(*found.modules):
            auto_class = class_for(auto_class, location, arguments)
            body, report = auto_class.from_pretrained(location, *model_args, **arguments)
    untrained = _untrained(body, report, location)
    if found.is_output_layer:
        _check_trunk_is_whole(body, untrained, location)
    _check_left_over(body, checkpoint, report["unexpected_keys"], arguments)
    if found.head is None:
        _check_rows(body, checkpoint, report["unexpected_keys"])
    return body, untrained


def _arguments_around(found: _Found, checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers must be told of a checkpoint because of the head in it, and of what is wrapped around it."""
    told = _renaming(checkpoint, found.body_prefix, arguments)
    device_map = arguments.get("device_map")
    if _PLACES_EVERY_TENSOR and isinstance(device_map, dict) and "" not in device_map:
        told["device_map"] = {**dict.fromkeys(found.modules, "cpu"), **device_map}
    if found.is_output_layer:
        # A head of one row in the output layer's place has another shape than the language model's; tied to the
        # embeddings it would be compared with them.
        told |= {"ignore_mismatched_sizes": True, "tie_word_embeddings": False}
    return told


def location_arguments(arguments: Mapping[str, Any]) -> LocationArguments:
    """Those of the arguments of `from_pretrained` that say where files are."""
    names = LocationArguments.__annotations__
    return cast("LocationArguments", {name: value for name, value in arguments.items() if name in names})


def _renaming(checkpoint: Checkpoint, prefix: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The argument that takes off names what has been wrapped around the model and its parts."""
    if not _MAPS_NAMES or "key_mapping" in arguments:
        return {}
    most = max((len(PRIVATE_WRAPPER.findall(name.removeprefix(prefix))) for name in checkpoint.weight_map), default=0)
    # Each pattern is applied once to a name; comments make one of several.
    inside = [f"{PRIVATE_WRAPPER.pattern}(?#{number})" for number in range(most)]
    patterns = [*([f"^{re.escape(prefix)}"] if prefix else []), *inside]
    return {"key_mapping": dict.fromkeys(patterns, "")} if patterns else {}


def _with_quantization(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a configuration of the quantisation that flags ask for, which transformers 5 does not take."""
    flags = {name: arguments[name] for name in _QUANTIZATION_FLAGS if name in arguments}
    settings = {name: value for name, value in arguments.items() if name.startswith(_QUANTIZATION_SETTINGS)}
    others = {name: value for name, value in arguments.items() if name not in (*flags, *settings)}
    if not any(flags.values()) or others.get("quantization_config") is not None:
        return others if flags else arguments
    return {**others, "quantization_config": {**flags, **settings}}


def _with_device_map(arguments: dict[str, Any], device: int | str) -> dict[str, Any]:
    """Quantised models live on an accelerator, so that one without a device map goes to the current one."""
    settings = arguments.get("quantization_config")
    get = settings.get if isinstance(settings, dict) else partial(getattr, settings)
    if "device_map" in arguments or not any(get(flag, False) for flag in ("load_in_8bit", "load_in_4bit")):
        return arguments
    logger.warning("device_map: none given, so the whole quantised model goes to device %s", device)
    return {**arguments, "device_map": {"": device}}


def _untrained(body: PreTrainedModel, report: Mapping[str, Any], location: str) -> frozenset[str]:
    """The names of the parameters that the checkpoint lacked; refused where these are the whole of the trunk."""
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in report.get("mismatched_keys", ())}
    lacking = set(report["missing_keys"]) | mismatched
    if not lacking:
        return frozenset()
    names = {name for name, _ in body.named_parameters()}
    missing, trunk = _own_names(body, lacking, names) & names, trunk_names(body, names)
    unexpected = sorted(report["unexpected_keys"])
    renamed = next((name for name in unexpected if any(name.endswith(f".{own}") for own in missing & trunk)), None)
    if renamed is None and not (trunk and trunk <= missing):
        return frozenset(missing)
    raise BodyMismatchError(
        f"{location}: the checkpoint does not hold the weights of a {type(body).__name__}: expected "
        f"{min(missing & trunk)} and {len(missing) - 1} others, found "
        f"{renamed or ', '.join(unexpected[:3]) or 'none of them'}. "
        "If the names only have a prefix too many, `vhead convert SRC DST` takes it off"
    )


def _own_names(body: PreTrainedModel, reported: set[str], names: set[str]) -> set[str]:
    """What a report calls the parameters `names`: transformers 4 leaves the base model's prefix out, or puts it in."""
    prefix = f"{body.base_model_prefix}."
    spellings = ((name, prefix + name, name.removeprefix(prefix)) for name in reported)
    return {next((spelling for spelling in group if spelling in names), group[0]) for group in spellings}


def _check_trunk_is_whole(body: PreTrainedModel, untrained: frozenset[str], location: str) -> None:
    lacking = sorted(trunk_names(body, set(untrained)))
    if lacking:
        raise BodyMismatchError(
            f"{location}: the checkpoint does not hold the weights of a {type(body).__name__}: "
            f"{', '.join(lacking[:3])}: missing, or of another shape"
        )


def _check_left_over(
    body: PreTrainedModel, checkpoint: Checkpoint, unexpected: Iterable[str], arguments: Mapping[str, Any]
) -> None:
    """Layers that the configuration does not have would be left out in silence; a caller may ask for fewer."""
    if any(name == "config" or is_layer_count(name) for name in arguments):
        return
    own = {_NUMBERS.sub("*", name) for name, _ in body.named_parameters()}
    left_over = sorted(name for name in unexpected if _NUMBERS.search(name) and _NUMBERS.sub("*", name) in own)
    if left_over:
        raise BodyMismatchError(
            f"{checkpoint.location}: the checkpoint holds layers that its configuration does not have: {left_over[0]} "
            f"and {len(left_over) - 1} other tensors"
        )


def _check_rows(body: PreTrainedModel, checkpoint: Checkpoint, unexpected: Iterable[str]) -> None:
    """A single row over the last hidden state, outside the layers, is a head, whatever it is called."""
    shape = (1, hidden_size_of(body.config))
    # Below an adapter, whose own head it is that counts, the language model may have one of a known name.
    names = [name for name in unexpected if not _NUMBERS.search(name) and not HEAD_LIKE.search(name)]
    found = {name: checkpoint.weight_map[name] for name in names if name in checkpoint.weight_map}
    rows = {name: file for name, file in found.items() if checkpoint.shape(name, file) == shape}
    if rows:
        raise mismatch(checkpoint, rows, "a name that a format has")


def trunk_names(body: PreTrainedModel, names: set[str]) -> set[str]:
    """The names of all parameters but the language-model head's."""
    head = without_adapter(body).get_output_embeddings()
    of_head = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    return {name for name in names if id(body.get_parameter(name)) not in of_head}
