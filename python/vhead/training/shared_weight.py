"""The weight that token embeddings and a language-model head share, as one step of autograd.

As two steps, each would make a gradient of the whole vocabulary, and autograd a third one of both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vhead.errors import VheadError
from vhead.ops.dispatch import is_plain
from vhead.ops.token_statistics import gradient_of
from vhead.scoring.logits import LogitsRule
from vhead.training.totals import is_distributed


class SharedWeight:
    """Lets a model's embeddings and its language-model head send back one gradient.

    Args:
        model: The language model.
        rule: How it makes logits; None: by itself.
        in_place: Whether backward adds the gradient of the rows to the weight's `.grad` by itself. The language-model
            head's is then somebody else's matter.
    """

    def __init__(self, model: nn.Module, rule: LogitsRule | None, *, in_place: bool = False) -> None:
        self._in_place = in_place
        self._embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        self._lm_head: Any = None if rule is None else rule.lm_head

    @property
    def _is_shared(self) -> bool:
        """Asked anew each time, as a program may give a model other weights."""
        weight = getattr(self._lm_head, "weight", None)
        return weight is not None and _is_plain(self._embeddings) and weight is self._embeddings.weight

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """While the block lasts, the model's embeddings give the weight for its language-model head to the list.

        The list stays empty where there is nothing to share: no gradient is wanted, or the embeddings have become
        something else.
        """
        found: list[Tensor] = []

        def share(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            wanted = torch.is_grad_enabled() and module.weight.requires_grad and is_plain(module.weight)
            if found or not args or not wanted:
                return None
            rows, weight = _Shared.apply(module.weight, args[0], output.detach(), module.padding_idx, self._in_place)
            found.append(module.weight if self._in_place else weight)
            shared: Tensor = rows
            return shared

        if not self._is_shared:
            yield found
            return
        handle = self._embeddings.register_forward_hook(share)
        try:
            yield found
        finally:
            handle.remove()


def check_alone(lm_head: Any) -> None:
    """Raises unless a gradient that backward adds to the weight's by itself is missed by nobody.

    Raises:
        VheadError: Several processes train together, or hooks wait for the weight's gradient.
    """
    weight = lm_head.weight
    hooks = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    if is_distributed() or hooks:
        found = "several processes" if is_distributed() else "hooks on the language-model head's weight"
        raise VheadError(
            f"accumulate_in_place: expected False with {found}, which would not see that gradient, got True"
        )


def _is_plain(embeddings: object) -> bool:
    """Whether this is torch's own lookup, with the usual gradient."""
    return type(embeddings) is nn.Embedding and not (
        embeddings.max_norm or embeddings.scale_grad_by_freq or embeddings.sparse or "forward" in vars(embeddings)
    )


class _Shared(torch.autograd.Function):
    """The rows of some tokens, and the weight itself."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        tokens: Tensor,
        rows: Tensor,
        padding: int | None,
        in_place: bool,  # noqa: FBT001
    ) -> tuple[Tensor, Tensor]:
        """The rows as they were looked up, and the weight as another tensor of the same memory."""
        ctx.save_for_backward(weight, tokens)
        ctx.padding, ctx.in_place = padding, in_place
        ctx.set_materialize_grads(False)
        return rows.view_as(rows), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor | None, of_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        """The language-model head's gradient, with those of the rows added to it, float32 sums of each token's."""
        weight, ids = ctx.saved_tensors
        if of_rows is None:
            return of_weight, None, None, None, None
        tokens, places = ids.flatten().unique(return_inverse=True)
        sums = of_rows.new_zeros(len(tokens), weight.shape[1], dtype=torch.promote_types(weight.dtype, torch.float32))
        sums.index_add_(0, places, of_rows.flatten(0, -2).to(sums.dtype))
        if ctx.padding is not None:
            sums[tokens == ctx.padding] = 0.0
        if ctx.in_place:
            gradient_of(weight).index_add_(0, tokens, sums.detach().to(weight.dtype))
            return of_weight, None, None, None, None
        of_weight = torch.zeros_like(weight) if of_weight is None else of_weight
        # In place where nobody differentiates once more: the gradient has been made for this step alone.
        add = of_weight.index_add if torch.is_grad_enabled() else of_weight.index_add_
        return add(0, tokens, sums.to(weight.dtype)), None, None, None, None
