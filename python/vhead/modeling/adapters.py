"""Models with adapters: the files of an adapter, putting one on, and the reward adapter with its head.

peft is imported only where an adapter is at hand. All files are found by `vhead.checkpoints`, so that the arguments
that say where a checkpoint is hold for its adapter as well, and what exists locally is never looked up on the hub.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vhead.backbone.placement import last_hidden_device
from vhead.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from vhead.checkpoints.checkpoint import Checkpoint
from vhead.checkpoints.config_bounds import check_config
from vhead.errors import AdapterError, HeadMismatchError, MissingPackageError, loading
from vhead.formats import BIAS_KEY, WEIGHT_KEY, save_beside_adapter
from vhead.formats.adapter_conversion import (
    CLASSIFIER_TASKS,
    LANGUAGE_MODEL_TASKS,
    language_model_settings,
    read_adapter_config,
)
from vhead.formats.writing import write_tensors
from vhead.heads import hidden_size_of

HEAD_FILE = "value_head.safetensors"
TRL_HEAD_FILE = "pytorch_model.bin"

_SCORE = re.compile(r"(?:^|\.)score\.(?:modules_to_save\.)?(?:[^.]+\.)?(?P<parameter>weight|bias)$")
_SCORE_LIKE = re.compile(r"(?:^|\.)score\.")


@dataclass(frozen=True)
class Adapter:
    """A trained adapter whose files are on the local disk.

    Attributes:
        folder: Where the files are.
        weights: The name of the file with the adapter's weights.
        base: The language model that it was trained on, a folder or a hub repository's id; None where it is not said.
        base_revision: That repository's revision, or None for the default.
    """

    folder: Path
    weights: str
    base: str | None
    base_revision: str | None


def find_adapter(checkpoint: Checkpoint) -> Adapter | None:
    """Finds a checkpoint's adapter and downloads it if need be.

    Returns:
        The adapter, or None for a checkpoint without one.

    Raises:
        AdapterError: The configuration is malformed, or there are no weights.
        LoadError: A number of the configuration is out of all proportion.
        HeadFileError: The file of weights is truncated, malformed or hostile.
    """
    config_path = checkpoint.path(ADAPTER_CONFIG)
    if config_path is None:
        return None
    weights = next((name for name in ADAPTER_WEIGHTS if checkpoint.path(name) is not None), None)
    if weights is None:
        raise AdapterError(f"{checkpoint.describe(ADAPTER_CONFIG)}: expected {' or '.join(ADAPTER_WEIGHTS)} beside it")
    # peft will read the file; what is wrong with it is said before a language model has been loaded.
    checkpoint.names_in(weights)
    config = read_adapter_config(checkpoint)
    check_config(config, str(config_path))
    base = _string(config, "base_model_name_or_path", config_path)
    return Adapter(
        folder=config_path.parent,
        weights=weights,
        base=base,
        base_revision=_string(config, "revision", config_path),
    )


def _string(config: Mapping[str, object], field: str, path: Path) -> str | None:
    value = config.get(field)
    if value is not None and not isinstance(value, str):
        raise AdapterError(f"{path}: {field}: expected a string, got {value!r}")
    return value


def put_on(body: nn.Module, adapter: Adapter, *, is_trainable: bool, has_head: bool) -> nn.Module:
    """Puts a trained adapter on its language model: frozen, unless it is to be trained on.

    Args:
        body: The language model, whose vocabulary takes the size that it had when the adapter was saved.
        adapter: The adapter.
        is_trainable: Whether it is to be trained on.
        has_head: Whether its checkpoint's head has been read: a classifier's adapter is a language model's without it.
    """
    peft, folder = _peft(), os.fspath(adapter.folder)
    config = peft.PeftConfig.from_pretrained(folder)
    if has_head and _task_of(config) in CLASSIFIER_TASKS:
        for name, value in language_model_settings(vars(config)).items():
            setattr(config, name, value)
    _fit_vocabulary(body, adapter)
    model: nn.Module = peft.PeftModel.from_pretrained(body, folder, is_trainable=is_trainable, config=config)
    return model


def _fit_vocabulary(body: Any, adapter: Adapter) -> None:
    """Gives a language model as many tokens as the embeddings have that lie beside an adapter, where some do."""
    embeddings = body.get_input_embeddings()
    place = next(name for name, module in body.named_modules() if module is embeddings)
    pattern = re.compile(rf"base_model\.model\.{re.escape(place)}\.(?:base_layer\.)?weight")
    checkpoint = Checkpoint(adapter.folder)
    name = next((name for name in checkpoint.names_in(adapter.weights) if pattern.fullmatch(name)), None)
    tokens = embeddings.weight.shape[0] if name is None else checkpoint.shape(name, adapter.weights)[0]
    if tokens != embeddings.weight.shape[0]:
        # The new rows are read from the adapter's file: drawing them from the others' distribution would be in vain.
        has_choice = "mean_resizing" in signature(body.resize_token_embeddings).parameters
        body.resize_token_embeddings(tokens, **({"mean_resizing": False} if has_choice else {}))


def add_new(body: nn.Module, peft_config: object, **k_bit_arguments: object) -> nn.Module:
    """Puts a fresh adapter on a language model, which is prepared first where its weights are quantised.

    Args:
        body: The language model.
        peft_config: The adapter's configuration.
        **k_bit_arguments: Those of `peft.prepare_model_for_kbit_training`.
    """
    peft = _peft()
    if is_k_bit(body):
        body = peft.prepare_model_for_kbit_training(body, **k_bit_arguments)
    model: nn.Module = peft.get_peft_model(body, peft_config)
    return model


def is_k_bit(body: nn.Module) -> bool:
    """Whether a language model's weights are quantised to 8 or 4 bits."""
    return bool(getattr(body, "is_loaded_in_8bit", False) or getattr(body, "is_loaded_in_4bit", False))


