"""MoBA block by block: for each key block the queries that read it are gathered, so that no T x T tensor arises.

A query's parts, its own block and each chosen one, meet in a running softmax. The backward goes over the same parts
with the merged logarithm of the denominator, which makes each part's gradients exact: they add up.
"""

# T queries  S keys  H query heads  Hkv key heads  D channels  B tokens of a block

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from perilune.ops.moba.options import MobaOptions
from perilune.ops.moba.reference import MobaResult, finite, unbounded
from perilune.ops.moba.routing import MobaRouting

# Scores computed at a time.
SCORE_BYTES = 16 << 20


def moba_blockwise(q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting) -> MobaResult:
    """Same contract as `perilune.ops.moba_attention`, on checked arguments; computes in float32 at least."""
    with torch.autocast(q.device.type, enabled=False):
        out, lse, top = _Moba.apply(q, k, v, routing)
    return MobaResult(out, lse, top)


@dataclass(frozen=True, slots=True)
class OwnRun:
    """Consecutive queries that read runs of keys causally: n equal ones, one after the other."""

    count: int
    """n."""
    query: int
    """First packed query."""
    key: int
    """First packed key."""
    queries: int
    """Queries of each run."""
    keys: int
    """Keys of each; the last query reads all of them."""

    def rows(self, group: int) -> slice:
        """Rows of `[T * G]` (query, head of the group)."""
        return slice(self.query * group, (self.query + self.count * self.queries) * group)

    def hidden(self, group: int, device: torch.device) -> Tensor:
        """`[queries * G, keys]` bool, which pairs are not read."""
        last = self.keys - self.queries + torch.arange(self.queries, device=device).repeat_interleave(group)
        return torch.arange(self.keys, device=device) > last[:, None]


