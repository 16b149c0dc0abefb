"""Elementwise functions whose bits do not depend on where in a tensor an element lies.

`torch.sigmoid`, `softplus` and `silu` compute the last few elements of each thread's share with other code than the
rest, so that a token's value may change by one unit in the last place when tokens are added after it. The ops promise
bitwise prefix invariance, and therefore compose `exp`, `reciprocal` and `logsigmoid`, which have no such tail.
"""

from __future__ import annotations

import torch
from torch import Tensor


def steady_sigmoid(x: Tensor) -> Tensor:
    """Return `1 / (1 + exp(-x))`, for use inside hand-written backwards only.

    Autograd through it yields NaN where `exp(-x)` overflows; differentiate `torch.sigmoid` instead.

    Args:
        x: any shape, float32 or float64.
    """
    return torch.exp(-x).add_(1).reciprocal_()
