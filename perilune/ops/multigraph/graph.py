"""Several graphs over the same nodes, laid out for gathering: what `multigraph` ops read."""

# N nodes  J graphs  nnz stored neighbors of a graph, each edge twice

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["left", "right", "sym", "none"]
"""`left`: means over neighbors, D^-1 A; `right`: A D^-1; `sym`: D^-1/2 A D^-1/2; `none`: A."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class MultiGraph:
    """J undirected graphs as lists of neighbors, with a factor per row and one per column.

    Graph j is diag(rows[j]) A_j diag(columns[j]). A_j is symmetric and has no values of its own, so its transpose,
    which gradients need, is the same lists with the factors exchanged: nothing is built for it.
    """

    bounds: Tensor
    """`[J, N + 1]` int32: where the neighbors of a node begin and end, counted from the graph's own first one."""
    neighbors: Tensor
    """`[sum of nnz]` int32, graph after graph, sorted within a node."""
    starts: tuple[int, ...]
    """`J + 1` numbers: where each graph's neighbors begin."""
    rows: Tensor
    """`[J, N]` float32."""
    columns: Tensor | None
    """`[J, N]` float32; None for ones."""

    @classmethod
    def of(cls, edges: Sequence[tuple[Tensor, Tensor]], *, num_nodes: int, norm: Norm = "left") -> MultiGraph:
        """Lay out undirected graphs.

        Args:
            edges: for each graph the two ends of its distinct edges, each `[E]` of whole numbers in [0, N); no loops.
            num_nodes: N.
            norm: how graphs are normalized; a node without neighbors keeps a row and a column of zeros.

        Raises:
            ValueError: an end is no node, an edge is a loop, or the norm is unknown.
        """
        if norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
        if not edges:
            raise ValueError("a multigraph needs at least one graph")
        bounds, neighbors = [], []
        for place, (first, second) in enumerate(edges):
            _check_edges(place, first, second, num_nodes)
            bound, neighbor = _symmetric_lists(first.to(torch.int32), second.to(torch.int32), num_nodes)
            bounds.append(bound)
            neighbors.append(neighbor)
        stacked = torch.stack(bounds)
        degrees = (stacked[:, 1:] - stacked[:, :-1]).to(torch.float32)
        rows, columns = _factors(degrees, norm)
        starts = [0]
        for neighbor in neighbors:
            starts.append(starts[-1] + len(neighbor))
        return cls(bounds=stacked, neighbors=torch.cat(neighbors), starts=tuple(starts), rows=rows, columns=columns)

    @property
    def num_graphs(self) -> int:
        """J."""
        return self.bounds.shape[0]

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.bounds.shape[1] - 1

    @property
    def degrees(self) -> Tensor:
        """`[J, N]` int32, how many neighbors each node has."""
        return self.bounds[:, 1:] - self.bounds[:, :-1]

    def neighbors_of(self, graph: int) -> Tensor:
        """Return the neighbors `[nnz]` of one graph, node after node."""
        return self.neighbors[self.starts[graph] : self.starts[graph + 1]]

    def to(self, device: torch.device | str) -> MultiGraph:
        """Return the same on a device."""
        return replace(
            self,
            bounds=self.bounds.to(device),
            neighbors=self.neighbors.to(device),
            rows=self.rows.to(device),
            columns=None if self.columns is None else self.columns.to(device),
        )


def _check_edges(place: int, first: Tensor, second: Tensor, num_nodes: int) -> None:
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"graph {place}: ends have shapes {tuple(first.shape)} and {tuple(second.shape)}, want [E] twice"
        )
    for ends in (first, second):
        if len(ends) and not 0 <= int(ends.min()) <= int(ends.max()) < num_nodes:
            raise ValueError(
                f"graph {place}: ends must be in [0, {num_nodes}), got {int(ends.min())} to {int(ends.max())}"
            )
    if bool((first == second).any()):
        raise ValueError(f"graph {place}: node {int(first[first == second][0])} has a loop")


def _symmetric_lists(first: Tensor, second: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Bounds `[N + 1]` and neighbors `[2 E]` of edges read both ways."""
    keys = torch.cat((first.long() * num_nodes + second, second.long() * num_nodes + first))
    keys = keys.sort().values
    bounds = torch.searchsorted(keys, torch.arange(num_nodes + 1, device=keys.device) * num_nodes)
    return bounds.to(torch.int32), (keys % max(1, num_nodes)).to(torch.int32)


def _factors(degrees: Tensor, norm: Norm) -> tuple[Tensor, Tensor | None]:
    """Factors of rows and columns `[J, N]`; an isolated node's are zero."""
    inverse = torch.where(degrees > 0, 1 / degrees.clamp(min=1), 0.0)
    present = (degrees > 0).to(torch.float32)
    match norm:
        case "left":
            return inverse, None
        case "right":
            return present, inverse
        case "sym":
            return inverse.sqrt(), inverse.sqrt()
        case "none":
            return present, None
