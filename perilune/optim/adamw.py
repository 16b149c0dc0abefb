"""AdamW over lists of tensors, in a handful of calls however many tensors there are."""

# pyright: reportPrivateImportUsage=false
# torch documents its foreach functions under these names.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_update_(
    weights: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: Sequence[float],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One AdamW step in place, with decoupled weight decay.

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
    w = (1 - eta lambda) w - eta (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    Args:
        weights: any shapes; the lists below are parallel to it and agree in shape and device.
        gradients: g, left as they are.
        first: m.
        second: v.
        steps: t of each weight, this step included, so at least 1.
        learning_rate: eta.
        weight_decay: lambda.
        betas: b1 and b2.
        eps: added to the denominator.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithm 2.
    """
    beta1, beta2 = betas
    torch._foreach_mul_(weights, 1 - learning_rate * weight_decay)
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    denominators = list(torch._foreach_sqrt(second))
    torch._foreach_div_(denominators, [math.sqrt(1 - beta2**step) for step in steps])
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(weights, first, denominators, [-learning_rate / (1 - beta1**step) for step in steps])
