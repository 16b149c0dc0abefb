"""From pairs to the multigraph that models propagate over: users are nodes 0 to U - 1, item i is node U + i."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from perilune.errors import DataError
from perilune.ops.multigraph import MultiGraph, Norm
from perilune.recsys.data import InteractionData, Interactions


def build_graph(
    data: InteractionData,
    *,
    norm: Norm = "left",
    behaviors: Collection[str] | None = None,
    hide_target_pairs: bool = False,
) -> MultiGraph:
    """Return one graph per behavior.

    Args:
        data: K behaviors over U users and I items.
        norm: how graphs are normalized.
        behaviors: those whose pairs are edges; the graphs of the others are empty. None: all.
        hide_target_pairs: whether other behaviors lose the pairs that the target has too.

    Raises:
        DataError: a behavior is not in the data.
    """
    check_behaviors(data, behaviors or ())
    edges = []
    for name, pairs in data.behaviors.items():
        if behaviors is not None and name not in behaviors:
            pairs = pairs.where(np.zeros(len(pairs), bool))
        elif hide_target_pairs and name != data.target_name:
            pairs = pairs.where(~_contained(pairs, data.target, data.num_items))
        edges.append((torch.from_numpy(pairs.users), torch.from_numpy(pairs.items) + data.num_users))
    return MultiGraph.of(edges, num_nodes=data.num_users + data.num_items, norm=norm)


def build_union(data: InteractionData, *, norm: Norm, behaviors: Collection[str]) -> MultiGraph:
    """Return one graph whose edges are the pairs of some behaviors, each once.

    Raises:
        DataError: a behavior is not in the data.
    """
    check_behaviors(data, behaviors)
    keys = np.unique(np.concatenate([data.behaviors[name].keys(data.num_items) for name in behaviors]))
    users, items = np.divmod(keys, max(1, data.num_items))
    edges = (torch.from_numpy(users), torch.from_numpy(items) + data.num_users)
    return MultiGraph.of([edges], num_nodes=data.num_users + data.num_items, norm=norm)


def concatenated(neighbors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the neighbors of all behaviors `[E]`, and which behavior each is of `[E]`."""
    kinds = [torch.full_like(nodes, place) for place, nodes in enumerate(neighbors)]
    return torch.cat(list(neighbors)), torch.cat(kinds)


def factors_of_new(graph: MultiGraph, place: int, neighbors: Tensor, norm: Norm) -> Tensor:
    """Return the weights `[E]` that a new node's row of graph `place` would have for its neighbors `[E]`.

    The neighbors' own degrees stay as they are in the graph, at least 1: of a node that is in the graph already, with
    these neighbors, the weights are those of its row.
    """
    bounds = graph.bounds[place]
    degrees = (bounds[neighbors + 1] - bounds[neighbors]).clamp(min=1).to(torch.float32)
    count = max(1, len(neighbors))
    match norm:
        case "left":
            return torch.full_like(degrees, 1 / count)
        case "right":
            return 1 / degrees
        case "sym":
            return (count * degrees).rsqrt()
        case "none":
            return torch.ones_like(degrees)


def check_behaviors(data: InteractionData, names: Collection[str]) -> None:
    """Refuse names that are no behaviors of the data.

    Raises:
        DataError: the message lists those that are.
    """
    unknown = [name for name in names if name not in data.behaviors]
    if unknown:
        raise DataError(f"no behavior {unknown[0]!r} in the data; there are: {', '.join(data.behaviors)}")


def _contained(pairs: Interactions, others: Interactions, num_items: int) -> np.ndarray:
    return np.isin(pairs.keys(num_items), others.keys(num_items), assume_unique=True)
