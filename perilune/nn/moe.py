"""Mixture of experts: a sigmoid router, stacked experts, shared experts, and balancing without an auxiliary loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perilune.nn.config import MoEConfig
from perilune.nn.mlp import MLP
from perilune.nn.precision import apply_keeping_float32
from perilune.nn.roles import MatrixLayout
from perilune.ops.moe import Routing, balance_bias_update, moe_experts, route


class MoE(nn.Module):
    """y = sum over the chosen experts of w_e * SwiGLU_e(x), plus the shared experts.

    Source: Kimi Linear, section 4 (MoE); Moonlight (2502.16982), appendix C; Kimi K2, section 2.3.
    """

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        """Create the layer for inputs of width `d_model`; `perilune.nn.initialize` gives it its values."""
        super().__init__()
        self.config = config
        num_experts, width = config.num_experts, config.d_expert
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.w_gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, d_model))
        self.w_down = nn.Parameter(torch.empty(num_experts, d_model, width))
        self.shared = MLP(d_model, width * config.num_shared_experts) if config.num_shared_experts else None
        self.register_buffer("router_bias", torch.zeros(num_experts))
        self.router_bias: Tensor
        self.register_buffer("expert_load", torch.zeros(num_experts), persistent=False)
        self.expert_load: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Route and mix `x` `[T, d]` to `[T, d]`; counts each expert's tokens in training."""
        routing = self._route(x)
        if self.training and torch.is_grad_enabled():
            self.expert_load += routing.load
        y = moe_experts(x, routing, self.w_gate_up, self.w_down)
        return y if self.shared is None else y + self.shared(x)

    def update_router_bias(self, rate: float) -> None:
        """Raise the bias of experts that got fewer tokens than the mean, lower the others', and restart the count.

        Args:
            rate: size of the step; 0 only restarts the count.

        Source: Moonlight (2502.16982), appendix C; DeepSeek-V3's balancing without an auxiliary loss.
        """
        if rate and bool(self.expert_load.any()):
            self.router_bias.copy_(balance_bias_update(self.router_bias, self.expert_load, rate))
        self.reset_expert_load()

    def reset_expert_load(self) -> None:
        """Restart the count of tokens per expert."""
        self.expert_load.zero_()

    def logical_matrices(self) -> dict[str, MatrixLayout]:
        """Every expert's gate, up and down are matrices of their own."""
        width, d_model = self.config.d_expert, self.router.in_features
        return {
            "w_gate_up": MatrixLayout(row_groups=(width, width), is_fused=True),
            "w_down": MatrixLayout(row_groups=(d_model,)),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        names = ("router_bias", "expert_load")
        apply_keeping_float32(self, names, lambda: super(MoE, self)._apply(fn, recurse))
        return self

    def _route(self, x: Tensor) -> Routing:
        """Choose experts in float32 whatever `x` is: a rounded score changes which expert wins."""
        config = self.config
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.router.weight.to(dtype))
            return route(
                logits,
                self.router_bias,
                top_k=config.top_k,
                num_groups=config.num_groups,
                topk_groups=config.topk_groups,
                renormalize=config.renormalize,
                scale=config.routed_scale,
                weight_includes_bias=config.weight_includes_bias,
            )
