"""Saving a wrapped model, with its head, to a folder or to the hub."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers.utils import PushToHubMixin

from vhead import adapters
from vhead.heads import ValueHead
from vhead.state import CheckpointState

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
        if getattr(body, "hf_quantizer", None) is None:
            return body.save_pretrained(folder, *args, state_dict=state, **kwargs)
        with _as_child(body, "v_head", self.v_head):
            return body.save_pretrained(folder, *args, state_dict=state, **kwargs)

    def _save_with_adapter(self, state: Mapping[str, Any], folder: Path, *args: object, **kwargs: Any) -> object:  # noqa: ANN401, peft's own
        body_state = {name: value for name, value in state.items() if name.partition(".")[0] not in self._modules}
        if body_state:
            kwargs["state_dict"] = body_state
        result: object = self.pretrained_model.save_pretrained(os.fspath(folder), *args, **kwargs)
        if kwargs.get("is_main_process", True):
            adapters.save_head(state, folder)
            score = self._modules.get("score")
            if score is not None and self.rm_adapter_name is not None:
                adapters.save_score(score, folder / self.rm_adapter_name)
        return result

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, transformers' own
        """Uploads what `save_pretrained` writes, head included; the body is not changed.

        Args:
            repo_id: The hub repository's id.
            *args: As transformers' `push_to_hub` takes them.
            **kwargs: As transformers' `push_to_hub` takes them.
        """
        tags = [*(getattr(self.pretrained_model, "model_tags", None) or ()), *_as_list(kwargs.pop("tags", None))]
        return super().push_to_hub(repo_id, *args, **kwargs, **({"tags": list(dict.fromkeys(tags))} if tags else {}))


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
    from accelerate.utils.modeling import (  # type: ignore[import-untyped]  # noqa: PLC0415, what offloads has it
        get_state_dict_offloaded_model,
    )

    whole = get_state_dict_offloaded_model(body)
    return {name: whole.get(name, value) if value.is_meta else value for name, value in state.items()}


def _as_list(tags: str | list[str] | None) -> list[str]:
    return [tags] if isinstance(tags, str) else tags or []
