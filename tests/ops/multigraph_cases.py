"""Small multigraphs and what is computed on them, shared by the CPU's and the GPU's tests."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.multigraph import MultiGraph, Norm, propagate, propagate_mixed
from perilune.seeding import make_generator
from tests.helpers import assert_close


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


def sparse_graph(
    num_nodes: int, counts: tuple[int, ...], hub: int, seed: int, norm: Norm = "left", device: str = "cpu"
) -> MultiGraph:
    """Graphs of about so many edges, drawn where they will be read; in the first, node 0 has `hub` neighbors."""
    generator = make_generator(seed, "edges", device=device)
    edges = []
    for place, count in enumerate(counts):
        first, second = torch.randint(num_nodes, (2, count), generator=generator, device=device)
        if place == 0:
            others = torch.arange(1, hub + 1, device=device)
            first, second = torch.cat((first, torch.zeros_like(others))), torch.cat((second, others))
        keys = (torch.minimum(first, second) * num_nodes + torch.maximum(first, second))[first != second].unique()
        edges.append((keys // num_nodes, keys % num_nodes))
    return MultiGraph.of(edges, num_nodes=num_nodes, norm=norm)


def gradient_of(y: Tensor) -> Tensor:
    """What arrives at an output: the same numbers whatever the backend and dtype."""
    return torch.randn(y.shape, generator=make_generator(0, "gradient"), dtype=torch.float32).to(y)


def results(graph: MultiGraph, x: Tensor, weights: Tensor, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients of both ops; x's first slice is what graphs share, and slices of their own are rolled."""
    x, weights = (tensor.detach().requires_grad_() for tensor in (x, weights))
    found: dict[str, Tensor] = {}
    found["mixed y"] = y = propagate_mixed(x, graph, weights, backend=backend)
    found["mixed dx"], found["mixed dweights"] = torch.autograd.grad(y, (x, weights), gradient_of(y))
    if x.shape[1]:
        shared = x.detach()[:, 0].contiguous().requires_grad_()
        own = torch.stack([shared.detach().roll(j, 0) for j in range(graph.num_graphs)], 1).requires_grad_()
        for name, leaf in (("shared", shared), ("own", own)):
            found[f"{name} y"] = y = propagate(leaf, graph, backend=backend)
            (found[f"{name} dx"],) = torch.autograd.grad(y, leaf, gradient_of(y))
    return found


def compare(graph: MultiGraph, slices: int, width: int, oracle: str, ratio: float = 1e-6) -> None:
    """The Triton kernels against another backend in float64."""
    x, weights = (tensor.to(graph.bounds.device) for tensor in random_inputs(graph, slices, width, seed=8))
    x, weights = x.float(), weights.float()
    got = results(graph, x, weights, "triton")
    for name, want in results(graph, x.double(), weights.double(), oracle).items():
        assert got[name].dtype == torch.float32
        assert_close(f"S = {slices}, d = {width}: {name}", want, got[name], ratio)
