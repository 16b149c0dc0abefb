"""Cases of the multigraph's Triton backend that its interpreter runs; `python -m tests.ops.multigraph_triton_cases`.

Run with TRITON_INTERPRET=1; names of `SECTIONS` as arguments choose among them.
"""

from __future__ import annotations

import sys
from typing import get_args

import torch

import perilune.ops.multigraph.triton as kernels
from perilune.ops.multigraph import MultiGraph, Norm, propagate, propagate_mixed
from tests.ops.multigraph_cases import compare, gradient_of, random_graph, random_inputs, results

NORMS: tuple[Norm, ...] = get_args(Norm)


def check_norms() -> None:
    """Every norm, with a hub of 8 neighbors and lists of none."""
    for norm in NORMS:
        compare(random_graph(9, 2, 0.1, seed=1, norm=norm, hub=True), 2, 5, "reference")


def check_widths() -> None:
    graph = random_graph(6, 2, 0.3, seed=2, norm="sym")
    for slices, width in ((1, 1), (1, 16), (3, 4), (4, 16), (5, 24), (2, 64), (4, 130)):
        compare(graph, slices, width, "reference")
    compare(random_graph(6, 5, 0.3, seed=3), 5, 3, "reference")


def check_segments() -> None:
    """Lists below, at and beyond a segment, and more segments than a tile has rows."""
    for size, slices, width, norm in ((4, 2, 5, "sym"), (1, 2, 64, "right"), (12, 1, 5, "none"), (11, 1, 5, "left")):
        kernels.SEGMENT = size
        compare(random_graph(13, 2, 0.15, seed=size, norm=norm, hub=True), slices, width, "reference")


def check_nothing() -> None:
    """No edges, no nodes, no channels."""
    none = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    for num_nodes, slices, width in ((4, 2, 3), (0, 2, 3), (4, 2, 0), (4, 0, 3)):
        compare(MultiGraph.of([none, none], num_nodes=num_nodes), slices, width, "reference")
    compare(random_graph(5, 2, 0.6, seed=4), 2, 0, "reference")


def check_repetition() -> None:
    """The same bits again, from strided operands, and for each gradient alone."""
    kernels.SEGMENT = 4
    graph = random_graph(7, 2, 0.2, seed=5, norm="sym", hub=True)
    inputs = random_inputs(graph, 2, 5, 6, torch.float32)
    first, second = (results(graph, *inputs, "triton") for _ in range(2))
    x, weights = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs)
    strided = results(graph, x, weights, "triton")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, strided[name]), name
    for place, name in enumerate(("mixed dx", "mixed dweights")):
        x, weights = (tensor.requires_grad_(index == place) for index, tensor in enumerate(inputs))
        y = propagate_mixed(x, graph, weights, backend="triton")
        (grad,) = torch.autograd.grad(y, (x, weights)[place], gradient_of(y))
        assert torch.equal(grad, first[name])


def check_cache() -> None:
    """A graph's segments are cut once and go when it goes; a NaN stays with the neighbors of who has it."""
    graph = random_graph(9, 2, 0.3, seed=7)
    x = torch.randn(9, 4)
    want = propagate(x, graph, backend="triton")
    cut = kernels._segments_of(graph)
    x[3] = torch.nan
    got = propagate(x, graph, backend="triton")
    assert kernels._segments_of(graph) is cut
    for j in range(2):
        knows = torch.zeros(9, dtype=torch.bool)
        knows[graph.neighbors_of(j)[graph.bounds[j, 3] : graph.bounds[j, 4]].long()] = True
        assert got[knows, j].isnan().all()
        assert torch.equal(got[~knows, j], want[~knows, j])
    before = len(kernels._segments)
    del graph
    assert len(kernels._segments) == before - 1


# the last two leave another length of a segment
SECTIONS = {
    "norms": check_norms, "widths": check_widths, "nothing": check_nothing, "cache": check_cache,
    "segments": check_segments, "repetition": check_repetition,
}  # fmt: skip


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # fills empty tensors with NaN
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
    print("equal")
