"""Gradients of attention on a CPU, from a few rows of weights at a time.

Torch's fused kernel multiplies small blocks in its backward pass. Here the weights are computed again, in float32 at
least, for as many queries as stay in the cache, and every product is one of torch's batched multiplications. The query
heads that share a key head are rows of one product, so that nothing is repeated.
"""

import torch
from torch import Tensor

# Weights of all heads that are there at once, twice.
_WEIGHTS = 2**19


def differentiate(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, grad_output: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values.

    Args:
        query: `[B, heads, queries, D]`.
        key: `[B, key heads, keys, D]`, whose heads each serve the same number of query heads.
        value: `[B, key heads, keys, E]`.
        mask: Additive, `[B or 1, 1, queries, keys]`; each query sees something.
        grad_output: `[B, heads, queries, E]`.
        scale: What products are multiplied by; None: one over the root of D.

    Returns:
        In their shapes, float32; float64 of float64.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    grad_query = torch.empty(query.shape, dtype=dtype)
    grad_key, grad_value = torch.zeros(key.shape, dtype=dtype), torch.zeros(value.shape, dtype=dtype)
    step = max(1, min(queries, _WEIGHTS // (heads * keys)))
    room = torch.empty(2, heads * step * keys, dtype=dtype)
    for place, seen in enumerate(mask.expand(len(query), 1, queries, keys)):
        own_key, own_value = key[place].to(dtype), value[place].to(dtype)
        for start in range(0, queries, step):
            rows = slice(start, start + step)
            asked, wanted = (
                tensor[place, :, rows].to(dtype).reshape(key.shape[1], -1, tensor.shape[3])
                for tensor in (query, grad_output)
            )
            asked = asked * scale
            shape = (*asked.shape[:2], keys)
            weights, gradients = (part[: shape[0] * shape[1] * keys].view(shape) for part in room)
            torch.bmm(asked, own_key.transpose(1, 2), out=weights)
            weights.view(heads, -1, keys).add_(seen[:, rows])
            torch.softmax(weights, -1, out=weights)
            grad_value[place].baddbmm_(weights.transpose(1, 2), wanted)
            torch.bmm(wanted, own_value.transpose(1, 2), out=gradients)
            gradients.mul_(weights)
            gradients.addcmul_(weights, gradients.sum(-1, keepdim=True), value=-1)
            grad_key[place].baddbmm_(gradients.transpose(1, 2), asked)
            grad_query[place, :, rows] = torch.bmm(gradients, own_key).view(heads, -1, query.shape[3])
    return grad_query.mul_(scale), grad_key, grad_value
