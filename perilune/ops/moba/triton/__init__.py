"""MoBA on a GPU: what the front door calls, and the order of its kernels.

plan       where everything lies, and within which memory
gate       block means, and the blocks that each query chooses
lists      the queries that chose each block
forward    what they read of it, and the merge with a query's own block
backward   gradients over the same parts

Queries go through it in slices, so that what is written per choice stays below a budget (plan.py). Nothing is asked of
the device: its memory is reserved for the most that could be chosen, and surplus programs end at once.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from perilune.ops.backends import shared_memory_bytes
from perilune.ops.moba.options import MobaOptions
from perilune.ops.moba.reference import MobaResult
from perilune.ops.moba.routing import MobaRouting
from perilune.ops.moba.triton import plan as tables
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
from perilune.ops.moba.triton.plan import TILES_OF_AN_ITEM, Lists, Plan, make_lists, make_plan

_LOG2E = 1.4426950408889634


@torch.compiler.disable()
def route_triton(q: Tensor, k: Tensor, options: MobaOptions, float32_means: bool) -> MobaRouting:
    """Same contract as `perilune.ops.moba.routing.route` with policy "mean", on arguments that the kernels take."""
    count = options.topk - 1
    q, k = q.detach().contiguous(), k.detach().contiguous()
    past = torch.full((*q.shape[:2], count), -1, dtype=torch.int32, device=q.device)
    if count and not options.is_dense:
        plan = make_plan(options, q, k, k)
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
        width = max(16, triton.next_power_of_2(dim))
        means = torch.empty(
            plan.blocks.shape[0], kv_heads, dim, dtype=torch.float32 if float32_means else k.dtype, device=k.device
        )
        average_blocks[(means.shape[0], kv_heads)](
            k, means, plan.info, plan.blocks, HKV=kv_heads, D=dim, BD=width, B=options.block_size, BN=32, num_warps=4
        )
        rows = 64
        choose_blocks[(plan.tiles.shape[0] * (tables.TILE // rows), heads)](
            q, means, past, plan.info, plan.tiles,
            H=heads, HKV=kv_heads, D=dim, BD=width, B=options.block_size, COUNT=count,
            SLOTS=triton.next_power_of_2(count), TILE=tables.TILE, BM=rows, BN=64, num_warps=4,
        )  # fmt: skip
    return MobaRouting(options, past)


class MobaTriton(torch.autograd.Function):
    """Attention over own and chosen blocks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting, with_top: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return o `[T, H, Dv]`, lse `[T, H]` and maximum logits `[H]`."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = _empty_results(q, v)
        plan, lists, top = _attend_routed(q, k, v, out, lse, routing, with_top)
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


@torch.compiler.disable()
def moba_triton(q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting, with_top: bool) -> MobaResult:
    """Same contract as `perilune.ops.moba_attention`, on checked arguments that the kernels take."""
    out, lse, top = MobaTriton.apply(q, k, v, routing, with_top)
    return MobaResult(out, lse, top if with_top else None)


@torch.compiler.disable()
def moba_triton_forward(
    q: Tensor, k: Tensor, v: Tensor, options: MobaOptions, float32_means: bool, with_top: bool
) -> MobaResult:
    """Same where neither gradients nor choices are wanted: it chooses, too, for as many queries at a time as fit.

    Choices and lists are 8 bytes a choice, which a long prefill has hundreds of millions of.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = _empty_results(q, v)
    top = q.new_full(q.shape[1:2], -torch.inf, dtype=torch.float32)
    most = tables.WORKSPACE_BYTES // 4 // (8 * q.shape[1] * max(1, options.topk - 1)) // tables.TILE * tables.TILE
    for rows, keys, part in options.chunks(max(tables.TILE, most)):
        routing = route_triton(q[rows], k[keys], part, float32_means)
        _, _, found = _attend_routed(q[rows], k[keys], v[keys], out[rows], lse[rows], routing, with_top)
        top = torch.maximum(top, found)
    return MobaResult(out, lse, top if with_top else None)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for o `[T, H, Dv]` and lse `[T, H]`."""
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def _attend_routed(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, routing: MobaRouting, with_top: bool
) -> tuple[Plan, Lists | None, Tensor]:
    """`attend` from what queries chose; return plan, lists, which are None if no query chooses, and what it returns."""
    plan, lists = make_plan(routing.options, q, k, v), None
    if routing.options.topk > 1 and not routing.options.is_dense:
        lists = make_lists(routing.past, plan, routing.options.block_size, k.shape[1])
    return plan, lists, attend(q, k, v, out, lse, routing.options, plan, lists, with_top)


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
    tops = torch.full((plan.tiles.shape[0] * (tables.TILE // own["BM"]) + 1, heads), -torch.inf, device=q.device)
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
        attend_own[(part.num_tiles * (tables.TILE // own["BM"]), heads)](
            q, k, v, out, lse, tops, values, levels, part_tops, plan.info, plan.tiles, part.first_tile, first_choice,
            options.scale * _LOG2E, H=heads, **shape.gathered, WITH_TOP=with_top, TILE=tables.TILE, **own,
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
        query_gradient_of_own[(part.num_tiles * (tables.TILE // own["BM"]), heads)](
            q, k, v, do, lse, drift, dq, shares, plan.info, plan.tiles, part.first_tile, first_choice,
            options.scale * _LOG2E, options.scale, H=heads, **shape.gathered, TILE=tables.TILE, **own,
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
    bound = shape.choices(q.shape[0]) if lists is not None else 0
    if lists is None:
        lists = Lists(plan.blocks, torch.zeros(2, segments, dtype=torch.int32, device=q.device))
    sums = tables.WORKSPACE_BYTES // (4 * tuned["BN"] * sum(widths))
    piece = triton.cdiv(max(tables.PIECE, 2 * bound * tiles // max(1, sums)), tuned["BM"]) * tuned["BM"]
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
