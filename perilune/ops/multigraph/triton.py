"""Propagation on a GPU: one warp follows a node's lists of all graphs and keeps what it sums in registers.

Data movement. Per stored neighbor its index and its row of S d floats are read, and per node its result is written; no
sum of a single graph reaches memory unless it is the result. Backward gathers twice with the same kernel: the output's
gradient times the weights of the node it comes from (dx), and x again (dweights); one after the other, because the L2
cache holds one table of rows rather than two. Lists longer than a segment, which would keep a warp busy long after the
others, are summed segment by segment before, and their sums are added in the order of the list: nothing is added
atomically, so that results repeat to the bit.
"""

# N nodes  J graphs  S slices  D width  P segments  BN neighbors of a tile  BS, BD: S and D as powers of two

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.multigraph.graph import MultiGraph

SEGMENT = 256
"""Most neighbors that one program walks along in one graph."""
_TILE_ELEMENTS = 1024
"""Of a warp: 32 floats, or eight loads of 16 bytes, in flight per thread."""
_ELEMENTS_PER_WARP = 256
"""Of a row: wider rows get more warps, which then need not exchange anything to sum over neighbors."""
_MOST_NEIGHBORS = 32
"""Of a tile; narrow rows are no reason to read further along lists that are short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segments:
    """The lists of a graph that are longer than SEGMENT, in pieces."""

    pieces: Tensor
    """`[P, 3]` int64: the graph, where in `neighbors` the piece begins, how many neighbors it has."""
    firsts: Tensor
    """`[J, N]` int32: how many pieces come before those of a list; read for long lists only."""
    starts: Tensor
    """`[J]` int64: where each graph's neighbors begin."""
    size: int


_segments: WeakKeyDictionary[MultiGraph, _Segments] = WeakKeyDictionary()
"""Made at a graph's first use, which waits for the device once."""


def propagate_triton(x: Tensor, graph: MultiGraph) -> Tensor:
    """See the front door."""
    return _Propagate.apply(x, graph)


def propagate_mixed_triton(x: Tensor, graph: MultiGraph, weights: Tensor) -> Tensor:
    """See the front door."""
    return _PropagateMixed.apply(x, weights, graph)


class _Propagate(torch.autograd.Function):
    """Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: MultiGraph) -> Tensor:
        ctx.graph, ctx.is_shared = graph, x.ndim == 2
        y = x.new_empty(graph.num_nodes, graph.num_graphs, x.shape[-1])
        return _gather(x.contiguous(), graph, y, inner=graph.columns, outer=graph.rows, by_graph=x.ndim == 3)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor, None]:
        graph: MultiGraph = ctx.graph
        dx = torch.empty_like(dy[:, 0] if ctx.is_shared else dy, memory_format=torch.contiguous_format)
        return _gather(dy.contiguous(), graph, dx, inner=graph.rows, outer=graph.columns, by_graph=True), None


class _PropagateMixed(torch.autograd.Function):
    """Keeps x and the weights times the factors of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, graph: MultiGraph) -> Tensor:
        ctx.graph, x = graph, x.contiguous()
        factors = weights.new_empty(graph.num_graphs, *x.shape[:2])
        torch.mul(weights.permute(2, 0, 1), graph.rows.unsqueeze(-1), out=factors)
        ctx.save_for_backward(x, factors)
        return _gather(x, graph, torch.empty_like(x), inner=graph.columns, outer=factors)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        graph: MultiGraph = ctx.graph
        x, factors = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dweights = None
        if ctx.needs_input_grad[0]:
            dx = _gather(dy, graph, torch.empty_like(dy), inner=factors, outer=graph.columns)
        if ctx.needs_input_grad[1]:
            dweights = x.new_empty(*x.shape[:2], graph.num_graphs)
            _gather(x, graph, dweights, inner=graph.columns, outer=graph.rows, dot=dy)
        return dx, dweights, None


