"""MoBA on a GPU: what the front door calls, and the order of its kernels.

gate       block means, and the blocks that each query chooses
lists      the queries that chose each block
forward    what they read of it, and the merge with a query's own block
backward   gradients over the same parts

Queries go through it in slices, so that what is written per choice stays below `WORKSPACE_BYTES`. Nothing is asked of
the device: its memory is reserved for the most that could be chosen, and surplus programs end at once.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass, replace
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
from perilune.ops.moba.triton.lists import count_choices, place_choices, spread_items

WORKSPACE_BYTES = 1 << 30
"""What is kept per choice at any time, at most, of rows of values or gradients in 16 bits and a few numbers."""
TILE = 128
"""Queries of a tile."""
TILES_OF_AN_ITEM = 8
"""Tiles of queries that pass by a block of keys that stays where it is."""
SORTED = 1024
"""Choices that are sorted at a time."""
BINS = 1024
"""Blocks, at most, that choices are counted of at a time."""
PIECE = 4096
"""Fewest choices of a piece of a list, where dK and dV are summed."""
_LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of query tiles that are computed together."""

    first_tile: int
    num_tiles: int
    first_query: int
    num_queries: int
    first_run: int
    """First of its runs of queries, which `place_choices` sorts one by one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything lies, as tables on the device."""

    info: Tensor
    """`[N, 6]` int32: first query, queries, first key, keys, first block, and where full attention begins."""
    blocks: Tensor
    """`[blocks]` int32, the sequence of each block."""
    tiles: Tensor
    """`[n, 2]` int32, sequence and first query in it, of tiles of `TILE` queries."""
    runs: Tensor
    """`[n, 3]` int32 sequence, first packed query and queries of runs that a program sorts."""
    slices: tuple[Slice, ...]
    """All tiles in order, each slice small enough for the workspace."""


