"""Balancing without an auxiliary loss, and the factor that keeps a sparse layer's output as large as a dense one's."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.seeding import make_generator

_SAMPLES = 1 << 18


def balance_bias_update(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """Return the selection bias after one step, which favors experts that got fewer tokens than the mean.

    b_i + u (sign(e_i) - mean_j sign(e_j)), with e_i = mean(load) - load_i. The bias keeps its mean.

    Args:
        bias: `[E]` float32, not modified.
        load: `[E]`, tokens of each expert since the last update, summed over data-parallel ranks.
        rate: u >= 0, in units of the router's score; 1e-3 in the paper, 0 in the last stage.

    Returns:
        The new bias `[E]`.

    Raises:
        ValueError: shapes differ or the rate is negative.

    Source: Moonlight (2502.16982), appendix C.
    """
    if bias.shape != load.shape or bias.ndim != 1:
        raise ValueError(
            f"balance_bias_update: bias is {tuple(bias.shape)} and load is {tuple(load.shape)}; both must be [E]"
        )
    if rate < 0:
        raise ValueError(f"balance_bias_update: rate must be >= 0, got {rate}")
    load = load.to(torch.float64)
    sign = torch.sign(load.mean() - load)
    return bias + (rate * (sign - sign.mean())).to(bias.dtype)


def routed_scaling_factor(num_experts: int, top_k: int, *, seed: int = 0) -> float:
    """Expected 1 / ||w||_2 of the renormalized weights of a sigmoid router with standard-normal logits.

    Multiplied with it, the mixture of `top_k` independent experts has the root-mean-square of one dense layer. The
    largest `top_k` of `num_experts` normal numbers are drawn directly, as the top order statistics of as many uniform
    ones: U_(E) = V_1^(1/E), U_(E-1) = U_(E) V_2^(1/(E-1)), ... The standard error is below 1e-3.

    >>> round(routed_scaling_factor(64, 6), 2)
    2.45

    Args:
        num_experts: E >= 1.
        top_k: k in [1, E].
        seed: of the 2^18 random draws.

    Returns:
        The factor, between 1 and sqrt(top_k).

    Raises:
        ValueError: top_k is not in [1, num_experts].

    Source: Moonlight (2502.16982), appendix C and figure 6.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"routed_scaling_factor: top_k must be in [1, {num_experts}], got {top_k}")
    generator = make_generator(seed, "routed_scaling_factor", num_experts, top_k)
    draws = torch.rand(_SAMPLES, top_k, generator=generator, dtype=torch.float64)
    remaining = torch.arange(num_experts, num_experts - top_k, -1)
    uniform = draws.pow_(1 / remaining).cumprod_(1)
    scores = torch.sigmoid(torch.special.ndtri(uniform))
    return (scores.sum(1) / scores.square().sum(1).sqrt()).mean().item()
