"""The multigraph's kernels on a GPU, against the float64 sums of the other backend."""

from typing import get_args

import pytest
import torch

from perilune.ops.multigraph import MultiGraph, Norm, propagate, propagate_mixed
from tests.helpers import assert_close
from tests.ops.multigraph_cases import compare, gradient_of, random_inputs, results, sparse_graph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NODES, HUB = 30_000, 20_000
COUNTS = (200_000, 40_000, 5_000, 0)


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize(("slices", "width"), [(4, 16), (4, 64)])
def test_values_and_gradients_equal_the_sums_in_float64(norm, slices, width):
    compare(sparse_graph(NODES, COUNTS, HUB, 1, norm, "cuda"), slices, width, "torch")


@pytest.mark.parametrize(("slices", "width"), [(1, 1), (1, 16), (2, 5), (3, 24), (5, 16), (1, 300), (5, 130)])
def test_odd_widths(slices, width):
    compare(sparse_graph(3_000, (20_000, 3_000, 1), 2_500, 2, "sym", "cuda"), slices, width, "torch")


def test_few_graphs_few_nodes_and_no_edges():
    none = (torch.zeros(0, dtype=torch.long, device="cuda"),) * 2
    for num_nodes in (0, 1, 7):
        compare(MultiGraph.of([none] * 2, num_nodes=num_nodes), 2, 3, "torch")
    compare(sparse_graph(300, (2_000,), 257, 3, "left", "cuda"), 4, 16, "torch")
    compare(sparse_graph(300, (500,) * 5, 0, 4, "right", "cuda"), 5, 16, "torch")


def test_repeats_to_the_bit_and_auto_takes_the_kernels():
    graph = sparse_graph(NODES, COUNTS, HUB, 5, "left", "cuda")
    x, weights = (tensor.cuda() for tensor in random_inputs(graph, 4, 16, 6, torch.float32))
    once = results(graph, x, weights, "triton")
    for backend in ("triton", "auto"):
        for name, value in results(graph, x, weights, backend).items():
            assert torch.equal(value, once[name]), name


def test_nan_stays_with_the_neighbors_of_who_has_it():
    graph = sparse_graph(NODES, COUNTS, HUB, 7, "left", "cuda")
    x = torch.randn(NODES, 16, device="cuda")
    want = propagate(x, graph, backend="triton")
    x[3] = torch.nan
    got = propagate(x, graph, backend="triton")
    for j in range(graph.num_graphs):
        knows = torch.zeros(NODES, dtype=torch.bool, device="cuda")
        knows[graph.neighbors_of(j)[graph.bounds[j, 3] : graph.bounds[j, 4]].long()] = True
        assert got[knows, j].isnan().all()
        assert torch.equal(got[~knows, j], want[~knows, j])


def test_forward_and_backward_can_be_captured_in_a_graph():
    graph = sparse_graph(NODES, COUNTS, HUB, 8, "sym", "cuda")
    leaves = [tensor.cuda().requires_grad_() for tensor in random_inputs(graph, 4, 16, 9, torch.float32)]
    seed = gradient_of(leaves[0])

    def step():
        y = propagate_mixed(leaves[0], graph, leaves[1], backend="triton")
        return [y, *torch.autograd.grad(y, leaves, seed)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled, and lists cut into segments, before the capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        outputs = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    captured.replay()
    for a, b in zip(step(), outputs, strict=True):
        assert torch.equal(a, b)


def test_rows_beyond_32_bit_offsets():
    """2^31 floats and more: the last nodes are each other's neighbors, and the first's."""
    num_nodes, slices, width = 2**31 // 8192 + 100, 8, 1024
    if torch.cuda.mem_get_info()[0] < 5 * 4 * 2**31:
        pytest.skip("needs 40 GiB of free memory")
    near = sparse_graph(100, (300,), 99, 10, "left", "cuda")
    first = torch.repeat_interleave(torch.arange(100, device="cuda"), near.degrees[0])
    second = near.neighbors_of(0).long()
    first, second = first[first < second], second[first < second]
    far = MultiGraph.of([(first + num_nodes - 100, second + num_nodes - 100)], num_nodes=num_nodes)
    x = torch.zeros(num_nodes, slices, width, device="cuda")
    x[-100:] = torch.randn(100, slices, width, device="cuda")
    x.requires_grad_()
    weights = torch.rand(num_nodes, slices, 1, device="cuda", requires_grad=True)
    leaves = [tensor.detach()[-100:].clone().requires_grad_() for tensor in (x, weights)]
    y, want = propagate_mixed(x, far, weights), propagate_mixed(leaves[0], near, leaves[1])
    assert torch.equal(y[-100:], want)
    assert not y[:-100].any()
    grads = torch.autograd.grad(y, (x, weights), y.detach())
    for name, a, b in zip(("dx", "dweights"), torch.autograd.grad(want, leaves, want.detach()), grads, strict=True):
        assert_close(name, a, b[-100:], 1e-12)