@dataclass(frozen=True, slots=True)
class Lists:
    """The choices of each key head's blocks, in order; segments are `[Hkv, blocks]`."""

    choices: Tensor
    """`[most]` int32 numbers of choices in `[T, H, k - 1]`."""
    bounds: Tensor
    """`[slices + 1, segments]` int32: a slice's choices of a segment lie between its bound and the next."""

    def items(self, begin: int, end: int, size: int, bound: int, at_least: int = 0) -> tuple[Tensor, Tensor]:
        """Cut the segments of some slices into items of at most `size` choices.

        Args:
            begin: first slice.
            end: the one after the last.
            size: choices of an item.
            bound: the most choices that these slices can have.
            at_least: items of a segment without choices.

        Returns:
            `[bound / size + segments, 2]` int32 segment and number in it of each item, -1 for the surplus; and
            `[segments]` int32 items of each.
        """
        counts = (self.bounds[end] - self.bounds[begin] + (size - 1)).div_(size, rounding_mode="floor")
        counts.clamp_min_(at_least)
        items = counts.new_full((bound // size + counts.shape[0], 2), -1)
        spread_items[(counts.shape[0],)](counts, counts.cumsum(0, dtype=torch.int32) - counts, items, SIZE=32)
        return items, counts


def make_plan(options: MobaOptions, q: Tensor, v: Tensor) -> Plan:
    """Tables for `options`; found again for the same numbers, whatever tensors they came from."""
    per_query = q.shape[1] * max(1, options.topk - 1) * (max(q.shape[2], v.shape[2]) * q.element_size() + 8)
    return _plan(
        options.layout_q.lengths,
        options.layout_k.lengths,
        options.full_starts,
        options.block_size,
        WORKSPACE_BYTES // per_query,
        q.device,
    )


@lru_cache(maxsize=32)
def _plan(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    full: tuple[int, ...],
    block_size: int,
    most: int,
    device: torch.device,
) -> Plan:
    blocks = [-(-length // block_size) for length in keys]
    first_q, first_k, first_b = (list(accumulate(x, initial=0))[:-1] for x in (queries, keys, blocks))
    # "full" never comes for sequences that have none
    never = [2**31 - 1 if f >= length else f for f, length in zip(full, keys, strict=True)]
    info = torch.tensor([first_q, queries, first_k, keys, first_b, never], dtype=torch.int32).T.contiguous()
    owners = torch.tensor(blocks, dtype=torch.int64)
    owners = torch.repeat_interleave(torch.arange(len(keys), dtype=torch.int32), owners)
    tiles = [(n, first) for n, length in enumerate(queries) for first in range(0, length, TILE)]
    # runs as long as leave about 2^22 counters, and no longer than keeps a GPU busy
    longest = max(TILE, min(2048, sum(queries) // 256), sum(queries) * sum(blocks) >> 22)
    slices: list[Slice] = []
    runs: list[list[int]] = []
    for number, (sequence, first) in enumerate(tiles):
        size, query = min(TILE, queries[sequence] - first), first_q[sequence] + first
        if slices and slices[-1].num_queries + size <= most:
            old = slices[-1]
            slices[-1] = replace(old, num_tiles=old.num_tiles + 1, num_queries=old.num_queries + size)
            is_longer = runs[-1][0] == sequence and runs[-1][2] + size <= longest
        else:
            slices.append(Slice(number, 1, query, size, len(runs)))
            is_longer = False
        if is_longer:
            runs[-1][2] += size
        else:
            runs.append([sequence, query, size])
    tables = (torch.tensor(table, dtype=torch.int32).view(-1, n).to(device) for table, n in ((tiles, 2), (runs, 3)))
    return Plan(info.to(device), owners.to(device), *tables, tuple(slices))


def route_triton(q: Tensor, k: Tensor, options: MobaOptions, float32_means: bool) -> MobaRouting:
    """Same contract as `perilune.ops.moba.routing.route` with policy "mean", on arguments that the kernels take."""
    count = options.topk - 1
    q, k = q.detach().contiguous(), k.detach().contiguous()
    past = torch.full((*q.shape[:2], count), -1, dtype=torch.int32, device=q.device)
    if count and not options.is_dense:
        plan = make_plan(options, q, k)
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
        width = max(16, triton.next_power_of_2(dim))
        means = torch.empty(
            plan.blocks.shape[0], kv_heads, dim, dtype=torch.float32 if float32_means else k.dtype, device=k.device
        )
        average_blocks[(means.shape[0], kv_heads)](
            k, means, plan.info, plan.blocks, HKV=kv_heads, D=dim, BD=width, B=options.block_size, BN=32, num_warps=4
        )
        rows = 64
        choose_blocks[(plan.tiles.shape[0] * (TILE // rows), heads)](
            q, means, past, plan.info, plan.tiles,
            H=heads, HKV=kv_heads, D=dim, BD=width, B=options.block_size, COUNT=count,
            SLOTS=triton.next_power_of_2(count), TILE=TILE, BM=rows, BN=64, num_warps=4,
        )  # fmt: skip
    return MobaRouting(options, past)


def make_lists(past: Tensor, plan: Plan, block_size: int, kv_heads: int) -> Lists:
    """Turn choices over.

    Args:
        past: `[T, H, k - 1]` int32.
        plan: where its queries lie.
        block_size: B.
        kv_heads: Hkv.
    """
    heads, count = past.shape[1:]
    blocks, runs = plan.blocks.shape[0], plan.runs.shape[0]
    choices = torch.empty(past.numel(), dtype=torch.int32, device=past.device)
    counters = torch.zeros(kv_heads * blocks * runs + 1, dtype=torch.int32, device=past.device)
    shape = {"H": heads, "HKV": kv_heads, "COUNT": count, "SIZE": SORTED, "num_warps": 4}
    bins = min(BINS, max(16, triton.next_power_of_2(blocks)))
    count_choices[(runs, kv_heads)](
        past, counters, plan.info, plan.runs, blocks, runs, B=block_size, BINS=bins, **shape
    )  # fmt: skip
    # the last counter is no block's: what is before it is all there is
    places = counters.cumsum(0, dtype=torch.int32) - counters
    starts = [part.first_run for part in plan.slices]
    bounds = [*(places[run:-1:runs] for run in starts), places[runs::runs]]
    lists = Lists(choices, torch.stack(bounds))
    place_choices[(runs, kv_heads)](past, places, choices, plan.info, plan.runs, blocks, runs, **shape)
    return lists


class MobaTriton(torch.autograd.Function):
    """Attention over own and chosen blocks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting, with_top: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return o `[T, H, Dv]`, lse `[T, H]` and maximum logits `[H]`."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        plan = make_plan(routing.options, q, v)
        lists = None
        if routing.options.topk > 1 and not routing.options.is_dense:
            lists = make_lists(routing.past, plan, routing.options.block_size, k.shape[1])
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        top = attend(q, k, v, out, lse, routing.options, plan, lists, with_top)
        saved = () if lists is None else (lists.choices, lists.bounds)
        ctx.save_for_backward(q, k, v, out, lse, *saved)
        ctx.options, ctx.plan = routing.options, plan
        ctx.mark_non_differentiable(lse, top)
        return out, lse, top

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, do: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of q, k and v."""
        q, k, v, out, lse, *saved = ctx.saved_tensors
        lists = Lists(*saved) if saved else None
        gradients = attend_backward(q, k, v, out, lse, do.contiguous(), ctx.options, ctx.plan, lists)
        return (*gradients, None, None)


def moba_triton(q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting, with_top: bool) -> MobaResult:
    """Same contract as `perilune.ops.moba_attention`, on checked arguments that the kernels take."""
    out, lse, top = MobaTriton.apply(q, k, v, routing, with_top)
    return MobaResult(out, lse, top if with_top else None)


def moba_triton_forward(
    q: Tensor, k: Tensor, v: Tensor, options: MobaOptions, float32_means: bool, with_top: bool
) -> MobaResult:
    """Same where neither gradients nor choices are wanted: it chooses, too, for as many queries at a time as fit.

    Choices and lists are 8 bytes a choice, which a long prefill has hundreds of millions of.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    top = q.new_full(q.shape[1:2], -torch.inf, dtype=torch.float32)
    most = WORKSPACE_BYTES // 4 // (8 * q.shape[1] * max(1, options.topk - 1)) // TILE * TILE
    for rows, keys, part in options.chunks(max(TILE, most)):
        routing = route_triton(q[rows], k[keys], part, float32_means)
        plan, lists = make_plan(part, q, v), None
        if options.topk > 1 and not part.is_dense:
            lists = make_lists(routing.past, plan, part.block_size, k.shape[1])
        found = attend(q[rows], k[keys], v[keys], out[rows], lse[rows], part, plan, lists, with_top)
        top = torch.maximum(top, found)
    return MobaResult(out, lse, top if with_top else None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: MobaOptions,
    plan: Plan,
    lists: Lists | None,
    with_top: bool,
) -> Tensor:
    """Fill in `out` and `lse`, slice by slice, and return the maximum logits `[H]`.

    Tensors are contiguous, and lists None if no query chooses.
    """
    shape, heads = _Shape.of(q, k, v, options), q.shape[1]
    own = shape.configuration("attend_own")
    tops = torch.full((plan.tiles.shape[0] * (TILE // own["BM"]) + 1, heads), -torch.inf, device=q.device)
    room = shape.choices(max((part.num_queries for part in plan.slices), default=0))
    values = torch.empty(max(1, room), v.shape[2], dtype=q.dtype, device=q.device)
    levels = torch.empty(max(1, room), dtype=torch.float32, device=q.device)
    part_tops = torch.empty_like(levels) if with_top else levels
    for number, part in enumerate(plan.slices):
        first_choice = shape.choices(part.first_query)
        if lists is not None:
            kernel, tuned, size = attend_block, shape.configuration("attend_block"), {}
            if options.block_size <= tuned["BN"]:
                size = {"CHUNK": TILES_OF_AN_ITEM * tuned["BM"]}
            else:
                kernel, tuned = attend_rows, shape.configuration("attend_rows")
            items, _ = lists.items(number, number + 1, size.get("CHUNK", tuned["BM"]), shape.choices(part.num_queries))
            kernel[(items.shape[0],)](
                q, k, v, values, levels, part_tops, lists.choices, items, lists.bounds[number],
                lists.bounds[number + 1], plan.info, plan.blocks, first_choice, plan.blocks.shape[0],
                options.scale * _LOG2E, **shape.gathered, WITH_TOP=with_top, **size, **tuned,
            )  # fmt: skip
        attend_own[(part.num_tiles * (TILE // own["BM"]), heads)](
            q, k, v, out, lse, tops, values, levels, part_tops, plan.info, plan.tiles, part.first_tile, first_choice,
            options.scale * _LOG2E, H=heads, **shape.gathered, WITH_TOP=with_top, TILE=TILE, **own,
        )  # fmt: skip
    return tops.amax(0) / _LOG2E


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    options: MobaOptions,
    plan: Plan,
    lists: Lists | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, slice by slice, and of k and v, over all queries at once."""
    shape, heads = _Shape.of(q, k, v, options), q.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not plan.slices:
        return dq, dk.zero_(), dv.zero_()
    drift = torch.empty_like(lse)
    multiply_rows[(triton.cdiv(drift.numel(), 64),)](
        out, do, drift, drift.numel(), DV=v.shape[2], BDV=shape.gathered["BDV"], BM=64, num_warps=4
    )
    own, tuned = shape.configuration("query_gradient_of_own"), shape.configuration("query_gradient_of_choices")
    room = shape.choices(max(part.num_queries for part in plan.slices))
    shares = torch.empty(max(1, room), q.shape[2], dtype=q.dtype, device=q.device)
    for number, part in enumerate(plan.slices):
        first_choice = shape.choices(part.first_query)
        if lists is not None:
            items, _ = lists.items(number, number + 1, tuned["BM"], shape.choices(part.num_queries))
            query_gradient_of_choices[(items.shape[0],)](
                q, k, v, do, lse, drift, shares, lists.choices, items, lists.bounds[number], lists.bounds[number + 1],
                plan.info, plan.blocks, first_choice, plan.blocks.shape[0], options.scale * _LOG2E, options.scale,
                **shape.gathered, **tuned,
            )  # fmt: skip
        query_gradient_of_own[(part.num_tiles * (TILE // own["BM"]), heads)](
            q, k, v, do, lse, drift, dq, shares, plan.info, plan.tiles, part.first_tile, first_choice,
            options.scale * _LOG2E, options.scale, H=heads, **shape.gathered, TILE=TILE, **own,
        )  # fmt: skip
    del shares
    _key_value_gradients((q, k, v, do, lse, drift, dk, dv), options, plan, lists, shape)
    return dq, dk, dv


def _key_value_gradients(
    tensors: tuple[Tensor, ...], options: MobaOptions, plan: Plan, lists: Lists | None, shape: _Shape
) -> None:
    """Lists of all queries; long ones in pieces, as many as the workspace holds sums of."""
    q, k = tensors[:2]
    tuned, widths = shape.configuration("key_value_gradient"), (shape.gathered["D"], shape.gathered["DV"])
    tiles = triton.cdiv(options.block_size, tuned["BN"])
    segments = k.shape[1] * plan.blocks.shape[0]
    bound = shape.choices(q.shape[0])
    if lists is None:
        lists = Lists(plan.blocks, torch.zeros(2, segments, dtype=torch.int32, device=q.device))
    sums = WORKSPACE_BYTES // (4 * tuned["BN"] * sum(widths))
    piece = triton.cdiv(max(PIECE, 2 * bound * tiles // max(1, sums)), tuned["BM"]) * tuned["BM"]
    items, pieces = lists.items(0, lists.bounds.shape[0] - 1, piece, bound, at_least=1)
    apart = torch.where(pieces > 1, pieces, 0)
    places = apart.cumsum(0, dtype=torch.int32) - apart
    # a list of several pieces fills more than half of each on average
    room = 2 * bound // piece * tiles * tuned["BN"]
    parts = [q.new_empty(max(1, room), width, dtype=torch.float32) for width in widths]
    key_value_gradient[(items.shape[0], tiles)](
        *tensors, *parts, lists.choices, items, lists.bounds[0], lists.bounds[-1], pieces, places, plan.info,
        plan.blocks, plan.blocks.shape[0], options.scale * _LOG2E, options.scale,
        H=q.shape[1], **shape.gathered, CHUNK=piece, **tuned,
    )  # fmt: skip
    if room:
        widths = {name: shape.gathered[name] for name in ("HKV", "D", "DV", "BD", "BDV", "B")}
        sum_pieces[(segments, tiles)](
            *tensors[-2:], *parts, pieces, places, plan.info, plan.blocks, plan.blocks.shape[0], options.scale,
            **widths, BN=tuned["BN"], num_warps=8,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Shape:
    """What kernels are compiled for."""

    gathered: dict[str, int]
    """Key heads, channels and their powers of two, block size and choices: what every kernel takes."""
    heads: int
    element_bytes: int
    shared_bytes: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, options: MobaOptions) -> _Shape:
        gathered = {
            "HKV": k.shape[1],
            "D": q.shape[2],
            "DV": v.shape[2],
            "BD": _width(q.shape[2]),
            "BDV": _width(v.shape[2]),
            "B": options.block_size,
            "COUNT": options.topk - 1,
        }
        return cls(gathered, q.shape[1], q.element_size(), shared_memory_bytes(q.device))

    def choices(self, queries: int) -> int:
        """Choices of so many queries."""
        return queries * self.heads * self.gathered["COUNT"]

    def configuration(self, kernel: str) -> dict[str, int]:
        return configuration(
            kernel,
            element_bytes=self.element_bytes,
            width=max(self.gathered["BD"], self.gathered["BDV"]),
            block_size=self.gathered["B"],
            shared_bytes=self.shared_bytes,
        )


def _width(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))
