"""The attributes of a transformers model that callers of a wrapped one reach for, read or patch."""

from collections.abc import Callable
from types import MethodType
from typing import Any, Self

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from vhead.backbone.hidden_states import BackbonePlan, Route, plan_for, without_adapter
from vhead.backbone.trunk import trunk_of
from vhead.errors import AdapterError
from vhead.heads import ValueHead


class _OfBody:
    """An attribute that is the wrapped model's, unless it is set on the wrapper itself.

    Args:
        newer_name: What newer versions of transformers call it.
    """

    def __init__(self, newer_name: str | None = None) -> None:
        self._newer_name = newer_name

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: nn.Module | None, owner: type | None = None) -> Any:
        if instance is None:
            return self
        body = instance.pretrained_model
        if self._newer_name and hasattr(body, self._newer_name):
            return getattr(body, self._newer_name)
        return getattr(body, self._name)


class TransformersSurface(nn.Module):
    """What a wrapper of a language model has in common with it."""

    pretrained_model: PreTrainedModel
    is_peft_model: bool
    plan: BackbonePlan
    v_head: ValueHead

    # TRL's new PPOTrainer reaches a value model's trunk by this name, and its head as `score`.
    base_model_prefix = "backbone"

    _keys_to_ignore_on_save = _OfBody()
    _no_split_modules = _OfBody()
    activation_checkpointing_disable = _OfBody()
    activation_checkpointing_enable = _OfBody()
    active_adapters = _OfBody()
    add_model_tags = _OfBody()
    can_generate = _OfBody()
    config = _OfBody()
    device = _OfBody()
    disable_adapter = _OfBody()
    disable_input_require_grads = _OfBody()
    dtype = _OfBody()
    enable_input_require_grads = _OfBody()
    get_input_embeddings = _OfBody()
    get_output_embeddings = _OfBody()
    gradient_checkpointing_disable = _OfBody()
    gradient_checkpointing_enable = _OfBody()
    hf_device_map = _OfBody()
    is_activation_checkpointing = _OfBody()
    is_gradient_checkpointing = _OfBody(newer_name="is_activation_checkpointing")
    main_input_name = _OfBody()
    name_or_path = _OfBody()
    prepare_inputs_for_generation = _OfBody()
    resize_token_embeddings = _OfBody()
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

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:  # noqa: FBT001, FBT002, transformers' signature
        """How many parameters the language model and the head have.

        Args:
            only_trainable: Whether only those are counted that train.
            exclude_embeddings: Whether embeddings are left out.
        """
        of_body: int = self.pretrained_model.num_parameters(only_trainable, exclude_embeddings)
        of_head = (p.numel() for p in self.v_head.parameters() if p.requires_grad or not only_trainable)
        return of_body + sum(of_head)

    # Adapters

    def merge_and_unload(self, *args: object, **kwargs: object) -> Self:
        """Merges the adapters into the language model's weights, as peft does it, and returns this model without them.

        Args:
            *args: As peft's `merge_and_unload` takes them.
            **kwargs: As peft's `merge_and_unload` takes them.

        Raises:
            AdapterError: There are no adapters, or a reward adapter among them, which would be lost.
        """
        merge = getattr(self.pretrained_model, "merge_and_unload", None)
        if merge is None or "score" in self._modules:
            found = "none" if merge is None else "a reward adapter too, whose scores would be lost"
            raise AdapterError(f"merge_and_unload: expected adapters of the language model, found {found}")
        self.pretrained_model = merge(*args, **kwargs)
        self.is_peft_model = False
        return self

    @property
    def get_nb_trainable_parameters(self) -> Callable[[], tuple[int, int]]:
        """Counts the parameters that train, and all of them, the head's included, as peft counts an adapter's."""
        count: Callable[[], tuple[int, int]] = self._of_peft("get_nb_trainable_parameters")
        return count

    @property
    def print_trainable_parameters(self) -> Callable[[], None]:
        """Prints how many parameters train, the head's included, as peft prints it."""
        show: Callable[[], None] = self._of_peft("print_trainable_parameters")
        return show

    def _of_peft(self, name: str) -> Any:
        """A method of peft's model that reads nothing but the parameters, for body and head together."""
        return MethodType(getattr(type(self.pretrained_model), name), self)

    def _current_plan(self) -> BackbonePlan:
        """The plan, made anew once an adapter has been put around the body or taken off it."""
        if self.plan.architecture is not type(self.pretrained_model):
            self.plan = plan_for(self.pretrained_model)
        return self.plan