def k_bit_argument_names() -> frozenset[str]:
    """The names of the arguments that `peft.prepare_model_for_kbit_training` takes beside the model."""
    return frozenset(signature(_peft().prepare_model_for_kbit_training).parameters) - {"model"}


def check_peft_config(peft_config: object) -> None:
    """Checks that something is an adapter's configuration.

    Raises:
        AdapterError: It is something else.
        MissingPackageError: peft is not installed.
    """
    if not isinstance(peft_config, _peft().PeftConfig):
        raise AdapterError(f"peft_config: expected a peft.PeftConfig, got a {type(peft_config).__name__}")


def check_task(body: nn.Module) -> None:
    """Checks that a model with its adapters is still a language model, with one hidden state for each token.

    Raises:
        AdapterError: The model is one for another task, or its prompt is learnt: TRL's PPO takes neither.
    """
    config = getattr(body, "active_peft_config", None)
    task = _task_of(config)
    if task not in LANGUAGE_MODEL_TASKS:
        raise AdapterError(
            f"pretrained_model_name_or_path: expected a language model, got a {type(body).__name__} "
            f"with an adapter for the task {task}"
        )
    if getattr(config, "is_prompt_learning", False):
        raise AdapterError(
            "pretrained_model_name_or_path: prompt learning is not supported, because its virtual tokens have hidden "
            "states of their own; if you want it all the same, build the class from the loaded model"
        )


def _task_of(config: object) -> str | None:
    """An adapter's task, which peft has as a text or as an enumeration's member."""
    task = getattr(config, "task_type", None)
    value: str | None = getattr(task, "value", task)
    return value


def drops_cache(body: nn.Module) -> bool:
    """Whether the active adapter is a learnt prefix, which takes the cache's place in a forward pass."""
    kind = getattr(getattr(body, "active_peft_config", None), "peft_type", None)
    return getattr(kind, "value", kind) == "PREFIX_TUNING"


def load_further(model: Any, checkpoint: Checkpoint, name: str) -> bool:
    """Adds a trained adapter to a model with adapters; which one is active, and what trains, stays as it is.

    Returns:
        Whether the checkpoint holds an adapter.

    Raises:
        AdapterError: It is malformed.
        LoadError: peft cannot load it.
    """
    adapter = find_adapter(checkpoint)
    if adapter is None:
        return False
    with unchanged(model), loading(checkpoint.location):
        model.load_adapter(os.fspath(adapter.folder), name, is_trainable=False)
    return True


# The reward adapter


def load_reward_adapter(model: Any, checkpoint: Checkpoint, name: str) -> nn.Linear:
    """Adds a trained reward adapter to a model with adapters; which one is active, and what trains, stays as it is.

    Returns:
        The adapter's reward head: weight `[K, H]`, float32, frozen, beside the last hidden state.

    Raises:
        AdapterError: There is no such adapter, or the model has none that it could be added to.
        HeadMismatchError: The adapter's file holds no reward head, or more than one.
    """
    if not hasattr(model, "get_base_model"):
        raise AdapterError(f"reward_adapter: expected a model with adapters, got a {type(model).__name__}")
    adapter = find_adapter(checkpoint)
    if adapter is None:
        raise AdapterError(f"reward_adapter: found no {ADAPTER_CONFIG} in {checkpoint.location!r}")
    score = _read_score(checkpoint, adapter.weights, hidden_size_of(model.config))
    with unchanged(model), loading(checkpoint.location):
        model.load_adapter(os.fspath(adapter.folder), name, is_trainable=False)
    return score.to(last_hidden_device(model))


