"""The gated activation on a GPU: one pass each way, of which the backward keeps the inputs only.

Data movement. Forward reads both halves and writes y. Backward reads both halves and dy, and writes both gradients.
"""

# M rows  D channels of a half  BD channels of a tile
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1024


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """Same contract as `perilune.ops.swiglu`."""
    y: Tensor = _SwiGLU.apply(gate_up)  # pyright: ignore[reportAssignmentType]
    return y


def _launch(kernel: Any, size: int, *tensors: Tensor) -> None:
    """Run `kernel` on rows of two halves of `size` channels."""
    rows = tensors[0].numel() // (2 * size) if size else 0
    block = min(_BLOCK, triton.next_power_of_2(size)) if size else 1
    if rows:
        kernel[(rows, triton.cdiv(size, block))](*tensors, D=size, BD=block, num_warps=max(1, block // 256))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        size = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], size)
        _launch(_swiglu_fwd_kernel, size, gate_up, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up)
        _launch(_swiglu_bwd_kernel, gate_up.shape[-1] // 2, gate_up, grads[0].contiguous(), d_gate_up)
        return d_gate_up


@triton.jit
def _swiglu_fwd_kernel(gate_up_ptr, y_ptr, D: tl.constexpr, BD: tl.constexpr) -> None:
    """BD channels of one row.

    Source: Kimi Linear, section 4 (channel mixing).
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = channels < D
    gate = tl.load(gate_up_ptr + row * (2 * D) + channels, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * D) + D + channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + channels, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(gate_up_ptr, dy_ptr, d_gate_up_ptr, D: tl.constexpr, BD: tl.constexpr) -> None:
    """BD channels of one row: dup = dy silu(gate), dgate = dy up s (1 + gate (1 - s)) with s = sigmoid(gate)."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = channels < D
    gate = tl.load(gate_up_ptr + row * (2 * D) + channels, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * D) + D + channels, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * D + channels, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = dy * up * (s + gate * s * (1.0 - s))
    place = d_gate_up_ptr + row * (2 * D) + channels
    tl.store(place, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(place + D, (dy * gate * s).to(d_gate_up_ptr.dtype.element_ty), mask=mask)
