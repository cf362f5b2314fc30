"""Hidden states of rollouts, by the pass over a language model that scores them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vhead.errors import HeadError
from vhead.fitting.examples import Checks
from vhead.fitting.fitting import FitOptions, Fitting
from vhead.formats.layout import Format
from vhead.heads import hidden_size_of
from vhead.scoring.conventions import Conventions
from vhead.scoring.fields import Asked
from vhead.scoring.scorer import Scorer


class HiddenStates(nn.Module):
    """A head whose outputs are the hidden states.

    Args:
        num_outputs: H.

    Attributes:
        dtype: That of the states that the model gives; None before the first ones.
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.dtype: torch.dtype | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The states `[N, H]`, float32."""
        self.dtype = hidden_states.dtype
        return hidden_states.float()


class _Headless(nn.Module):
    """A language model with a head that reads its states."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.pretrained_model, self.v_head = body, head


class Reading:
    """Reads hidden states off rollouts as a scorer reads values: neither its head nor logits are computed.

    Args:
        scorer_or_model: As `fit` takes it.

    Raises:
        HeadError: It is neither a scorer nor a language model.
    """

    def __init__(self, scorer_or_model: Scorer | nn.Module) -> None:
        model = scorer_or_model.model if isinstance(scorer_or_model, Scorer) else scorer_or_model
        body = getattr(model, "pretrained_model", model)
        if not isinstance(body, nn.Module) or not hasattr(body, "config"):
            kind = type(scorer_or_model).__name__
            raise HeadError(f"scorer_or_model: expected a Scorer or a language model, got a {kind}")
        own = getattr(getattr(model, "v_head", None), "hidden_size", None)
        self.hidden_size: int = own if isinstance(own, int) else hidden_size_of(body.config)
        self._head = HiddenStates(self.hidden_size)
        if isinstance(scorer_or_model, Scorer):
            self._scorer = scorer_or_model.with_head(self._head, scorer_or_model.conventions.of_states())
        else:
            self._scorer = Scorer(_Headless(body, self._head), conventions=Conventions())

    def fitting(self, options: FitOptions, folder: Path) -> Fitting:
        """A new fitting of what is read."""
        return Fitting(options, self.hidden_size, self._scorer.device, folder, self._dtype)

    def chunks(
        self, examples: Iterable[Any], options: FitOptions, format: Format | None = None, **handlers: Any
    ) -> Iterator[Any]:
        """The examples that can be read, chunk by chunk, with the states as their values or rewards."""
        check = Checks(options.target, format)
        return self._scorer.scored(examples, Asked((options.reads,)), check=check, **handlers)

    def _dtype(self) -> str:
        return str(self._head.dtype).removeprefix("torch.")
