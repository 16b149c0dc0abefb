"""Causal softmax attention in blocks of queries, with its own backward.

Scores are computed once: the same block gives the output, the maximum logits and the probabilities that the backward
needs. Blocks keep the live scores near the cache and skip the keys no query of the block can see. Probabilities are
kept for the backward while they are small, and recomputed block by block otherwise.

Letters: B sequences of a group; Hkv key heads; G query heads per key head; R query rows of a block; S keys it can see.
Queries are laid out `[B * Hkv, L * G, Dk]`, so that heads which share a key share one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.attention.plan import Group, plan_groups
from perilune.ops.layout import SequenceLayout

# Queries per block: fewer skip more of the masked half, more make larger products.
BLOCK_ROWS = 64
MIN_BLOCK_ROWS = 8
# Scores of one block. Sequences are added to a group up to the first, which stays in cache; a single long sequence gets
# fewer rows beyond the second.
GROUP_BYTES = 2 << 20
BLOCK_BYTES = 8 << 20
# Probabilities that one call keeps for its backward; beyond this they are recomputed.
KEPT_BYTES = 64 << 20
# Of PyTorch's kernel, which keeps no scores either; other dtypes would get one that does.
_FUSED_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries `[start, end)` of every sequence of a group; only keys before `columns` can be seen by any of them."""

    start: int
    end: int
    columns: int


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores of half-precision inputs are float32: rounded to bfloat16, a logit of 100 is off by up to a quarter."""
    return torch.promote_types(dtype, torch.float32)


def _batch_heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """`[B, L, Hkv * G, D]` to `[B * Hkv, L * G, D]`."""
    batch, length, heads, dim = x.shape
    split = x.view(batch, length, num_kv_heads, heads // num_kv_heads, dim)
    return split.transpose(1, 2).reshape(batch * num_kv_heads, length * (heads // num_kv_heads), dim)


def _split_heads(x: Tensor, num_kv_heads: int, length: int) -> Tensor:
    """`[B * Hkv, L * G, D]` to `[B, L, Hkv * G, D]`."""
    batch, rows, dim = x.shape[0] // num_kv_heads, x.shape[1], x.shape[2]
    split = x.view(batch, num_kv_heads, length, rows // length, dim).transpose(1, 2)
    return split.reshape(batch, length, num_kv_heads * (rows // length), dim)


class _Operands:
    """One group's padded inputs, and the blocks of its scores."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, group: Group) -> None:
        self.group = group
        self.num_kv_heads = k.shape[1]
        self.queries_per_key = q.shape[1] // k.shape[1]
        self.q = _batch_heads(group.queries.pad(q), self.num_kv_heads)
        self.k = _batch_heads(group.keys.pad(k), self.num_kv_heads)
        self.v = _batch_heads(group.keys.pad(v), self.num_kv_heads)

    def blocks(self) -> Iterator[_Block]:
        """Blocks of rows, in order."""
        length, columns, farthest = self.group.queries.length, self.group.keys.length, max(self.group.offsets)
        row_bytes = self.q.shape[0] * self.queries_per_key * columns * _score_dtype(self.q.dtype).itemsize
        step = min(BLOCK_ROWS, max(MIN_BLOCK_ROWS, BLOCK_BYTES // row_bytes))
        for start in range(0, length, step):
            end = min(start + step, length)
            yield _Block(start, end, min(columns, end + farthest))

    def rows(self, block: _Block) -> slice:
        """Rows of the block in `q`."""
        return slice(block.start * self.queries_per_key, block.end * self.queries_per_key)

    def hidden_keys(self) -> Tensor:
        """`[B or 1, BLOCK_ROWS, W]` bool: True where a key is later than the query.

        Counted from the first key that some row of a block cannot see, the pattern is the same for every block.
        """
        device, nearest = self.q.device, min(self.group.offsets)
        offsets = self.group.offsets if max(self.group.offsets) > nearest else (nearest,)
        last_visible = torch.tensor(offsets, device=device)[:, None] - nearest + torch.arange(BLOCK_ROWS, device=device)
        keys = torch.arange(BLOCK_ROWS + max(self.group.offsets) - nearest, device=device)
        return keys >= last_visible[..., None]

    def scores(self, scale: float) -> Iterator[tuple[_Block, Tensor]]:
        """Each block with its masked logits `[B * Hkv, R * G, S]`."""
        dtype = _score_dtype(self.q.dtype)
        q, k, hidden = self.q.to(dtype) * scale, self.k.to(dtype), self.hidden_keys()
        for block in self.blocks():
            scores = torch.bmm(q[:, self.rows(block)], k[:, : block.columns].transpose(1, 2))
            first_hidden = block.start + min(self.group.offsets) + 1
            if first_hidden < block.columns:
                count = block.end - block.start
                view = scores.view(-1, self.num_kv_heads, count, self.queries_per_key, block.columns)
                mask = hidden[:, None, :count, None, : block.columns - first_hidden]
                view[..., first_hidden:].masked_fill_(mask, -torch.inf)
            yield block, scores

    def probabilities(self, scores: Tensor) -> Tensor:
        """Softmax over keys, in the dtype of the values."""
        return torch.softmax(scores, -1).to(self.v.dtype)


def _forward_group(x: _Operands, scale: float, row_max: Tensor | None, kept: list[Tensor] | None) -> Tensor:
    """Output `[B * Hkv, L * G, Dv]`; fills `row_max` `[B * Hkv, L * G]` and appends each block's probabilities."""
    out = x.q.new_empty(*x.q.shape[:2], x.v.shape[-1])
    for block, scores in x.scores(scale):
        rows = x.rows(block)
        if row_max is not None:
            row_max[:, rows] = scores.amax(-1)
        p = x.probabilities(scores)
        if kept is not None:
            kept.append(p)
        out[:, rows] = torch.bmm(p, x.v[:, : block.columns])
    return out


def _fused_group(q: Tensor, k: Tensor, v: Tensor, group: Group, scale: float) -> Tensor:
    """Output `[B, L, H, Dv]` by PyTorch's kernel; padded keys are later than every query that counts."""
    padded = group.queries.pad(q), group.keys.pad(k), group.keys.pad(v)
    queries, keys, values = (x.transpose(1, 2) for x in padded)
    is_shared = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=is_shared)
    return o.transpose(1, 2)


def _is_fused(q: Tensor, k: Tensor, v: Tensor, group: Group) -> bool:
    """Whether that kernel takes a group: it sees the first keys of a sequence, and wants one size of vectors."""
    is_known = q.device.type == "cpu" and q.dtype in _FUSED_DTYPES and q.shape[-1] == v.shape[-1]
    return is_known and not any(group.offsets)


def _head_max(row_max: Tensor, x: _Operands) -> Tensor:
    """Largest logit of each query head `[H]`, padded rows left out."""
    rows = _split_heads(row_max[..., None], x.num_kv_heads, x.group.queries.length)[..., 0]
    valid = x.group.queries.valid()
    if valid is not None:
        rows = rows.masked_fill(~valid[..., None], -torch.inf)
    return rows.flatten(0, 1).amax(0).float()


def _backward_group(
    x: _Operands, scale: float, d_out: Tensor, kept: Iterator[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one group's `q`, `k`, `v`, those of q and k still without the factor `scale`.

    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = dS K,  dK = dS^T Q.
    """
    if kept is None:
        blocks = ((block, x.probabilities(scores)) for block, scores in x.scores(scale))
    else:
        # blocks first: when they end, nothing of the next group's probabilities has been taken
        blocks = zip(x.blocks(), kept, strict=False)
    d_q = torch.empty_like(x.q)
    d_k = torch.zeros_like(x.k, dtype=_score_dtype(x.k.dtype))
    d_v = torch.zeros_like(x.v, dtype=_score_dtype(x.v.dtype))
    for block, p in blocks:
        rows, columns = x.rows(block), slice(block.columns)
        d_o = d_out[:, rows]
        d_v[:, columns] += torch.bmm(p.transpose(1, 2), d_o)
        d_p = torch.bmm(d_o, x.v[:, columns].transpose(1, 2))
        d_s = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
        d_q[:, rows] = torch.bmm(d_s, x.k[:, columns])
        d_k[:, columns] += torch.bmm(d_s.transpose(1, 2), x.q[:, rows])
    return d_q, d_k, d_v


class _VarlenAttention(torch.autograd.Function):
    """Packed causal attention over a list of groups; see `perilune.ops.varlen_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: list[Group],
        scale: float,
        with_max: bool,
        needs_grad: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
        maxima = [torch.full((q.shape[1],), -torch.inf, device=q.device)]
        kept: list[Tensor] | None = [] if keep else None
        with torch.autocast(q.device.type, enabled=False):
            for group in groups:
                if not (with_max or needs_grad) and _is_fused(q, k, v, group):
                    group.queries.unpad(_fused_group(q, k, v, group, scale), out)
                    continue
                x = _Operands(q, k, v, group)
                row_max = x.q.new_empty(x.q.shape[:2], dtype=_score_dtype(q.dtype)) if with_max else None
                o = _forward_group(x, scale, row_max, kept)
                group.queries.unpad(_split_heads(o, x.num_kv_heads, group.queries.length), out)
                if row_max is not None:
                    maxima.append(_head_max(row_max, x))
        ctx.save_for_backward(q, k, v, *(kept or ()))
        ctx.groups, ctx.scale, ctx.keep = groups, scale, keep
        if not with_max:
            return out, None
        max_logits = torch.stack(maxima).amax(0)
        ctx.mark_non_differentiable(max_logits)
        return out, max_logits

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        stream = iter(kept) if ctx.keep else None
        d_out = grad_outputs[0].contiguous()
        with torch.autocast(q.device.type, enabled=False):
            for group in ctx.groups:
                x = _Operands(q, k, v, group)
                d_o = _batch_heads(group.queries.pad(d_out), x.num_kv_heads)
                g_q, g_k, g_v = _backward_group(x, ctx.scale, d_o, stream)
                group.queries.unpad(_split_heads(g_q * ctx.scale, x.num_kv_heads, group.queries.length), d_q)
                group.keys.unpad(_split_heads((g_k * ctx.scale).to(k.dtype), x.num_kv_heads, group.keys.length), d_k)
                group.keys.unpad(_split_heads(g_v.to(v.dtype), x.num_kv_heads, group.keys.length), d_v)
        return d_q, d_k, d_v, None, None, None, None, None


def varlen_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: SequenceLayout,
    layout_k: SequenceLayout,
    scale: float,
    with_max: bool,
) -> tuple[Tensor, Tensor | None]:
    """Same contract as `perilune.ops.varlen_attention`, on checked arguments."""
    max_scores = GROUP_BYTES // (q.shape[1] * _score_dtype(q.dtype).itemsize)
    groups = plan_groups(layout_q, layout_k, max_scores, BLOCK_ROWS)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    scores = sum(len(group.offsets) * group.queries.length * group.keys.length for group in groups) * q.shape[1]
    keep = needs_grad and scores * v.element_size() <= KEPT_BYTES
    return _VarlenAttention.apply(
        q.contiguous(), k.contiguous(), v.contiguous(), groups, scale, with_max, needs_grad, keep
    )
