"""MoBA on a GPU: what the front door calls, and the order of its kernels.

gate       block means, and the blocks that each query chooses
lists      the queries that chose each block
forward    what they read of it, and the merge with a query's own block
backward   gradients over the same parts

Queries go through it in slices, so that what is written per choice stays below `WORKSPACE_BYTES`. Nothing is asked of
the device: its memory is reserved for the most that could be chosen, and surplus programs end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from perilune.ops.backends import shared_memory_bytes
from perilune.ops.moba.options import MobaOptions
from perilune.ops.moba.reference import MobaResult
from perilune.ops.moba.routing import MobaRouting
from perilune.ops.moba.triton.backward import (
    key_value_gradient,
    multiply_rows,
    query_gradient_of_choices,
    query_gradient_of_own,
    sum_pieces,
)
from perilune.ops.moba.triton.configurations import configuration
from perilune.ops.moba.triton.forward import attend_block, attend_own, attend_rows
from perilune.ops.moba.triton.gate import average_blocks, choose_blocks
from perilune.ops.moba.triton.lists import sort_choices, spread_items

WORKSPACE_BYTES = 1 << 30
"""What is kept per choice at any time, at most, of rows of values or gradients in 16 bits and a few numbers."""
TILE = 128
"""Queries of a tile."""
TILES_OF_AN_ITEM = 4
"""Tiles of queries that pass by a block of keys that stays where it is."""
_SORTED = 1024
_LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Part:
    """A run of query tiles that are computed together."""

    first_tile: int
    num_tiles: int
    first_query: int
    num_queries: int
    runs: Tensor
    """`[n, 3]` int32 sequence, first packed query and queries, of what one program of `sort_choices` sorts."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything lies, as tables on the device."""

    info: Tensor
    """`[N, 6]` int32: first query, queries, first key, keys, first block, and where full attention begins."""
    blocks: Tensor
    """`[blocks]` int32, the sequence of each block."""
    tiles: Tensor
    """`[n, 2]` int32, sequence and first query in it, of tiles of `TILE` queries."""
    whole: Part
    """All of them."""
    slices: tuple[Part, ...]
    """Parts of them, each small enough for the workspace."""


