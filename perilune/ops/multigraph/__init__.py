"""Propagation over several graphs at once (CIGF's CIGCN): neighbors' sums of all graphs, mixed per node, one op."""

# N nodes  J graphs  S slices (start behaviors)  d width

from __future__ import annotations

from torch import Tensor, float32

from perilune.errors import BackendError
from perilune.ops.backends import triton_is_default, triton_obstacle
from perilune.ops.multigraph.graph import MultiGraph, Norm
from perilune.ops.multigraph.reference import propagate_mixed_reference, propagate_reference
from perilune.ops.multigraph.torch import propagate_mixed_torch, propagate_torch

__all__ = ["MultiGraph", "Norm", "propagate", "propagate_mixed"]


def propagate(x: Tensor, graph: MultiGraph, *, backend: str = "auto") -> Tensor:
    """One hop of each graph: y[:, j] = Â_j x, or Â_j x[:, j].

    Args:
        x: `[N, d]`, read by every graph, or `[N, J, d]`, a slice for each; float32 or float64.
        graph: J graphs over N nodes, on x's device.
        backend: `triton` (float32 on a GPU), `torch`, `reference` (dense, N^2), or `auto`: triton on a GPU, else torch.

    Returns:
        `[N, J, d]` in x's dtype; differentiable once.

    Raises:
        ValueError: shapes disagree, or the backend is unknown.
        BackendError: `triton` cannot serve the call.

    Source: CIGF, eq. 6 (the first hop).
    """
    if x.ndim not in (2, 3) or x.shape[0] != graph.num_nodes or (x.ndim == 3 and x.shape[1] != graph.num_graphs):
        raise ValueError(
            f"propagate: x must be [{graph.num_nodes}, d] or [{graph.num_nodes}, {graph.num_graphs}, d], got "
            f"{list(x.shape)}"
        )
    match _choose("propagate", backend, x):
        case "reference":
            return propagate_reference(x, graph)
        case "triton":
            from perilune.ops.multigraph.triton import propagate_triton

            return propagate_triton(x, graph)
        case _:
            return propagate_torch(x, graph)


def propagate_mixed(x: Tensor, graph: MultiGraph, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """One hop of a mixture of graphs, weighted at the node that receives it.

    y[v, s] = sum_j weights[v, s, j] (Â_j x[:, s])[v]. No product of adjacency matrices is ever formed.

    Args:
        x: `[N, S, d]`, float32 or float64.
        graph: J graphs over N nodes, on x's device.
        weights: `[N, S, J]` in x's dtype.
        backend: as for `propagate`.

    Returns:
        `[N, S, d]` in x's dtype; differentiable once in x and weights.

    Raises:
        ValueError: shapes or dtypes disagree, or the backend is unknown.
        BackendError: `triton` cannot serve the call.

    Source: CIGF, eq. 4 and 7 (later hops; weights of eq. 5).
    """
    if x.ndim != 3 or x.shape[0] != graph.num_nodes:
        raise ValueError(f"propagate_mixed: x must be [{graph.num_nodes}, S, d], got {list(x.shape)}")
    wanted = (*x.shape[:2], graph.num_graphs)
    if tuple(weights.shape) != wanted or weights.dtype != x.dtype:
        raise ValueError(
            f"propagate_mixed: weights must be {list(wanted)} of {x.dtype}, got {list(weights.shape)} of "
            f"{weights.dtype}"
        )
    match _choose("propagate_mixed", backend, x):
        case "reference":
            return propagate_mixed_reference(x, graph, weights)
        case "triton":
            from perilune.ops.multigraph.triton import propagate_mixed_triton

            return propagate_mixed_triton(x, graph, weights)
        case _:
            return propagate_mixed_torch(x, graph, weights)


def _choose(op: str, backend: str, x: Tensor) -> str:
    if backend not in ("auto", "triton", "torch", "reference"):
        raise ValueError(f"{op}: backend must be 'auto', 'triton', 'torch' or 'reference', got {backend!r}")
    if backend == "triton":
        obstacle = triton_obstacle(x, dtypes=(float32,))
        if obstacle is not None:
            raise BackendError(f"{op}: backend 'triton' {obstacle}; use 'torch'")
    if backend == "auto":
        return "triton" if triton_is_default(op, x) else "torch"
    return backend