def _gather(
    table: Tensor, graph: MultiGraph, out: Tensor, *, inner: Tensor | None, outer: Tensor | None,
    by_graph: bool = False, dot: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fill `out` from m[j, v] = outer[j, v] sum_u inner[j, u] table[u] over neighbors u of v in graph j, and return it.

    `out` is sum_j m `[N, S, D]`, or m itself if it has an axis of graphs more than the rows that are read, or
    `[N, S, J]`, each m's products with the rows of `dot`.

    Args:
        table: `[N, S, D]` or `[N, D]`; with `by_graph` `[N, J, D]`, of which each graph reads its own slice.
        graph: the lists.
        out: dense.
        inner: factors `[J, N]` or `[J, N, S]` of who is read; None for ones.
        outer: factors of who receives.
        by_graph: whether graphs read slices of their own.
        dot: `[N, S, D]`.
    """
    if not out.numel() or not table.numel():
        return out.zero_()
    slices = table.shape[1] if table.ndim == 3 and not by_graph else 1
    sizes = _sizes(slices, table.shape[-1])
    sizes |= {"ROW": table[0].numel(), "SHIFT": table.shape[-1] if by_graph else 0}
    sizes["INNER"] = 0 if inner is None else slices if inner.ndim == 3 else 1
    segments = _segments_of(graph)
    sums, num_pieces = out, len(segments.pieces)
    if num_pieces:
        sums = torch.empty(num_pieces, slices, table.shape[-1], dtype=table.dtype, device=table.device)
        _multigraph_segment_kernel[(num_pieces,)](
            table, graph.neighbors, table if inner is None else inner, segments.pieces, sums, graph.num_nodes, **sizes
        )
    _multigraph_gather_kernel[(graph.num_nodes,)](
        table, graph.neighbors, table if inner is None else inner, table if outer is None else outer,
        table if dot is None else dot, out, graph.bounds, segments.starts, segments.firsts, sums, graph.num_nodes,
        J=graph.num_graphs, OUTER=0 if outer is None else slices if outer.ndim == 3 else 1, SEGMENT=segments.size,
        HAS_LONG=num_pieces > 0, BY_GRAPH=dot is None and out[0].numel() > slices * table.shape[-1],
        HAS_DOT=dot is not None, **sizes,
    )  # fmt: skip
    return out


def _sizes(slices: int, width: int) -> dict[str, Any]:
    """Constants of the kernels: a function of the shape alone, so that results repeat to the bit."""
    BS, BD = triton.next_power_of_2(slices), triton.next_power_of_2(width)
    warps = min(8, max(1, BS * BD // _ELEMENTS_PER_WARP))
    BN = min(_MOST_NEIGHBORS, max(1, _TILE_ELEMENTS * warps // (BS * BD)))
    return {"S": slices, "D": width, "BN": BN, "BS": BS, "BD": BD, "num_warps": warps, "num_stages": 1}


def _segments_of(graph: MultiGraph) -> _Segments:
    found = _segments.get(graph)
    if found is None or found.size != SEGMENT:
        found = _segments[graph] = _cut(graph, SEGMENT)
    return found


def _cut(graph: MultiGraph, size: int) -> _Segments:
    """Cut lists longer than `size`."""
    device = graph.bounds.device
    starts = torch.tensor(graph.starts[:-1], dtype=torch.int64, device=device)
    degrees = graph.degrees.flatten().long()
    numbers = torch.where(degrees > size, (degrees + size - 1) // size, 0)
    firsts = numbers.cumsum(0) - numbers
    lists = torch.repeat_interleave(numbers)
    done = (torch.arange(len(lists), device=device) - firsts[lists]) * size
    graphs = lists // max(1, graph.num_nodes)
    begins = starts[graphs] + graph.bounds[:, :-1].flatten()[lists] + done
    pieces = torch.stack((graphs, begins, (degrees[lists] - done).clamp(max=size)), 1)
    return _Segments(pieces=pieces, firsts=firsts.to(torch.int32), starts=starts, size=size)


@triton.jit
def _sum_rows(
    table_ptr, neighbors_ptr, inner_ptr, begin, count,
    ROW: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    INNER: tl.constexpr, IS_LISTED: tl.constexpr,
) -> Any:  # fmt: skip
    """Sum `[BS, BD]` of `count` rows times their factors: those listed from `begin`, or rows `begin` and following."""
    places = tl.arange(0, BN)
    # Rows are loaded flat, so that lanes next to each other read along a row, and cut into slices afterwards.
    flat = tl.arange(0, BS * BD)[None, :]
    within, exists = (flat // BD) * D + flat % BD, (flat < S * BD) & (flat % BD < D)
    slices = tl.arange(0, BS)[None, :]
    total = tl.zeros([BS, BD], tl.float32)
    listed = neighbors_ptr + begin + places
    if IS_LISTED:
        ahead = tl.load(listed, mask=places < count, other=0, eviction_policy="evict_first")
    for done in range(0, count, BN):
        is_there = places < count - done
        if IS_LISTED:
            rows = ahead
            # Loaded a tile ahead, so that a row's latency does not begin when its index's ends.
            later = places < count - done - BN
            ahead = tl.load(listed + done + BN, mask=later, other=0, eviction_policy="evict_first")
        else:
            rows = begin + done + places
        places_of_rows = rows[:, None].to(tl.int64)
        tile = tl.load(table_ptr + places_of_rows * ROW + within, mask=is_there[:, None] & exists, other=0.0)
        tile = tl.reshape(tile, [BN, BS, BD])
        if INNER == 1:
            tile *= tl.load(inner_ptr + rows, mask=is_there, other=0.0)[:, None, None]
        elif INNER > 1:
            places_of_factors = inner_ptr + places_of_rows * S + slices
            tile *= tl.load(places_of_factors, mask=is_there[:, None] & (slices < S), other=0.0)[:, :, None]
        total += tl.sum(tile, 0)
    return total


@triton.jit(do_not_specialize=["N"])
def _multigraph_segment_kernel(
    table_ptr, neighbors_ptr, inner_ptr, pieces_ptr, sums_ptr, N,
    ROW: tl.constexpr, SHIFT: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
    BD: tl.constexpr, INNER: tl.constexpr,
) -> None:  # fmt: skip
    """One segment of a long list, before its factor of rows."""
    piece = tl.program_id(0).to(tl.int64)
    graph = tl.load(pieces_ptr + piece * 3)
    begin = tl.load(pieces_ptr + piece * 3 + 1)
    count = tl.load(pieces_ptr + piece * 3 + 2).to(tl.int32)
    total = _sum_rows(
        table_ptr + graph * SHIFT, neighbors_ptr, inner_ptr + graph * N * INNER, begin, count,
        ROW, S, D, BN, BS, BD, INNER, True,
    )  # fmt: skip
    slices, channels = tl.arange(0, BS)[:, None], tl.arange(0, BD)[None, :]
    places = sums_ptr + piece * (S * D) + slices * D + channels
    tl.store(places, total, mask=(slices < S) & (channels < D))


@triton.jit(do_not_specialize=["N"])
def _multigraph_gather_kernel(
    table_ptr, neighbors_ptr, inner_ptr, outer_ptr, dot_ptr, out_ptr, bounds_ptr, starts_ptr, firsts_ptr, sums_ptr, N,
    J: tl.constexpr, ROW: tl.constexpr, SHIFT: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, BD: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_LONG: tl.constexpr, BY_GRAPH: tl.constexpr, HAS_DOT: tl.constexpr,
) -> None:  # fmt: skip
    """One node, all graphs.

    Source: CIGF, eq. 4, 6 and 7, and their gradients.
    """
    node = tl.program_id(0).to(tl.int64)
    slices, channels = tl.arange(0, BS), tl.arange(0, BD)[None, :]
    within = slices[:, None] * D + channels
    exists = (slices[:, None] < S) & (channels < D)
    if HAS_DOT:
        dot = tl.load(dot_ptr + node * (S * D) + within, mask=exists, other=0.0)
    total = tl.zeros([BS, BD], tl.float32)
    for j in range(J):
        graph = tl.full([], j, tl.int64)
        bound = bounds_ptr + graph * (N + 1) + node
        low = tl.load(bound)
        count = tl.load(bound + 1) - low
        begin = tl.load(starts_ptr + graph) + low
        listed = count
        if HAS_LONG:
            # A long list has been summed in segments: what is left of it are their sums.
            is_long = count > SEGMENT
            first = tl.load(firsts_ptr + graph * N + node, mask=is_long, other=0).to(tl.int64)
            pieces = tl.where(is_long, (count + SEGMENT - 1) // SEGMENT, 0)
            listed = tl.where(is_long, 0, count)
        found = _sum_rows(
            table_ptr + graph * SHIFT, neighbors_ptr, inner_ptr + graph * N * INNER, begin, listed,
            ROW, S, D, BN, BS, BD, INNER, True,
        )  # fmt: skip
        if HAS_LONG:
            found += _sum_rows(sums_ptr, neighbors_ptr, inner_ptr, first, pieces, S * D, S, D, BN, BS, BD, 0, False)
        if OUTER == 1:
            found *= tl.load(outer_ptr + graph * N + node)
        elif OUTER > 1:
            factors = tl.load(outer_ptr + (graph * N + node) * S + slices, mask=slices < S, other=0.0)
            found *= factors[:, None]
        if HAS_DOT:
            products = tl.sum(found * dot, 1)
            tl.store(out_ptr + (node * S + slices) * J + graph, products, mask=slices < S)
        elif BY_GRAPH:
            tl.store(out_ptr + (node * J + graph) * (S * D) + within, found, mask=exists)
        else:
            total += found
    if not HAS_DOT and not BY_GRAPH:
        tl.store(out_ptr + node * (S * D) + within, total, mask=exists)
