"""Newton-Schulz orthogonalization, the heart of Muon: push every singular value of a matrix toward 1."""

from __future__ import annotations

import math

from torch import Tensor, bfloat16, float32, float64
from torch import dtype as Dtype

from perilune.ops.newton_schulz.coefficients import Coefficients, resolve_coefficients
from perilune.ops.newton_schulz.reference import newton_schulz_reference
from perilune.ops.newton_schulz.torch import newton_schulz_torch

__all__ = ["Coefficients", "newton_schulz", "resolve_coefficients"]

# Nothing here is reached through the name `torch`: in this namespace it is the sibling module.
_BACKENDS = {
    "auto": newton_schulz_torch,
    "reference": newton_schulz_reference,
    "torch": newton_schulz_torch,
}
_DTYPES = (float64, float32, bfloat16)


def newton_schulz(
    x: Tensor,
    *,
    steps: int | None = None,
    coefficients: Coefficients = "jordan",
    eps: float = 1e-7,
    dtype: Dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Orthogonalize matrices: for `U S V^T`, approximately `U V^T`.

    X_0 = U / (||U||_F + eps); X_k = a X + (b X X^T + c (X X^T)^2) X. Leading dimensions are independent matrices.
    The default coefficients take singular values in [0.01, 1] of the Frobenius norm to [0.68, 1.14], not to exactly 1;
    those below 0.001 stay small. A matrix whose norm is near `eps` is damped, a zero matrix stays zero.

    Args:
        x: `[..., A, B]`, any floating dtype; batch and matrices may be empty.
        steps: iterations, at least 1; None: as many as there are triples in `coefficients`, else 5.
        coefficients: `"jordan"`, `"polar_express"`, one triple `(a, b, c)`, or a list of triples, one per step.
        eps: added to the Frobenius norm.
        dtype: of the iteration: float64, float32 or bfloat16. None: float64 for float64 input, else bfloat16 on a GPU
            and float32 on a CPU. The norm is taken in float32 at least, whatever this says.
        backend: `"torch"` (all matrices at once), `"reference"` (one by one) or `"auto"`, which is `"torch"`.

    Returns:
        `[..., A, B]` in x's dtype.

    Raises:
        TypeError: x is not floating point.
        ValueError: x has fewer than two dimensions, or another argument is not one of those named above.

    Source: Moonlight, eq. 2; Amsel et al., The Polar Express, Algorithm 1.
    """
    if not x.is_floating_point():
        raise TypeError(f"newton_schulz: x must be floating point, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"newton_schulz: x must be [..., A, B], got shape {tuple(x.shape)}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"newton_schulz: eps must be positive and finite, got {eps}")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"newton_schulz: dtype must be one of {_DTYPES} or None, got {dtype}")
    if backend not in _BACKENDS:
        raise ValueError(f"newton_schulz: unknown backend {backend!r}; choose one of {sorted(_BACKENDS)}")
    triples = resolve_coefficients(coefficients, steps)
    return _BACKENDS[backend](x, triples, eps, dtype or _default_dtype(x))


def _default_dtype(x: Tensor) -> Dtype:
    """The iteration dtype that `dtype=None` stands for."""
    if x.dtype == float64:
        return float64
    return bfloat16 if x.device.type == "cuda" else float32
