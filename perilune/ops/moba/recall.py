"""How well a choice of blocks meets what full attention looks at: mass of the chosen blocks, recall of the best."""

# R queries  H query heads  Hkv key heads  D channels  n blocks  k blocks a query reads

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perilune.ops.moba.routing import SCORE_BYTES, MobaRouting, block_masses, top_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRecall:
    """What `router_recall` finds, over the queries that have a choice of blocks."""

    queries: int
    """Queries that were counted; without any, the shares are NaN."""
    mass: tuple[float, ...]
    """For each head the share of the past blocks' attention that the chosen ones have, of all queries together, so that
    those that hardly look back hardly count."""
    recall: tuple[float, ...]
    """For each head the share of the k - 1 past blocks with most attention that are chosen, mean of queries."""


@torch.no_grad()
def router_recall(q: Tensor, k: Tensor, routing: MobaRouting, queries: Tensor | None = None) -> RouterRecall:
    """Compare chosen blocks with the attention that every past block would get if all were read.

    With M_j = sum of softmax_u(scale * q . k_u) over the tokens u of past block j, and C the chosen blocks, mass is the
    sum of M_j over C by that over all past blocks, and recall is |C and the k - 1 largest M_j| / (k - 1). A query's own
    block, which it reads anyway, is in neither.

    Args:
        q: `[Tq, H, D]`, floating.
        k: `[Tk, Hkv, D]`, q's dtype, of the lengths that `routing` was made for.
        routing: what `perilune.ops.moba_route` chose, of whatever policy.
        queries: `[Tq]` bool, those that count; None for all. Of them, those that read every earlier key do not.

    Raises:
        ValueError: the lengths or heads are not those of `routing`, or it chooses nothing, as its topk is 1.

    Source: MoBA (2502.13189), eq. 5 (the choice); what it is compared with, this project.
    """
    options = routing.options
    count = options.topk - 1
    if q.shape[:2] != routing.past.shape[:2] or k.shape[0] != options.layout_k.total:
        raise ValueError(
            f"router_recall: q is {tuple(q.shape)} and k {tuple(k.shape)}, but routing is of {routing.past.shape[0]} "
            f"queries in {routing.past.shape[1]} heads and {options.layout_k.total} keys"
        )
    if (options.asked_topk or options.topk) == 1:
        raise ValueError("router_recall: topk must be >= 2, as with 1 no past block is chosen")
    wide = torch.promote_types(k.dtype, torch.float32)
    counted = options.routed() if queries is None else options.routed() & queries
    positions, ids = options.positions(), options.layout_q.sequence_ids
    chosen_mass, past_mass, hits = torch.zeros(3, q.shape[1], dtype=torch.float64, device=q.device)
    for n, (start, length) in enumerate(zip(options.layout_k.starts, options.layout_k.lengths, strict=False)):
        keys = k[start : start + length].to(wide)
        step = max(1, SCORE_BYTES // (8 * q.shape[1] * max(1, length)))
        for rows in (counted & (ids == n)).nonzero().squeeze(1).split(step):
            if not rows.numel():
                continue
            own = positions[rows] // options.block_size
            masses = block_masses(q[rows].to(wide), keys, positions[rows], options)
            best = top_blocks(masses.clone(), own, count)
            is_past = torch.arange(masses.shape[0], device=own.device)[:, None] < own
            masses = masses.masked_fill(~is_past[..., None], 0).movedim(0, -1).double()
            chosen = routing.past[rows]
            chosen_mass += masses.gather(-1, chosen.long()).sum((0, 2))
            past_mass += masses.sum((0, 2))
            hits += (chosen[..., None] == best[..., None, :]).sum((0, 2, 3))
    total = int(counted.sum())
    return RouterRecall(
        queries=total,
        mass=tuple((chosen_mass / past_mass).tolist()),
        recall=tuple((hits / (count * total)).tolist()),
    )
