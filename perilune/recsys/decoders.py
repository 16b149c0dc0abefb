"""From representations of a user and an item to scores of each task: MESI, and heads to compare it with.

All take rows of users `[P, K, d]` and of items `[P, K, d]`, one slice for each behavior, and give `[P]` for a task.
The heads that share their input read z = [sum_k x_k ; sum_k y_k].
"""

# P pairs  b users  I items  K behaviors (tasks, experts)  d width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perilune.recsys.config import CIGFConfig

_SCORED_AT_ONCE = 1 << 24


class XavierLinear(nn.Linear):
    """A linear layer whose weight begins uniform in Xavier's limits, its bias at 0."""

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See `nn.init.InitializesParameters`."""
        if name == "bias":
            return torch.zeros(shape)
        return nn.init.xavier_uniform_(torch.empty(shape), generator=generator)


class Head(nn.Module):
    """What all decoders share."""

    def __init__(self, config: CIGFConfig) -> None:
        super().__init__()
        self.scale = config.logit_scale

    def forward(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Score pairs.

        Args:
            x: users' rows, `[..., K, d]`.
            y: items' rows, `[..., K, d]`.
            task: behavior whose score is wanted, counted from 0.

        Returns:
            `[...]`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Score every item for every user, without gradients: `[b, K, d]` and `[I, K, d]` give `[b, I]`."""
        rows = max(1, _SCORED_AT_ONCE // max(1, y.numel()))
        parts = [
            self(part[:, None].expand(-1, len(y), -1, -1), y.expand(len(part), -1, -1, -1), task)
            for part in x.split(rows)
        ]
        return torch.cat(parts) if parts else x.new_zeros(0, len(y))

    def directions(self, x: Tensor, y: Tensor, task: int) -> Tensor | None:
        """See `Recommender.directions`."""
        del x, y, task
        return None

    def keys(self, y: Tensor) -> list[Tensor]:
        """See `Recommender.keys`."""
        del y
        return []

    def queries(self, x: Tensor, task: int) -> dict[int, Tensor]:
        """See `Recommender.queries`."""
        del x, task
        return {}

    def decayed(self) -> list[nn.Parameter]:
        """Return the matrices under the L2 term."""
        return [p for p in self.parameters() if p.ndim == 2]


class MESI(Head):
    """Experts with separate input: o^k = scale * sum_j g^k(j) <x_j, y_j>, g^k = softmax(W_g [x_k ; y_k] + b_g).

    Source: CIGF, eq. 10-12; one W_g for all tasks and a sum over d as in the official code.
    """

    def __init__(self, config: CIGFConfig, num_behaviors: int) -> None:
        super().__init__(config)
        gates = num_behaviors if config.gate_sharing == "per_task" else 1
        made = [XavierLinear(2 * config.dim, num_behaviors) for _ in range(gates)]
        self.gate = made[0] if gates == 1 else nn.ModuleList(made)
        if config.tower == "mean":
            self.scale /= config.dim

    def gate_of(self, task: int) -> nn.Linear:
        """Return a task's gate."""
        found = self.gate[task] if isinstance(self.gate, nn.ModuleList) else self.gate
        assert isinstance(found, nn.Linear)
        return found

    def gates(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Return g^k `[..., K]`."""
        return self.gate_of(task)(torch.cat((x[..., task, :], y[..., task, :]), -1)).softmax(-1)

    def forward(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Head`."""
        return self.scale * ((x * y).sum(-1) * self.gates(x, y, task)).sum(-1)

    def directions(self, x: Tensor, y: Tensor, task: int) -> Tensor | None:
        """See `Recommender.directions`: scale * g^k(j) * y_j."""
        return self.scale * self.gates(x, y, task)[..., None] * y

    def keys(self, y: Tensor) -> list[Tensor]:
        """See `Recommender.keys`: the slice of each expert, and all of them as one vector."""
        return [*y.unbind(1), y.flatten(1)]

    def queries(self, x: Tensor, task: int) -> dict[int, Tensor]:
        """See `Recommender.queries`: x_j for each expert, as the gate is not known before the item is.

        The last one mixes experts as the gate would for an item of zeros. Where experts have little in common, an item
        that all of them like well and none of them best is found by it alone; where gates depend much on the item, the
        experts find what it misses.
        """
        gates = self.gates(x, torch.zeros_like(x), task)
        return {**dict(enumerate(x.unbind(1))), x.shape[1]: (gates[..., None] * x).flatten(1)}

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Head`; matrices `[b, I]` in place of the pairs' rows, of as many items as `_SCORED_AT_ONCE` allows."""
        if len(x) == 1:
            return self._score_one(x[0], y, task)[None]
        # A weight and a product for each expert.
        size = max(1, _SCORED_AT_ONCE // max(1, 2 * x.shape[1] * len(x)))
        found = x.new_empty(len(x), len(y))
        for low in range(0, len(y), size):
            found[:, low : low + size] = self._score_block(x, y[low : low + size], task)
        return found

    def _score_block(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        gate, d = self.gate_of(task), x.shape[-1]
        of_user = F.linear(x[:, task], gate.weight[:, :d], gate.bias)
        of_item = F.linear(y[:, task], gate.weight[:, d:])
        logits = [of_user[:, j, None] + of_item[None, :, j] for j in range(x.shape[1])]
        largest = logits[0].clone()
        for other in logits[1:]:
            torch.maximum(largest, other, out=largest)
        total, mass = torch.zeros_like(largest), torch.zeros_like(largest)
        for j, logit in enumerate(logits):
            weight = logit.sub_(largest).exp_()
            mass += weight
            total.addcmul_(weight, x[:, j] @ y[:, j].T)
        return total.div_(mass).mul_(self.scale)

    def _score_one(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Score `[I, K, d]` for one user `[K, d]`: a single pass over the items' rows, which is what takes time."""
        gate, (count, d) = self.gate_of(task), x.shape
        read = x.new_zeros(count, d, 2 * count)
        read[torch.arange(count), :, torch.arange(count)] = x
        read[task, :, count:] = gate.weight[:, d:].T
        # Long rows from here on: sums over K columns of short ones cost three times as much.
        products, logits = (y.flatten(1) @ read.flatten(0, 1)).T.contiguous().chunk(2)
        logits += F.linear(x[task], gate.weight[:, :d], gate.bias)[:, None]
        weights = logits.sub_(logits.amax(0)).exp_()
        return (products * weights).sum(0).div_(weights.sum(0)).mul_(self.scale)


class Bilinear(Head):
    """GHCF's head, o^k = scale * sum(x_k * y_k * r_k); with `is_plain`, r_k is 1 ("dot")."""

    def __init__(self, config: CIGFConfig, num_behaviors: int, *, is_plain: bool) -> None:
        super().__init__(config)
        self.rel = None if is_plain else XavierEmbedding(num_behaviors, config.dim)

    def forward(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Head`."""
        return self.scale * (self._scaled(x, task) * y[..., task, :]).sum(-1)

    def score(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Head`."""
        return self.scale * (self._scaled(x, task) @ y[:, task].T)

    def directions(self, x: Tensor, y: Tensor, task: int) -> Tensor | None:
        """See `Recommender.directions`."""
        del x
        found = torch.zeros_like(y)
        found[..., task, :] = self.scale * self._scaled(y, task)
        return found

    def keys(self, y: Tensor) -> list[Tensor]:
        """See `Recommender.keys`."""
        return list(y.unbind(1))

    def queries(self, x: Tensor, task: int) -> dict[int, Tensor]:
        """See `Recommender.queries`."""
        return {task: self._scaled(x, task)}

    def decayed(self) -> list[nn.Parameter]:
        """Nothing: the official code leaves r_k free."""
        return []

    def _scaled(self, x: Tensor, task: int) -> Tensor:
        return x[..., task, :] if self.rel is None else x[..., task, :] * self.rel.weight[task]


class XavierEmbedding(nn.Embedding):
    """An embedding whose rows begin uniform in Xavier's limits."""

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See `nn.init.InitializesParameters`."""
        del name
        return nn.init.xavier_uniform_(torch.empty(shape), generator=generator)


class SharedBottom(Head):
    """One linear tower a task on [e_u * e_i ; e_u ; e_i]; with `is_linear`, on [e_u ; e_i] as in the official code.

    That linear one gives every user the same ranking: under BPR the user's part cancels.
    """

    def __init__(self, config: CIGFConfig, num_behaviors: int, *, is_linear: bool) -> None:
        super().__init__(config)
        self.is_linear = is_linear
        self.tower = XavierLinear((2 if is_linear else 3) * config.dim, num_behaviors)

    def forward(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Head`."""
        e_u, e_i = x.sum(-2), y.sum(-2)
        parts = (e_u, e_i) if self.is_linear else (e_u * e_i, e_u, e_i)
        return self.scale * (torch.cat(parts, -1) @ self.tower.weight[task] + self.tower.bias[task])

    def directions(self, x: Tensor, y: Tensor, task: int) -> Tensor | None:
        """See `Recommender.directions`."""
        del x
        first, *rest = self.tower.weight[task].split(y.shape[-1])
        of_pair = first.expand_as(y[..., 0, :]) if self.is_linear else first * y.sum(-2) + rest[0]
        return (self.scale * of_pair)[..., None, :].expand_as(y)


class MMoE(Head):
    """Shared experts LeakyReLU(F_e z + f_e), a softmax gate and a linear tower for each task."""

    def __init__(self, config: CIGFConfig, num_behaviors: int) -> None:
        super().__init__(config)
        width = 2 * config.dim
        self.slope = config.leaky_slope
        self.expert = nn.ModuleList(XavierLinear(width, width) for _ in range(config.n_experts))
        self.gate_softmax = nn.ModuleList(XavierLinear(width, config.n_experts) for _ in range(num_behaviors))
        self.tower = XavierLinear(width, num_behaviors)

    def forward(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Head`."""
        z = torch.cat((x.sum(-2), y.sum(-2)), -1)
        mixed = _mixture(z, list(self.expert), self.gate_softmax[task], self.slope)
        return self.scale * (mixed @ self.tower.weight[task] + self.tower.bias[task])


class PLE(Head):
    """One level of PLE: shared experts and the task's own, gated by the task."""

    def __init__(self, config: CIGFConfig, num_behaviors: int) -> None:
        super().__init__(config)
        width = 2 * config.dim
        own = 1 if config.n_experts == 3 else 2
        self.slope = config.leaky_slope
        self.shared = XavierLinear(width, width)
        self.specific = nn.ModuleList(
            nn.ModuleList(XavierLinear(width, width) for _ in range(own)) for _ in range(num_behaviors)
        )
        self.gate_softmax = nn.ModuleList(XavierLinear(width, own + 1) for _ in range(num_behaviors))
        self.tower = XavierLinear(width, num_behaviors)

    def forward(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """See `Head`."""
        z = torch.cat((x.sum(-2), y.sum(-2)), -1)
        own = self.specific[task]
        assert isinstance(own, nn.ModuleList)
        mixed = _mixture(z, [self.shared, *own], self.gate_softmax[task], self.slope)
        return self.scale * (mixed @ self.tower.weight[task] + self.tower.bias[task])


def build_head(config: CIGFConfig, num_behaviors: int) -> Head:
    """Return the decoder that a configuration names."""
    match config.decoder:
        case "mesi":
            return MESI(config, num_behaviors)
        case "bilinear" | "dot":
            return Bilinear(config, num_behaviors, is_plain=config.decoder == "dot")
        case "shared_bottom" | "shared_bottom_linear":
            return SharedBottom(config, num_behaviors, is_linear=config.decoder == "shared_bottom_linear")
        case "mmoe":
            return MMoE(config, num_behaviors)
        case "ple":
            return PLE(config, num_behaviors)


def _mixture(z: Tensor, experts: list[nn.Module], gate: nn.Module, slope: float) -> Tensor:
    weights = gate(z).softmax(-1)
    outputs = torch.stack([F.leaky_relu(expert(z), slope) for expert in experts], -2)
    return (weights.unsqueeze(-1) * outputs).sum(-2)
