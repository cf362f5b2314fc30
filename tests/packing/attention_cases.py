"""Random trees, attention in the plainest way, and a stand-in for the package flash_attn."""

import sys
import types

import numpy as np
import pytest
import torch

from vhead.packing.trees import Pack, pack_trees

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def random_pack(seed: int, longest: int = 40, trees: int = 3) -> Pack:
    """One row of trees that fork anywhere, also within a completion, some of them chains and some single sequences."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(int(rng.integers(1, trees + 1))):
        grown = [rng.integers(3, 90, int(rng.integers(1, longest)))]
        for _ in range(int(rng.integers(0, 6))):
            parent = grown[int(rng.integers(len(grown)))]
            kept = int(rng.integers(0, len(parent) + 1))
            grown.append(np.concatenate([parent[:kept], rng.integers(3, 90, int(rng.integers(1, longest)))]))
        sequences += grown
    (pack,) = pack_trees(sequences, 10**6)
    return pack


def random_states(rows: int, seed: int, key_heads: int = KEY_HEADS) -> list[torch.Tensor]:
    """Queries, keys and values `[1, heads, T, D]`, laid out as projections leave them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, rows, heads, SIZE, generator=generator).transpose(1, 2)
        for heads in (HEADS, key_heads, key_heads)
    ]


def one_at_a_time(
    pack: Pack, states: list[torch.Tensor], *, scale: float, softcap: float | None, window: int | None
) -> torch.Tensor:
    """Each sequence's attention by itself in float64: `[1, T, heads, D]`."""
    query, key, value = (tensor.double() for tensor in states)
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    output = torch.full((1, query.shape[2], query.shape[1], value.shape[3]), torch.nan, dtype=torch.float64)
    for at in range(len(pack.places)):
        rows = torch.from_numpy(pack.rows(at))
        scores = query[:, :, rows] @ key[:, :, rows].transpose(2, 3) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(len(rows))
        hidden = place > place[:, None]
        if window is not None:
            hidden |= place <= place[:, None] - window
        attended = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, :, rows]
        output[:, rows] = attended.transpose(1, 2)
    return output


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """What the package's function of this name and signature gives, sequence by sequence; the last ones are aligned."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    groups = q.shape[1] // k.shape[1]
    output, log_sums = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype), torch.empty(q.shape[1], q.shape[0])
    bounds = zip(*(b.tolist() for b in (cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:])), strict=False)
    for query_start, query_stop, key_start, key_stop in bounds:
        queries, keys = query_stop - query_start, key_stop - key_start
        assert 0 < queries <= max_seqlen_q
        assert 0 < keys <= max_seqlen_k
        query = q[query_start:query_stop].float().transpose(0, 1)
        key, value = (
            tensor[key_start:key_stop].float().transpose(0, 1).repeat_interleave(groups, dim=0) for tensor in (k, v)
        )
        scores = query @ key.transpose(1, 2) * scale
        if softcap > 0.0:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        left, right = window_size
        hidden = (distance > (left if left >= 0 else keys + queries)) | (distance < (0 if causal else -keys - queries))
        if right >= 0:
            hidden |= distance < -right
        scores = scores.masked_fill(hidden, -torch.inf)
        output[query_start:query_stop] = (scores.softmax(-1) @ value).transpose(0, 1).to(q.dtype)
        log_sums[:, query_start:query_stop] = scores.logsumexp(-1)
    return (output, log_sums, None) if return_attn_probs else output


def install_flash(monkeypatch: pytest.MonkeyPatch, function=flash_attn_varlen_func) -> None:
    """Makes `import flash_attn` find a module with this function."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, "flash_attn", module)
