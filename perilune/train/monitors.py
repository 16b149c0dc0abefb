"""What the layers themselves count during a step: attention logits and the load of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perilune.models import attention_modes
from perilune.nn import MoE
from perilune.optim import MuonClip, qk_clip_specs
from perilune.report import MetricValue


class LayerMonitor:
    """Reads, reports and resets the counters of a model's attention and expert layers."""

    def __init__(self, model: nn.Module) -> None:
        """Collect the layers that count; any module may have none."""
        self._model = model
        self._attention = qk_clip_specs(model)
        self._experts = [module for module in model.modules() if isinstance(module, MoE)]

    def metrics(self) -> dict[str, MetricValue]:
        """Return what was counted since the last reset.

        Returns:
            `max_logits` (one number per attention layer) and its maximum `max_logit`; `expert_load` (MoE layer by
            expert, shares of the routed tokens), and over layers the mean of `expert_imbalance` (largest load over mean
            load, 1 is balanced) and of `expert_entropy` (1 is balanced, 0 is one expert); `moba_layers`, how many MoBA
            layers read blocks at present. Only what the model has.
        """
        values: dict[str, MetricValue] = {}
        if modes := attention_modes(self._model):
            values["moba_layers"] = sum(mode == "moba" for mode in modes.values())
        if self._attention:
            maxima = [float(spec.max_logits().max()) for spec in self._attention]
            values |= {"max_logits": maxima, "max_logit": max(maxima)}
        shares = [load_shares(module.expert_load) for module in self._experts]
        if shares:
            values["expert_load"] = [share.tolist() for share in shares]
            values["expert_imbalance"] = _mean([load_imbalance(share) for share in shares])
            values["expert_entropy"] = _mean([load_entropy(share) for share in shares])
        return values

    @torch.no_grad()
    def finish_step(self, router_bias_rate: float) -> None:
        """Move the balancing biases by what was counted, then start counting anew.

        Args:
            router_bias_rate: u of the bias update; 0 leaves the biases.

        Source: Kimi Linear, section 4 (MoE); Moonlight (2502.16982), appendix C.
        """
        for module in self._experts:
            module.update_router_bias(router_bias_rate)
        for spec in self._attention:
            spec.reset()

    def skip_step(self) -> None:
        """Forget what was counted in a step that did not happen."""
        self.finish_step(0.0)


def clip_metrics(optimizer: Optimizer) -> dict[str, MetricValue]:
    """Return what QK-Clip did in the step just taken; nothing of an optimizer that does not clip.

    Returns:
        `clipped_heads` (heads scaled down in this step, all layers) and `clipped_share` (of all heads, those that were
        ever scaled down).
    """
    if not isinstance(optimizer, MuonClip) or not optimizer.clip_stats:
        return {}
    clipped = sum(stats.num_clipped for stats in optimizer.clip_stats)
    return {"clipped_heads": clipped, "clipped_share": optimizer.clipped_share}


def load_shares(load: Tensor) -> Tensor:
    """Return `[E]` shares of the routed tokens, uniform if nothing was routed.

    Args:
        load: `[E]` tokens per expert.
    """
    total = load.sum()
    return load / total if total > 0 else torch.full_like(load, 1 / load.numel())


def load_imbalance(shares: Tensor) -> float:
    """Return the largest load over the mean load: 1 if balanced, E if one expert gets everything.

    >>> import torch
    >>> load_imbalance(torch.tensor([0.5, 0.25, 0.25, 0.0]))
    2.0
    """
    return float(shares.max()) * shares.numel()


def load_entropy(shares: Tensor) -> float:
    """Return the entropy of the loads over its maximum ln E: 1 if balanced, 0 if one expert gets everything.

    >>> import torch
    >>> round(load_entropy(torch.tensor([0.5, 0.5, 0.0, 0.0])), 6)
    0.5
    """
    if shares.numel() == 1:
        return 1.0
    return float(torch.special.entr(shares.double()).sum()) / math.log(shares.numel())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
