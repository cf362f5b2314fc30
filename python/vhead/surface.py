"""The attributes of a transformers model that callers of a wrapped one reach for, read or patch."""

from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from vhead.backbone import BackbonePlan, Route, plan_for, without_adapter
from vhead.heads import ValueHead
from vhead.trunk import trunk_of


class _OfBody:
    """An attribute that is the wrapped model's, unless it is set on the wrapper itself.

    Args:
        newer_name: What newer versions of transformers call it.
    """

    def __init__(self, newer_name: str | None = None) -> None:
        self._newer_name = newer_name

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: nn.Module | None, owner: type | None = None) -> Any:  # noqa: ANN401, the body's type
        if instance is None:
            return self
        body = instance.pretrained_model
        if self._newer_name and hasattr(body, self._newer_name):
            return getattr(body, self._newer_name)
        return getattr(body, self._name)


class TransformersSurface(nn.Module):
    """What a wrapper of a language model has in common with it."""

    pretrained_model: PreTrainedModel
    plan: BackbonePlan
    v_head: ValueHead

    # TRL's new PPOTrainer reaches a value model's trunk by this name, and its head as `score`.
    base_model_prefix = "backbone"

    _keys_to_ignore_on_save = _OfBody()
    _no_split_modules = _OfBody()
    add_model_tags = _OfBody()
    can_generate = _OfBody()
    config = _OfBody()
    device = _OfBody()
    disable_input_require_grads = _OfBody()
    dtype = _OfBody()
    enable_input_require_grads = _OfBody()
    get_input_embeddings = _OfBody()
    get_output_embeddings = _OfBody()
    gradient_checkpointing_disable = _OfBody()
    gradient_checkpointing_enable = _OfBody()
    hf_device_map = _OfBody()
    is_gradient_checkpointing = _OfBody(newer_name="is_activation_checkpointing")
    main_input_name = _OfBody()
    name_or_path = _OfBody()
    prepare_inputs_for_generation = _OfBody()
    set_input_embeddings = _OfBody()
    set_output_embeddings = _OfBody()
    tie_weights = _OfBody()

    @property
    def backbone(self) -> nn.Module:
        """The language model without its head, or the whole of it where there is no such part."""
        has_trunk = self._current_plan().route is Route.BASE_MODEL
        trunk = trunk_of(without_adapter(self.pretrained_model)) if has_trunk else None
        return trunk or self.pretrained_model

    @property
    def score(self) -> nn.Module:
        """The reward adapter's head where there is one, else the value head."""
        module: nn.Module = self._modules.get("score") or self.v_head
        return module

    @property
    def generation_config(self) -> GenerationConfig:
        """The language model's generation configuration, which `generate` uses."""
        return self.pretrained_model.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.pretrained_model.generation_config = value

    def _current_plan(self) -> BackbonePlan:
        """The plan, made anew once an adapter has been put around the body or taken off it."""
        if self.plan.architecture is not type(self.pretrained_model):
            self.plan = plan_for(self.pretrained_model)
        return self.plan
