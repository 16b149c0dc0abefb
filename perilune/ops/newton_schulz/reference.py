"""Newton-Schulz orthogonalization, one matrix at a time and straight from the equations: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.newton_schulz.coefficients import Triple


def newton_schulz_reference(x: Tensor, coefficients: tuple[Triple, ...], eps: float, dtype: torch.dtype) -> Tensor:
    """Orthogonalize each matrix of `x` `[..., A, B]`; `coefficients` holds one triple per step.

    Source: Moonlight, eq. 2.
    """
    if x.numel() == 0:
        return x.clone()
    matrices = x.reshape(-1, *x.shape[-2:])
    return torch.stack([_orthogonalize(matrix, coefficients, eps, dtype) for matrix in matrices]).reshape(x.shape)


def _orthogonalize(matrix: Tensor, coefficients: tuple[Triple, ...], eps: float, dtype: torch.dtype) -> Tensor:
    """X_0 = U / (||U||_F + eps); X_k = a X + (b X X^T + c (X X^T)^2) X, on the wide orientation."""
    if matrix.shape[0] > matrix.shape[1]:
        return _orthogonalize(matrix.T, coefficients, eps, dtype).T
    wide = torch.promote_types(matrix.dtype, torch.float32)
    # In float64 the sum of squares of any float32 number neither overflows nor underflows.
    norm = matrix.to(torch.float64).square().sum().sqrt()
    x = (matrix.to(torch.float64) / (norm + eps)).to(wide).to(dtype)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.to(matrix.dtype)