@dataclass(frozen=True, slots=True)
class Lists:
    """The choices of each key head's blocks, in order; segments are `[Hkv, blocks]`."""

    choices: Tensor
    """`[most]` int32 numbers of choices in `[queries, H, k - 1]`."""
    offsets: Tensor
    """`[segments + 1]` int32, where each segment's choices begin."""

    def items(self, size: int, bound: int, *, at_least: int = 0) -> tuple[Tensor, Tensor]:
        """Items of at most `size` choices of one segment: `[bound, 2]` int32 segment and number, and `[segments]` counts.

        Args:
            size: choices of an item.
            bound: the most choices there can be.
            at_least: items of a segment without choices.
        """
        counts = (self.offsets.diff() + (size - 1)).div_(size, rounding_mode="floor").clamp_min_(at_least)
        segments = counts.shape[0]
        items = counts.new_full((bound // size + segments, 2), -1)
        spread_items[(segments,)](counts, counts.cumsum(0, dtype=torch.int32) - counts, items, segments, SIZE=32)
        return items, counts


def make_plan(options: MobaOptions, num_heads: int, choice_bytes: int) -> Plan:
    """Tables for `options`; found again for the same numbers, whatever tensors they came from."""
    return _plan(
        options.layout_q.lengths,
        options.layout_k.lengths,
        options.full_starts,
        options.block_size,
        options.topk,
        num_heads,
        choice_bytes,
        WORKSPACE_BYTES,
        options.layout_q.device,
    )


@lru_cache(maxsize=32)
def _plan(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    full: tuple[int, ...],
    block_size: int,
    topk: int,
    num_heads: int,
    choice_bytes: int,
    workspace: int,
    device: torch.device,
) -> Plan:
    blocks = [-(-length // block_size) for length in keys]
    first_q, first_k, first_b = (list(accumulate(x, initial=0))[:-1] for x in (queries, keys, blocks))
    # "full" never comes for sequences that have none
    never = [2**31 - 1 if f >= length else f for f, length in zip(full, keys, strict=True)]
    info = torch.tensor([first_q, queries, first_k, keys, first_b, never], dtype=torch.int32).T.contiguous()
    owners = torch.repeat_interleave(
        torch.arange(len(keys), dtype=torch.int32), torch.tensor(blocks, dtype=torch.int64)
    )
    tiles = [(n, first) for n, length in enumerate(queries) for first in range(0, length, TILE)]
    sizes = [min(TILE, queries[n] - first) for n, first in tiles]
    most = max(TILE, workspace // (num_heads * max(1, topk - 1) * choice_bytes))
    parts, begin = [], 0
    while begin < len(tiles):
        end, taken = begin, 0
        while end < len(tiles) and taken + sizes[end] <= most:
            taken, end = taken + sizes[end], end + 1
        parts.append(_part(tiles, sizes, begin, end, first_q, sum(blocks), device))
        begin = end
    whole = _part(tiles, sizes, 0, len(tiles), first_q, sum(blocks), device)
    table = torch.tensor(tiles, dtype=torch.int32).view(-1, 2)
    return Plan(info.to(device), owners.to(device), table.to(device), whole, tuple(parts))


def _part(
    tiles: Sequence[tuple[int, int]],
    sizes: Sequence[int],
    begin: int,
    end: int,
    first_q: Sequence[int],
    blocks: int,
    device: torch.device,
) -> Part:
    # runs as long as leaves counters below 2^24 a head, and never longer than keeps a GPU busy
    total = sum(sizes[begin:end])
    longest = max(TILE, min(2048, -(-total // 256)), -(-total * blocks >> 22))
    runs: list[list[int]] = []
    for (sequence, first), size in zip(tiles[begin:end], sizes[begin:end], strict=True):
        if runs and runs[-1][0] == sequence and runs[-1][2] + size <= longest:
            runs[-1][2] += size
        else:
            runs.append([sequence, first_q[sequence] + first, size])
    start = first_q[tiles[begin][0]] + tiles[begin][1] if begin < end else 0
    return Part(begin, end - begin, start, total, torch.tensor(runs, dtype=torch.int32).view(-1, 3).to(device))


def route_triton(q: Tensor, k: Tensor, options: MobaOptions, float32_means: bool) -> MobaRouting:
    """Same contract as `perilune.ops.moba.routing.route` with policy "mean", on arguments that the kernels take."""
    count = options.topk - 1
    q, k = q.detach().contiguous(), k.detach().contiguous()
    past = torch.empty(*q.shape[:2], count, dtype=torch.int32, device=q.device)
    plan = make_plan(options, q.shape[1], _choice_bytes(q, q.shape[2]))
    if count and plan.whole.num_tiles:
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
        width = max(16, triton.next_power_of_2(dim))
        means = torch.empty(
            plan.blocks.shape[0], kv_heads, dim, dtype=torch.float32 if float32_means else k.dtype, device=k.device
        )
        average_blocks[(means.shape[0], kv_heads)](
            k, means, plan.info, plan.blocks, HKV=kv_heads, D=dim, BD=width, B=options.block_size, BN=32, num_warps=4
        )
        rows = 64
        choose_blocks[(plan.whole.num_tiles * (TILE // rows), heads)](
            q, means, past, plan.info, plan.tiles,
            H=heads, HKV=kv_heads, D=dim, BD=width, B=options.block_size, COUNT=count,
            SLOTS=triton.next_power_of_2(count), TILE=TILE, BM=rows, BN=64, num_warps=4,
        )  # fmt: skip
    return MobaRouting(options, past)


def make_lists(past: Tensor, part: Part, plan: Plan, kv_heads: int) -> Lists:
    """Turn the choices of a part's queries over.

    Args:
        past: `[T, H, k - 1]` int32.
        part: which queries.
        plan: of all.
        kv_heads: Hkv.
    """
    heads, count = past.shape[1:]
    blocks, runs = plan.blocks.shape[0], part.runs.shape[0]
    choices = torch.empty(part.num_queries * heads * count, dtype=torch.int32, device=past.device)
    counters = torch.zeros(kv_heads * blocks * runs + 1, dtype=torch.int32, device=past.device)

    def sort(counters: Tensor, place: bool) -> None:
        sort_choices[(runs, kv_heads)](
            past, counters, choices, plan.info, part.runs, part.first_query, blocks, runs,
            H=heads, HKV=kv_heads, COUNT=count, SIZE=_SORTED, PLACE=place, num_warps=4,
        )  # fmt: skip

    sort(counters, False)
    # the last counter is no block's: its sum is the number of all choices
    sums = counters.cumsum(0, dtype=torch.int32)
    begins = sums - counters
    offsets = begins[::runs].clone()
    sort(begins, True)
    return Lists(choices, offsets)


class MobaTriton(torch.autograd.Function):
    """Attention over own and chosen blocks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting, with_top: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return o `[T, H, Dv]`, lse `[T, H]` and maximum logits `[H]`."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse, top = attend(q, k, v, routing, with_top)
        ctx.save_for_backward(q, k, v, out, lse, routing.past)
        ctx.options = routing.options
        ctx.mark_non_differentiable(lse, top)
        return out, lse, top

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, do: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of q, k and v."""
        q, k, v, out, lse, past = ctx.saved_tensors
        return (*attend_backward(q, k, v, out, lse, do.contiguous(), MobaRouting(ctx.options, past)), None, None)


def moba_triton(q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting, with_top: bool) -> MobaResult:
    """Same contract as `perilune.ops.moba_attention`, on checked arguments that the kernels take."""
    out, lse, top = MobaTriton.apply(q, k, v, routing, with_top)
    return MobaResult(out, lse, top if with_top else None)


def attend(q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting, with_top: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, slice by slice; tensors are contiguous."""
    options, heads, kv_heads = routing.options, q.shape[1], k.shape[1]
    count = options.topk - 1
    dim, value_dim = q.shape[2], v.shape[2]
    plan = make_plan(options, heads, _choice_bytes(q, value_dim))
    out = torch.empty(q.shape[0], heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    scale = options.scale * _LOG2E
    widths = {"D": dim, "DV": value_dim, "BD": _width(dim), "BDV": _width(value_dim)}
    most = max((part.num_queries for part in plan.slices), default=0) * heads * count
    gathered = _configuration("attend_block", q, widths, options.block_size)
    is_resident = options.block_size <= gathered["BN"]
    if not is_resident:
        gathered = _configuration("attend_rows", q, widths, options.block_size)
    own = _configuration("attend_own", q, widths, options.block_size)
    tops = torch.full((plan.whole.num_tiles * (TILE // own["BM"]) + 1, heads), -torch.inf, device=q.device)
    values = torch.empty(max(1, most), value_dim, dtype=q.dtype, device=q.device)
    levels = torch.empty(max(1, most), dtype=torch.float32, device=q.device)
    part_tops = torch.empty_like(levels) if with_top else levels
    for part in plan.slices:
        if count:
            lists = make_lists(routing.past, part, plan, kv_heads)
            bound = part.num_queries * heads * count
            size = TILES_OF_AN_ITEM * gathered["BM"] if is_resident else gathered["BM"]
            items, _ = lists.items(size, bound)
            kernel, chunk = (attend_block, {"CHUNK": size}) if is_resident else (attend_rows, {})
            kernel[(items.shape[0],)](
                q, k, v, values, levels, part_tops, lists.choices, items, lists.offsets, plan.info, plan.blocks,
                part.first_query * heads, plan.blocks.shape[0], scale,
                HKV=kv_heads, **widths, B=options.block_size, COUNT=count, WITH_TOP=with_top, **chunk, **gathered,
            )  # fmt: skip
        attend_own[(part.num_tiles * (TILE // own["BM"]), heads)](
            q, k, v, out, lse, tops, values, levels, part_tops, plan.info, plan.tiles,
            part.first_tile, part.first_query * heads, scale,
            H=heads, HKV=kv_heads, **widths, B=options.block_size, COUNT=count, WITH_TOP=with_top, TILE=TILE, **own,
        )  # fmt: skip
    return out, lse, tops.amax(0) / _LOG2E


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, routing: MobaRouting
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, slice by slice, and of k and v, over all queries at once."""
    options, heads, kv_heads = routing.options, q.shape[1], k.shape[1]
    count, size = options.topk - 1, options.block_size
    dim, value_dim = q.shape[2], v.shape[2]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not plan_has_queries(options):
        return dq.zero_(), dk.zero_(), dv.zero_()
    plan = make_plan(options, heads, _choice_bytes(q, dim))
    scale = options.scale * _LOG2E
    widths = {"D": dim, "DV": value_dim, "BD": _width(dim), "BDV": _width(value_dim)}
    drift = torch.empty_like(lse)
    multiply_rows[(triton.cdiv(drift.numel(), 64),)](
        out, do, drift, drift.numel(), DV=value_dim, BDV=widths["BDV"], BM=64, num_warps=4
    )
    gathered = _configuration("query_gradient_of_choices", q, widths, size)
    own = _configuration("query_gradient_of_own", q, widths, size)
    most = max(part.num_queries for part in plan.slices) * heads * count
    shares = torch.empty(max(1, most), dim, dtype=q.dtype, device=q.device)
    for part in plan.slices:
        if count:
            lists = make_lists(routing.past, part, plan, kv_heads)
            items, _ = lists.items(gathered["BM"], part.num_queries * heads * count)
            query_gradient_of_choices[(items.shape[0],)](
                q, k, v, do, lse, drift, shares, lists.choices, items, lists.offsets, plan.info, plan.blocks,
                part.first_query * heads, plan.blocks.shape[0], scale, options.scale,
                HKV=kv_heads, **widths, B=size, COUNT=count, **gathered,
            )  # fmt: skip
        query_gradient_of_own[(part.num_tiles * (TILE // own["BM"]), heads)](
            q, k, v, do, lse, drift, dq, shares, plan.info, plan.tiles,
            part.first_tile, part.first_query * heads, scale, options.scale,
            H=heads, HKV=kv_heads, **widths, B=size, COUNT=count, TILE=TILE, **own,
        )  # fmt: skip
    del shares
    _key_value_gradients(q, k, v, do, lse, drift, dk, dv, routing, plan, widths, scale)
    return dq, dk, dv


def _key_value_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, drift: Tensor, dk: Tensor, dv: Tensor,
    routing: MobaRouting, plan: Plan, widths: dict[str, int], scale: float,
) -> None:  # fmt: skip
    """Lists of all queries; long ones in pieces, as many as the workspace holds sums of."""
    options, heads, kv_heads = routing.options, q.shape[1], k.shape[1]
    count, size = options.topk - 1, options.block_size
    tuned = _configuration("key_value_gradient", q, widths, size)
    keys = tuned["BN"]
    tiles = triton.cdiv(size, keys)
    bound = q.shape[0] * heads * count
    segments = kv_heads * plan.blocks.shape[0]
    if count:
        lists = make_lists(routing.past, plan.whole, plan, kv_heads)
    else:
        nothing = torch.zeros(segments + 1, dtype=torch.int32, device=q.device)
        lists = Lists(nothing, nothing)
    sums = WORKSPACE_BYTES // (4 * keys * (widths["D"] + widths["DV"]))
    piece = max(4096, 2 * bound * tiles // max(1, sums))
    piece = triton.cdiv(piece, tuned["BM"]) * tuned["BM"]
    items, pieces = lists.items(piece, bound, at_least=1)
    apart = torch.where(pieces > 1, pieces, 0)
    # a list of several pieces has more than half of one in each on average
    room = 2 * bound // piece * tiles * keys
    dk_parts, dv_parts = (q.new_empty(max(1, room), widths[n], dtype=torch.float32) for n in ("D", "DV"))
    places = apart.cumsum(0, dtype=torch.int32) - apart
    key_value_gradient[(items.shape[0], tiles)](
        q, k, v, do, lse, drift, dk, dv, dk_parts, dv_parts, lists.choices, items, lists.offsets, pieces, places,
        plan.info, plan.blocks, plan.blocks.shape[0], scale, options.scale,
        H=heads, HKV=kv_heads, **widths, B=size, COUNT=count, CHUNK=piece, **tuned,
    )  # fmt: skip
    if room:
        sum_pieces[(segments, tiles)](
            dk, dv, dk_parts, dv_parts, pieces, places, plan.info, plan.blocks, plan.blocks.shape[0], options.scale,
            HKV=kv_heads, **widths, B=size, BN=keys, num_warps=4,
        )  # fmt: skip


def plan_has_queries(options: MobaOptions) -> bool:
    """Whether there is a query at all."""
    return options.layout_q.total > 0


def _configuration(kernel: str, q: Tensor, widths: dict[str, int], block_size: int) -> dict[str, int]:
    return configuration(
        kernel,
        element_bytes=q.element_size(),
        width=max(widths["BD"], widths["BDV"]),
        block_size=block_size,
        shared_bytes=shared_memory_bytes(q.device),
    )


def _width(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _choice_bytes(q: Tensor, channels: int) -> int:
    return channels * q.element_size() + 8
