"""The head on a device against the head on the CPU, bit by bit: values, gradients and dropout masks."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vhead.benchmark.document import Row, dtype_name
from vhead.ops import value_head

Head = Callable[..., Tensor]
Layout = Callable[[Tensor, int, int], Tensor]

SEED = 0x1234_5678_9ABC_DEF0
_PADDING = 8
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Each makes hidden states [..., H] of so many rows from the beginning of a flat tensor.
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda flat, rows, columns: flat[: rows * columns].view(rows, columns),
    "padded rows": lambda flat, rows, columns: flat.view(rows, columns + _PADDING)[:, :columns],
    "unaligned rows": lambda flat, rows, columns: flat.view(rows, columns + _PADDING)[:, 1 : columns + 1],
    "transposed": lambda flat, rows, columns: flat[: rows * columns].view(2, rows // 2, columns).transpose(0, 1),
    "repeated": lambda flat, rows, columns: flat[:columns].expand(rows, columns),
}


@dataclass(frozen=True)
class Plan:
    """What is compared: every combination of these. `rows` is even; `special` adds NaN, infinities and subnormals."""

    rows: int
    columns: tuple[int, ...]
    outputs: tuple[int, ...] = (1, 3)
    dropouts: tuple[float, ...] = (0.0, 0.1, 0.5)
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    special: tuple[bool, ...] = (False, True)


# Rows enough that the weight's gradient is added over several chunks, and over more chunks than there are sums of them;
# and enough for the kernels that take several rows at a time.
QUICK = (Plan(rows=260, columns=(7, 896), dropouts=(0.0, 0.1), special=(False,)),)
FULL = (
    Plan(rows=1300, columns=(1, 7, 64, 896, 2048, 4096, 5120)),
    Plan(rows=8206, columns=(64, 1000, 2048), outputs=(1,), dropouts=(0.0, 0.1), special=(False,)),
)


@dataclass(frozen=True)
class Setting:
    """One combination."""

    dtype: torch.dtype
    rows: int
    columns: int
    special: bool
    outputs: int
    layout: str
    dropout_p: float

    def described(self) -> Row:
        """As it stands in a row."""
        return asdict(self) | {"dtype": dtype_name(self.dtype)}


@dataclass
class Tally:
    """What was compared of one kind, and the first place that differs."""

    cases: int = 0
    elements: int = 0
    differing: int = 0
    first: Row | None = None

    def add(self, setting: Setting, expected: Tensor, actual: Tensor) -> None:
        """Compares one more pair."""
        self.cases += 1
        self.elements += expected.numel()
        if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
            self._differ(setting, expected.numel(), expected=_kind(expected), actual=_kind(actual))
            return
        places = differing(expected, actual).nonzero()
        if len(places):
            place = tuple(places[0].tolist())
            values = {"expected": expected[place].item(), "actual": actual[place].item()}
            self._differ(setting, len(places), index=list(place), **{k: repr(v) for k, v in values.items()})

    def _differ(self, setting: Setting, count: int, **about: object) -> None:
        self.differing += count
        self.first = self.first or {**setting.described(), **about}


@dataclass(frozen=True)
class Inputs:
    """Numbers of one dtype and width, on the CPU: the same for every setting."""

    flat: Tensor
    weight: Tensor
    bias: Tensor
    grad_values: Tensor

    @classmethod
    def draw(cls, plan: Plan, dtype: torch.dtype, columns: int, *, special: bool) -> "Inputs":
        """Standard normal numbers, a function of the arguments alone."""
        generator = torch.Generator().manual_seed(columns)
        flat = torch.randn(plan.rows * (columns + _PADDING), generator=generator)
        if special:
            flat[::97], flat[5::101], flat[11::103], flat[3::7] = torch.nan, torch.inf, -torch.inf, 1e-39
        outputs = max(plan.outputs)
        weight = torch.randn(outputs, columns, generator=generator)
        bias = torch.randn(outputs, generator=generator)
        return cls(flat.to(dtype), weight, bias, torch.randn(plan.rows, outputs, generator=generator))

    def to(self, device: torch.device) -> "Inputs":
        """The same on a device."""
        return Inputs(*(x.to(device) for x in (self.flat, self.weight, self.bias, self.grad_values)))


def compare_with_cpu(device: torch.device, plans: Sequence[Plan], head: Head = value_head) -> list[Row]:
    """Runs `head` on a device, in every layout, against `value_head` on the CPU on contiguous rows.

    Returns:
        One row for each dtype and each thing compared: how many cases and elements, and how many elements differ. NaN
        equals NaN whatever its payload; otherwise every bit counts.
    """
    tallies: dict[tuple[str, str], Tally] = {}
    for plan in plans:
        for setting, expected, actual in _pairs(device, plan, head):
            for what, tensor in expected.items():
                tally = tallies.setdefault((dtype_name(setting.dtype), what), Tally())
                tally.add(setting, tensor, actual[what].cpu())
    return [{"dtype": dtype, "what": what, **asdict(tally)} for (dtype, what), tally in tallies.items()]


def _pairs(
    device: torch.device, plan: Plan, head: Head
) -> Iterator[tuple[Setting, dict[str, Tensor], dict[str, Tensor]]]:
    for dtype, columns, special in itertools.product(plan.dtypes, plan.columns, plan.special):
        inputs = Inputs.draw(plan, dtype, columns, special=special)
        there = inputs.to(device)
        for choice in itertools.product(plan.outputs, plan.layouts, plan.dropouts):
            setting = Setting(dtype, plan.rows, columns, special, *choice)
            hidden = _hidden(inputs, setting)
            expected = outcomes(value_head, hidden.contiguous(), inputs, setting)
            yield setting, expected, outcomes(head, _hidden(there, setting), there, setting)


def outcomes(head: Head, hidden: Tensor, inputs: Inputs, setting: Setting) -> dict[str, Tensor]:
    """Values, gradients of all and of a frozen trunk's head alone, and the mask where something is dropped."""
    weight = inputs.weight[: setting.outputs].clone().requires_grad_()
    bias = inputs.bias[: setting.outputs].clone().requires_grad_()
    mask = {"dropout_p": setting.dropout_p, "seed": SEED if setting.dropout_p else None}
    leaf = hidden.detach().requires_grad_()
    values = head(leaf, weight, bias, **mask)
    grad = inputs.grad_values[:, : setting.outputs].reshape(values.shape)
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(values, (leaf, weight, bias), grad)
    (frozen,) = torch.autograd.grad(head(hidden, weight, None, **mask), weight, grad)
    found = {"values": values.detach(), "grad_hidden": grad_hidden, "grad_weight": grad_weight, "grad_bias": grad_bias}
    found["grad_weight, frozen trunk"] = frozen
    return found | ({"mask": dropout_mask(head, hidden, **mask)} if setting.dropout_p else {})


def dropout_mask(head: Head, hidden: Tensor, **mask: object) -> Tensor:
    """Which elements are kept: where the values' sum depends on them, for weights of one."""
    leaf = torch.ones_like(hidden, memory_format=torch.contiguous_format).requires_grad_()
    ones = torch.ones(hidden.shape[-1], device=hidden.device)
    (grad,) = torch.autograd.grad(head(leaf, ones, **mask).sum(), leaf)
    return grad != 0


def differing(expected: Tensor, actual: Tensor) -> Tensor:
    """Where two tensors of one shape and dtype differ in a bit; two NaNs do not."""
    same = _bits(expected) == _bits(actual)
    if expected.is_floating_point():
        same |= expected.isnan() & actual.isnan()
    return ~same


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _hidden(inputs: Inputs, setting: Setting) -> Tensor:
    return LAYOUTS[setting.layout](inputs.flat, setting.rows, setting.columns)


def _kind(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
