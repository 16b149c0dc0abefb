"""Newton-Schulz orthogonalization of many matrices at once: three batched products a step."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.newton_schulz.coefficients import Triple


def newton_schulz_torch(x: Tensor, coefficients: tuple[Triple, ...], eps: float, dtype: torch.dtype) -> Tensor:
    """Orthogonalize `x` `[..., A, B]` over its last two dimensions; `coefficients` holds one triple per step.

    Source: Moonlight, eq. 2.
    """
    if x.numel() == 0:
        return x.clone()
    matrices = x.reshape(-1, *x.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    iterate = normalize(matrices.mT if is_tall else matrices, eps).to(dtype)
    for a, b, c in coefficients:
        gram = torch.bmm(iterate, iterate.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        iterate = torch.baddbmm(iterate, polynomial, iterate, beta=a)
    return (iterate.mT if is_tall else iterate).to(x.dtype).reshape(x.shape)


def normalize(matrices: Tensor, eps: float) -> Tensor:
    """X_0 = U / (||U||_F + eps) for `[n, A, B]`, in float32 (float64 stays).

    The largest entry is divided out first, because float32 squares overflow from 1e19 and vanish below 1e-23.

    Source: Moonlight, eq. 2.
    """
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    scaled = wide / largest
    return scaled / (torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True) + eps / largest)
