"""Trained models to compare with: matrix factorisation, LightGCN, and MBGCN's scheme. All scores are inner products."""

# N nodes  K behaviors  S slices  d width  L hops  E events

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perilune.ops.multigraph import propagate
from perilune.recsys.config import FactorConfig, MBGCNConfig
from perilune.recsys.data import InteractionData
from perilune.recsys.decoders import XavierLinear
from perilune.recsys.graphs import build_graph, build_union, concatenated, factors_of_new
from perilune.recsys.recommender import Recommender, Side


class _InnerProduct(Recommender):
    """Scores are scaled inner products of whole rows; only the target is learned."""

    scale: float

    @property
    def tasks(self) -> tuple[int, ...]:
        """The target alone."""
        return (len(self.behaviors) - 1,)

    def logits(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Recommender`."""
        del task
        return self.scale * (x * y).flatten(-2).sum(-1)

    def score(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Recommender`."""
        del task
        return self.scale * (x.flatten(1) @ y.flatten(1).T)

    def directions(self, x: Tensor, y: Tensor, task: int) -> Tensor | None:
        """See `Recommender`."""
        del x, task
        return self.scale * y

    def keys(self, y: Tensor) -> list[Tensor]:
        """See `Recommender`; rows are one vector."""
        return [y.flatten(1)]

    def queries(self, x: Tensor, task: int) -> dict[int, Tensor]:
        """See `Recommender`."""
        del task
        return {0: x.flatten(1)}


class FactorModel(_InnerProduct):
    """BPR-MF, or LightGCN: the mean of X and its L hops over a symmetrically normalized graph.

    Source: Rendle et al., BPR (1205.2618); He et al., LightGCN (2002.02126), eq. 3-8.
    """

    def __init__(self, config: FactorConfig, data: InteractionData) -> None:
        super().__init__(data.num_users, data.num_items, tuple(data.behaviors), config.dim)
        self.config, self.scale = config, config.logit_scale
        self.edges = config.graph_behaviors or (data.target_name,)
        if config.kind == "lightgcn":
            self._graph = build_union(data, norm=config.norm, behaviors=self.edges)

    def tables(self) -> Tensor:
        """See `Recommender`; `[N, 1, d]`."""
        hops = [self.embeddings()[:, None, :]]
        if self._graph is not None:
            for _ in range(self.config.layers):
                hops.append(propagate(hops[-1], self.graph))
        return torch.stack(hops).mean(0)

    @property
    def learned_from(self) -> tuple[str, ...]:
        """See `Recommender`."""
        edges = () if self._graph is None else self.edges
        return tuple(dict.fromkeys((*super().learned_from, *edges)))

    @property
    def folded_from(self) -> tuple[str, ...]:
        """See `Recommender`; BPR-MF, which has no edges, takes all."""
        return self.behaviors if self._graph is None else self.edges

    @torch.no_grad()
    def fold_states(self) -> tuple[Tensor, ...]:
        """See `Recommender`; hops 0 to L - 1, `[N, 1, d]` each."""
        hops = [self.embeddings()[:, None, :]]
        if self._graph is not None:
            for _ in range(self.config.layers - 1):
                hops.append(propagate(hops[-1], self.graph))
        return tuple(hops)

    @torch.no_grad()
    def event_shares(
        self, neighbors: Sequence[Tensor], states: Sequence[Tensor], side: Side, own: Tensor | None = None
    ) -> Tensor | None:
        """See `Recommender`; a pair of several behaviors is one edge, and counts for the last of them.

        BPR-MF has no rule for a new node: here it is the mean of the vectors of its neighbors. The vector of a node
        that was trained is no sum over events.
        """
        del side
        if self._graph is None and own is not None:
            return None
        nodes, kinds = concatenated(neighbors)
        is_edge = torch.tensor([name in self.folded_from for name in self.behaviors], device=nodes.device)[kinds]
        last = dict(zip(nodes[is_edge].tolist(), is_edge.nonzero()[:, 0].tolist(), strict=True))
        places = torch.tensor(list(last.values()), dtype=torch.int64, device=nodes.device)
        if self._graph is None:
            factors = nodes.new_full((len(places),), 1 / max(1, len(places)), dtype=torch.float32)
        else:
            factors = factors_of_new(self.graph, 0, nodes[places], self.config.norm) / (self.config.layers + 1)
        shares = states[0].new_zeros(len(nodes), *states[0].shape[1:])
        for state in states:
            shares[places] += factors[:, None, None].to(state.dtype) * state[nodes[places]]
        return shares


class MBGCN(_InnerProduct):
    """Behaviors weighted by how often a user shows them, plus scores between items of one behavior.

    User and item: p_u^{l+1} = sum_t alpha_ut mean over N_t(u) of q_i^l with alpha_ut = w_t n_ut / sum_m w_m n_um; items
    take the mean of their behaviors' means; representations are the sums over hops. Items by behavior:
    s_t^{l+1} = W_t (A^T A)_t s_t^l, means both ways; the score of i for u is that of the mean of s over what u has.

    Source: Jin et al., Multi-behavior Recommendation with Graph Convolutional Networks (SIGIR 2020), sections 3.2-3.5;
    a sum over hops in place of a concatenation with a joint regularizer, so "MBGCN-style".
    """

    def __init__(self, config: MBGCNConfig, data: InteractionData) -> None:
        super().__init__(data.num_users, data.num_items, tuple(data.behaviors), config.dim)
        self.config, self.scale = config, config.logit_scale
        self._graph = build_graph(data, norm="left")
        self.strength = _Ones(len(data.behaviors))
        self.relation = nn.ModuleList(XavierLinear(config.dim, config.dim, bias=False) for _ in data.behaviors)
        self.matching = nn.ModuleList(XavierLinear(config.dim, config.dim, bias=False) for _ in data.behaviors)

    def tables(self) -> Tensor:
        """See `Recommender`; `[N, 1 + K, d]`: user and item, then items by behavior."""
        share = self.config.item_share
        parts = [(1 - share) ** 0.5 * self._collaborative()[:, None], share**0.5 * self._by_items()]
        return torch.cat(parts, 1)

    def decayed(self) -> list[Tensor]:
        """Return embeddings and matrices."""
        return [*super().decayed(), *self.relation.parameters(), *self.matching.parameters()]

    @property
    def learned_from(self) -> tuple[str, ...]:
        """All: every behavior is in the graph."""
        return self.behaviors

    @property
    def folded_from(self) -> tuple[str, ...]:
        """See `Recommender`."""
        return self.behaviors

    @torch.no_grad()
    def fold_states(self) -> tuple[Tensor, ...]:
        """See `Recommender`; L hops of user and item `[N, d]`, L of items at users `[N, K, d]`, the sums of s_t."""
        hops, _ = self._walk()
        at_users, total = self._walk_items()
        return (*hops, *at_users, total)

    @torch.no_grad()
    def event_shares(
        self, neighbors: Sequence[Tensor], states: Sequence[Tensor], side: Side, own: Tensor | None = None
    ) -> Tensor | None:
        """See `Recommender`."""
        del own  # of no weight in what neighbors give
        layers, share = self.config.layers, self.config.item_share
        hops, at_users, total = states[:layers], states[layers : 2 * layers], states[-1]
        nodes, kinds = concatenated(neighbors)
        counts = torch.bincount(kinds, minlength=len(self.behaviors)).to(total.dtype)
        if side == "user":
            strength = self.strength.weight.clamp(min=0)
            weights = (strength / (strength * counts).sum().clamp(min=1e-12))[kinds]
        else:
            weights = 1 / (counts[kinds] * (counts > 0).sum())
        shares = total.new_zeros(len(nodes), 1 + len(self.behaviors), total.shape[-1])
        for hop in hops:
            shares[:, 0] += (1 - share) ** 0.5 * weights[:, None] * hop[nodes]
        for t in range(len(self.behaviors)):
            of_kind = kinds == t
            seen, part = nodes[of_kind], shares[of_kind, 1 + t]
            if side == "user":
                part = part + self.matching[t](total[seen, t])
            else:
                for found in at_users:
                    part = part + self.relation[t](found[seen, t])
            shares[of_kind, 1 + t] = share**0.5 * part / counts[t].clamp(min=1)
        return shares

    def _collaborative(self) -> Tensor:
        hops, last = self._walk()
        return torch.stack((*hops, last)).sum(0)

    def _walk(self) -> tuple[list[Tensor], Tensor]:
        """Hops 0 to L - 1 of user and item `[N, d]`, and hop L."""
        x, graph = self.embeddings(), self.graph
        shown = graph.degrees.T * self.strength.weight.clamp(min=0)
        of_user = shown / shown.sum(1, keepdim=True).clamp(min=1e-12)
        present = (graph.degrees > 0).T.to(x.dtype)
        of_item = present / present.sum(1, keepdim=True).clamp(min=1)
        weights = torch.cat((of_user[: self.num_users], of_item[self.num_users :]))
        hops = []
        for _ in range(self.config.layers):
            hops.append(x)
            x = (propagate(x, graph) * weights.unsqueeze(-1)).sum(1)
        return hops, x

    def _by_items(self) -> Tensor:
        """`[N, K, d]`: items' s_t, and for users M_t applied to the mean of s_t over what they have."""
        _, total = self._walk_items()
        users = propagate(total, self.graph)
        matched = torch.stack([self.matching[t](users[:, t]) for t in range(len(self.behaviors))], 1)
        return total + matched * (1 - self._is_item())

    def _walk_items(self) -> tuple[list[Tensor], Tensor]:
        """Means at users of s_t^0 to s_t^{L-1}, `[N, K, d]` each, and at items the sum of s_t over hops `[N, K, d]`."""
        graph, behaviors, is_item = self.graph, len(self.behaviors), self._is_item()
        items = self.embeddings()[:, None, :].expand(-1, behaviors, -1) * is_item
        total, at_users = items, []
        for _ in range(self.config.layers):
            at_users.append(propagate(items, graph))
            walked = propagate(at_users[-1], graph) * is_item
            items = torch.stack([self.relation[t](walked[:, t]) for t in range(behaviors)], 1)
            total = total + items
        return at_users, total

    def _is_item(self) -> Tensor:
        """`[N, 1, 1]`: 0 for users, 1 for items."""
        is_item = torch.ones(self.num_users + self.num_items, 1, 1, device=self.item_embedding.weight.device)
        is_item[: self.num_users] = 0
        return is_item


class _Ones(nn.Module):
    """w_t, one for each behavior, beginning at 1."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count))

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        del name, generator
        return torch.ones(shape)