def own_runs(options: MobaOptions, group: int) -> Iterator[OwnRun]:
    """What queries read besides chosen blocks: their own block, or every earlier key; each query is in one run."""
    size = options.block_size
    for start_q, queries, start_k, keys, full in zip(
        options.layout_q.starts,
        options.layout_q.lengths,
        options.layout_k.starts,
        options.layout_k.lengths,
        options.full_starts,
        strict=True,
    ):
        shift = keys - queries
        dense = min(options.dense_tokens, full)

        def run(begin: int, end: int, origin: int, count: int, *, q: int = start_q - shift, k: int = start_k) -> OwnRun:
            return OwnRun(count, q + begin, k + origin, end - begin, end - origin)

        for begin, end in ((shift, dense), (max(full, shift), keys)):  # every earlier key
            while begin < end:
                step = max(1, SCORE_BYTES // (4 * group * end))
                yield run(begin, min(begin + step, end), 0, 1)
                begin += step
        begin, end = max(dense, shift), min(full, keys)
        batch = max(1, SCORE_BYTES // (4 * group * size * size))
        while begin < end:
            origin = begin // size * size
            blocks = min((end - origin) // size, batch) if begin == origin else 0
            if blocks:
                yield run(begin, begin + size, origin, blocks)
            else:
                yield run(begin, min(origin + size, end), origin, 1)
            begin = min(origin + max(1, blocks) * size, end)


def chosen_runs(routing: MobaRouting, group: int, head: int) -> Iterator[tuple[Tensor, slice]]:
    """Rows of `[T * G]` that chose each block of key head `head`, `[m]` int64 without repeats, and its packed keys."""
    options = routing.options
    past = routing.past[:, head * group : (head + 1) * group]
    firsts = list(accumulate(options.block_counts(), initial=0))
    origin = torch.tensor(firsts[:-1], dtype=torch.int32, device=past.device)[options.layout_q.sequence_ids]
    blocks = torch.where(past < 0, firsts[-1], past + origin[:, None, None]).flatten()
    order = blocks.sort(stable=True).indices.div_(max(1, past.shape[-1]), rounding_mode="floor")
    ends = list(accumulate(torch.bincount(blocks, minlength=firsts[-1] + 1).tolist(), initial=0))
    step = max(1, SCORE_BYTES // (4 * options.block_size))
    for first, start, count in zip(firsts, options.layout_k.starts, options.block_counts(), strict=False):
        for j in range(count):
            keys = slice(start + j * options.block_size, start + (j + 1) * options.block_size)
            for begin in range(ends[first + j], ends[first + j + 1], step):
                yield order[begin : min(begin + step, ends[first + j + 1])], keys


class _Moba(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = q.shape[1], k.shape[1]
        group, wide, options = heads // kv_heads, torch.promote_types(q.dtype, torch.float32), routing.options
        out = torch.empty(q.shape[0], kv_heads, group, v.shape[-1], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], kv_heads, group, dtype=wide, device=q.device)
        top = torch.full((kv_heads, group), -torch.inf, dtype=wide, device=q.device)
        runs = list(own_runs(options, group))
        for head in range(kv_heads):
            a, b, c = _head(q, k, v, head, wide, options.scale)
            total = c.new_empty(a.shape[0], c.shape[-1])
            best, mass = c.new_empty(a.shape[0]), c.new_empty(a.shape[0])
            is_finite = bool(c.sum().isfinite())
            for run in runs:
                rows, values = run.rows(group), _batch(c, run)
                p = _own_logits(a, b, run, group)
                highest = p.amax(-1)
                p.sub_(_finite(highest)[..., None]).exp_()
                o = total[rows].view(run.count, -1, c.shape[-1])
                torch.bmm(p, values if is_finite else finite(values), out=o)
                if not is_finite:  # those of later tokens must not reach earlier ones as 0 * NaN
                    o += unbounded(~run.hidden(group, a.device), values)
                torch.sum(p, -1, out=mass[rows].view(run.count, -1))
                best[rows] = highest.flatten()
            for rows, keys in chosen_runs(routing, group, head):
                p = a.index_select(0, rows) @ b[keys].t()
                before = best.index_select(0, rows)
                highest = torch.maximum(before, p.amax(-1))
                shift = _finite(highest)
                p.sub_(shift[:, None]).exp_()
                kept = before.sub_(shift).exp_()
                mass.index_copy_(0, rows, mass.index_select(0, rows).mul_(kept).add_(p.sum(-1)))
                total.index_copy_(0, rows, total.index_select(0, rows).mul_(kept[:, None]).addmm_(p, c[keys]))
                best.index_copy_(0, rows, highest)
            out[:, head] = total.div_(mass[:, None]).view(-1, group, c.shape[-1])
            lse[:, head] = (best + mass.log()).view(-1, group)
            if best.numel():
                top[head] = best.view(-1, group).amax(0)
        out, lse, top = out.flatten(1, 2), lse.flatten(1, 2), top.flatten().float()
        ctx.save_for_backward(q, k, v, out, lse, routing.past)
        ctx.options = options
        ctx.mark_non_differentiable(lse, top)
        return out, lse, top

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, do: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        with torch.autocast(do.device.type, enabled=False):
            return (*_gradients(ctx, do), None)


def _gradients(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse, past = ctx.saved_tensors
    options: MobaOptions = ctx.options
    kv_heads, wide = k.shape[1], lse.dtype
    group = q.shape[1] // kv_heads
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    runs = list(own_runs(options, group))
    for head in range(kv_heads):
        a, b, c = _head(q, k, v, head, wide, options.scale)
        o, d = (x.unflatten(1, (kv_heads, group))[:, head].flatten(0, 1).to(wide) for x in (out, do))
        level = lse.unflatten(1, (kv_heads, group))[:, head].flatten()
        drift = (o * d).sum(1)
        da, db, dc = torch.empty_like(a), torch.zeros_like(b), torch.zeros_like(c)
        for run in runs:
            rows = run.rows(group)
            queries, grads, keys, values = _rows(a, run, rows), _rows(d, run, rows), _batch(b, run), _batch(c, run)
            p = _own_logits(a, b, run, group).sub_(level[rows].view(run.count, -1, 1)).exp_()
            _batch(dc, run).baddbmm_(p.mT, grads)
            ds = torch.bmm(grads, values.mT).sub_(drift[rows].view(run.count, -1, 1)).mul_(p)
            torch.bmm(ds, keys, out=_rows(da, run, rows))
            _batch(db, run).baddbmm_(ds.mT, queries)
        for rows, keys in chosen_runs(MobaRouting(options, past), group, head):
            queries, grads = a.index_select(0, rows), d.index_select(0, rows)
            p = (queries @ b[keys].t()).sub_(level.index_select(0, rows)[:, None]).exp_()
            dc[keys].addmm_(p.t(), grads)
            ds = (grads @ c[keys].t()).sub_(drift.index_select(0, rows)[:, None]).mul_(p)
            da.index_copy_(0, rows, da.index_select(0, rows).addmm_(ds, b[keys]))
            db[keys].addmm_(ds.t(), queries)
        dq.unflatten(1, (kv_heads, group))[:, head] = da.mul_(options.scale).view(-1, group, da.shape[-1])
        dk[:, head], dv[:, head] = db, dc
    return dq, dk, dv


def _head(q: Tensor, k: Tensor, v: Tensor, head: int, wide: torch.dtype, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """One key head in `wide`: queries `[T * G, D]` times `scale`, keys `[S, D]` and values `[S, Dv]`."""
    a = q.unflatten(1, (k.shape[1], -1))[:, head].flatten(0, 1)
    return a.to(wide) * scale, k[:, head].to(wide).contiguous(), v[:, head].to(wide).contiguous()


def _own_logits(a: Tensor, b: Tensor, run: OwnRun, group: int) -> Tensor:
    """`[n, queries * G, keys]`, -inf where a pair is not read."""
    logits = torch.bmm(_rows(a, run, run.rows(group)), _batch(b, run).mT)
    return logits.masked_fill_(run.hidden(group, a.device), -torch.inf)


def _rows(x: Tensor, run: OwnRun, rows: slice) -> Tensor:
    """The rows of a run as `[n, queries * G, D]`, a view."""
    return x[rows].view(run.count, -1, x.shape[-1])


def _batch(x: Tensor, run: OwnRun) -> Tensor:
    """The keys or values of a run as `[n, keys, D]`, a view."""
    return x[run.key : run.key + run.count * run.keys].view(run.count, run.keys, x.shape[-1])


def _finite(highest: Tensor) -> Tensor:
    """What logits are taken from: 0 where all of them are -inf, which infinite inputs make; NaN passes."""
    return highest.masked_fill(highest == -torch.inf, 0)
