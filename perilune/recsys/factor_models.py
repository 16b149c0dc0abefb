"""Trained models to compare with: matrix factorisation, LightGCN, and MBGCN's scheme. All scores are inner products."""

# N nodes  K behaviours  S slices  d width  L hops

from __future__ import annotations

import torch
from torch import Tensor, nn

from perilune.ops.multigraph import propagate
from perilune.recsys.config import FactorConfig, MBGCNConfig
from perilune.recsys.data import InteractionData
from perilune.recsys.decoders import XavierLinear
from perilune.recsys.graphs import build_graph, build_union
from perilune.recsys.recommender import Recommender


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


class FactorModel(_InnerProduct):
    """BPR-MF, or LightGCN: the mean of X and its L hops over a symmetrically normalised graph.

    Source: Rendle et al., BPR (1205.2618); He et al., LightGCN (2002.02126), eq. 3-8.
    """

    def __init__(self, config: FactorConfig, data: InteractionData) -> None:
        super().__init__(data.num_users, data.num_items, tuple(data.behaviors), config.dim)
        self.config, self.scale = config, config.logit_scale
        behaviors = config.graph_behaviors or (data.target_name,)
        self.graph = build_union(data, norm=config.norm, behaviors=behaviors) if config.kind == "lightgcn" else None

    def _apply(self, fn, recurse: bool = True):  # pyright: ignore
        moved = super()._apply(fn, recurse)
        self.graph = None if self.graph is None else self.graph.to(self.user_embedding.weight.device)
        return moved

    def tables(self) -> Tensor:
        """See `Recommender`; `[N, 1, d]`."""
        hops = [self.embeddings()[:, None, :]]
        if self.graph is not None:
            for _ in range(self.config.layers):
                hops.append(propagate(hops[-1], self.graph))
        return torch.stack(hops).mean(0)


class MBGCN(_InnerProduct):
    """Behaviours weighted by how often a user shows them, plus scores between items of one behaviour.

    User and item: p_u^{l+1} = sum_t alpha_ut mean over N_t(u) of q_i^l with alpha_ut = w_t n_ut / sum_m w_m n_um; items
    take the mean of their behaviours' means; representations are the sums over hops. Items by behaviour:
    s_t^{l+1} = W_t (A^T A)_t s_t^l, means both ways; the score of i for u is that of the mean of s over what u has.

    Source: Jin et al., Multi-behavior Recommendation with Graph Convolutional Networks (SIGIR 2020), sections 3.2-3.5;
    a sum over hops in place of a concatenation with a joint regulariser, so "MBGCN-style".
    """

    def __init__(self, config: MBGCNConfig, data: InteractionData) -> None:
        super().__init__(data.num_users, data.num_items, tuple(data.behaviors), config.dim)
        self.config, self.scale = config, config.logit_scale
        self.graph = build_graph(data, norm="left")
        self.strength = _Ones(len(data.behaviors))
        self.relation = nn.ModuleList(XavierLinear(config.dim, config.dim, bias=False) for _ in data.behaviors)
        self.matching = nn.ModuleList(XavierLinear(config.dim, config.dim, bias=False) for _ in data.behaviors)

    def _apply(self, fn, recurse: bool = True):  # pyright: ignore
        moved = super()._apply(fn, recurse)
        self.graph = self.graph.to(self.user_embedding.weight.device)
        return moved

    def tables(self) -> Tensor:
        """See `Recommender`; `[N, 1 + K, d]`: user and item, then items by behaviour."""
        share = self.config.item_share
        parts = [(1 - share) ** 0.5 * self._collaborative()[:, None], share**0.5 * self._by_items()]
        return torch.cat(parts, 1)

    def decayed(self) -> list[Tensor]:
        """Return embeddings and matrices."""
        return [*super().decayed(), *self.relation.parameters(), *self.matching.parameters()]

    def _collaborative(self) -> Tensor:
        x, graph = self.embeddings(), self.graph
        shown = graph.degrees.T * self.strength.weight.clamp(min=0)
        of_user = shown / shown.sum(1, keepdim=True).clamp(min=1e-12)
        present = (graph.degrees > 0).T.to(x.dtype)
        of_item = present / present.sum(1, keepdim=True).clamp(min=1)
        weights = torch.cat((of_user[: self.num_users], of_item[self.num_users :]))
        total = x
        for _ in range(self.config.layers):
            x = (propagate(x, graph) * weights.unsqueeze(-1)).sum(1)
            total = total + x
        return total

    def _by_items(self) -> Tensor:
        """`[N, K, d]`: items' s_t, and for users M_t applied to the mean of s_t over what they have."""
        graph, behaviors = self.graph, len(self.behaviors)
        is_item = torch.ones(self.num_users + self.num_items, 1, 1, device=self.item_embedding.weight.device)
        is_item[: self.num_users] = 0
        items = self.embeddings()[:, None, :].expand(-1, behaviors, -1) * is_item
        total = items
        for _ in range(self.config.layers):
            walked = propagate(propagate(items, graph), graph) * is_item
            items = torch.stack([self.relation[t](walked[:, t]) for t in range(behaviors)], 1)
            total = total + items
        users = propagate(total, graph)
        matched = torch.stack([self.matching[t](users[:, t]) for t in range(behaviors)], 1)
        return total * is_item + matched * (1 - is_item)


class _Ones(nn.Module):
    """w_t, one for each behaviour, beginning at 1."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count))

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        del name, generator
        return torch.ones(shape)
