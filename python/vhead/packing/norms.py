"""Root-mean-square norms of transformers' models in one pass over memory, where the model takes five."""

import torch
from torch import Tensor, nn

from vhead.ops.norm import fuses_norms, rms_norm

# transformers' classes that norm in float32, round, and multiply by their weight.
_CLASSES = frozenset(
    f"{family}RMSNorm"
    for family in (
        "Llama",
        "Mistral",
        "Mixtral",
        "Qwen2",
        "Qwen2Moe",
        "Qwen3",
        "Qwen3Moe",
        "Phi3",
        "Granite",
        "SmolLM3",
    )
)
# What two right roundings of one number differ by, as a part of it.
_LAST_PLACE = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}
_TRIAL_ROWS = 3


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module calls itself a root-mean-square norm."""
    return "RMSNorm" in type(module).__name__


@torch.no_grad()
def is_norm(module: nn.Module) -> bool:
    """Whether a module is one of transformers' norms in its usual form, and gives what the kernel gives."""
    kind = type(module)
    if kind.__name__ not in _CLASSES or not kind.__module__.startswith("transformers.models."):
        return False
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float) or weight.dim() != 1:
        return False
    return len(list(module.parameters())) == 1 and fuses_norms(weight) and _agrees(module, weight, epsilon)


def forward(module: nn.Module, states: Tensor) -> Tensor:
    """The norm by the kernel, or by the module itself where autocast or the caller has made other dtypes."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if states.dtype != weight.dtype or not states.is_cpu:
        own: Tensor = type(module).forward(module, states)
        return own
    return rms_norm(states, weight, module.variance_epsilon)  # type: ignore[arg-type]


def _agrees(module: nn.Module, weight: Tensor, epsilon: float) -> bool:
    """Whether both give the same numbers, but for their last place, where the epsilon counts and where it does not."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[epsilon**0.5], [1.0], [30.0]])[:_TRIAL_ROWS]
    states = (torch.randn(_TRIAL_ROWS, weight.shape[0], generator=generator) * sizes).to(weight.dtype)
    expected, found = type(module).forward(module, states).float(), rms_norm(states, weight, epsilon).float()
    # Rounded before the weight and after it.
    return bool(((found - expected).abs() <= 2 * _LAST_PLACE[weight.dtype] * expected.abs()).all())
