"""The oracle: every graph as a dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.multigraph.graph import MultiGraph


def dense_matrices(graph: MultiGraph, dtype: torch.dtype) -> Tensor:
    """Return Â_j as `[J, N, N]`; its memory grows with N^2."""
    num_graphs, num_nodes = graph.num_graphs, graph.num_nodes
    matrices = torch.zeros(num_graphs, num_nodes, num_nodes, dtype=dtype, device=graph.bounds.device)
    for j in range(num_graphs):
        nodes = torch.repeat_interleave(torch.arange(num_nodes, device=matrices.device), graph.degrees[j])
        matrices[j, nodes, graph.neighbors_of(j).long()] = 1.0
    matrices = graph.rows.to(dtype)[:, :, None] * matrices
    return matrices if graph.columns is None else matrices * graph.columns.to(dtype)[:, None, :]


def propagate_reference(x: Tensor, graph: MultiGraph) -> Tensor:
    """y[:, j] = Â_j x, or Â_j x[:, j]."""
    equation = "jvu,ud->vjd" if x.ndim == 2 else "jvu,ujd->vjd"
    return torch.einsum(equation, dense_matrices(graph, x.dtype), x)


def propagate_mixed_reference(x: Tensor, graph: MultiGraph, weights: Tensor) -> Tensor:
    """y[v, s] = sum_j weights[v, s, j] (Â_j x[:, s])[v]."""
    return torch.einsum("vsj,jvu,usd->vsd", weights, dense_matrices(graph, x.dtype), x)
