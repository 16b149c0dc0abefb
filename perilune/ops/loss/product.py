"""Float32 products on matrix units, which multiply bfloat16 and add up in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def bfloat16_parts(x: Tensor) -> list[Tensor]:
    """Write `x` as a sum of bfloat16: two, which leave 2^-17 of it out, or one if it is bfloat16 already."""
    if x.dtype == torch.bfloat16:
        return [x]
    high = x.bfloat16()
    return [high, (x.float() - high.float()).bfloat16()]


def product_of_parts(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return `x @ y.T` in float32 for the sums x and y of `left` and `right`, to about 2^-17 of `|x| |y|`.

    Of the four products of two parts each, the smallest is below what the parts leave out. The other three, side by
    side along the summed axis, are one product, of a fifth of the time that a float32 one takes.

    Args:
        left: `bfloat16_parts` of `[n, d]`.
        right: `bfloat16_parts` of `[V, d]`.
    """
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j <= 1]
    x, y = torch.cat([left[i] for i, _ in pairs], 1), torch.cat([right[j] for _, j in pairs], 1)
    return torch.mm(x, y.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ y.float().T
