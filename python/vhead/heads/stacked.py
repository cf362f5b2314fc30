"""Several heads over the same hidden states as one module."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vhead import ops
from vhead.errors import HeadError
from vhead.heads.kinds import is_plain_linear
from vhead.heads.value_head import ValueHead


class StackedHeads(nn.Module):
    """Maps hidden states `[..., H]` to the outputs of several heads side by side, `[..., K]`, float32.

    K is the sum of the heads' outputs. Each head gives the bits that it gives alone. Heads of one projection are one
    operation, which reads the hidden states once; the others run one after the other.

    Attributes:
        names: The heads' names, in order.
        heads: The heads, in the same order. Their weights are not copies.
        columns: Where each head's outputs are among the K, by name.

    Raises:
        HeadError: There is no head, one is no `ValueHead`, or they read hidden states of different widths.
    """

    def __init__(self, heads: Mapping[str, ValueHead]) -> None:
        super().__init__()
        if not isinstance(heads, Mapping):
            raise HeadError(f"heads: expected a mapping from names to heads, got a {type(heads).__name__}")
        for name, head in heads.items():
            if not isinstance(head, ValueHead):
                raise HeadError(f"heads: expected a ValueHead under {name!r}, got a {type(head).__name__}")
        if not heads:
            raise HeadError("heads: expected at least one head, got none")
        widths = {name: head.hidden_size for name, head in heads.items()}
        if len(set(widths.values())) > 1:
            listing = ", ".join(f"{name} [{width}]" for name, width in widths.items())
            raise HeadError(f"heads: expected heads that read hidden states of one width, got {listing}")
        self.names = tuple(heads)
        self.heads = nn.ModuleList(heads.values())

    @property
    def hidden_size(self) -> int:
        """Elements of the hidden state that the heads read: H."""
        return self._heads()[0].hidden_size

    @property
    def num_outputs(self) -> int:
        """Numbers per hidden state: K, of all heads together."""
        return sum(head.num_outputs for head in self._heads())

    @property
    def columns(self) -> dict[str, slice]:
        """Where each head's outputs are among the K, by name."""
        places, start = {}, 0
        for name, head in zip(self.names, self._heads(), strict=True):
            places[name] = slice(start, start + head.num_outputs)
            start += head.num_outputs
        return places

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Projects hidden states `[..., H]` to the outputs of all heads, `[..., K]`, float32."""
        heads = self._heads()
        summaries = [head.summary for head in heads if _is_one_projection(head)]
        if len(summaries) < len(heads) or len({summary.weight.device for summary in summaries}) > 1:
            return torch.cat([head(hidden_states) for head in heads], dim=-1)
        # Put together anew each time: a trainer or a hand-over of weights may have changed any of them.
        weight = torch.cat([summary.weight for summary in summaries])
        bias = torch.cat([summary.bias for summary in summaries])
        values = ops.value_head(hidden_states.to(weight.device), weight, bias)
        return values.unsqueeze(-1) if weight.shape[0] == 1 else values

    def _heads(self) -> list[ValueHead]:
        return list(self.heads)  # type: ignore[arg-type]  # the constructor put these in


def stacked(heads: Mapping[str, ValueHead]) -> StackedHeads:
    """One module that gives the outputs of several heads side by side, as `StackedHeads` describes it.

    Args:
        heads: The heads by name, which give hidden states of one width their values.

    Raises:
        HeadError: There is no head, or the heads read hidden states of different widths.
    """
    return StackedHeads(heads)


def _is_one_projection(head: ValueHead) -> bool:
    """Whether the head is its weight and bias and nothing else: no support, no dropout at work, no adapter, no hook."""
    is_dropping = head.dropout.training and getattr(head.dropout, "p", 0.0) > 0.0
    return head.support is None and not is_dropping and is_plain_linear(head.summary)
