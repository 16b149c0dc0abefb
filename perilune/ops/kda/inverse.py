"""The inverse of a chunk's unit lower triangular matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """Return `(I + stril(lower))^-1` by forward substitution.

    Never a Neumann or doubling series: for repeated tokens the powers of `lower` reach thousands while the inverse
    stays of order one, and a series loses everything in the cancellation.

    Args:
        lower: `[B, C, C]`, float32 or float64; the diagonal and everything above it are not read.

    Returns:
        `[B, C, C]`, unit lower triangular.

    Source: Kimi Linear, eq. 6 (the matrix in square brackets); numerics are this project's.
    """
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
