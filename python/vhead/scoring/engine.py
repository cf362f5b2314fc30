"""The model's side of scoring: a padded batch in, the asked-for fields of its rollouts out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vhead.backbone import last_hidden_state, plan_for, run
from vhead.errors import HeadError, VheadError
from vhead.scoring.encode import Encoded
from vhead.scoring.logits import find_logits_rule
from vhead.scoring.statistics import row_chunks, token_statistics

Fields = dict[str, NDArray[np.float32]]

# Without a rule for the logits of chosen rows, those of a whole batch exist at once; batches are then this small.
_FULL_LOGITS_BYTES = 64 * 1024 * 1024
_FLOAT32_BYTES = 4


class Engine:
    """Runs a language model with a value head over batches of rollouts.

    Args:
        model: `.pretrained_model` is the language model, `.v_head` maps `[..., H]` to `[..., 1]`.
        num_threads: Torch's threads while computing; None leaves them as they are.

    Attributes:
        device: Where token ids go.
        vocabulary_size: Token ids are below it.
        context_length: Tokens that the model takes at once, None where it states no limit.
        selects_rows: Whether logits are computed for completion tokens only, by a rule that was checked against the
            model's own logits; otherwise the model computes those of a whole batch.

    Raises:
        HeadError: The model has no value head.
        VheadError: The model is an encoder-decoder.
    """

    def __init__(self, model: nn.Module, num_threads: int | None = None) -> None:
        body, head = getattr(model, "pretrained_model", None), getattr(model, "v_head", None)
        if not isinstance(body, nn.Module) or not isinstance(head, nn.Module):
            raise HeadError(f"model: expected a language model with a value head, got a {type(model).__name__}")
        self._model, self._body, self._head = model, body, head
        self._num_threads = num_threads
        self._plan = plan_for(body)
        if self._plan.is_encoder_decoder:
            raise VheadError(f"model: expected a decoder-only language model, got the {type(body).__name__}")
        weight = _embedding(body)
        self.device: torch.device = weight.device
        self.vocabulary_size = _vocabulary_size(body, weight)
        self.context_length = _context_length(body.config)
        with self._computing():
            self._rule = find_logits_rule(body, self._plan)
        self.selects_rows = self._rule is not None

    def batch_budget(self, token_budget: int, fields: Sequence[str]) -> int:
        """Padded tokens per batch: `token_budget`, or fewer where the logits of all of them have to exist."""
        if self.selects_rows or not _needs_logits(fields):
            return token_budget
        return min(token_budget, max(1, _FULL_LOGITS_BYTES // (_FLOAT32_BYTES * self.vocabulary_size)))

    def score(self, batch: Sequence[Encoded], fields: Sequence[str], temperature: float) -> Fields:
        """The fields of a batch's rollouts, one after the other in the batch's order, float32.

        Raises:
            VheadError: The device has not enough memory for the batch.
        """
        tokens, mask = _padded(batch)
        try:
            return self._score(batch, tokens, mask, fields, temperature)
        except torch.cuda.OutOfMemoryError as error:
            raise VheadError(
                f"out of memory with a batch of {list(tokens.shape)} tokens; a smaller token_budget "
                f"(--token-budget) needs less: {str(error).splitlines()[0]}"
            ) from error

    def _score(
        self, batch: Sequence[Encoded], tokens: Tensor, mask: Tensor, fields: Sequence[str], temperature: float
    ) -> Fields:
        with self._computing():
            inputs = {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device)}
            predicting, last = _rows(batch, tokens.shape[1])
            hidden, logits_of = self._forward(inputs, predicting, fields)
            computed = self._head_outputs(hidden, predicting, last, fields)
            if _needs_logits(fields):
                computed |= self._statistics(logits_of, batch, fields, temperature)
            return {name: tensor.cpu().numpy() for name, tensor in computed.items()}

    def _forward(
        self, inputs: dict[str, Tensor], predicting: Tensor, fields: Sequence[str]
    ) -> tuple[Tensor, Callable[[slice], Tensor]]:
        """Hidden states `[B, T, H]`, and what gives the logits of a slice of the predicting rows."""
        if self._rule is None and _needs_logits(fields):
            output, hidden = run(self._body, self._plan, {**inputs, "use_cache": False})
            logits = output.logits.flatten(0, 1)
            rows = predicting.to(logits.device)
            return hidden, lambda chunk: logits[rows[chunk]].float()
        hidden = last_hidden_state(self._body, plan=self._plan, **inputs)
        states, rows, rule = hidden.flatten(0, 1), predicting.to(hidden.device), self._rule
        return hidden, lambda chunk: Tensor() if rule is None else rule(states[rows[chunk]])

    def _head_outputs(
        self, hidden: Tensor, predicting: Tensor, last: Tensor, fields: Sequence[str]
    ) -> dict[str, Tensor]:
        rows = {name: index for name, index in (("values", predicting), ("reward", last)) if name in fields}
        if not rows:
            return {}
        outputs = self._head(hidden).float().flatten()
        return {name: outputs[index.to(outputs.device)] for name, index in rows.items()}

    def _statistics(
        self,
        logits_of: Callable[[slice], Tensor],
        batch: Sequence[Encoded],
        fields: Sequence[str],
        temperature: float,
    ) -> dict[str, Tensor]:
        targets = np.concatenate([rollout.tokens[rollout.prompt_length :] for rollout in batch])
        chunks = row_chunks(len(targets), self.vocabulary_size)
        logprobs, entropy = token_statistics(
            logits_of, chunks, torch.from_numpy(targets), temperature, entropy="entropy" in fields
        )
        computed = {"logprobs": logprobs, "entropy": entropy}
        return {name: tensor for name, tensor in computed.items() if tensor is not None and name in fields}

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Evaluation mode, no gradients and the asked-for threads; all as before afterwards."""
        training = [module for module in self._model.modules() if module.training]
        threads = torch.get_num_threads()
        try:
            for module in training:
                module.training = False
            if self._num_threads is not None:
                torch.set_num_threads(self._num_threads)
            # Not inference mode: what a model caches on its first call would then be of no use to training.
            with torch.no_grad():
                yield
        finally:
            if self._num_threads is not None:
                torch.set_num_threads(threads)
            for module in training:
                module.training = True


