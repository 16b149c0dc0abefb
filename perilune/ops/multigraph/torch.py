"""Gathering by `embedding_bag`, whose CPU kernel reads rows at the speed of the cache and uses every core.

Rows are summed in the order in which neighbors are listed, whatever the number of threads: results repeat to the bit.
"""

# N nodes  J graphs  S slices (start behaviors)  d width

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.multigraph.graph import MultiGraph

KEPT_BYTES = 512 * 2**20
"""Neighbors' sums are kept for the backward pass up to this size; beyond it they are gathered again, in blocks."""
_BLOCK_ROWS = 1 << 16


def propagate_torch(x: Tensor, graph: MultiGraph) -> Tensor:
    """See the front door."""
    return _Propagate.apply(x, graph)


def propagate_mixed_torch(x: Tensor, graph: MultiGraph, weights: Tensor) -> Tensor:
    """See the front door."""
    return _PropagateMixed.apply(x, weights, graph)


class _Propagate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: MultiGraph) -> Tensor:
        ctx.graph, ctx.is_shared = graph, x.ndim == 2
        found = [
            _gather(_scaled(x if x.ndim == 2 else x[:, j], graph.columns, j), graph, j) * _column(graph.rows[j], x)
            for j in range(graph.num_graphs)
        ]
        return torch.stack(found, 1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        graph: MultiGraph = ctx.graph
        parts = [
            _scaled(_gather(grad[:, j] * _column(graph.rows[j], grad), graph, j), graph.columns, j)
            for j in range(graph.num_graphs)
        ]
        if not ctx.is_shared:
            return torch.stack(parts, 1), None
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total, None


class _PropagateMixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, graph: MultiGraph) -> Tensor:
        ctx.graph = graph
        keeps = x.numel() * x.element_size() * graph.num_graphs <= KEPT_BYTES
        kept: list[Tensor] = []
        y = torch.empty_like(x)
        for low, high in _blocks(graph.num_nodes, is_whole=keeps):
            total: Tensor | None = None
            for j in range(graph.num_graphs):
                sums = _sums(x, graph, j, low, high)
                if keeps:
                    kept.append(sums)
                factors = (weights[low:high, :, j] * _column(graph.rows[j, low:high], x)).unsqueeze(-1)
                total = sums * factors if total is None else total.addcmul_(sums, factors)
            if total is not None:
                y[low:high] = total
        ctx.save_for_backward(x, weights, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        graph: MultiGraph = ctx.graph
        x, weights, *kept = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _grad_x(grad, weights, graph) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        grad_weights = torch.empty_like(weights)
        for low, high in _blocks(graph.num_nodes, is_whole=bool(kept)):
            for j in range(graph.num_graphs):
                sums = kept[j] if kept else _sums(x, graph, j, low, high)
                products = torch.einsum("vsd,vsd->vs", grad[low:high], sums)
                grad_weights[low:high, :, j] = products * _column(graph.rows[j, low:high], x)
        return grad_x, grad_weights, None


def _grad_x(grad: Tensor, weights: Tensor, graph: MultiGraph) -> Tensor:
    """sum_j Â_j^T (weights_j * grad), `[N, S, d]`."""
    total: Tensor | None = None
    for j in range(graph.num_graphs):
        factors = weights[:, :, j] * _column(graph.rows[j], grad)
        part = _scaled(_gather((grad * factors.unsqueeze(-1)).flatten(1), graph, j), graph.columns, j)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.view_as(grad)


def _sums(x: Tensor, graph: MultiGraph, j: int, low: int, high: int) -> Tensor:
    """Sums `[high - low, S, d]` over the neighbors of some nodes, before the rows' factors."""
    return _gather(_scaled(x.flatten(1), graph.columns, j), graph, j, low, high).view(-1, *x.shape[1:])


def _gather(table: Tensor, graph: MultiGraph, j: int, low: int = 0, high: int | None = None) -> Tensor:
    """Sum the rows of `table` `[N, w]` over the neighbors of nodes `low` to `high`."""
    high = graph.num_nodes if high is None else high
    neighbors, bounds = graph.neighbors_of(j), graph.bounds[j]
    if (low, high) != (0, graph.num_nodes):
        bounds = bounds[low : high + 1]
        neighbors, bounds = neighbors[int(bounds[0]) : int(bounds[-1])], bounds - bounds[0]
    if not len(neighbors):
        return table.new_zeros(high - low, table.shape[1])
    return F.embedding_bag(neighbors, table.contiguous(), bounds, mode="sum", include_last_offset=True)


def _blocks(num_nodes: int, *, is_whole: bool) -> list[tuple[int, int]]:
    rows = max(1, num_nodes) if is_whole else _BLOCK_ROWS
    return [(low, min(low + rows, num_nodes)) for low in range(0, num_nodes, rows)]


def _scaled(x: Tensor, factors: Tensor | None, j: int) -> Tensor:
    return x if factors is None else x * _column(factors[j], x)


def _column(factors: Tensor, like: Tensor) -> Tensor:
    return factors.to(like.dtype).unsqueeze(1)
