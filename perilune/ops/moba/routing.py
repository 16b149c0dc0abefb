"""Which past blocks a query reads: block means, scores and the top k - 1, chosen alike on every backend.

Higher scores first, then lower blocks; NaN and -inf count as the lowest number. Nothing here has a gradient.
"""

# T queries  H query heads  Hkv key heads  D channels  B tokens of a block  n blocks  k blocks a query reads

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.ops.moba.options import MobaOptions, Policy
from perilune.seeding import make_generator

# Scores computed at a time.
SCORE_BYTES = 16 << 20
# Blocks to choose from which on sorting is quicker than finding one after the other.
_MAXIMA = 24


@dataclass(frozen=True, slots=True)
class MobaRouting:
    """The past blocks that each query reads; computed once, it serves forward, backward and recomputation alike."""

    options: MobaOptions
    """How sequences are cut, and what k is."""
    past: Tensor
    """`[T, H, k - 1]` int32: blocks of the query's sequence, ascending, -1 behind the last. A query that reads every
    earlier key, as it has fewer than k past blocks or is behind `full_from`, has none of them here."""

    def blocks(self) -> Tensor:
        """`[T, H, topk]` int32 blocks that each query reads, its own included, ascending and -1 behind the last.

        There are as many as were asked for, even if no sequence has so many blocks. A query behind `full_from` has only
        its own here, though it reads all.
        """
        options = self.options
        positions = options.positions()
        own = (positions // options.block_size).to(torch.int32)
        listed = torch.cat([self.past, own[:, None, None].expand(-1, self.past.shape[1], 1)], -1)
        is_early = positions < options.dense_tokens
        full = torch.tensor(options.full_starts, dtype=torch.int64, device=own.device)
        is_early &= positions < full[options.layout_q.sequence_ids]
        ids = torch.arange(options.topk, dtype=torch.int32, device=own.device)
        early = torch.where(ids <= own[:, None], ids, -1)[:, None].expand_as(listed)
        listed = torch.where(is_early[:, None, None], early, listed)
        # -1 sorts behind every block
        last = torch.iinfo(torch.int32).max
        listed = torch.where(listed < 0, last, listed).sort(-1).values
        listed = torch.where(listed == last, -1, listed)
        return F.pad(listed, (0, (options.asked_topk or options.topk) - options.topk), value=-1)

    def matches(self, options: MobaOptions, num_heads: int) -> bool:
        """Whether this routing is one of `options` for `num_heads` query heads."""
        return self.options == options and self.past.shape[1] == num_heads


def block_means(k: Tensor, options: MobaOptions, dtype: torch.dtype) -> Tensor:
    """Mean key of every complete block, zeros for a sequence's last partial one.

    Args:
        k: `[Tk, Hkv, D]`.
        options: how Tk is cut.
        dtype: what means are rounded to.

    Returns:
        `[sum of n, Hkv, D]` in `dtype`, the blocks of one sequence after those of another.
    """
    size = options.block_size
    means = k.new_zeros(sum(options.block_counts()), *k.shape[1:], dtype=dtype)
    firsts = accumulate(options.block_counts(), initial=0)
    for first, start, length in zip(firsts, options.layout_k.starts, options.layout_k.lengths, strict=False):
        complete = length // size
        blocks = k[start : start + complete * size].unflatten(0, (complete, size))
        means[first : first + complete] = mean_keys(blocks, dtype)
    return means


def mean_keys(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """kbar_j = mean of k_u over the tokens u of block j, summed in float32 (float64 for float64 keys), rounded once.

    Args:
        blocks: `[n, B, Hkv, D]`, the keys of complete blocks.
        dtype: what means are rounded to.

    Returns:
        `[n, Hkv, D]` in `dtype`.

    Source: MoBA, eq. 6.
    """
    wide = torch.promote_types(blocks.dtype, torch.float32)
    return (blocks.sum(1, dtype=wide) / blocks.shape[1]).to(dtype)


@torch.no_grad()
def route(
    q: Tensor, k: Tensor, options: MobaOptions, *, policy: Policy = "mean", seed: int = 0, float32_means: bool = False
) -> MobaRouting:
    """Choose the past blocks of every query, on any device; see `perilune.ops.moba_route`."""
    past = torch.full((*q.shape[:2], options.topk - 1), -1, dtype=torch.int32, device=q.device)
    if options.topk == 1:
        return MobaRouting(options, past)
    wide = torch.promote_types(k.dtype, torch.float32)
    is_routed = options.routed()
    rows_routed = is_routed.nonzero().squeeze(1)
    lengths = torch.bincount(options.layout_q.sequence_ids[rows_routed], minlength=options.layout_q.num_sequences)
    firsts = list(accumulate(options.block_counts(), initial=0))
    means = block_means(k, options, wide if float32_means else k.dtype) if policy == "mean" else None
    generator = make_generator(seed, "moba") if policy == "random" else None
    positions = options.positions()
    taken = 0
    for n, count in enumerate(lengths.tolist()):
        if not count:
            continue
        blocks = firsts[n + 1] - firsts[n]
        start, length = options.layout_k.starts[n], options.layout_k.lengths[n]
        keys = k[start : start + length]
        step = max(1, SCORE_BYTES // (8 * q.shape[1] * (length if policy == "oracle" else blocks)))
        for first in range(taken, taken + count, step):
            rows = rows_routed[first : min(first + step, taken + count)]
            own = positions[rows] // options.block_size
            match policy:
                case "mean":
                    assert means is not None
                    scores = _grouped(q[rows].to(wide), means[firsts[n] : firsts[n + 1]].to(wide))
                case "recent" | "sink_recent":
                    order = torch.arange(blocks, dtype=wide, device=q.device)
                    if policy == "sink_recent":
                        order[0] = blocks
                    scores = order[:, None, None].repeat(1, rows.shape[0], q.shape[1])
                case "minmax":
                    scores = _bounds(q[rows].to(wide), keys.to(wide), options.block_size)
                case "random":
                    assert generator is not None
                    scores = torch.rand(blocks, rows.shape[0], q.shape[1], generator=generator).to(q.device)
                case "oracle":
                    scores = block_masses(q[rows].to(wide), keys.to(wide), positions[rows], options)
            past[rows] = top_blocks(scores, own, options.topk - 1)
        taken += count
    return MobaRouting(options, past)


def top_blocks(scores: Tensor, own: Tensor, count: int) -> Tensor:
    """The `count` best-scored blocks before a query's own, of equal ones the lower; NaN and -inf are the lowest number.

    Args:
        scores: `[n, R, H]`; overwritten.
        own: `[R]` int64, the block of each query, at least `count`.
        count: blocks to choose, at least 1.

    Returns:
        `[R, H, count]` int32, ascending.
    """
    lowest = torch.finfo(scores.dtype).min
    scores.nan_to_num_(lowest, torch.inf, lowest)
    is_past = torch.arange(scores.shape[0], device=scores.device)[:, None] < own
    scores.masked_fill_(~is_past[..., None], -torch.inf)
    if count > _MAXIMA:
        chosen = scores.sort(dim=0, descending=True, stable=True).indices[:count]
    else:
        found = []
        for _ in range(count):  # of equal ones, max tells the first
            found.append(scores.max(0, keepdim=True).indices)
            scores.scatter_(0, found[-1], -torch.inf)
        chosen = torch.cat(found)
    return chosen.sort(0).values.movedim(0, -1).to(torch.int32)


def _grouped(q: Tensor, keys: Tensor) -> Tensor:
    """Products `[n, R, H]` of queries `[R, H, D]` with `[n, Hkv, D]`, which H / Hkv heads share."""
    q = q.unflatten(1, (keys.shape[1], -1))
    return torch.einsum("rgid,ngd->nrgi", q, keys).flatten(2)


def _bounds(q: Tensor, keys: Tensor, size: int) -> Tensor:
    """Quest's bound of a block's largest logit: sum_i max(q_i kmin_i, q_i kmax_i).

    Source: Quest (2406.10774), algorithm 1.
    """
    parts = keys.split(size)
    lowest, highest = (torch.stack([f(part, 0) for part in parts]) for f in (torch.amin, torch.amax))
    return _grouped(q.clamp_min(0), highest) + _grouped(q.clamp_max(0), lowest)


def block_masses(q: Tensor, keys: Tensor, positions: Tensor, options: MobaOptions) -> Tensor:
    """What full attention gives to each block.

    Args:
        q: `[R, H, D]`, queries of one sequence.
        keys: `[L, Hkv, D]`, all of that sequence.
        positions: `[R]` int64, the queries' places among the keys.
        options: how the sequence is cut, and the scale.

    Returns:
        `[n, R, H]`; of each query they add up to 1, its own block included.
    """
    logits = options.scale * _grouped(q, keys)
    hidden = torch.arange(keys.shape[0], device=keys.device)[:, None] > positions
    p = torch.softmax(logits.masked_fill(hidden[..., None], -torch.inf), 0)
    return torch.stack([part.sum(0) for part in p.split(options.block_size)])