def _needs_logits(fields: Sequence[str]) -> bool:
    return "logprobs" in fields or "entropy" in fields


def _padded(batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 `[B, T]`, padded on the right, where no position of a token depends on it."""
    tokens = np.zeros((len(batch), max(map(len, batch))), np.int64)
    mask = np.zeros_like(tokens)
    for row, rollout in enumerate(batch):
        tokens[row, : len(rollout)] = rollout.tokens
        mask[row, : len(rollout)] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def _rows(batch: Sequence[Encoded], width: int) -> tuple[Tensor, Tensor]:
    """Rows of the flattened batch: those that predict a completion token, and each rollout's last token."""
    ends = np.fromiter(map(len, batch), np.int64) + np.arange(len(batch)) * width
    starts = ends - np.fromiter((rollout.completion_length for rollout in batch), np.int64)
    predicting = np.concatenate([np.arange(start - 1, end - 1) for start, end in zip(starts, ends, strict=True)])
    return torch.from_numpy(predicting), torch.from_numpy(ends - 1)


def _embedding(body: Any) -> Tensor:  # noqa: ANN401, a language model of any class
    weight: Tensor = body.get_input_embeddings().weight
    return weight


def _vocabulary_size(body: Any, embedding: Tensor) -> int:  # noqa: ANN401, a language model of any class
    """Ids that can be both read and predicted."""
    predicted = getattr(body.get_output_embeddings(), "weight", embedding)
    return min(embedding.shape[0], predicted.shape[0])


def _context_length(config: Any) -> int | None:  # noqa: ANN401, a configuration of any class
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
