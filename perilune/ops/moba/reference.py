"""MoBA as a mask over all pairs of tokens: the oracle.

Letters: Tq, Tk packed queries and keys; H query heads; Hkv key heads; D channels; B tokens of a block.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from perilune.ops.moba.options import MobaOptions
from perilune.ops.moba.routing import MobaRouting, block_means

MOST_SCORES = 1 << 28
"""Scores of a sequence, over all heads, that the oracle computes."""


class MobaResult(NamedTuple):
    """What every backend returns."""

    out: Tensor
    """`[Tq, H, Dv]` in q's dtype."""
    lse: Tensor
    """`[Tq, H]` float32 (float64 for float64 inputs), the natural logarithm of the softmax's denominator."""
    max_logits: Tensor | None
    """`[H]` float32, the largest logit that any query reads; -inf where there is no query."""


def route_reference(q: Tensor, k: Tensor, options: MobaOptions, float32_means: bool = False) -> MobaRouting:
    """Choose blocks by a stable sort of all scores, row by row.

    s_j = q . kbar_j for j before the query's own block; the k - 1 largest, of equal ones the lower blocks.

    Source: MoBA, eq. 4 to 6 (the gate), with ties as this project orders them.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    means = block_means(k.detach(), options, wide if float32_means else k.dtype).to(wide)
    firsts = list(accumulate(options.block_counts(), initial=0))
    past = torch.full((*q.shape[:2], options.topk - 1), -1, dtype=torch.int32)
    group = q.shape[1] // k.shape[1]
    sequences = options.layout_q.sequence_ids.tolist()
    for t, (n, position) in enumerate(zip(sequences, options.positions().tolist(), strict=True)):
        if position < options.dense_tokens or position >= options.full_starts[n] or options.topk == 1:
            continue
        for h in range(q.shape[1]):
            candidates = means[firsts[n] : firsts[n] + position // options.block_size, h // group]
            best = best_blocks((candidates * q[t, h].detach().to(wide)).sum(-1), options.topk - 1)
            past[t, h] = torch.tensor(best, dtype=torch.int32)
    return MobaRouting(options, past.to(q.device))


def best_blocks(scores: Tensor, count: int) -> list[int]:
    """The `count` largest of scores `[n]`, or all of them, ascending; of equal ones the first, NaN as the lowest."""
    lowest = torch.finfo(scores.dtype).min
    values = [lowest if math.isnan(score) else max(score, lowest) for score in scores.tolist()]
    return sorted(sorted(range(len(values)), key=lambda j: (-values[j], j))[:count])


def moba_reference(q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting) -> MobaResult:
    """Same contract as `perilune.ops.moba_attention`, on checked arguments, by one masked softmax a sequence.

    o_t = sum_u softmax_u(scale q_t . k_u) v_u over the keys u <= t of the blocks that t reads. A value that is NaN or
    infinite reaches the queries that read it, and no others.

    Raises:
        ValueError: a sequence has more than `MOST_SCORES` scores.

    Source: MoBA, eq. 2 and 3.
    """
    options = routing.options
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    outs, lses, tops = [], [], []
    for n, (queries, keys) in enumerate(zip(options.layout_q.lengths, options.layout_k.lengths, strict=True)):
        if queries * keys * q.shape[1] > MOST_SCORES:
            raise ValueError(
                f"moba_attention: backend 'dense' computes at most {MOST_SCORES} scores of a sequence, but sequence "
                f"{n} has {queries} x {keys} x {q.shape[1]} heads; use 'blockwise'"
            )
        rows = slice(options.layout_q.starts[n], options.layout_q.starts[n] + queries)
        columns = slice(options.layout_k.starts[n], options.layout_k.starts[n] + keys)
        a = q[rows].to(wide).transpose(0, 1)
        b, c = (x[columns].to(wide).transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        is_read = _mask(routing, rows, keys - queries, keys, options.full_starts[n])
        logits = (options.scale * (a @ b.transpose(1, 2))).masked_fill(~is_read, -torch.inf)
        outs.append((torch.softmax(logits, -1) @ finite(c) + unbounded(is_read, c)).transpose(0, 1).to(q.dtype))
        lses.append(logits.logsumexp(-1).transpose(0, 1))
        tops.append(logits.detach().flatten(1).max(1).values if queries else logits.new_full(a.shape[:1], -torch.inf))
    if not outs:  # zeros from the inputs, so that gradients are zeros and not absent
        nothing = q.new_zeros(0, q.shape[1], v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum())
        return MobaResult(nothing, q.new_zeros(0, q.shape[1], dtype=wide), q.new_full(q.shape[1:2], -torch.inf).float())
    top = torch.stack(tops).amax(0).float()
    return MobaResult(torch.cat(outs), torch.cat(lses).detach(), top)


def finite(values: Tensor) -> Tensor:
    """The same with 0 for infinities and NaN, which times a probability of 0 would be NaN."""
    return values.nan_to_num(0, 0, 0)


def unbounded(is_read: Tensor, values: Tensor) -> Tensor:
    """What infinities and NaN among the values add to queries that read them, however small their probability.

    Args:
        is_read: `[..., Lq, Lk]` bool.
        values: `[..., Lk, Dv]`.

    Returns:
        `[..., Lq, Dv]` of 0, inf, -inf and NaN, without gradient; or one 0, if all values are finite.
    """
    rows, added = is_read.to(values.dtype), values.new_zeros(())
    found = {torch.inf: values.isposinf(), -torch.inf: values.isneginf(), torch.nan: values.isnan()}
    for number, is_there in found.items():
        if is_there.any():
            added = added + torch.where(rows @ is_there.to(values.dtype) > 0, number, 0.0)
    return added


def _mask(routing: MobaRouting, rows: slice, shift: int, keys: int, full_start: int) -> Tensor:
    """`[H, Lq, Lk]` bool, which keys each query of a sequence reads."""
    options, past = routing.options, routing.past[rows]
    device = past.device
    t = shift + torch.arange(past.shape[0], device=device)
    u = torch.arange(keys, device=device)
    block = u // options.block_size
    blocks = -(-keys // options.block_size)
    is_chosen = torch.zeros(*past.shape[:2], blocks + 1, dtype=torch.bool, device=device)
    is_chosen.scatter_(-1, torch.where(past < 0, blocks, past).long(), True)
    chosen = is_chosen[..., block].transpose(0, 1)
    own = block == (t // options.block_size)[:, None]
    every = ((t < options.dense_tokens) | (t >= full_start))[:, None]
    return (chosen | own | every) & (u <= t[:, None])
