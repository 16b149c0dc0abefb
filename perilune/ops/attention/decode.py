"""Attention of one query per row over that row's cached keys: memory-bound, so keys are read where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

# Keys of the rows computed at a time (as float32): they stay in cache from the logits to the values.
BLOCK_BYTES = 4 << 20


def decode_attention_torch(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Same contract as `perilune.ops.decode_attention`, on checked arguments."""
    num_rows = q.shape[0]
    row_bytes = keys.shape[1] * keys.shape[3] * torch.promote_types(keys.dtype, torch.float32).itemsize
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    with torch.autocast(q.device.type, enabled=False):
        parts = [
            _decode_rows(q[rows], keys[rows], values[rows], lengths[rows], scale)
            for rows in (slice(first, first + step) for first in range(0, num_rows, step))
        ]
    return torch.cat(parts) if parts else q.new_zeros(0, q.shape[1], values.shape[-1])


def _decode_rows(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """One batched product per key head: each is a strided view of the cache, so that nothing is copied or repeated."""
    longest = max(1, int(lengths.max()))
    group = q.shape[1] // keys.shape[2]
    # key 0 stays visible to rows without keys, which keeps their softmax finite until they are zeroed
    hidden = torch.arange(longest, device=q.device) >= lengths.clamp_min(1)[:, None]
    heads = [
        _decode_head(q[:, h * group : (h + 1) * group], keys[:, :longest, h], values[:, :longest, h], hidden, scale)
        for h in range(keys.shape[2])
    ]
    out = heads[0] if len(heads) == 1 else torch.cat(heads, 1)
    return out.masked_fill((lengths == 0)[:, None, None], 0)


def _decode_head(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Attention `[n, G, Dv]` of the G queries that share one key head."""
    # bfloat16 logits of 100 would be off by up to a quarter
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q.to(wide) * scale, keys.to(wide).transpose(1, 2))
    p = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1)
    return torch.bmm(p.to(values.dtype), values)
