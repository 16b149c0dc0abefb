"""Root-mean-square normalization, alone and with an output gate."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from perilune.errors import BackendError
from perilune.ops.backends import triton_is_default, triton_obstacle
from perilune.ops.native.elementwise import can_compute, rms_norm_native
from perilune.ops.norm.reference import rms_norm_gated_reference, rms_norm_reference
from perilune.ops.norm.torch import gate_torch, rms_norm_torch

__all__ = ["rms_norm", "rms_norm_gated"]

Backend = Literal["auto", "reference", "torch", "triton"]
Gate = Literal["sigmoid", "swish"]

MAX_TRITON_SIZE = 8192
"""Longest vector of backend `triton`, which keeps it in registers."""


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, dtype: torch.dtype | None = None, backend: Backend = "auto"
) -> Tensor:
    """Scale every vector to unit root mean square, then each channel by its gain.

    y = x / sqrt(mean(x^2) + eps) * weight

    Computed in float32 at least: squares of bfloat16 keep two digits.

    Args:
        x: `[..., D]`, any float dtype.
        weight: `[D]`, any float dtype.
        eps: added to the mean square.
        dtype: of the result, which is rounded to it once; None means that of `x`.
        backend: `triton` (float32, bfloat16 and float16 on a GPU, D <= 8192), `torch`, `reference` (computes in the
            dtype of `x`), or `auto`: triton on a GPU, else, and under `torch.compile`, torch; where
            `ops.native.elementwise` is on, that.

    Returns:
        `[..., D]` in `dtype`.

    Raises:
        ValueError: `weight` does not fit `x`, or the backend is unknown.
        BackendError: `triton` cannot serve the call.

    Source: Kimi Linear, section 4 (pre-norm blocks and the head-wise norm of eq. 10).
    """
    _check("rms_norm", x, weight, backend)
    dtype = dtype or x.dtype
    if backend == "reference":
        return rms_norm_reference(x, weight, eps).to(dtype)
    if _use_triton("rms_norm", backend, x, x):
        from perilune.ops.norm.triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps, dtype)
    if backend == "auto" and can_compute(x, weight):
        return rms_norm_native(x, weight, eps).to(dtype)
    return rms_norm_torch(x, weight, eps, dtype)


def rms_norm_gated(
    x: Tensor, weight: Tensor, z: Tensor, eps: float, *, gate: Gate = "sigmoid", backend: Backend = "auto"
) -> Tensor:
    """Normalize every vector and multiply it by the gate of its logits.

    y = x / sqrt(mean(x^2) + eps) * weight * sigmoid(z), or `* z * sigmoid(z)` with gate "swish"

    Computed in float32 at least. `triton` rounds once, at the end; `torch` rounds the norm and the gate to the dtype of
    `x` before their product.

    Args:
        x: `[..., D]`, any float dtype.
        weight: `[D]`, any float dtype.
        z: `[..., D]`, the shape of `x`, any float dtype.
        eps: added to the mean square.
        gate: "sigmoid" or "swish".
        backend: `triton` (one pass each way; float32, bfloat16 and float16 on a GPU, D <= 8192), `torch`, `reference`
            (computes in the dtype of `x`), or `auto`: triton on a GPU, else, and under `torch.compile`, torch.

    Returns:
        `[..., D]` in the dtype of `x`.

    Raises:
        ValueError: `weight` or `z` does not fit `x`, or the gate or the backend is unknown.
        BackendError: `triton` cannot serve the call.

    Source: Kimi Linear, eq. 10 (head-wise RMSNorm and output gate); swish: the ablations of table 1.
    """
    _check("rms_norm_gated", x, weight, backend)
    if z.shape != x.shape:
        raise ValueError(f"rms_norm_gated: z must be {list(x.shape)} like x, got {list(z.shape)}")
    if gate not in ("sigmoid", "swish"):
        raise ValueError(f"rms_norm_gated: gate must be 'sigmoid' or 'swish', got {gate!r}")
    use_swish = gate == "swish"
    if backend == "reference":
        return rms_norm_gated_reference(x, weight, z, eps, use_swish=use_swish)
    if _use_triton("rms_norm_gated", backend, x, z):
        from perilune.ops.norm.triton import rms_norm_gated_triton

        return rms_norm_gated_triton(x, weight, z, eps, use_swish=use_swish)
    return gate_torch(rms_norm(x, weight, eps, backend=backend), z, use_swish=use_swish)


def _check(name: str, x: Tensor, weight: Tensor, backend: str) -> None:
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"{name}: weight must be {list(x.shape[-1:])} like x's last axis, got {list(weight.shape)}")
    if backend not in ("auto", "reference", "torch", "triton"):
        raise ValueError(f"{name}: backend must be 'auto', 'triton', 'torch' or 'reference', got {backend!r}")


def _use_triton(name: str, backend: str, x: Tensor, z: Tensor) -> bool:
    """Whether to; an error where `triton` is asked of what it does not take."""
    channels = x.shape[-1]
    too_wide = None
    if channels > MAX_TRITON_SIZE:
        too_wide = f"takes vectors of at most {MAX_TRITON_SIZE} channels, got {channels}"
    if backend == "triton" and (obstacle := triton_obstacle(x, z) or too_wide) is not None:
        raise BackendError(f"{name}: backend 'triton' {obstacle}; use 'torch'")
    return backend == "triton" or (backend == "auto" and triton_is_default(name, x, z, obstacle=too_wide))
