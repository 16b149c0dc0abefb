"""Dense feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perilune.nn.linear import Linear, Packing
from perilune.nn.roles import MatrixLayout
from perilune.ops.packing import packed_linear, packed_linear_mul
from perilune.ops.precision import autocast_dtype
from perilune.ops.swiglu import swiglu

_PACKED_ROWS = 512
"""Rows at a time: larger hidden layers come from memory that the system has to clear first, and are cleared again."""


class MLP(nn.Module):
    """SwiGLU: y = W_down (silu(W_gate x) * W_up x), with gate and up stored as one matrix.

    Source: Kimi Linear, section 4 (channel mixing); Kimi K2, section 2.3.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        """Create a layer of hidden width `d_ff`."""
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down_proj = Linear(d_ff, d_model, bias=False)
        self.packing = Packing(num_parts=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., d]` to `[..., d]`."""
        packed = self.packing.find(x, self.gate_up_proj.weight)
        if not packed:
            y: Tensor = self.down_proj(swiglu(self.gate_up_proj(x)))
            return y
        w_gate, w_up = packed
        flat = x.to(autocast_dtype(x)).reshape(-1, x.shape[-1])
        parts: list[Tensor] = []
        for part in flat.split(_PACKED_ROWS):
            # the activation and the product are applied to results that are still in registers
            gate = packed_linear(part, w_gate, activation="swish")
            parts.append(self.down_proj(packed_linear_mul(part, w_up, gate)))
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.view(*x.shape[:-1], -1)

    def logical_matrices(self) -> dict[str, MatrixLayout]:
        """Gate and up are two matrices."""
        d_ff = self.down_proj.in_features
        return {"gate_up_proj.weight": MatrixLayout(row_groups=(d_ff, d_ff), is_fused=True)}
