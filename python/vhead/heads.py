"""The value head: one projection from a hidden state to a scalar, in float32 whatever the language model's dtype."""

import math
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from vhead import ops
from vhead.errors import HeadError

DEFAULT_DROPOUT = 0.1
DEFAULT_INITIALIZER_RANGE = 0.2

# Where a configuration keeps the width of the states that its language-model head reads, most specific first: OPT
# projects down to `word_embed_proj_dim`, multimodal configurations nest the text model's, encoder-decoders the
# decoder's.
_WIDTH_ATTRIBUTES = ("word_embed_proj_dim", "hidden_size", "text_config.hidden_size", "decoder.hidden_size")


class HeadArguments(TypedDict, total=False):
    """The head's arguments that a model's constructor and `from_pretrained` take as well."""

    summary_dropout_prob: float | None
    v_head_init_strategy: str | None
    v_head_initializer_range: float


class ValueHead(nn.Module):
    """Maps hidden states `[..., H]` of any floating dtype to values `[..., 1]`, float32.

    The children are those of TRL's head, in its order: `dropout` holds the probability, `summary` the weights (a real
    `nn.Linear(H, 1)`, float32), `flatten` nothing. Dropout and projection run as one operation, which accumulates in
    float32 also under autocast and after `.bfloat16()`; the mask and the dropped states are never stored.

    Args:
        config: The language model's configuration. Where it has a `summary_dropout_prob`, that wins over the argument.
        hidden_size: H. None: read from the configuration.
        summary_dropout_prob: The probability that training drops an element of a hidden state.
        v_head_init_strategy: None for `nn.Linear`'s default distribution, "normal" for N(0, `v_head_initializer_range`)
            with a zero bias.
        v_head_initializer_range: The standard deviation of "normal".

    Raises:
        HeadError: The strategy is unknown, the probability is outside [0, 1), or the configuration states no width.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        hidden_size: int | None = None,
        summary_dropout_prob: float | None = None,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = DEFAULT_INITIALIZER_RANGE,
    ) -> None:
        super().__init__()
        check_head_arguments(
            summary_dropout_prob=summary_dropout_prob,
            v_head_init_strategy=v_head_init_strategy,
            v_head_initializer_range=v_head_initializer_range,
        )
        width = hidden_size_of(config) if hidden_size is None else hidden_size
        self.dropout = _dropout(_dropout_probability(config, summary_dropout_prob))
        # Built on meta first: nn.Linear's own initialisation would draw from torch's generator in vain.
        self.summary = nn.Linear(width, 1, dtype=torch.float32, device="meta").to_empty(device=torch.empty(0).device)
        self.flatten = nn.Flatten()
        self.initialize(v_head_init_strategy, v_head_initializer_range)

    def initialize(self, strategy: str | None = None, initializer_range: float = DEFAULT_INITIALIZER_RANGE) -> None:
        """Draws new weights in place, from a seed of torch's default generator.

        Raises:
            HeadError: The strategy is neither None nor "normal", or the range is not a standard deviation.
        """
        check_head_arguments(v_head_init_strategy=strategy, v_head_initializer_range=initializer_range)
        weight, bias = self.summary.weight, self.summary.bias
        if weight.is_meta:
            return
        if strategy is None:
            ops.init_linear_(weight, bias)
        else:
            ops.init_normal_(weight, bias, initializer_range)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Projects hidden states `[..., H]` to values `[..., 1]`, float32, on the head's device."""
        # Each look-up of a child or parameter costs a good part of what a small projection does: each is made once.
        summary, dropout = self.summary, self.dropout
        if not _is_plain_linear(summary):
            return self._forward_through_modules(hidden_states)
        weight = summary.weight
        probability = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        hidden_states = hidden_states.to(weight.device)
        return ops.value_head(hidden_states, weight, summary.bias, dropout_p=probability).unsqueeze(-1)

    def _forward_through_modules(self, hidden_states: Tensor) -> Tensor:
        """Calls the children as modules, for a `summary` that an adapter replaced or a sharding library hooked."""
        weight = self.summary.weight
        with torch.autocast(weight.device.type, enabled=False):
            hidden_states = hidden_states.to(weight.device, weight.dtype)
            values: Tensor = self.summary(self.dropout(hidden_states))
        return values.float()


def hidden_size_of(config: PretrainedConfig) -> int:
    """Reads the width of the last hidden state from a configuration.

    Raises:
        HeadError: None of the attributes that can hold it is a positive integer.
    """
    for path in _WIDTH_ATTRIBUTES:
        value = config
        for name in path.split("."):
            value = getattr(value, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise HeadError(
        f"config: expected a {type(config).__name__} with one of {', '.join(_WIDTH_ATTRIBUTES)}, found none of them"
    )


def check_head_arguments(**arguments: Unpack[HeadArguments]) -> None:
    """Checks the head's arguments, so that a mistake in them is found before a language model has been loaded.

    Raises:
        HeadError: One of them is not what it must be.
    """
    strategy = arguments.get("v_head_init_strategy")
    if strategy not in (None, "normal"):
        raise HeadError(f'v_head_init_strategy: expected None or "normal", got {strategy!r}')
    initializer_range = arguments.get("v_head_initializer_range", DEFAULT_INITIALIZER_RANGE)
    if not 0.0 <= initializer_range < math.inf:
        raise HeadError(f"v_head_initializer_range: expected a standard deviation, got {initializer_range!r}")
    _checked_probability(arguments.get("summary_dropout_prob") or 0.0)


def _dropout_probability(config: PretrainedConfig, argument: float | None) -> float:
    configured = getattr(config, "summary_dropout_prob", None)
    return _checked_probability(next((p for p in (configured, argument) if p is not None), DEFAULT_DROPOUT))


def _checked_probability(probability: float) -> float:
    if not 0.0 <= probability < 1.0:
        raise HeadError(f"summary_dropout_prob: expected a probability in [0, 1), got {probability!r}")
    return float(probability)


def _dropout(probability: float) -> nn.Module:
    return nn.Dropout(probability) if probability else nn.Identity()


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether reading the module's weights gives what calling it would."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
    )
