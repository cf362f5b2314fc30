"""The operators' arguments, and named errors for what they may not be."""

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from vhead.ops.arguments import bare, check_device, check_kind
from vhead.ops.devices import SETTINGS

# Scale, softcap and temperature.
Rule: TypeAlias = tuple[float, float | None, float]


# Most tokens that `top` may ask for.
MAX_TOP = 128


class Selection(NamedTuple):
    """What is asked for besides the target: candidates, int64 `[N, M]`, and how many of the likeliest tokens."""

    candidates: Tensor | None = None
    top: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for."""
        return self.candidates is None and not self.top

    def of_rows(self, rows: slice) -> "Selection":
        """The same of some of the rows."""
        return Selection(None if self.candidates is None else self.candidates[rows], self.top)


class Inputs(NamedTuple):
    """Arguments of the operator `token_statistics`, in the order of its schema, with token ids as int64."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    scale: float
    batch_invariant: bool
    candidates: Tensor | None
    top: int

    @property
    def selection(self) -> Selection:
        """What is asked for besides the targets."""
        return Selection(self.candidates, self.top)

    @property
    def rule(self) -> Rule:
        """How a product becomes a logit over temperature."""
        return self.scale, self.softcap, self.temperature


class BackwardInputs(NamedTuple):
    """Arguments of the operator `token_statistics_backward`, in the order of its schema.

    `needed` says which gradients of (hidden, weight, bias) are asked for.
    """

    grad_logprobs: Tensor
    grad_entropy: Tensor
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    peak: Tensor
    log_sum: Tensor
    entropy: Tensor
    temperature: float
    softcap: float | None
    scale: float
    needed: tuple[bool, ...]

    @property
    def forward(self) -> Inputs:
        """Arguments of the forward pass."""
        tensors = (self.hidden, self.weight, self.targets, self.bias)
        numbers = (self.temperature, self.softcap, self.scale)
        return Inputs(*tensors, *numbers, batch_invariant=False, candidates=None, top=0)


def checked(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float | None,
    batch_invariant: bool,  # noqa: FBT001
    candidates: Tensor | None,
    top: int,
) -> Inputs:
    """The public functions' arguments as the operator's.

    Raises:
        TypeError: An argument is no tensor or has a dtype that is not listed.
        ValueError: Shapes do not fit, devices differ, or a number is out of range.
    """
    check_kind("hidden", hidden)
    check_kind("lm_head_weight", lm_head_weight)
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        raise ValueError(f"hidden: expected [N, H] with H >= 1, got {list(hidden.shape)}")
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != hidden.shape[1] or lm_head_weight.shape[0] < 1:
        raise ValueError(f"lm_head_weight: expected [V, {hidden.shape[1]}], got {list(lm_head_weight.shape)}")
    check_device("lm_head_weight", lm_head_weight, hidden)
    check_targets(targets, hidden)
    if bias is not None:
        check_kind("bias", bias)
        if bias.shape != lm_head_weight.shape[:1]:
            raise ValueError(f"bias: expected [{lm_head_weight.shape[0]}], got {list(bias.shape)}")
        check_device("bias", bias, hidden)
    factor, softcap, temperature = checked_rule(temperature, softcap, scale)
    if batch_invariant and not (hidden.is_cpu and are_of_kernels(hidden, lm_head_weight, bias)):
        got = f"{bare(torch.promote_types(hidden.dtype, lm_head_weight.dtype))} on {hidden.device.type}"
        raise ValueError(f"batch_invariant: expected float32, bfloat16 or float16 on cpu, got {got}")
    numbers = (temperature, softcap, factor, batch_invariant)
    selection = checked_selection(candidates, top, hidden, len(lm_head_weight))
    return Inputs(hidden, lm_head_weight, targets.long(), bias, *numbers, *selection)


def checked_selection(candidates: Tensor | None, top: int, rows: Tensor, vocabulary: int) -> Selection:
    """Candidates as int64, and `top`; `rows` are hidden states or logits `[N, ...]`.

    Raises:
        TypeError: Candidates are no integer tensor, or `top` is no integer.
        ValueError: Shapes do not fit, devices differ, or `top` is out of range.
    """
    if isinstance(top, bool) or not isinstance(top, (int, torch.SymInt)):
        raise TypeError(f"top: expected an int, got {type(top).__qualname__}")
    most = min(MAX_TOP, vocabulary)
    if not 0 <= top <= most:
        raise ValueError(f"top: expected at least 0 and at most {most}, got {top}")
    if candidates is None:
        return Selection(None, top)
    _check_integers("candidates", candidates)
    if candidates.dim() != 2 or len(candidates) != len(rows):
        raise ValueError(f"candidates: expected [{len(rows)}, M], got {list(candidates.shape)}")
    check_device("candidates", candidates, rows)
    return Selection(candidates.long(), top)


def checked_rule(temperature: float, softcap: float | None, scale: float | None) -> Rule:
    """Scale, softcap and temperature; a scale that is None is 1.

    Raises:
        ValueError: A number is out of range.
    """
    _check_positive("temperature", temperature)
    if softcap is not None:
        _check_positive("softcap", softcap)
    factor = 1.0 if scale is None else float(scale)
    if not -math.inf < factor < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return factor, softcap, float(temperature)


def check_targets(targets: Tensor, hidden: Tensor) -> None:
    """Raises unless `targets` are `[N]` integers where the hidden states are."""
    _check_integers("targets", targets)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: expected [{hidden.shape[0]}], got {list(targets.shape)}")
    check_device("targets", targets, hidden)


def _check_integers(name: str, tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tokens).__qualname__}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32, got {bare(tokens.dtype)}")


def _check_positive(name: str, number: float) -> None:
    if not 0.0 < number < math.inf:  # which Dynamo can trace, as it cannot isfinite
        raise ValueError(f"{name}: expected a finite number above zero, got {number}")


def check_range(targets: Tensor, vocabulary: int, candidates: Tensor | None = None) -> None:
    """Raises unless each target and candidate is a token of the vocabulary.

    On a CUDA device the check is a device-side assertion, as in torch's own indexing: nothing waits for its outcome,
    and the error comes up where the host next waits for the device.
    """
    for name, tokens in (("targets", targets), ("candidates", candidates)):
        if tokens is None:
            continue
        inside = (tokens >= 0) & (tokens < vocabulary)
        if tokens.is_cuda:
            torch._assert_async(inside.all(), f"{name}: expected token ids below {vocabulary}")
            continue
        outside = (~inside).nonzero()
        if len(outside):
            place = tuple(outside[0].tolist())
            got = f"{int(tokens[place])} in row {place[0]}"
            raise ValueError(f"{name}: expected token ids below {vocabulary}, got {got}")


def precision(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of products, sums and results."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def are_of_kernels(*tensors: Tensor | None) -> bool:
    """Whether the kernels, which know no float64, may be used for these tensors."""
    return not SETTINGS.plain_torch and all(t is None or t.dtype != torch.float64 for t in tensors)
