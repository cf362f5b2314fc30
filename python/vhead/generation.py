"""Values, log-probabilities and entropies that are read off while a model generates: no second forward.

Every decoding step computes the last hidden state and the logits of the position that predicts the next token. A
stopping criterion, which transformers calls after each choice and which here never stops, takes from them what was
asked for and lets them go.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput

from vhead import backbone, ops
from vhead.errors import GenerationError

_RETURNED = {"return_dict_in_generate": True}
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass
class ScoredGeneration:
    """What `generate` returns when values, log-probabilities or entropies are asked for.

    Everything else that transformers' own output holds is an attribute here as well.

    Attributes:
        sequences: The token ids `[B, P + N]`: prompts, then completions, padded.
        completion_mask: `[B, N]`, bool: completion tokens up to each row's end of sequence, that token included.
        values: `[B, N]`, float32: the head's output at the position that predicts each completion token, 0 where
            `completion_mask` is False. None where it was not asked for, as below.
        logprobs: `[B, N]`, float32: the log-probability of each completion token by the unprocessed logits, which
            temperature, top-p and other processors have not touched; 0 where `completion_mask` is False.
        entropy: `[B, N]`, float32: the entropy of that distribution in nats; 0 where `completion_mask` is False.
        generation: transformers' own output.
    """

    sequences: Tensor
    completion_mask: Tensor
    values: Tensor | None
    logprobs: Tensor | None
    entropy: Tensor | None
    generation: ModelOutput = field(repr=False)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401, as transformers' output has it
        if name.startswith("__") or name == "generation":
            raise AttributeError(name)
        return getattr(self.generation, name)


@dataclass(frozen=True)
class Wanted:
    """Which statistics of each completion token are read off."""

    values: bool
    logprobs: bool
    entropy: bool

    def __bool__(self) -> bool:
        return self.values or self.logprobs or self.entropy


class Recorder(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Records the statistics of each chosen token; stops nothing.

    Args:
        wanted: Which statistics.
        v_head: The head, `[..., H]` to `[..., 1]`.
        hidden_states: Returns the last hidden state of the latest run, `[B, T, H]`.
        logits: Returns the logits of the latest run, `[B, T, V]`.
    """

    def __init__(
        self, wanted: Wanted, v_head: nn.Module, hidden_states: Callable[[], Tensor], logits: Callable[[], Tensor]
    ) -> None:
        self._wanted = wanted
        self._v_head = v_head
        self._hidden_states = hidden_states
        self._logits = logits
        self.prompt_length: int | None = None
        self.columns: dict[str, list[Tensor]] = {"values": [], "logprobs": [], "entropy": []}

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:  # noqa: ARG002, transformers'
        """Records the step that chose the last token of `input_ids` `[B, T]`."""
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1] - 1
        if self._wanted.values:
            self.columns["values"].append(self._v_head(self._hidden_states()[:, -1]).squeeze(-1))
        if self._wanted.logprobs or self._wanted.entropy:
            self._record_statistics(input_ids[:, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _record_statistics(self, tokens: Tensor) -> None:
        logits = self._logits()[:, -1].detach()
        statistics = ops.statistics_of_logits(logits, tokens.to(logits.device))
        if self._wanted.logprobs:
            self.columns["logprobs"].append(statistics.logprobs)
        if self._wanted.entropy:
            self.columns["entropy"].append(statistics.entropy)


def generate(
    model: PreTrainedModel,
    v_head: nn.Module,
    plan: backbone.BackbonePlan,
    wanted: Wanted,
    *args: object,
    **kwargs: Any,  # noqa: ANN401, transformers' arguments
) -> ScoredGeneration:
    """Runs a language model's `generate` and records the statistics of every token that it chooses.

    Raises:
        GenerationError: The arguments ask for a way of decoding whose steps are not the tokens of the output (beam
            search, assisted decoding), or for an output that has no place for the statistics.
    """
    config = _generation_config(model, args, kwargs)
    criteria = list(kwargs.pop("stopping_criteria", None) or [])
    language_model = backbone.without_adapter(model)
    with ExitStack() as stack:
        hidden_states = stack.enter_context(backbone.observed(model, plan))
        logits = stack.enter_context(backbone.observed_logits(language_model))
        recorder = Recorder(wanted, v_head, hidden_states, logits)
        kwargs |= {"stopping_criteria": StoppingCriteriaList([*criteria, recorder]), **_RETURNED}
        output = model.generate(*args, **kwargs)
    return _scored(output, recorder, config, trims_padding=bool(criteria or getattr(config, "stop_strings", None)))


def _generation_config(model: PreTrainedModel, args: tuple[object, ...], kwargs: dict[str, Any]) -> GenerationConfig:
    """The configuration that `generate` will use, checked for what cannot be recorded."""
    given: Any = kwargs.get("generation_config") or next((a for a in args if isinstance(a, GenerationConfig)), None)
    config: GenerationConfig = copy.deepcopy(given or model.generation_config)
    config.update(**{name: value for name, value in kwargs.items() if name != "generation_config"} | _RETURNED)
    if kwargs.get("return_dict_in_generate") is False:
        raise GenerationError("return_dict_in_generate: expected True or nothing with output_values, got False")
    if kwargs.get("custom_generate") is not None:
        raise GenerationError("custom_generate: expected None with output_values, got a decoding method of your own")
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in _MODES:
        raise GenerationError(
            f"output_values, output_logprobs and output_entropy: expected greedy search or sampling, got {mode.value}; "
            "score the returned sequences instead"
        )
    return config


def _scored(
    output: ModelOutput, recorder: Recorder, config: GenerationConfig, *, trims_padding: bool
) -> ScoredGeneration:
    sequences: Tensor = output.sequences
    prompt_length = recorder.prompt_length if recorder.prompt_length is not None else sequences.shape[1]
    completions = sequences[:, prompt_length:]
    mask = _completion_mask(completions, config, trims_padding=trims_padding)
    columns = {name: _padded(steps, mask) for name, steps in recorder.columns.items()}
    return ScoredGeneration(sequences, mask, generation=output, **columns)


def _padded(steps: list[Tensor], mask: Tensor) -> Tensor | None:
    # Some versions of transformers look for the end of a sequence a few steps late, and drop what came after it.
    steps = steps[: mask.shape[1]]
    return torch.stack(steps, dim=1).to(mask.device).masked_fill(~mask, 0.0) if steps else None


def _completion_mask(completions: Tensor, config: GenerationConfig, *, trims_padding: bool) -> Tensor:
    """Marks the tokens up to the first end of sequence; also leaves out padding behind rows that ended otherwise."""
    ends = torch.isin(completions, torch.tensor(_token_ids(config.eos_token_id), device=completions.device))
    mask = ends.long().cumsum(dim=-1) - ends.long() == 0
    padding = _token_ids(config.pad_token_id)
    if trims_padding and padding:
        is_token = ~torch.isin(completions, torch.tensor(padding, device=completions.device))
        mask &= is_token.flip(-1).long().cumsum(dim=-1).flip(-1) > 0
    return mask


def _token_ids(value: int | Iterable[int] | Tensor | None) -> list[int]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.tolist()
    return [value] if isinstance(value, int) else list(value)
