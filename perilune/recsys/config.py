"""Typed settings of recommenders and of how they are trained."""

import math
from dataclasses import dataclass
from typing import Literal

from perilune.checks import require, require_at_least, require_choice, require_positive
from perilune.ops.multigraph import Norm

Encoder = Literal["lightgcn", "lrgccf", "gcn", "ngcf"]
Order = Literal["official", "paper"]
Attention = Literal["node", "global", "uniform", "softmax"]
DecoderName = Literal["mesi", "bilinear", "dot", "shared_bottom", "shared_bottom_linear", "mmoe", "ple"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CIGFConfig:
    """CIGF: compressed interaction graphs, and experts with separate input; defaults are the official code's."""

    kind: Literal["cigf"] = "cigf"
    """Tag of this model."""
    dim: int = 16
    """d, width of an embedding."""
    layers: int = 2
    """L, hops; >= 1."""
    heads: int = 1
    """H, weighted sums of graphs that are added up at each hop from the second on."""
    norm: Norm = "left"
    """How graphs are normalized: left (means over neighbors), right, sym (LightGCN's) or none."""
    encoder: Encoder = "lightgcn"
    """What a hop's result goes through before it is summed up: nothing (lightgcn), or as in LR-GCCF, GCN or NGCF."""
    cross_behavior: bool = True
    """Whether later hops mix behaviors; without it each behavior has its own LightGCN (ablation "w/o CIGCN")."""
    order: Order = "official"
    """Whether the first behavior acts on the embeddings (official code) or at the node that is represented (paper)."""
    attention: Attention = "node"
    """Weights of behaviors: from the node's embedding (eq. 5), the same for all nodes, 1/K, or node with a softmax."""
    leaky_slope: float = 0.1
    """Slope of LeakyReLU below 0."""
    decoder: DecoderName = "mesi"
    """How representations become scores."""
    gate_sharing: Literal["shared", "per_task"] = "shared"
    """Whether MESI's gate has one set of weights (official code) or one for each task."""
    tower: Literal["sum", "mean"] = "sum"
    """Whether MESI sums products over d or averages them (paper; then `logit_scale` means d times as much)."""
    logit_scale: float = 300.0
    """Factor of scores; embeddings are tiny under `l2`."""
    n_experts: int = 3
    """Experts of mmoe; for ple, 3 means one shared and one of the task's own, anything else one and two."""
    graph_behaviors: tuple[str, ...] | None = None
    """Behaviors whose pairs are edges; without it all."""
    hide_target_pairs: bool = False
    """Whether other behaviors lose the edges that the target has too: what is predicted then has no edge of its own
    there, as in the protocol "clean"."""

    def __post_init__(self) -> None:
        require_at_least(1, dim=self.dim, layers=self.layers, heads=self.heads, n_experts=self.n_experts)
        require_choice("norm", self.norm, Norm)
        require_choice("encoder", self.encoder, Encoder)
        require_choice("order", self.order, Order)
        require_choice("attention", self.attention, Attention)
        require_choice("decoder", self.decoder, DecoderName)
        require(0 <= self.leaky_slope <= 1, "leaky_slope", "in [0, 1]", self.leaky_slope)
        require_positive(logit_scale=self.logit_scale)
        has_experts = self.decoder in ("mmoe", "ple") or self.n_experts == 3
        require(has_experts, "n_experts", f"absent for decoder {self.decoder}", self.n_experts)
        plain = self.cross_behavior or (self.order == "official" and self.encoder == "lightgcn" and self.heads == 1)
        require(plain, "cross_behavior", "true with order, encoder or heads changed", self.cross_behavior)


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorConfig:
    """BPR-MF (no layers) and LightGCN on the target's pairs, or on those of several behaviors."""

    kind: Literal["mf", "lightgcn"] = "lightgcn"
    """Tag of this model: mf has no graph."""
    dim: int = 64
    """Width of an embedding."""
    layers: int = 3
    """Hops of lightgcn; not read by mf."""
    norm: Norm = "sym"
    """How lightgcn's graph is normalized."""
    graph_behaviors: tuple[str, ...] | None = None
    """Behaviors whose pairs, taken together, are lightgcn's edges; without it the target's alone."""
    logit_scale: float = 1.0
    """Factor of scores."""

    def __post_init__(self) -> None:
        require_at_least(1, dim=self.dim, layers=self.layers)
        require_choice("norm", self.norm, Norm)
        require_positive(logit_scale=self.logit_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class MBGCNConfig:
    """MBGCN's scheme: users weigh behaviors by how often they show them, and items know items by behavior."""

    kind: Literal["mbgcn"] = "mbgcn"
    """Tag of this model."""
    dim: int = 64
    """Width of an embedding."""
    layers: int = 2
    """Hops."""
    item_share: float = 0.5
    """Weight of the score by items that the user has, in [0, 1]; the rest is that of user and item."""
    logit_scale: float = 1.0
    """Factor of scores."""

    def __post_init__(self) -> None:
        require_at_least(1, dim=self.dim, layers=self.layers)
        require(0 <= self.item_share <= 1, "item_share", "in [0, 1]", self.item_share)
        require_positive(logit_scale=self.logit_scale)


RecommenderConfig = CIGFConfig | FactorConfig | MBGCNConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SubgraphConfig:
    """Steps on parts of the graph, drawn anew for each chunk of users; defaults are the official code's for IJCAI."""

    chunk_users: int = 10_000
    """Users from whom a part grows, and for whose batches it is used."""
    rounds: int = 2
    """Rounds of growth, after the chunk's own items."""
    nodes_per_round: int = 40_000
    """Most users, and most items, that a round adds."""

    def __post_init__(self) -> None:
        require_at_least(1, chunk_users=self.chunk_users)
        require_at_least(0, rounds=self.rounds, nodes_per_round=self.nodes_per_round)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How a recommender is trained: BPR on batches of users; defaults are the official code's."""

    epochs: int = 100
    """Passes over `users_per_epoch` users."""
    users_per_epoch: int = 10_000
    """Users drawn for an epoch, at most all."""
    batch_users: int = 256
    """Users of a step."""
    samples_per_user: int = 40
    """Most positives that a user gives to a step, for each behavior, and as many negatives."""
    lr: float = 1e-3
    """Adam's learning rate."""
    lr_decay: float = 0.96
    """Factor of the rate every `decay_steps`, in (0, 1]."""
    decay_steps: int | None = None
    """Steps between decays; without it an epoch's whole batches."""
    l2: float = 1e-2
    """lambda, weight of the sum of squares of embeddings and of the matrices of attention and decoder."""
    behavior_weights: dict[str, float] | None = None
    """Weight of each behavior's loss; 1 for those that are not named."""
    subgraph: SubgraphConfig | None = None
    """cigf: train on sampled parts of the graph, for graphs too large for steps on all of it; without it on all.
    Evaluation is on all of it either way."""
    eval_interval: int = 3
    """Epochs between evaluations on the validation set; 0: none before the end."""
    validation_users: int = 20_000
    """Most users of the validation set that an evaluation ranks all items for, where there are more the same ones by
    chance each time; 0: all."""
    patience: int | None = None
    """Evaluations without a better validation score after which training ends; without it all epochs run."""
    log_interval: int = 1
    """Epochs between lines of metrics."""
    checkpoint_interval_s: float = 60.0
    """Seconds between checkpoints; the last state is always kept."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU if there is one."""

    def __post_init__(self) -> None:
        require_at_least(1, epochs=self.epochs, users_per_epoch=self.users_per_epoch, batch_users=self.batch_users)
        require_at_least(1, samples_per_user=self.samples_per_user, log_interval=self.log_interval)
        require_at_least(0, eval_interval=self.eval_interval, validation_users=self.validation_users)
        require(self.decay_steps is None or self.decay_steps >= 1, "decay_steps", ">= 1", self.decay_steps)
        require(self.patience is None or self.patience >= 1, "patience", ">= 1", self.patience)
        require(
            self.patience is None or self.eval_interval > 0, "patience", "absent without eval_interval", self.patience
        )
        require(0 < self.lr_decay <= 1, "lr_decay", "in (0, 1]", self.lr_decay)
        require_positive(lr=self.lr)
        for name, value in {"l2": self.l2, "checkpoint_interval_s": self.checkpoint_interval_s}.items():
            require(0 <= value < math.inf, name, "finite and >= 0", value)
        for name, value in (self.behavior_weights or {}).items():
            require(0 <= value < math.inf, f"behavior_weights.{name}", "finite and >= 0", value)
