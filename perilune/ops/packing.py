"""Products with weights that lie in oneDNN's own order, on a CPU.

A product of few rows spends much of its time turning the weight into the order in which the kernel reads it. Turned
once, it need not be; and oneDNN can apply what follows a product while its result is still in the registers. PyTorch
has these functions for its compiler, without a promise to keep them: `can_pack` tries them out.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["none", "swish"]


def pack(weight: Tensor) -> Tensor:
    """Return a copy of `weight` `[out, in]`, float32 or bfloat16, that only the functions of this module read."""
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
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "")
    return y


def packed_linear_mul(x: Tensor, packed: Tensor, other: Tensor) -> Tensor:
    """Compute y = (x W^T) * other, for `x` `[..., in]` and `other` `[..., out]`, rounded once."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, None, "mul")
    return y


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and machine have these functions for weights of `dtype`: tried once, on a small product."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    with torch.no_grad():
        x, weight = torch.eye(4, dtype=dtype), torch.arange(16, dtype=dtype).view(4, 4)
        try:
            packed = pack(weight)
            found = packed_linear_mul(x, packed, torch.full_like(x, 2)), packed_linear(x, packed, activation="swish")
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
        wanted = weight.T * 2, torch.nn.functional.silu(weight.T)
        return all(torch.allclose(a, b, rtol=0.01) for a, b in zip(found, wanted, strict=True))
