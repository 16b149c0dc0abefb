"""Dense feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from perilune.nn.linear import Linear
from perilune.nn.roles import MatrixLayout
from perilune.ops.swiglu import swiglu


class MLP(nn.Module):
    """SwiGLU: y = W_down (silu(W_gate x) * W_up x), with gate and up stored as one matrix.

    Source: Kimi Linear, section 4 (channel mixing); Kimi K2, section 2.3.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        """Create a layer of hidden width `d_ff`."""
        super().__init__()
        self.gate_up_proj = Linear(d_model, 2 * d_ff, bias=False)
        self.down_proj = Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., d]` to `[..., d]`."""
        y: Tensor = self.down_proj(swiglu(self.gate_up_proj(x)))
        return y

    def logical_matrices(self) -> dict[str, MatrixLayout]:
        """Gate and up are two matrices."""
        d_ff = self.down_proj.in_features
        return {"gate_up_proj.weight": MatrixLayout(row_groups=(d_ff, d_ff), is_fused=True)}
