"""The names of a wrapped model's weights: without a prefix in checkpoints, with one in the module itself."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from vhead.formats.head_settings import ACTIVATION, SUPPORT, in_config, in_metadata
from vhead.formats.layout import PRIVATE_WRAPPER, WRAPPERS
from vhead.heads import ValueHead
from vhead.modeling import adapters

BODY = "pretrained_model"


class CheckpointState(nn.Module):
    """A module whose state dict leaves its body's prefix out, and takes every layout back."""

    pretrained_model: PreTrainedModel
    head_source: str | None
    is_peft_model: bool
    _loaded_prefix: str
    _saved_elsewhere: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_tell_what_is_missing)  # type: ignore[no-untyped-call]

    def state_dict(  # type: ignore[override]  # torch overloads what is one signature
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The weights as checkpoints name them: the body's without a prefix, the head's as `v_head.summary.*`.

        Of a model with adapters it is the head alone, since adapters are saved by peft. A weight that is tied to an
        earlier one is a copy, unless `keep_vars`: savers that know the model by its state dict alone, as transformers'
        `Trainer` saves it, refuse weights that share memory.
        """
        state: dict[str, Any] = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)  # type: ignore[arg-type]
        tied = {} if keep_vars else self._tied_names()
        own_names = [name for name in state if name.startswith(tuple(f"{prefix}{child}." for child in self._modules))]
        for name in own_names:
            # Every name is put back, in order: the body's parameters stay before the head's.
            value, path = state.pop(name), name.removeprefix(prefix)
            if not (path.startswith(f"{BODY}.") and self.is_peft_model):
                state[prefix + path.removeprefix(f"{BODY}.")] = value.clone() if path in tied else value
        return state

    def _tied_names(self) -> dict[str, str]:
        """The names of parameters that have an earlier name as well, and that name."""
        first: dict[int, str] = {}
        named = self.named_parameters(remove_duplicate=False)
        names = {name: first.setdefault(id(parameter), name) for name, parameter in named}
        return {name: earlier for name, earlier in names.items() if name != earlier}

    def _saved_state(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The weights to save, by the checkpoint's names; tied ones share memory, by which transformers knows them."""
        items = self._checkpoint_items(self.state_dict(keep_vars=True) if given is None else given)
        state = {name: value.detach() if isinstance(value, Tensor) else value for name, value in items}
        for name, earlier in self._checkpoint_items(self._tied_names()):
            source = earlier.removeprefix(f"{BODY}.")
            if name in state and source in state:
                state[name] = state[source]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object, **kwargs: object) -> None:
        own_name_of = partial(self._module_name, own=self._own_names())
        for name in [name for name in state_dict if name.startswith(prefix)]:
            own_name = prefix + own_name_of(name.removeprefix(prefix))
            # What two models in one state dict both have stays as it is, for torch to name.
            if own_name not in state_dict:
                state_dict[own_name] = state_dict.pop(name)
        if any(name.startswith(f"{prefix}v_head.summary.") for name in state_dict):
            self.head_source = "load_state_dict"
        self._loaded_prefix = prefix
        self._saved_elsewhere = self._left_to_peft(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _left_to_peft(self, state_dict: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
        """The prefixes of names that a state dict of a model with adapters leaves to peft, as `state_dict` does."""
        children = [f"{prefix}{name}." for name in self._modules if name != "v_head" and self.is_peft_model]
        return tuple(child for child in children if not any(name.startswith(child) for name in state_dict))

    def _fqn_modifiers(self) -> dict[str, str]:
        """Tells `torch.distributed.checkpoint` which child the state dict's names leave out."""
        if self._saves_raw_names():
            return {}
        body: nn.Module = self.pretrained_model
        of_body = [*body._modules, *body._parameters, *body._buffers]
        return dict.fromkeys([name for name in of_body if name not in self._modules], BODY)

    @classmethod
    def _saves_raw_names(cls) -> bool:
        """Whether `state_dict` was replaced by torch's, as verl does it for its sharded checkpoints."""
        return cls.state_dict is not CheckpointState.state_dict

    def _checkpoint_items(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        own = self._own_names()
        for name, value in state_dict.items():
            yield self._module_name(name, own).removeprefix(f"{BODY}."), value

    def _own_names(self) -> dict[str, str]:
        """This module's own names, each found by the name without what compilers and trainers wrap around its parts."""
        tensors = (*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False))
        return {PRIVATE_WRAPPER.sub("", name): name for name, _ in tensors}

    def _module_name(self, name: str, own: Mapping[str, str]) -> str:
        """Turns a name of any layout (checkpoint, raw module, wrapped in `module.`) into this module's own."""
        plain = PRIVATE_WRAPPER.sub("", name)
        known = next((own[path] for path in (plain, f"{BODY}.{plain}") if path in own), None)
        if known is not None:
            return known
        first, _, rest = plain.partition(".")
        if first in WRAPPERS and first not in self._modules and not hasattr(self.pretrained_model, first):
            return self._module_name(rest, own)
        return plain if first in self._modules else f"{BODY}.{plain}"


def _tell_what_is_missing(module: CheckpointState, result: Any) -> None:
    """Names missing weights as `state_dict` does: safetensors and accelerate look tied ones up there."""
    missing = result.missing_keys
    missing[:] = [name for name in missing if not name.startswith(module._saved_elsewhere)]
    if module._saves_raw_names():
        return
    prefix = module._loaded_prefix
    own = f"{prefix}{BODY}."
    missing[:] = [prefix + name.removeprefix(own) if name.startswith(own) else name for name in missing]


_BRINGS_WEIGHTS_BACK = Version(transformers.__version__) >= Version("5")


class CheckpointSaving(CheckpointState, PushToHubMixin):  # type: ignore[misc]  # untyped
    """A module whose checkpoints hold body and head."""

    v_head: ValueHead
    rm_adapter_name: str | None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: object,
        state_dict: Mapping[str, Any] | None = None,
        **kwargs: object,
    ) -> object:
        """Saves body and head in one checkpoint, which TRL and plain transformers read as well.

        Of a model with adapters, peft saves the adapter; the head lies beside it in a file of its own, as TRL has it.

        Args:
            save_directory: The folder, made if need be.
            *args: Passed to the language model's `save_pretrained`.
            state_dict: The weights to save, in any of the layouts that `load_state_dict` accepts. None: this model's.
            **kwargs: Passed to the language model's `save_pretrained`, for instance `max_shard_size`.
        """
        state = self._saved_state(state_dict)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_peft_model:
            return self._save_with_adapter(state, folder, *args, **kwargs)
        body: Any = self.pretrained_model
        state = _brought_back(state, body)
        with ExitStack() as saving:
            saving.enter_context(_stated_in(body.config, self.v_head))
            if getattr(body, "hf_quantizer", None) is not None:
                saving.enter_context(_as_child(body, "v_head", self.v_head))
            return body.save_pretrained(folder, *args, state_dict=state, **kwargs)

    def _save_with_adapter(self, state: Mapping[str, Any], folder: Path, *args: object, **kwargs: Any) -> object:
        body_state = {name: value for name, value in state.items() if name.partition(".")[0] not in self._modules}
        if body_state:
            kwargs["state_dict"] = body_state
        result: object = self.pretrained_model.save_pretrained(os.fspath(folder), *args, **kwargs)
        if kwargs.get("is_main_process", True):
            adapters.save_head(state, folder, in_metadata(self.v_head))
            score = self._modules.get("score")
            if score is not None and self.rm_adapter_name is not None:
                adapters.save_score(score, folder / self.rm_adapter_name)
        return result

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Uploads what `save_pretrained` writes, head included; the body is not changed.

        Args:
            repo_id: The hub repository's id.
            *args: As transformers' `push_to_hub` takes them.
            **kwargs: As transformers' `push_to_hub` takes them.
        """
        tags = [*(getattr(self.pretrained_model, "model_tags", None) or ()), *_as_list(kwargs.pop("tags", None))]
        return super().push_to_hub(repo_id, *args, **kwargs, **({"tags": list(dict.fromkeys(tags))} if tags else {}))


@contextmanager
def _stated_in(config: Any, head: ValueHead) -> Iterator[None]:
    """Lets a language model's configuration state what belongs to the head while the block saves it.

    A head that was saved before it may have left other statements there, which the configuration gets back.
    """
    stated = {name: config.__dict__.pop(name) for name in (SUPPORT, ACTIVATION) if name in config.__dict__}
    settings = in_config(head)
    config.__dict__.update(settings)
    try:
        yield
    finally:
        for name in settings:
            config.__dict__.pop(name, None)
        config.__dict__.update(stated)


@contextmanager
def _as_child(body: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Makes a module one of a quantised model's own while the block runs.

    Transformers asks the quantiser for the weights to save, instead of taking those that it is given, and the quantiser
    asks the model.
    """
    children = dict(body._modules)
    body._modules[name] = module
    try:
        yield
    finally:
        body._modules.clear()
        body._modules.update(children)


def _brought_back(state: dict[str, Any], body: nn.Module) -> dict[str, Any]:
    """The weights with the offloaded ones in memory, which transformers 5 brings back itself, a shard at a time."""
    if _BRINGS_WEIGHTS_BACK or not any(getattr(value, "is_meta", False) for value in state.values()):
        return state
    from accelerate.utils.modeling import (  # type: ignore[import-untyped]  # what offloads has it
        get_state_dict_offloaded_model,
    )

    whole = get_state_dict_offloaded_model(body)
    return {name: whole.get(name, value) if value.is_meta else value for name, value in state.items()}


def _as_list(tags: str | list[str] | None) -> list[str]:
    return [tags] if isinstance(tags, str) else tags or []
