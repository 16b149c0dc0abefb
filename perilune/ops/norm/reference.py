"""Root-mean-square normalization as one expression: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y = x / sqrt(mean(x^2) + eps) * weight, over the last axis, in the dtype of `x`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rms_norm_gated_reference(x: Tensor, weight: Tensor, z: Tensor, eps: float, *, use_swish: bool) -> Tensor:
    """Return the norm of `x` times sigmoid(z), or times z * sigmoid(z), in the dtype of `x`."""
    z = z.to(x.dtype)
    return rms_norm_reference(x, weight, eps) * torch.sigmoid(z) * (z if use_swish else 1)
