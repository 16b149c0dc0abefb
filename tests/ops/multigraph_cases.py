"""Small multigraphs and what is computed on them, shared by the CPU's and the GPU's tests."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.multigraph import MultiGraph, Norm


def random_graph(
    num_nodes: int, num_graphs: int, density: float, seed: int, norm: Norm = "left", hub: bool = False
) -> MultiGraph:
    """Graphs drawn edge by edge; with `hub`, node 0 knows every other one in the first."""
    generator = torch.Generator().manual_seed(seed)
    edges = []
    for place in range(num_graphs):
        drawn = torch.rand(num_nodes, num_nodes, generator=generator).triu(1) > 1 - density
        drawn &= torch.ones_like(drawn).triu(1)
        if hub and place == 0:
            drawn[0, 1:] = True
        first, second = drawn.nonzero(as_tuple=True)
        edges.append((first, second))
    return MultiGraph.of(edges, num_nodes=num_nodes, norm=norm)


def random_inputs(
    graph: MultiGraph, slices: int, width: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """`x [N, S, d]` and `weights [N, S, J]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(graph.num_nodes, slices, width, generator=generator, dtype=torch.float64)
    weights = torch.randn(graph.num_nodes, slices, graph.num_graphs, generator=generator, dtype=torch.float64)
    return x.to(dtype), weights.to(dtype)
