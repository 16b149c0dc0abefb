"""Root-mean-square normalization on a GPU, with or without its output gate, in one pass each way.

Data movement. Forward reads x (and z) and writes y. Backward reads x, dy (and z), recomputes the statistics, and writes
dx (and dz). A program holds whole rows, several where they are short. The gain's gradient is summed in float32 over a
program's rows, a number that depends on the shape alone, and then over programs in a fixed order: results repeat to
the bit.
"""

# M rows  D channels  BM rows and BD channels of a tile  TILES tiles of a program

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE_ELEMENTS = 2048
_ELEMENTS_PER_WARP = 512
_ROWS_PER_PROGRAM = 64
"""Of the backward pass: few enough to fill the machine, enough to make the partial sums of the gain small change."""
_FEW_ROWS = 65536
"""Below, a program of the backward pass takes four times fewer."""


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Same contract as `perilune.ops.norm.rms_norm`."""
    return _launch(x, weight, None, eps, dtype, use_swish=False)


def rms_norm_gated_triton(x: Tensor, weight: Tensor, z: Tensor, eps: float, *, use_swish: bool) -> Tensor:
    """Same contract as `perilune.ops.norm.rms_norm_gated`."""
    return _launch(x, weight, z, eps, x.dtype, use_swish=use_swish)


def _launch(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, dtype: torch.dtype, *, use_swish: bool) -> Tensor:
    if x.numel() == 0:
        return (x * weight.to(x.dtype) * (1 if z is None else z.to(x.dtype))).to(dtype)
    y: Tensor = _RMSNorm.apply(x, weight, z, eps, dtype, use_swish)  # pyright: ignore[reportAssignmentType]
    return y


def _sizes(size: int, is_gated: bool, use_swish: bool) -> dict[str, Any]:
    BD = triton.next_power_of_2(size)
    BM = min(16, max(1, _TILE_ELEMENTS // BD))
    warps = min(16, max(1, BM * BD // _ELEMENTS_PER_WARP))
    return {"D": size, "BM": BM, "BD": BD, "IS_GATED": is_gated, "USE_SWISH": use_swish, "num_warps": warps}


class _RMSNorm(torch.autograd.Function):
    """Keeps the inputs only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, z: Tensor | None, eps: float, dtype: torch.dtype, use_swish: bool
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        z = None if z is None else z.contiguous()
        ctx.save_for_backward(x, weight, z)
        ctx.eps, ctx.use_swish = eps, use_swish
        y = torch.empty_like(x, dtype=dtype)
        rows = x.numel() // x.shape[-1]
        sizes = _sizes(x.shape[-1], z is not None, use_swish)
        _rms_norm_fwd_kernel[(triton.cdiv(rows, sizes["BM"]),)](x, weight, x if z is None else z, y, eps, rows, **sizes)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, z = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx, dz = torch.empty_like(x), None if z is None else torch.empty_like(z)
        rows = x.numel() // x.shape[-1]
        sizes = _sizes(x.shape[-1], z is not None, ctx.use_swish)
        per_program = _ROWS_PER_PROGRAM if rows >= _FEW_ROWS else _ROWS_PER_PROGRAM // 4
        programs = triton.cdiv(rows, per_program)
        dweight = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        _rms_norm_bwd_kernel[(programs,)](
            x, weight, x if z is None else z, dy, dx, dx if dz is None else dz, dweight, ctx.eps, rows,
            TILES=per_program // sizes["BM"], **sizes,
        )  # fmt: skip
        return dx, dweight.sum(0).to(weight.dtype), dz, None, None, None


@triton.jit(do_not_specialize=["M"])
def _rms_norm_fwd_kernel(
    x_ptr, weight_ptr, z_ptr, y_ptr, eps, M,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, IS_GATED: tl.constexpr, USE_SWISH: tl.constexpr,
) -> None:  # fmt: skip
    """BM rows.

    Source: Kimi Linear, eq. 10.
    """
    first = tl.program_id(0).to(tl.int64) * BM
    rows, channels = tl.arange(0, BM)[:, None], tl.arange(0, BD)[None, :]
    mask = (rows < M - first) & (channels < D)
    places = first * D
    within = rows * D + channels
    weight = tl.load(weight_ptr + channels, mask=channels < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + places + within, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 1)[:, None] / D + eps) * weight
    if IS_GATED:
        z = tl.load(z_ptr + places + within, mask=mask, other=0.0).to(tl.float32)
        gate = tl.sigmoid(z)
        if USE_SWISH:
            gate = z * gate
        y = y * gate
    tl.store(y_ptr + places + within, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_bwd_kernel(
    x_ptr, weight_ptr, z_ptr, dy_ptr, dx_ptr, dz_ptr, dweight_ptr, eps, M,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr, IS_GATED: tl.constexpr,
    USE_SWISH: tl.constexpr,
) -> None:  # fmt: skip
    """Compute dx and dz of TILES * BM rows and their share of dweight.

    With u = x / rms and dn the gradient of u * weight: dx = (dn w - u mean(dn w u)) / rms, dweight = sum of dn u.
    """
    rows, channels = tl.arange(0, BM)[:, None], tl.arange(0, BD)[None, :]
    within = rows * D + channels
    weight = tl.load(weight_ptr + channels, mask=channels < D, other=0.0).to(tl.float32)
    summed = tl.zeros([BM, BD], tl.float32)
    for tile in range(TILES):
        first = (tl.program_id(0).to(tl.int64) * TILES + tile) * BM
        mask = (rows < M - first) & (channels < D)
        places = first * D
        x = tl.load(x_ptr + places + within, mask=mask, other=0.0).to(tl.float32)
        dn = tl.load(dy_ptr + places + within, mask=mask, other=0.0).to(tl.float32)
        if IS_GATED:
            z = tl.load(z_ptr + places + within, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1)[:, None] / D + eps)
        u = x * rstd
        if IS_GATED:
            gate = tl.sigmoid(z)
            slope = gate * (1.0 - gate)
            if USE_SWISH:
                slope = gate + z * slope
                gate = z * gate
            dz = dn * u * weight * slope
            tl.store(dz_ptr + places + within, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            dn = dn * gate
        summed += dn * u
        du = dn * weight
        dx = rstd * (du - u * (tl.sum(du * u, 1)[:, None] / D))
        tl.store(dx_ptr + places + within, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    columns = tl.arange(0, BD)
    place = dweight_ptr + tl.program_id(0).to(tl.int64) * D
    tl.store(place + columns, tl.sum(summed, 0), mask=columns < D)
