"""Root-mean-square normalization."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from perilune.ops.norm.reference import rms_norm_reference
from perilune.ops.norm.torch import rms_norm_torch

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, backend: Literal["auto", "reference", "torch"] = "auto"
) -> Tensor:
    """Scale every vector to unit root mean square, then each channel by its gain.

    y = x / sqrt(mean(x^2) + eps) * weight

    Computed in float32 at least: squares of bfloat16 keep two digits.

    Args:
        x: `[..., D]`, any float dtype.
        weight: `[D]`, any float dtype.
        eps: added to the mean square.
        backend: `reference` computes in the dtype of `x`; `auto` is `torch`.

    Returns:
        `[..., D]` in the dtype of `x`.

    Raises:
        ValueError: `weight` does not fit `x`, or the backend is unknown.

    Source: Kimi Linear, section 4 (pre-norm blocks and the head-wise norm of eq. 10).
    """
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be {list(x.shape[-1:])} like x's last axis, got {list(weight.shape)}")
    if backend == "reference":
        return rms_norm_reference(x, weight, eps)
    if backend not in ("auto", "torch"):
        raise ValueError(f"rms_norm: backend must be 'auto', 'reference' or 'torch', got {backend!r}")
    return rms_norm_torch(x, weight, eps)
