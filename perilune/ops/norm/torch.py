"""Root-mean-square normalization with few passes over memory.

On a CPU these passes are the whole cost. The forward reads `x` twice. The backward borrows layer normalization's fused
one: given mean 0 it computes the wanted gradient minus its mean, so the mean is added back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Elements up to which a forward without gradients gains by PyTorch's own function: one call instead of seven.
_FEW = 1 << 18


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = _reciprocal_rms(x, eps)
        ctx.save_for_backward(x, rstd, weight)
        return (x * rstd).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        x, rstd, weight = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        grad = grads[0].contiguous()
        size = x.shape[-1]
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [size], torch.zeros_like(rstd), rstd, weight, None, [True, True, False]
        )
        mean = torch.mv(grad.view(-1, size), weight).view_as(rstd)
        return dx.add_(mean.mul_(rstd), alpha=1 / size), dweight, None


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Same contract as `perilune.ops.norm.rms_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        return (x * weight.to(x.dtype)).to(dtype)
    x, weight = x.to(wide), weight.to(wide)
    if not torch.is_grad_enabled():
        if x.numel() <= _FEW:
            return F.rms_norm(x, x.shape[-1:], weight, eps).to(dtype)
        return (x * _reciprocal_rms(x, eps)).mul_(weight).to(dtype)
    y: Tensor = _RMSNorm.apply(x.contiguous(), weight, eps)  # pyright: ignore[reportAssignmentType]
    return y.to(dtype)


def gate_torch(x: Tensor, z: Tensor, *, use_swish: bool) -> Tensor:
    """What `perilune.ops.norm.rms_norm_gated` does to a norm `x` of its input."""
    gate = F.silu(z) if use_swish else torch.sigmoid(z)
    return x * gate.to(x.dtype)
