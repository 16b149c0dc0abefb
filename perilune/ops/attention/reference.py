"""Causal softmax attention written as loops over sequences, heads and queries: the oracle.

Letters: Tq, Tk packed queries and keys; H query heads; Hkv key heads; Dk, Dv head dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.layout import SequenceLayout


def attend_row(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one query over the keys it may see.

    o = sum_j softmax_j(scale * q . k_j) v_j

    Args:
        q: `[Dk]`.
        keys: `[L, Dk]`, L >= 1.
        values: `[L, Dv]`.
        scale: factor of the logits.

    Returns:
        o `[Dv]`, and the largest logit as a scalar without gradient.

    Source: Kimi Linear, section 5.1 (global attention layers).
    """
    logits = scale * (keys @ q)
    return torch.softmax(logits, 0) @ values, logits.detach().max()


def varlen_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout_q: SequenceLayout, layout_k: SequenceLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Same contract as `perilune.ops.varlen_attention`, in the dtype of its inputs, always with maximum logits."""
    num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    maxima = [torch.full((), -torch.inf, dtype=torch.float32, device=q.device) for _ in range(num_heads)]
    rows: list[Tensor] = []
    for start_q, length_q, start_k, length_k in zip(
        layout_q.starts, layout_q.lengths, layout_k.starts, layout_k.lengths, strict=True
    ):
        for i in range(length_q):
            visible = slice(start_k, start_k + length_k - length_q + i + 1)
            for h in range(num_heads):
                o, top = attend_row(q[start_q + i, h], k[visible, h // group], v[visible, h // group], scale)
                rows.append(o)
                maxima[h] = torch.maximum(maxima[h], top.float())
    if not rows:
        # zero times an empty sum keeps the graph, so that gradients are zeros and not absent
        empty = q.new_zeros(0, num_heads, v.shape[-1])
        return empty + 0 * (q.sum() + k.sum() + v.sum()), torch.stack(maxima)
    return torch.stack(rows).view(q.shape[0], num_heads, v.shape[-1]), torch.stack(maxima)


def decode_attention_reference(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Same contract as `perilune.ops.decode_attention`: one `attend_row` per row and head."""
    num_heads, group = q.shape[1], q.shape[1] // keys.shape[2]
    out = q.new_zeros(q.shape[0], num_heads, values.shape[-1])
    for n, length in enumerate(lengths.tolist()):
        if not length:
            continue
        for h in range(num_heads):
            kv = h // group
            out[n, h] = attend_row(q[n, h], keys[n, :length, kv], values[n, :length, kv], scale)[0]
    return out
