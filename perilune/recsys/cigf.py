"""CIGF: high-order relations between instances by compressed interaction graphs, and experts with separate input.

Source: Guo et al., Compressed Interaction Graph based Framework for Multi-behavior Recommendation (2303.02418).
"""

# N nodes  K behaviors  d width  L hops  H heads  E events of a node

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perilune.ops.multigraph import MultiGraph, propagate, propagate_mixed
from perilune.recsys.config import CIGFConfig
from perilune.recsys.data import InteractionData
from perilune.recsys.decoders import MESI, XavierLinear, build_head
from perilune.recsys.graphs import build_graph, check_behaviors, concatenated, factors_of_new
from perilune.recsys.recommender import Recommender, Side


class CIGF(Recommender):
    """CIGCN (eq. 6-9) and a decoder, MESI by default (eq. 10-12).

    Later hops mix all behaviors with weights of the node that receives them, so that every path u -a-> i -b-> u' ...
    counts by its types, and no product of adjacency matrices is formed.
    """

    def __init__(self, config: CIGFConfig, data: InteractionData) -> None:
        """Make a model for data; `nn.initialize` fills it.

        Raises:
            DataError: the configuration names a behavior that is not in the data.
        """
        super().__init__(data.num_users, data.num_items, tuple(data.behaviors), config.dim)
        check_behaviors(data, config.graph_behaviors or ())
        self.config = config
        self._graph = self.graph_of(data)
        self.attn = nn.ModuleDict(
            {
                str(k): nn.ModuleDict(
                    {str(hop): _Attention(config, len(self.behaviors)) for hop in range(1, config.layers)}
                )
                for k in range(len(self.behaviors))
            }
            if config.cross_behavior and config.attention != "uniform"
            else {}
        )
        self.encoder = _Encoder(config)
        self.decoder = build_head(config, len(self.behaviors))

    def tables(self) -> Tensor:
        """Return X*_k `[N, K, d]`: X*_k = (L + 1) X + sum_m (L + 1 - m) E^m_k (eq. 8 and 9 in closed form)."""
        return self._represent(self.embeddings(), self.graph)

    def tables_of(self, users: Tensor, items: Tensor, graph: MultiGraph) -> Tensor:
        """Return the same of some users `[u]` and items `[i]` over a graph of their own: `[u + i, K, d]`."""
        return self._represent(torch.cat((self.user_embedding(users), self.item_embedding(items))), graph)

    def graph_of(self, data: InteractionData) -> MultiGraph:
        """Return the graph that this model sees in data, which may be a part of its own."""
        config = self.config
        return build_graph(
            data, norm=config.norm, behaviors=config.graph_behaviors, hide_target_pairs=config.hide_target_pairs
        ).to(self.user_embedding.weight.device)

    def _represent(self, embeddings: Tensor, graph: MultiGraph) -> Tensor:
        if self.config.order == "paper" and self.config.encoder == "lightgcn":
            return self._paper_total(embeddings, graph)
        find = self._paper_hops if self.config.order == "paper" else self._official_hops
        return self._total(embeddings, find(embeddings, graph))

    def _total(self, embeddings: Tensor, hops: Sequence[Tensor]) -> Tensor:
        total = (self._weight(0) * embeddings)[:, None, :]
        for hop, found in enumerate(hops, start=1):
            total = total + self._weight(hop) * self.encoder(found, embeddings, hop)
        return total

    def _weight(self, hop: int) -> int:
        """How often E^hop is in the representation."""
        return self.config.layers + 1 - hop if self.config.cross_behavior else 1

    def attention(self, embeddings: Tensor, hop: int) -> Tensor:
        """Return alpha `[N, K, K]` (node, start behavior, behavior of this hop) of hop `hop` + 1 (eq. 5)."""
        count = len(self.behaviors)
        if self.config.attention == "uniform":
            return embeddings.new_full((len(embeddings), count, count), 1 / count)
        layers = [self._layer(k, hop) for k in range(count)]
        return torch.stack([layer(embeddings) for layer in layers], 1)

    def logits(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Recommender`."""
        return self.decoder(x, y, task)

    def score(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Recommender`."""
        return self.decoder.score(x, y, task)

    @property
    def learned_from(self) -> tuple[str, ...]:
        """See `Recommender`."""
        return tuple(dict.fromkeys((*super().learned_from, *self.folded_from)))

    @property
    def folded_from(self) -> tuple[str, ...]:
        """See `Recommender`."""
        return self.config.graph_behaviors or self.behaviors

    @torch.no_grad()
    def fold_states(self) -> tuple[Tensor, ...]:
        """See `Recommender`; L of `[N, K, d]`, each one step of the node's own away from the hop that is added up."""
        embeddings = self.embeddings()
        if self.config.order == "paper":
            return tuple(self._paper_states(embeddings, self.graph))
        return (self._spread(embeddings), *self._official_hops(embeddings, self.graph)[:-1])

    @torch.no_grad()
    def fold_in(self, neighbors: Sequence[Tensor], states: Sequence[Tensor], side: Side) -> Tensor:
        """See `Recommender`; attention at an embedding of 0 is what its biases give."""
        del side
        own = states[0].new_zeros(1, states[0].shape[-1])
        hops = [shares.sum(0, keepdim=True) for shares in self._hop_shares(neighbors, states, own[0])]
        return self._total(own, hops)[0]

    @torch.no_grad()
    def event_shares(
        self, neighbors: Sequence[Tensor], states: Sequence[Tensor], side: Side, own: Tensor | None = None
    ) -> Tensor | None:
        """See `Recommender`; an encoder that is not linear has no shares."""
        del side
        if self.config.encoder != "lightgcn":
            return None
        own = states[0].new_zeros(states[0].shape[-1]) if own is None else own
        hops = enumerate(self._hop_shares(neighbors, states, own), start=1)
        return torch.stack([self._weight(hop) * shares for hop, shares in hops]).sum(0)

    def directions(self, x: Tensor, y: Tensor, task: int) -> Tensor | None:
        """See `Recommender`."""
        return self.decoder.directions(x, y, task)

    def keys(self, y: Tensor) -> list[Tensor]:
        """See `Recommender`."""
        return self.decoder.keys(y)

    def queries(self, x: Tensor, task: int) -> dict[int, Tensor]:
        """See `Recommender`."""
        return self.decoder.queries(x, task)

    def decayed(self) -> list[Tensor]:
        """Return embeddings, attention's matrices and the decoder's."""
        matrices = [p for p in self.attn.parameters() if p.ndim == 2]
        return [*super().decayed(), *matrices, *self.decoder.decayed()]

    @torch.no_grad()
    def collapse(self, pairs: int = 4096, seed: int = 0) -> dict[str, float]:
        """Tell how much attention and gate vary: means, and standard deviations over nodes and over pairs.

        A deviation near 0 says that "node-level" weights are one learned constant per behavior.
        """
        embeddings = self.embeddings()
        found: dict[str, float] = {}
        if self.config.cross_behavior:
            for hop in range(1, self.config.layers):
                alpha = self.attention(embeddings, hop)
                found[f"alpha_mean_{hop + 1}"] = float(alpha.mean())
                found[f"alpha_std_{hop + 1}"] = float(alpha.std(0, correction=0).mean())
        if isinstance(self.decoder, MESI) and self.num_users and self.num_items:
            tables = self.tables()
            generator = torch.Generator().manual_seed(seed)
            users = torch.randint(self.num_users, (pairs,), generator=generator).to(tables.device)
            items = torch.randint(self.num_items, (pairs,), generator=generator).to(tables.device)
            gates = self.decoder.gates(tables[users], tables[self.num_users + items], self.tasks[-1])
            found["gate_std"] = float(gates.std(0, correction=0).mean())
            found |= {f"gate_{name}": float(g) for name, g in zip(self.behaviors, gates.mean(0), strict=True)}
        return found

    def _official_hops(self, embeddings: Tensor, graph: MultiGraph) -> list[Tensor]:
        """E^1 = Â_k X, E^l = sum_j diag(alpha^l_kj) Â_j E^{l-1}: behavior k acts first on the embeddings."""
        hops = [propagate(embeddings, graph)]
        for hop in range(1, self.config.layers):
            if self.config.cross_behavior:
                hops.append(propagate_mixed(hops[-1], graph, self.attention(embeddings, hop)))
            else:
                hops.append(propagate(hops[-1], graph))
        return hops

    def _paper_hops(self, embeddings: Tensor, graph: MultiGraph) -> list[Tensor]:
        """E^l = Â_k C^2 ... C^l X with C^l = sum_j diag(alpha^l_kj) Â_j: behavior k is the step at the node itself."""
        return [propagate(walked, graph) for walked in self._paper_states(embeddings, graph)]

    def _paper_total(self, embeddings: Tensor, graph: MultiGraph) -> Tensor:
        """w_0 X + Â_k (w_1 X + C^2 (w_2 X + ... C^L w_L X)): in L hops what hop by hop takes L (L + 1) / 2."""
        spread = self._spread(embeddings)
        walked = self._weight(self.config.layers) * spread
        for hop in range(self.config.layers - 1, 0, -1):
            mixed = propagate_mixed(walked.contiguous(), graph, self.attention(embeddings, hop))
            walked = self._weight(hop) * spread + mixed
        return self._weight(0) * spread + propagate(walked.contiguous(), graph)

    def _paper_states(self, embeddings: Tensor, graph: MultiGraph) -> Iterator[Tensor]:
        """C^2 ... C^l X of l = 1 to L, `[N, K, d]` each."""
        spread = self._spread(embeddings).contiguous()
        mixed = {hop: self.attention(embeddings, hop) for hop in range(1, self.config.layers)}
        for last in range(1, self.config.layers + 1):
            walked = spread
            for hop in range(last - 1, 0, -1):
                walked = propagate_mixed(walked, graph, mixed[hop])
            yield walked

    def _spread(self, embeddings: Tensor) -> Tensor:
        return embeddings[:, None, :].expand(-1, len(self.behaviors), -1)

    def _hop_shares(self, neighbors: Sequence[Tensor], states: Sequence[Tensor], own: Tensor) -> Iterator[Tensor]:
        """What each event gives to E^1 to E^L of a node: `[E, K, d]` each.

        An event of behavior j gives Â_j times the neighbor's state; to which start behaviors, attention at the node
        says where the node receives a hop of a mixture, and otherwise j alone has it.
        """
        nodes, kinds = concatenated(neighbors)
        factors = torch.cat(self._event_factors(neighbors)).to(own.dtype)
        alone = F.one_hot(kinds, len(self.behaviors)).to(own.dtype)
        is_mixed = self.config.cross_behavior and self.config.order == "official"
        for hop, state in enumerate(states):
            weights = self.attention(own[None], hop)[0, :, kinds].T if hop and is_mixed else alone
            yield (factors[:, None] * weights)[..., None] * state[nodes]

    def _event_factors(self, neighbors: Sequence[Tensor]) -> list[Tensor]:
        """The node's row of each graph at its neighbors `[E_k]`; 0 for events that are no edges."""
        found, target = [], neighbors[-1]
        for place, (name, nodes) in enumerate(zip(self.behaviors, neighbors, strict=True)):
            is_edge = torch.full_like(nodes, name in self.folded_from, dtype=torch.bool)
            if self.config.hide_target_pairs and name != self.behaviors[-1]:
                is_edge &= ~torch.isin(nodes, target)
            factors = torch.zeros(len(nodes), device=nodes.device)
            factors[is_edge] = factors_of_new(self.graph, place, nodes[is_edge], self.config.norm)
            found.append(factors)
        return found

    def _layer(self, behavior: int, hop: int) -> _Attention:
        layers = self.attn[str(behavior)]
        assert isinstance(layers, nn.ModuleDict)
        layer = layers[str(hop)]
        assert isinstance(layer, _Attention)
        return layer


class _Attention(XavierLinear):
    """alpha = sum over heads of LeakyReLU(W x + b), from the initial embedding; neither softmax nor a sum of 1."""

    def __init__(self, config: CIGFConfig, num_behaviors: int) -> None:
        super().__init__(config.dim, config.heads * num_behaviors)
        self.kind, self.slope, self.heads = config.attention, config.leaky_slope, config.heads
        if self.kind == "global":
            self.weight.requires_grad_(False)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        if self.kind == "global" and name == "weight":
            return torch.zeros(shape)
        return super().initial_value(name, shape, generator)

    def forward(self, input: Tensor) -> Tensor:
        """`[N, d]` to `[N, K]`."""
        logits = super().forward(input).unflatten(-1, (self.heads, -1))
        weights = logits.softmax(-1) if self.kind == "softmax" else F.leaky_relu(logits, self.slope)
        return weights.sum(-2)


class _Encoder(nn.Module):
    """What a hop's sums go through before they are added up; the next hop goes on from the sums themselves."""

    def __init__(self, config: CIGFConfig) -> None:
        super().__init__()
        self.kind, self.slope = config.encoder, config.leaky_slope
        hops = config.layers if config.encoder in ("gcn", "ngcf") else 0
        self.W_gc = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(hops))
        self.W_bi = nn.ModuleList(
            nn.Linear(config.dim, config.dim) for _ in range(hops if config.encoder == "ngcf" else 0)
        )

    def forward(self, sums: Tensor, embeddings: Tensor, hop: int) -> Tensor:
        """`[N, K, d]` of hop `hop`, counted from 1, to the same shape."""
        if self.kind == "lightgcn":
            return sums
        if self.kind == "lrgccf":
            return F.leaky_relu(sums, self.slope)
        encoded = F.leaky_relu(self.W_gc[hop - 1](sums), self.slope)
        if self.kind == "gcn":
            return encoded
        return encoded + F.leaky_relu(self.W_bi[hop - 1](embeddings[:, None, :] * encoded), self.slope)
