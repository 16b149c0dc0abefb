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


class SplitWeight:
    """A matrix `[V, d]` that float32 vectors are to be multiplied with, several times, on bfloat16 units.

    Of the four products of two parts each, the smallest is below what the parts leave out. The other three, side by
    side along the summed axis, are one product, of a fifth of the time that a float32 one takes.
    """

    def __init__(self, weight: Tensor, *, is_single: bool) -> None:
        """Split `weight` for vectors that are bfloat16 already (`is_single`) or are not."""
        parts = bfloat16_parts(weight)
        self._pairs = [(i, j) for i in range(1 if is_single else 2) for j in range(len(parts)) if i + j <= 1]
        self._wide = torch.cat([parts[j] for _, j in self._pairs], 1) if len(self._pairs) > 1 else parts[0]

    def logits(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T` `[n, V]` in float32, to about 2^-17 of `|x| |weight|`."""
        parts = bfloat16_parts(x)
        wide = torch.cat([parts[i] for i, _ in self._pairs], 1) if len(self._pairs) > 1 else parts[0]
        if wide.is_cuda:
            return torch.mm(wide, self._wide.T, out_dtype=torch.float32)
        return wide.float() @ self._wide.float().T
