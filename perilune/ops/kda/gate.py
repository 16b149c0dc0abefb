"""Forget gate, unit-length scaling and beta: the elementwise maps around the recurrence, forward and backward."""

# T tokens or slots  H value heads  K key dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.ops.elementwise import steady_sigmoid


def log_decay(f: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """Turn the raw gate into a natural-log decay <= 0, differentiably.

    Softplus gate: `-exp(A_log) * softplus(f + dt_bias)`.
    Bounded gate: `lower_bound * sigmoid(exp(A_log) * (f + dt_bias))`, another activation and not a clamp of the first.

    Args:
        f: `[..., H, K]`, float32 or float64.
        A_log: `[H]`; None (bounded gate only) stands for 0.
        dt_bias: `[H, K]`, or None for 0.
        lower_bound: floor of the bounded gate; None selects the softplus gate.

    Source: Kimi Linear, eq. 10 (alpha), as in the released model; the bounded gate is of later models.
    """
    z = f if dt_bias is None else f + dt_bias
    rate = None if A_log is None else A_log.exp().unsqueeze(-1)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(z if rate is None else z * rate)
    # logsigmoid(-z) is -softplus(z), and its bits do not depend on the position in the tensor
    return F.logsigmoid(-z) if rate is None else F.logsigmoid(-z) * rate


def gate_forward(f: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """Compute `log_decay` with few temporaries, for use without autograd."""
    rate = None if A_log is None else A_log.exp().unsqueeze(-1)
    if lower_bound is None:
        g = F.logsigmoid(-f if dt_bias is None else torch.sub(-dt_bias, f))
        return g if rate is None else g.mul_(rate)
    z = f.clone() if dt_bias is None else f + dt_bias
    return steady_sigmoid(z if rate is None else z.mul_(rate)).mul_(lower_bound)


def gate_backward(
    dg: Tensor, g: Tensor, f: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `f` `[T, H, K]`, `A_log` `[H]` and `dt_bias` `[H, K]`.

    Args:
        dg: `[T, H, K]`, gradient of the log decay; overwritten.
        g: `[T, H, K]`, the log decay.
        f: as in the forward, as are the others.
        A_log: of the forward.
        dt_bias: of the forward.
        lower_bound: of the forward.

    Source: derived in this project from `log_decay`.
    """
    rate = f.new_ones(f.shape[1], 1) if A_log is None else A_log.exp().unsqueeze(-1)
    z = f if dt_bias is None else f + dt_bias
    if lower_bound is None:
        dz = torch.sigmoid(z).mul_(dg).mul_(-rate)
        da_log = dg.mul_(g).sum(0).sum(-1)
    else:
        open_part = (g / lower_bound).neg_().add_(1)
        dz = open_part.mul_(g).mul_(dg).mul_(rate)
        da_log = (dz * z).sum(0).sum(-1)
    return dz, da_log, dz.sum(0)


def unit_length_gain(x: Tensor, eps: float) -> Tensor:
    """Return `(sum x^2 + eps)^-1/2` over the last dimension, kept.

    Source: Kimi Linear, eq. 10 (L2Norm).
    """
    return x.square().sum(dim=-1, keepdim=True).add_(eps).rsqrt_()


def beta_forward(logits: Tensor, allow_neg_eigval: bool) -> Tensor:
    """Return `sigmoid(logits)`, doubled if `allow_neg_eigval`.

    Source: Kimi Linear, eq. 10 (beta).
    """
    beta = steady_sigmoid(logits)
    return beta.mul_(2) if allow_neg_eigval else beta


def beta_backward(dbeta: Tensor, beta: Tensor, allow_neg_eigval: bool) -> Tensor:
    """Return the gradient of the logits, given `beta` of `beta_forward`."""
    rest = 1 - beta * 0.5 if allow_neg_eigval else 1 - beta
    return rest.mul_(beta).mul_(dbeta)
