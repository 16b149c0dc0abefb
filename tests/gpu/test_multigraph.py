"""The multigraph's kernels on a GPU, against float64 by the torch backend."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from perilune.ops.multigraph import MultiGraph, Norm, propagate, propagate_mixed
from tests.ops.multigraph_cases import compare, random_inputs, results

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _graph(num_nodes: int, num_edges: tuple[int, ...], norm: Norm = "left", hub: int = 0) -> MultiGraph:
    """Edges drawn at random, more of them at nodes with small numbers; node 0 of the first graph has `hub` neighbors."""
    generator = torch.Generator().manual_seed(num_nodes)
    edges = []
    for place, count in enumerate(num_edges):
        ends = (torch.rand(2, count, generator=generator) ** 3 * (num_nodes - 1)).long()
        if place == 0 and hub:
            ends = torch.cat((ends, torch.stack((torch.zeros(hub, dtype=torch.long), torch.arange(1, hub + 1)))), 1)
        ends = ends[:, ends[0] != ends[1]].sort(0).values
        first, second = torch.unique(ends, dim=1).cuda()
        edges.append((first, second))
    return MultiGraph.of(edges, num_nodes=num_nodes, norm=norm)


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize(("slices", "width"), [(4, 16), (1, 64), (4, 64), (5, 24), (3, 5), (1, 1), (2, 200)])
def test_values_and_gradients_equal_float64(slices: int, width: int, norm: Norm) -> None:
    compare(_graph(3000, (20000, 500, 0, 4000), norm), slices, width, "torch")


@pytest.mark.parametrize("norm", ["left", "sym"])
def test_a_hub_of_20000_neighbors(norm: Norm) -> None:
    graph = _graph(30000, (100000, 50000, 2000), norm, hub=20000)
    assert graph.degrees[0, 0] >= 20000
    compare(graph, 4, 16, "torch")


@pytest.mark.parametrize("norm", ["left", "sym"])
def test_results_repeat_to_the_bit(norm: Norm) -> None:
    graph = _graph(30000, (100000, 50000, 2000), norm, hub=20000)
    x, weights = (tensor.cuda() for tensor in random_inputs(graph, 4, 16, 9, torch.float32))
    once = results(graph, x, weights, "triton")
    for _ in range(3):
        for name, value in results(graph, x, weights, "triton").items():
            assert torch.equal(value, once[name]), name


def test_triton_is_the_default() -> None:
    graph = _graph(300, (900, 100))
    x, weights = (tensor.cuda() for tensor in random_inputs(graph, 2, 8, 9, torch.float32))
    assert torch.equal(propagate(x[:, 0], graph), propagate(x[:, 0], graph, backend="triton"))
    assert torch.equal(propagate_mixed(x, graph, weights), propagate_mixed(x, graph, weights, backend="triton"))


def test_rows_beyond_32_bit_offsets() -> None:
    far = 2**31 // 1024 + 100
    ends = torch.arange(far - 50, far, device="cuda")
    graph = MultiGraph.of([(ends[:-1], ends[1:])], num_nodes=far)
    near = MultiGraph.of([(ends[:-1] - ends[0], ends[1:] - ends[0])], num_nodes=50)
    x = torch.zeros(far, 4, 256, device="cuda")
    x[-50:] = torch.randn(50, 4, 256, device="cuda")
    weights = torch.ones(far, 4, 1, device="cuda")
    small, small_weights = (tensor[-50:].clone().requires_grad_() for tensor in (x, weights))
    x.requires_grad_()
    weights.requires_grad_()
    y, alone = propagate_mixed(x, graph, weights), propagate_mixed(small, near, small_weights)
    assert torch.equal(y[-50:], alone)
    got = torch.autograd.grad(y, (x, weights), y.detach())
    want = torch.autograd.grad(alone, (small, small_weights), alone.detach())
    for found, expected in zip(got, want, strict=True):
        assert torch.equal(found[-50:], expected)
