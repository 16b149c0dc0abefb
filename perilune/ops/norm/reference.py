"""Root-mean-square normalization as one expression: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y = x / sqrt(mean(x^2) + eps) * weight, over the last axis, in the dtype of `x`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
