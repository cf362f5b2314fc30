"""Values, log-probabilities and entropies that are read off while a model generates: no second forward.

Every decoding step computes the last hidden state and the logits of the position that predicts the next token. A logits
processor reads them off before the token is chosen; a stopping criterion, which transformers calls after the choice,
takes from them what was asked for and lets them go.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput

from vhead import ops
from vhead.backbone.hidden_states import BackbonePlan, observed, observed_logits, without_adapter
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
        values: `[B, N]`, or `[B, N, K]` for a head of K outputs, float32: the head's output at the position that
            predicts each completion token, 0 where `completion_mask` is False. None where it was not asked for, as
            below.
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

    def __getattr__(self, name: str) -> Any:
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


class StepReader(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Reads off each run of the model that a token is chosen by, before the model runs again. It changes no scores.

    It is called first among the processors that `generate` is given. Streamers, stopping criteria and processors may
    run the model as well, `values` included: all of them after this one, and before the next step's own run.

    Args:
        wanted: Which statistics will be taken from what is read.
        hidden_states: Returns the last hidden state of the latest run, `[B, T, H]`.
        logits: Returns the logits of the latest run, `[B, T, V]`.
    """

    def __init__(self, wanted: Wanted, hidden_states: Callable[[], Tensor], logits: Callable[[], Tensor]) -> None:
        self._wanted = wanted
        self._hidden_states = hidden_states
        self._logits = logits
        self._step: tuple[Tensor | None, Tensor | None] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Reads the step that will choose the token after `input_ids` `[B, T]`."""
        self.read()
        return scores

    def read(self) -> None:
        """Reads the latest run, unless this step was read already."""
        if self._step is None:
            needs_logits = self._wanted.logprobs or self._wanted.entropy
            state = self._hidden_states()[:, -1] if self._wanted.values else None
            self._step = state, self._logits()[:, -1].detach() if needs_logits else None

    def before(self, allowed: Callable[..., Any]) -> Callable[..., Any]:
        """The caller's function for allowed tokens, which transformers calls before this processor."""

        def read_then_allowed(*args: object) -> Any:
            self.read()
            return allowed(*args)

        return read_then_allowed

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """Gives the step's state `[B, H]` and logits `[B, V]`, each if it was wanted, and forgets them.

        Raises:
            GenerationError: The model's `generate` chose a token without calling its logits processors.
        """
        if self._step is None:
            raise GenerationError(
                "output_values, output_logprobs and output_entropy: this model's generate did not call its logits "
                "processors, so nothing can be read off; score the returned sequences instead"
            )
        step, self._step = self._step, None
        return step


class Recorder(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Records the statistics of each chosen token, and where each row ends by the caller's criteria.

    Args:
        wanted: Which statistics.
        v_head: The head, `[..., H]` to `[..., K]`.
        reader: What each step is read by.
        criteria: The caller's own stopping criteria.

    Attributes:
        ends: For each step, which rows a criterion has ended, bool `[B]`.
    """

    def __init__(
        self, wanted: Wanted, v_head: nn.Module, reader: StepReader, criteria: Sequence[StoppingCriteria] = ()
    ) -> None:
        self._wanted = wanted
        self._v_head = v_head
        self._reader = reader
        self._criteria = criteria
        self.prompt_length: int | None = None
        self.columns: dict[str, list[Tensor]] = {"values": [], "logprobs": [], "entropy": []}
        self.ends: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Records the step that chose the last token of `input_ids` `[B, T]`; says which rows end."""
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1] - 1
        state, logits = self._reader.take()
        if state is not None:
            values = self._v_head(state)
            self.columns["values"].append(values.squeeze(-1) if values.shape[-1] == 1 else values)
        if logits is not None:
            self._record_statistics(logits, input_ids[:, -1])
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self._criteria:
            ended |= torch.as_tensor(criterion(input_ids, scores, **kwargs), device=ended.device)
        self.ends.append(ended)
        return ended

    def _record_statistics(self, logits: Tensor, tokens: Tensor) -> None:
        statistics = ops.statistics_of_logits(logits, tokens.to(logits.device))
        if self._wanted.logprobs:
            self.columns["logprobs"].append(statistics.logprobs)
        if self._wanted.entropy:
            self.columns["entropy"].append(statistics.entropy)


