"""Normalization layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perilune.nn.config import OutputGate
from perilune.ops.norm import rms_norm, rms_norm_gated


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        gate: OutputGate = "sigmoid",
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Normalize `x` `[..., size]` and, given logits `z` of its shape, gate it.

        The result has the dtype of `x`, or `dtype`, which only a norm without gate takes. With a gate it is equal to
        `gate_output(norm(x), z, gate)`, in one pass where the kernels run.
        """
        if z is None or gate == "none":
            return rms_norm(x, self.weight, self.eps, dtype=dtype)
        return rms_norm_gated(x, self.weight, z, self.eps, gate=gate)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Gains start at 1."""
        return torch.ones(shape)

    def extra_repr(self) -> str:
        """Size and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def gate_output(x: Tensor, z: Tensor, kind: OutputGate) -> Tensor:
    """Multiply `x` by sigmoid(z), or by z * sigmoid(z) for `swish`; the dtype is that of `x`.

    Source: Kimi Linear, eq. 10, and the ablations of table 1.
    """
    if kind == "none":
        return x
    gate = torch.sigmoid(z) if kind == "sigmoid" else nn.functional.silu(z)
    return x * gate.to(x.dtype)