def _read_score(checkpoint: Checkpoint, weights: str, hidden_size: int) -> nn.Linear:
    names = [name for name in checkpoint.names_in(weights) if _SCORE_LIKE.search(name)]
    found = {match["parameter"]: name for name in names if (match := _SCORE.search(name))}
    shapes = {parameter: checkpoint.shape(name, weights) for parameter, name in found.items()}
    weight_shape = shapes.get("weight", ())
    fits_bias = shapes.get("bias", weight_shape[:1]) == weight_shape[:1]
    if len(found) != len(names) or len(weight_shape) != 2 or weight_shape[1] != hidden_size or not fits_bias:
        listing = ", ".join(f"{name} {list(checkpoint.shape(name, weights))}" for name in names) or "none"
        raise HeadMismatchError(
            f"{checkpoint.describe(weights)}: expected a reward head, score.weight [K, {hidden_size}] and perhaps "
            f"score.bias [K]; found {listing}"
        )
    tensors = {parameter: checkpoint.read(name, weights).float() for parameter, name in found.items()}
    score = nn.Linear(hidden_size, weight_shape[0], bias="bias" in tensors, device="meta")
    score.load_state_dict(tensors, assign=True)
    return score.requires_grad_(requires_grad=False)


@contextmanager
def active(model: Any, name: str) -> Iterator[None]:
    """Makes one adapter of a model the active one, in evaluation mode, while the block runs."""
    with unchanged(model):
        model.set_adapter(name)
        model.eval()
        yield


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Restores the active adapter, the mode of every module, and what trains, however the block ends."""
    active_adapter = model.active_adapter
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        if model.active_adapter != active_adapter:
            model.set_adapter(active_adapter)
        for module, mode in modes.items():
            module.training = mode
        for parameter, requires_grad in trained.items():
            parameter.requires_grad = requires_grad


def reward_scores(score: nn.Module, hidden_states: Tensor) -> Tensor:
    """Applies a reward head to hidden states `[B, T, H]`, in its own dtype, also under autocast.

    Returns:
        The scores `[B, T, K]`, float32.
    """
    parameter = next(score.parameters())
    with torch.autocast(parameter.device.type, enabled=False):
        scores: Tensor = score(hidden_states.to(parameter.device, parameter.dtype))
    return scores.float()


# Saving


def save_head(state: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str]) -> None:
    """Writes a head beside an adapter: as safetensors, and pickled where TRL looks for it.

    Args:
        state: A model's state dict, of which only the head is written.
        folder: The adapter's folder, which exists.
        metadata: What else belongs to the head. TRL has no place for it, and gets no file of such a head.
    """
    head = {name: value.detach().cpu().contiguous() for name, value in state.items() if name.startswith("v_head.")}
    write_tensors(head, folder / HEAD_FILE, metadata)
    # TRL would take another kind of head for its own and load nothing of it; an older save's would win over this one.
    pickled = folder / TRL_HEAD_FILE
    if head.keys() == {WEIGHT_KEY, BIAS_KEY} and not metadata:
        save_beside_adapter(head, folder)
    elif pickled.exists() and Checkpoint(pickled).names_in(TRL_HEAD_FILE).keys() == {WEIGHT_KEY, BIAS_KEY}:
        pickled.unlink()


def save_score(score: nn.Module, folder: Path) -> None:
    """Adds a reward head to its adapter's file, where peft leaves it out, so that the folder can be loaded again.

    Args:
        score: The reward head.
        folder: The reward adapter's folder, if peft wrote one.
    """
    checkpoint = Checkpoint(folder)
    file = next((name for name in ADAPTER_WEIGHTS if folder.is_dir() and checkpoint.path(name) is not None), None)
    if file is None:
        return
    tensors = {name: checkpoint.read(name, file) for name in checkpoint.names_in(file)}
    own = {f"base_model.model.score.{name}": value.detach().cpu() for name, value in score.state_dict().items()}
    write_tensors(tensors | own, folder / file)


def _peft() -> ModuleType:
    try:
        import peft  # slow to import and often absent
    except ImportError as error:
        raise MissingPackageError("peft is not installed; adapters need it: pip install peft") from error
    module: ModuleType = peft
    return module
