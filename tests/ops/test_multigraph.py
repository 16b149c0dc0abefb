from __future__ import annotations

import importlib
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import BackendError
from perilune.ops.multigraph import MultiGraph, Norm, propagate, propagate_mixed
from tests.ops.multigraph_cases import random_graph, random_inputs

NORMS = get_args(Norm)


def _edges(*pairs: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.tensor(pairs).reshape(-1, 2).T
    return first, second


def test_left_takes_means_and_isolated_nodes_stay_zero() -> None:
    graph = MultiGraph.of([_edges((0, 2), (1, 2)), _edges()], num_nodes=4)
    x = torch.tensor([[1.0], [3.0], [10.0], [7.0]])
    assert propagate(x, graph)[:, :, 0].tolist() == [[10, 0], [10, 0], [2, 0], [0, 0]]


@pytest.mark.parametrize(("norm", "value"), [("left", 1.0), ("right", 0.5), ("sym", 0.5**0.5), ("none", 1.0)])
def test_norms_of_an_edge_between_degrees_one_and_two(norm: Norm, value: float) -> None:
    graph = MultiGraph.of([_edges((0, 2), (1, 2))], num_nodes=3, norm=norm)
    x = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    assert propagate(x, graph)[0, 0, 0].item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("is_shared", [True, False])
def test_propagate_equals_the_oracle(norm: Norm, is_shared: bool) -> None:
    graph = random_graph(23, 3, 0.2, seed=1, norm=norm, hub=True)
    x = random_inputs(graph, 3, 5, seed=2)[0]
    x = (x[:, 0].clone() if is_shared else x).requires_grad_()
    ours, oracle = propagate(x, graph), propagate(x, graph, backend="reference")
    torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(oracle)
    torch.testing.assert_close(torch.autograd.grad(ours, x, grad), torch.autograd.grad(oracle, x, grad))
    assert torch.autograd.gradcheck(lambda x: propagate(x, graph), (x,))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_propagate_mixed_equals_the_oracle(norm: Norm, kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("perilune.ops.multigraph.torch")
    monkeypatch.setattr(module, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    graph = random_graph(23, 3, 0.2, seed=3, norm=norm, hub=True)
    x, weights = (tensor.requires_grad_() for tensor in random_inputs(graph, 2, 5, seed=4))
    ours, oracle = propagate_mixed(x, graph, weights), propagate_mixed(x, graph, weights, backend="reference")
    torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(oracle)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (x, weights), grad), torch.autograd.grad(oracle, (x, weights), grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x, w: propagate_mixed(x, graph, w), (x, weights))


@given(
    num_nodes=st.integers(1, 12), num_graphs=st.integers(1, 4), density=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 99), norm=st.sampled_from(NORMS),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_graph_equals_the_oracle_and_repeats_to_the_bit(
    num_nodes: int, num_graphs: int, density: float, seed: int, norm: Norm
) -> None:
    graph = random_graph(num_nodes, num_graphs, density, seed, norm)
    x, weights = random_inputs(graph, 2, 3, seed, torch.float32)
    ours = propagate_mixed(x, graph, weights)
    oracle = propagate_mixed(x.double(), graph, weights.double(), backend="reference")
    torch.testing.assert_close(ours.double(), oracle, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours, propagate_mixed(x, graph, weights))
    # <Âx, y> = <x, Â^T y>: what makes the gradient right for asymmetric norms too.
    x = x[:, 0].clone().requires_grad_()
    y = torch.randn(num_nodes, num_graphs, 3)
    pulled = torch.autograd.grad(propagate(x, graph), x, y)[0]
    torch.testing.assert_close((propagate(x, graph) * y).sum(), (x * pulled).sum(), rtol=1e-4, atol=1e-4)


def test_no_nodes() -> None:
    graph = MultiGraph.of([_edges()], num_nodes=0)
    assert propagate(torch.zeros(0, 4), graph).shape == (0, 1, 4)
    assert propagate_mixed(torch.zeros(0, 2, 4), graph, torch.zeros(0, 2, 1)).shape == (0, 2, 4)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (_edges((0, 3)), r"graph 0: ends must be in \[0, 3\), got 3 to 3"),
        (_edges((-1, 2)), r"got -1 to -1"),
        (_edges((1, 1)), "node 1 has a loop"),
        ((torch.tensor([0]), torch.tensor([1, 2])), r"shapes \(1,\) and \(2,\)"),
    ],
)
def test_bad_edges_are_refused(edges: tuple[torch.Tensor, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiGraph.of([edges], num_nodes=3)


def test_bad_calls_are_refused() -> None:
    graph = random_graph(4, 2, 0.5, seed=0)
    with pytest.raises(ValueError, match="at least one"):
        MultiGraph.of([], num_nodes=3)
    with pytest.raises(ValueError, match="norm must be one of left"):
        MultiGraph.of([_edges((0, 1))], num_nodes=3, norm="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"x must be \[4, d\] or \[4, 2, d\]"):
        propagate(torch.zeros(4, 3, 5), graph)
    with pytest.raises(ValueError, match=r"weights must be \[4, 3, 2\]"):
        propagate_mixed(torch.zeros(4, 3, 5), graph, torch.zeros(4, 2, 3))
    with pytest.raises(ValueError, match="backend must be"):
        propagate(torch.zeros(4, 5), graph, backend="numpy")
    with pytest.raises(BackendError, match="'triton' needs"):
        propagate(torch.zeros(4, 5), graph, backend="triton")
