"""Products with weights that lie in the order in which a CPU's kernels read them.

A product of few rows spends much of its time turning the weight into that order. Turned once, it need not be. For large
weights the order is oneDNN's own, and what follows a product is applied while its result is still in the registers;
PyTorch has these functions for its compiler, without a promise to keep them: `can_pack` tries them out. A small weight
in float32 is transposed, so that MKL reads it row by row.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "swish"]

# Measured on two cores with 4 to 64 rows: below, MKL's product with the transposed weight takes 60 to 90 % of oneDNN's
# time; above, oneDNN's takes 80 to 95 % of that.
_TRANSPOSED = 1 << 20


def pack(weight: Tensor) -> Tensor:
    """Return a copy of `weight` `[out, in]`, float32 or bfloat16, that only the functions of this module read."""
    if weight.dtype == torch.float32 and weight.numel() < _TRANSPOSED:
        return weight.t().contiguous()
    return _reorder(weight)


def _reorder(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """Compute y = f(x W^T + bias), where f is the identity or silu.

    Args:
        x: `[..., in]`, the dtype of the weight, at least one row.
        packed: W, by `pack`.
        bias: `[out]` of that dtype.
        activation: f; applied before the result is rounded.

    Returns:
        `[..., out]`.
    """
    if packed.is_mkldnn:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "")
        return y
    y = x @ packed
    if bias is not None:
        y += bias
    return F.silu(y, inplace=True) if activation == "swish" else y


def packed_linear_mul(x: Tensor, packed: Tensor, other: Tensor) -> Tensor:
    """Compute y = (x W^T) * other, for `x` `[..., in]` and `other` `[..., out]`, rounded once."""
    if packed.is_mkldnn:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, None, "mul")
        return y
    return (x @ packed).mul_(other)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and machine have these functions for weights of `dtype`: tried once, on a small product."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    with torch.no_grad():
        x, weight = torch.eye(4, dtype=dtype), torch.arange(16, dtype=dtype).view(4, 4)
        try:
            packed = _reorder(weight)
            found = packed_linear_mul(x, packed, torch.full_like(x, 2)), packed_linear(x, packed, activation="swish")
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
        wanted = weight.T * 2, F.silu(weight.T)
        return all(torch.allclose(a, b, rtol=0.01) for a, b in zip(found, wanted, strict=True))