def generate(
    model: PreTrainedModel,
    v_head: nn.Module,
    plan: BackbonePlan,
    wanted: Wanted,
    *args: object,
    **kwargs: Any,
) -> ScoredGeneration:
    """Runs a language model's `generate` and records the statistics of every token that it chooses.

    Raises:
        GenerationError: The arguments ask for a way of decoding whose steps are not the tokens of the output (beam
            search, assisted decoding) or run the model twice (guidance), or for an output that has no place for the
            statistics.
    """
    language_model = without_adapter(model)
    kwargs = _named(language_model, args, kwargs)
    config = _generation_config(language_model, kwargs)
    # One of transformers' own type takes the place of the one that transformers would make, and so stays in the list.
    theirs: list[StoppingCriteria] = []
    own: list[StoppingCriteria] = []
    for criterion in kwargs.pop("stopping_criteria", None) or []:
        (theirs if type(criterion).__module__.startswith("transformers.") else own).append(criterion)
    with ExitStack() as stack:
        hidden_states = stack.enter_context(observed(model, plan))
        logits = stack.enter_context(observed_logits(language_model))
        reader = StepReader(wanted, hidden_states, logits)
        recorder = Recorder(wanted, v_head, reader, own)
        kwargs["logits_processor"] = LogitsProcessorList([reader, *(kwargs.get("logits_processor") or [])])
        kwargs["stopping_criteria"] = StoppingCriteriaList([*theirs, recorder])
        if (allowed := kwargs.get("prefix_allowed_tokens_fn")) is not None:
            kwargs["prefix_allowed_tokens_fn"] = reader.before(allowed)
        output = model.generate(**kwargs, **_RETURNED)
    return _scored(output, recorder, config, trims_padding=bool(theirs or getattr(config, "stop_strings", None)))


def _named(model: PreTrainedModel, args: tuple[object, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names; `return_dict_in_generate` is checked and left out."""
    parameters = signature(model.generate)
    parameters.bind_partial(*args, **kwargs)  # An argument that is given twice is a TypeError, as ever.
    named = {**dict(zip(parameters.parameters, args, strict=False)), **kwargs}
    if named.pop("return_dict_in_generate", None) is False:
        raise GenerationError(
            "return_dict_in_generate: expected True or nothing, because values, log-probabilities and entropies are "
            "attributes of what is returned, got False"
        )
    return named


def _generation_config(model: PreTrainedModel, kwargs: dict[str, Any]) -> GenerationConfig:
    """The configuration as `generate` will fill it from the model's own, checked for what cannot be recorded."""
    if kwargs.get("custom_generate") is not None:
        raise GenerationError(
            "custom_generate: expected None with output_values, output_logprobs or output_entropy, got a decoding "
            "method of your own; score the returned sequences instead"
        )
    options = {name: value for name, value in kwargs.items() if name != "generation_config"} | _RETURNED
    config: GenerationConfig
    config, _ = model._prepare_generation_config(kwargs.get("generation_config"), **options)
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in _MODES:
        raise GenerationError(
            f"output_values, output_logprobs and output_entropy: expected greedy search or sampling, got {mode.value}; "
            "score the returned sequences instead"
        )
    if (guidance := getattr(config, "guidance_scale", None)) not in (None, 1):
        raise GenerationError(
            f"guidance_scale: expected 1 or nothing, because with guidance two runs of the model choose each token, "
            f"got {guidance}; score the returned sequences instead"
        )
    return config


def _scored(
    output: ModelOutput, recorder: Recorder, config: GenerationConfig, *, trims_padding: bool
) -> ScoredGeneration:
    sequences: Tensor = output.sequences
    prompt_length = recorder.prompt_length if recorder.prompt_length is not None else sequences.shape[1]
    completions = sequences[:, prompt_length:]
    mask = _completion_mask(completions, config, trims_padding=trims_padding)
    if recorder.ends and completions.shape[1]:
        # A row's tokens go as far as the first one after which one of the caller's criteria ended it.
        mask &= _up_to_first(torch.stack(recorder.ends, dim=1)[:, : mask.shape[1]].to(mask.device))
    columns = {name: _padded(steps, mask) for name, steps in recorder.columns.items()}
    return ScoredGeneration(sequences, mask, generation=output, **columns)


def _padded(steps: list[Tensor], mask: Tensor) -> Tensor | None:
    # Some versions of transformers look for the end of a sequence a few steps late, and drop what came after it.
    steps = steps[: mask.shape[1]]
    if not steps:
        return None
    column = torch.stack(steps, dim=1).to(mask.device)
    return column.masked_fill(~mask.reshape(*mask.shape, *(1 for _ in column.shape[2:])), 0.0)


def _completion_mask(completions: Tensor, config: GenerationConfig, *, trims_padding: bool) -> Tensor:
    """Marks the tokens up to the first end of sequence; also leaves out padding behind rows that ended otherwise."""
    end_tokens = _token_ids(config.eos_token_id)
    mask = _up_to_first(torch.isin(completions, torch.tensor(end_tokens, device=completions.device)))
    padding = _token_ids(config.pad_token_id) or end_tokens[:1]  # As transformers fills it.
    if trims_padding and padding:
        is_token = ~torch.isin(completions, torch.tensor(padding, device=completions.device))
        mask &= is_token.flip(-1).long().cumsum(dim=-1).flip(-1) > 0
    return mask


def _up_to_first(ends: Tensor) -> Tensor:
    """Marks each row's columns up to its first end, that one included."""
    return ends.long().cumsum(dim=-1) - ends.long() == 0


def _token_ids(value: int | Iterable[int] | Tensor | None) -> list[int]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.tolist()
    return [value] if isinstance(value, int) else list(value)
