"""The value head: a projection of a hidden state, or two, in float32 whatever the language model's dtype."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from vhead import ops
from vhead.errors import HeadError, HeadMismatchError
from vhead.head_weights import HeadWeights, LinearWeights
from vhead.heads import distribution
from vhead.heads.kinds import HeadKind, head_for, kind_of, kind_with, plain_kind
from vhead.support import Support

DEFAULT_DROPOUT = 0.1
DEFAULT_INITIALIZER_RANGE = 0.2
INIT_STRATEGIES = (None, "normal", "zeros")

# Where a configuration keeps the width of the states that its language-model head reads, most specific first: OPT
# projects down to `word_embed_proj_dim`, multimodal configurations nest the text model's, encoder-decoders the
# decoder's.
_WIDTH_ATTRIBUTES = ("word_embed_proj_dim", "hidden_size", "text_config.hidden_size", "decoder.hidden_size")


class InitialArguments(TypedDict, total=False):
    """The head's arguments that a trained head's weights leave open."""

    summary_dropout_prob: float | None
    v_head_init_strategy: str | None
    v_head_initializer_range: float


class HeadArguments(InitialArguments, total=False):
    """The head's arguments that a model's constructor and `from_pretrained` take as well."""

    num_outputs: int
    intermediate_size: int | None
    support: Support | None


class ValueHead(nn.Module):
    """Maps hidden states `[..., H]` of any floating dtype to values `[..., K]`, float32.

    A head with a support is distributional: its projection has an output for each bin of the support, their softmax is
    the distribution of the return, and the value, `[..., 1]`, is its expectation.

    The children are those of TRL's head, in its order: `dropout` holds the probability, `summary` the weights (float32,
    a real `nn.Linear(H, K)`, or `nn.Sequential` of `nn.Linear(H, I)`, ReLU and `nn.Linear(I, K)`), `flatten` nothing.
    Dropout and projection run as one operation, which accumulates in float32 also under autocast and after
    `.bfloat16()`; the mask and the dropped states are never stored.

    Args:
        config: The language model's configuration. Where it has a `summary_dropout_prob`, that wins over the argument.
        hidden_size: H. None: read from the configuration.
        num_outputs: K, 1 for a critic. A head with a support has 1.
        intermediate_size: I, or None for a single projection.
        summary_dropout_prob: The probability that training drops an element of a hidden state.
        v_head_init_strategy: None for `nn.Linear`'s default distribution, "normal" for N(0, `v_head_initializer_range`)
            with a zero bias, "zeros" for a head whose values are all 0 until it is trained. Of two projections, "zeros"
            leaves the first one in the default distribution, without which no gradient would ever reach it.
        v_head_initializer_range: The standard deviation of "normal".
        support: The returns that the outputs of a distributional head stand for. None: the outputs are values.
        activation: "softmax" for a classifier, whose outputs mean something after it alone. None: the outputs are
            values. `forward` does not apply it; whoever reads the head does, as the scorer does for steps.

    Raises:
        HeadError: The strategy is unknown, the probability is outside [0, 1), a size is not positive, the
            configuration states no width, or a head with a support is to have several outputs or an activation.
    """

    summary: Any
    support: Support | None
    activation: Literal["softmax"] | None

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        hidden_size: int | None = None,
        num_outputs: int = 1,
        intermediate_size: int | None = None,
        summary_dropout_prob: float | None = None,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = DEFAULT_INITIALIZER_RANGE,
        support: Support | None = None,
        activation: Literal["softmax"] | None = None,
    ) -> None:
        super().__init__()
        check_head_arguments(
            summary_dropout_prob=summary_dropout_prob,
            v_head_init_strategy=v_head_init_strategy,
            v_head_initializer_range=v_head_initializer_range,
            num_outputs=num_outputs,
            support=support,
        )
        _check_activation(activation, support)
        self.support, self.activation = support, activation
        if support is not None:
            num_outputs = support.bins
        width = hidden_size_of(config) if hidden_size is None else hidden_size
        sizes = {"hidden_size": width, "intermediate_size": intermediate_size, "num_outputs": num_outputs}
        self.dropout = _dropout(_dropout_probability(config, summary_dropout_prob))
        self.summary = _summary({name: size for name, size in sizes.items() if size is not None})
        self.flatten = nn.Flatten()
        self.initialize(v_head_init_strategy, v_head_initializer_range)

    @classmethod
    def like(
        cls,
        head: HeadWeights,
        config: PretrainedConfig,
        *,
        hidden_size: int | None = None,
        **arguments: Unpack[InitialArguments],
    ) -> Self:
        """Builds a head with the projections and outputs of a trained one, and with its weights.

        Args:
            head: The trained head.
            config: The language model's configuration.
            hidden_size: The width of the language model's last hidden state. None: read from the configuration.
            **arguments: The other arguments of the constructor.

        Raises:
            HeadMismatchError: The trained head reads hidden states of another width.
            HeadError: An argument is not what it must be.
        """
        module = cls(
            config,
            hidden_size=hidden_size,
            num_outputs=head.num_outputs,
            intermediate_size=head.intermediate_size,
            support=head.support,
            activation=head.activation,
            **arguments,
        )
        kind = head_for(head)
        if module.kind is not kind:
            module.summary = kind.build([module.hidden_size, *head.sizes[1:]])
        module.load(head)
        return module

    @property
    def kind(self) -> HeadKind:
        """Which kind of head this is, whatever an adapter or a sharding library has wrapped around its projections."""
        return kind_of(self.summary)

    @property
    def hidden_size(self) -> int:
        """Elements of the hidden state that the head reads: H."""
        size: int = next(linear for _, linear in self._linears()).in_features
        return size

    @property
    def num_outputs(self) -> int:
        """Numbers that `forward` gives for each hidden state: K, or 1 with a support."""
        if self.support is not None:
            return 1
        *_, (_, last) = self._linears()
        return last.out_features

    @property
    def intermediate_size(self) -> int | None:
        """Elements between the two projections: I, or None for a head of one."""
        first, *others = (linear for _, linear in self._linears())
        return first.out_features if others else None

    def load(self, head: HeadWeights) -> None:
        """Copies a trained head's weights into this one, and its activation; without a bias, it gets one of zeros.

        Args:
            head: As `vhead.formats.load` gives it, and `vhead.fit` in its result's `head`.

        Raises:
            HeadMismatchError: The trained head has other projections or another support than this one; nothing has been
                copied.
            TypeError: It is something else, such as a path.
        """
        if not isinstance(head, HeadWeights):
            expected = "HeadWeights, as vhead.formats.load gives them and the result of vhead.fit has in its head"
            raise TypeError(f"head: expected {expected}, got a {type(head).__name__}")
        own = dict(self._linears())
        shapes = {f"v_head.{name}.weight": list(linear.weight.shape) for name, linear in own.items()}
        trained = _trained_layers(head)
        found = {f"v_head.{name}.weight": list(layer.weight.shape) for name, layer in trained.items()}
        if found != shapes:
            raise HeadMismatchError(f"{head.source}: found {_listing(found)}, expected {_listing(shapes)}")
        if head.support not in (None, self.support):
            raise HeadMismatchError(f"{head.source}: found the {head.support}, expected {self.support}")
        self.activation = head.activation
        with torch.no_grad():
            for name, layer in trained.items():
                own[name].weight.copy_(layer.weight)
                own[name].bias.copy_(layer.bias_or_zeros)

    def weights(self) -> HeadWeights:
        """Copies this head's weights, float32 on the CPU, as `vhead.formats.save` takes them."""
        layers = [
            LinearWeights(*(p.detach().to("cpu", torch.float32, copy=True) for p in (linear.weight, linear.bias)))
            for _, linear in self._linears()
        ]
        return HeadWeights(
            tuple(layers),
            format="vhead",
            source="a model in memory",
            support=self.support,
            activation=self.activation,
        )

    def initialize(self, strategy: str | None = None, initializer_range: float = DEFAULT_INITIALIZER_RANGE) -> None:
        """Draws new weights in place, from a seed of torch's default generator.

        Raises:
            HeadError: The strategy is not None, "normal" or "zeros", or the range is not a standard deviation.
        """
        check_head_arguments(v_head_init_strategy=strategy, v_head_initializer_range=initializer_range)
        linears = [linear for _, linear in self._linears()]
        for linear in linears:
            if linear.weight.is_meta:
                continue
            if strategy == "normal":
                ops.init_normal_(linear.weight, linear.bias, initializer_range)
            elif strategy == "zeros" and linear is linears[-1]:
                ops.init_zeros_(linear.weight, linear.bias)
            else:
                ops.init_linear_(linear.weight, linear.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Projects hidden states `[..., H]` to values `[..., K]`, float32, on the head's device."""
        outputs = self._outputs(hidden_states)
        return outputs if self.support is None else distribution.expectation(outputs, self.support)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """What the softmax of a distributional head is taken of: `[..., bins]`, float32, for `Support.cross_entropy`.

        Raises:
            HeadError: The head has no support.
        """
        self._own_support()
        return self._outputs(hidden_states)

    def distribution(self, hidden_states: Tensor) -> Tensor:
        """The probability of each bin of the support: `[..., bins]`, float32.

        Raises:
            HeadError: The head has no support.
        """
        return self.logits(hidden_states).softmax(-1)

    def variance(self, hidden_states: Tensor) -> Tensor:
        """The variance of the return: `[..., 1]`, float32, in the square of its unit.

        Raises:
            HeadError: The head has no support.
        """
        return distribution.variance(self.logits(hidden_states), self._own_support())

    def quantile(self, hidden_states: Tensor, q: float | Sequence[float]) -> Tensor:
        """The smallest return of the support below or at which lies the share `q` of the distribution.

        Args:
            hidden_states: `[..., H]`.
            q: A share in [0, 1], or Q of them.

        Returns:
            `[..., Q]`, float32, with Q = 1 for a number; without gradients, since it goes from bin to bin.

        Raises:
            HeadError: The head has no support, or a share is outside [0, 1].
        """
        return distribution.quantile(self.logits(hidden_states), self._own_support(), q)

    def _own_support(self) -> Support:
        if self.support is None:
            raise HeadError(
                "support: expected a head with one, as ValueHead(..., support=Support(...)) makes it; this head gives "
                "values, and no distributions"
            )
        return self.support

    def _outputs(self, hidden_states: Tensor) -> Tensor:
        # Each look-up of a child or parameter costs a good part of what a small projection does: each is made once.
        summary, dropout = self.summary, self.dropout
        kind = plain_kind(summary)
        if kind is None:
            return self._outputs_through_modules(hidden_states)
        probability = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return kind.values(hidden_states, summary, probability)

    def _outputs_through_modules(self, hidden_states: Tensor) -> Tensor:
        """Calls the children as modules, for a `summary` that an adapter replaced or a sharding library hooked."""
        weight = self.summary.weight if hasattr(self.summary, "weight") else self.summary[0].weight
        with torch.autocast(weight.device.type, enabled=False):
            hidden_states = hidden_states.to(weight.device, weight.dtype)
            values: Tensor = self.summary(self.dropout(hidden_states))
        return values.float()

    def _linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """The projections by their place in this module: `summary`, or `summary.0` and `summary.2`."""
        for place in self.kind.places:
            path = f"summary.{place}".removesuffix(".")
            yield path, self.get_submodule(path)  # type: ignore[misc]  # what an adapter puts there has its attributes


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
    if strategy not in INIT_STRATEGIES:
        known = " or ".join(f'"{name}"' for name in INIT_STRATEGIES if name is not None)
        raise HeadError(f"v_head_init_strategy: expected None or {known}, got {strategy!r}")
    initializer_range = arguments.get("v_head_initializer_range", DEFAULT_INITIALIZER_RANGE)
    if not 0.0 <= initializer_range < math.inf:
        raise HeadError(
            f"v_head_initializer_range: expected a standard deviation, finite and 0 or more, got {initializer_range!r}"
        )
    _checked_probability(arguments.get("summary_dropout_prob") or 0.0)
    support = arguments.get("support")
    if support is not None and not isinstance(support, Support):
        raise HeadError(f"support: expected a vhead.Support or None, got {support!r}")
    if support is not None and arguments.get("num_outputs", 1) != 1:
        raise HeadError(
            f"num_outputs: expected 1 for a head with a support, whose value is one number, "
            f"got {arguments.get('num_outputs')}; the support's bins are the outputs of its projection"
        )


def _check_activation(activation: object, support: Support | None) -> None:
    if activation not in (None, "softmax"):
        raise HeadError(f'activation: expected None or "softmax", got {activation!r:.100}')
    if activation is not None and support is not None:
        raise HeadError(f"activation: expected None for a head with a support, which has its own, got {activation!r}")


def _dropout_probability(config: PretrainedConfig, argument: float | None) -> float:
    configured = getattr(config, "summary_dropout_prob", None)
    return _checked_probability(next((p for p in (configured, argument) if p is not None), DEFAULT_DROPOUT))


def _checked_probability(probability: float) -> float:
    if not 0.0 <= probability < 1.0:
        raise HeadError(f"summary_dropout_prob: expected a probability in [0, 1), got {probability!r}")
    return float(probability)


def _dropout(probability: float) -> nn.Module:
    return nn.Dropout(probability) if probability else nn.Identity()


def _summary(sizes: dict[str, int]) -> nn.Module:
    for name, size in sizes.items():
        if size < 1:
            raise HeadError(f"{name}: expected a positive number, got {size}")
    return kind_with(len(sizes) - 1, "v_head").build(list(sizes.values()))


def _trained_layers(head: HeadWeights) -> dict[str, LinearWeights]:
    """A trained head's projections by their places in `ValueHead`."""
    names = [f"summary.{place}".removesuffix(".") for place in head_for(head).places]
    return dict(zip(names, head.layers, strict=True))


def _listing(shapes: dict[str, list[int]]) -> str:
    return " and ".join(f"{name} {shape}" for name, shape in shapes.items())
