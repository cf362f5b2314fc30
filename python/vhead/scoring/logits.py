"""How a language model turns its last hidden state into logits, found once and checked against the model itself.

And what those logits say about tokens, which is computed without holding the logits of all rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vhead import ops
from vhead.backbone.hidden_states import BackbonePlan, last_hidden_state
from vhead.backbone.placement import to_device
from vhead.heads import is_plain_linear
from vhead.ops.matrix_unit import suits_matrix_unit

# Weights of other dtypes are quantised, and their module converts what it reads by itself.
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Large enough for a soft cap of any size in use (30, 50) to bend the probe's logits visibly.
_PROBE_PEAK = 50.0
_PROBE_TOKENS = 8
_FLOAT32_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2


@dataclass(frozen=True)
class LogitsRule:
    """Logits as `cap * tanh(scale * lm_head(hidden) / cap)`, the cap only where there is one.

    Attributes:
        lm_head: The model's output projection.
        scale: 1, Cohere's `logit_scale`, Falcon-H1's `lm_head_multiplier`, or 1 / Granite's `logits_scaling`.
        softcap: Gemma 2's `final_logit_softcapping`, or None.
    """

    lm_head: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """How many logits a row has."""
        weight: Tensor = self.lm_head.get_parameter("weight")
        return getattr(self.lm_head, "out_features", None) or weight.shape[0]

    @property
    def uses_matrix_unit(self) -> bool:
        """Whether the processor's matrix unit multiplies for token statistics."""
        return is_plain_linear(self.lm_head) and suits_matrix_unit(self.lm_head.weight)

    def __str__(self) -> str:
        scale = "" if self.scale == 1.0 else f", times {self.scale:g}"
        cap = "" if self.softcap is None else f", capped at {self.softcap:g}"
        return f"the language-model head's output{scale}{cap}"

    def readable(self, hidden: Tensor) -> Tensor:
        """Hidden states in the weight's dtype: Mamba's and others' are float32 in a half-precision model too."""
        dtype = self.lm_head.get_parameter("weight").dtype
        return hidden.to(dtype) if dtype in _PLAIN_DTYPES else hidden

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[N, V]`, float32, of hidden states `[N, H]`; scaled and capped in place, as they are large."""
        logits: Tensor = self.lm_head(self.readable(hidden)).float()
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def find_logits_rule(model: nn.Module, plan: BackbonePlan) -> LogitsRule | None:
    """The rule that gives this model's own logits, or None when it computes them in another way.

    The model runs on a few tokens with the input of its `lm_head` scaled up, so that also a soft cap shows, and its
    logits are compared with the rule's. The model has to be in evaluation mode.
    """
    lm_head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(lm_head, nn.Module):
        return None
    config: Any = model.config
    rule = _rule_of(lm_head, config.get_text_config() if hasattr(config, "get_text_config") else config)
    with torch.no_grad():
        return rule if _agrees(rule, lm_head, model, plan) else None


def _rule_of(lm_head: nn.Module, config: object) -> LogitsRule:
    multipliers = [_number(config, name) or 1.0 for name in ("logit_scale", "lm_head_multiplier")]
    scale = math.prod(multipliers) / (_number(config, "logits_scaling") or 1.0)
    return LogitsRule(lm_head, scale, softcap=_number(config, "final_logit_softcapping"))


def _number(config: object, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else None


def _agrees(rule: LogitsRule, lm_head: nn.Module, model: nn.Module, plan: BackbonePlan) -> bool:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    tokens = torch.arange(1, 1 + _PROBE_TOKENS, device=embeddings.weight.device)[None] % embeddings.weight.shape[0]
    hidden = rule.readable(last_hidden_state(model, plan=plan, input_ids=tokens))
    peak = lm_head(hidden).abs().max().item()
    factor = _PROBE_PEAK / peak if 0.0 < peak < float("inf") else 1.0
    handle = lm_head.register_forward_pre_hook(lambda _module, args: (args[0] * factor, *args[1:]))
    try:
        own = model(input_ids=tokens, use_cache=False).logits.float()
        ours = rule(hidden[0])  # The hook scales this call as well.
    finally:
        handle.remove()
    if own.shape[1:] != ours.shape:
        return False
    tolerance = _FLOAT32_TOLERANCE if hidden.dtype == torch.float32 else _HALF_TOLERANCE
    return bool((own[0] - ours).abs().max() <= tolerance * own.abs().max())


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What is asked about the distributions of N rows.

    Attributes:
        targets: Token ids `[N]`, whose log-probabilities are wanted.
        candidates: More of them, `[N, M]`, or None.
        temperature: The logits are divided by it.
        entropy: Whether the entropies are wanted too.
        top: How many of the likeliest tokens are wanted.
    """

    targets: Tensor
    candidates: Tensor | None
    temperature: float
    entropy: bool
    top: int

    def fields(self, found: ops.TokenStatistics) -> dict[str, Tensor]:
        """What was asked for, by the names of its columns: float32, and int64 token ids."""
        fields = {"logprobs": found.logprobs.float()}
        if self.entropy:
            fields["entropy"] = found.entropy.float()
        if found.candidate_logprobs is not None:
            fields["candidate_logprobs"] = found.candidate_logprobs.float()
        if found.top_tokens is not None and found.top_logprobs is not None:
            fields |= {"top_tokens": found.top_tokens, "top_logprobs": found.top_logprobs.float()}
        return fields


def token_statistics(states: Tensor, rule: LogitsRule, asked: Statistics) -> dict[str, Tensor]:
    """What is asked for, in nats, without the logits of all rows.

    Args:
        states: Hidden states `[N, H]`.
        rule: How the model makes logits of them.
        asked: What is asked for.

    Returns:
        `logprobs` `[N]`, and whatever else is asked for, by the names of the scores' columns.
    """
    output = rule.lm_head
    if is_plain_linear(output) and output.weight.device == states.device:
        found = ops.token_statistics(
            rule.readable(states),
            output.weight,
            to_device(asked.targets, states.device),
            bias=output.bias,
            temperature=asked.temperature,
            softcap=rule.softcap,
            scale=rule.scale,
            candidates=None if asked.candidates is None else to_device(asked.candidates, states.device),
            top=asked.top,
        )
    else:
        # An adapter, a quantised layer, or one on another device: its module alone knows what its weights mean.
        found = _in_chunks(lambda rows: rule(states[rows]), rule.vocabulary, asked)
    return asked.fields(found)


def statistics_of_logits(logits: Tensor, rows: Tensor, asked: Statistics) -> dict[str, Tensor]:
    """The same of some rows `[N]` of logits `[M, V]` that are there already; they stay as they are."""
    return asked.fields(_in_chunks(lambda chunk: logits[rows[chunk]], logits.shape[-1], asked))


def _in_chunks(logits_of: Callable[[slice], Tensor], vocabulary: int, asked: Statistics) -> ops.TokenStatistics:
    return ops.statistics_in_chunks(
        logits_of,
        asked.targets,
        vocabulary,
        temperature=asked.temperature,
        candidates=asked.candidates,
        top=asked.top,
    )
