"""The gated activation of feed-forward layers."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from perilune.errors import BackendError
from perilune.ops.backends import triton_is_default, triton_obstacle
from perilune.ops.native.elementwise import can_compute, swiglu_native
from perilune.ops.swiglu.reference import swiglu_reference

__all__ = ["swiglu"]

Backend = Literal["auto", "reference", "torch", "triton"]


def swiglu(gate_up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Gate one half of the channels by the other.

    y = silu(gate) * up, with silu(z) = z * sigmoid(z)

    `triton` computes in float32 and rounds once; `torch` rounds silu(gate) to the dtype of the inputs too.

    Args:
        gate_up: `[..., 2 D]`, floating: D channels of the gate, then as many of what it gates.
        backend: `triton` (one pass each way; float32, bfloat16 and float16 on a GPU), `torch`, `reference` (the
            expression, in the dtype of the input), or `auto`: triton on a GPU, else, and under `torch.compile`, torch;
            where `ops.native.elementwise` is on, that.

    Returns:
        `[..., D]` in the dtype of `gate_up`.

    Raises:
        ValueError: the last axis is odd, or the backend is unknown.
        BackendError: `triton` cannot serve the call.

    Source: Kimi Linear, section 4 (channel mixing); SwiGLU: Shazeer (2002.05202).
    """
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up must be [..., 2 D], got shape {tuple(gate_up.shape)}")
    if backend == "triton" or (backend == "auto" and triton_is_default("swiglu", gate_up)):
        if (obstacle := triton_obstacle(gate_up)) is not None:
            raise BackendError(f"swiglu: backend 'triton' {obstacle}; use 'torch'")
        from perilune.ops.swiglu.triton import swiglu_triton

        return swiglu_triton(gate_up)
    if backend == "auto" and can_compute(gate_up):
        return swiglu_native(gate_up)
    match backend:
        case "auto" | "torch":
            gate, up = gate_up.chunk(2, -1)
            return F.silu(gate) * up
        case "reference":
            return swiglu_reference(gate_up)
        case _:
            raise ValueError(f"swiglu: backend must be 'auto', 'triton', 'torch' or 'reference', got {backend!r}")
