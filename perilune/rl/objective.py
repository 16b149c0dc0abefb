"""The policy objective of Kimi k1.5 and the two it is compared with, as functions of sequence log-probabilities.

Each loss is a sum over the sequences it is given divided by a fixed `denominator` (prompts x group size of the whole
minibatch), so that how a minibatch is cut into pieces never changes its gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perilune.rl.config import ObjectiveConfig


def log_partition(rewards: Tensor, tau: float, is_valid: Tensor | None = None) -> Tensor:
    """Estimate tau log Z from a group: tau (logsumexp(r_j / tau) - log k), stable for any tau > 0.

    It tends to max r as tau -> 0 and to the mean reward as tau -> infinity.

    Args:
        rewards: `[..., k]`.
        tau: mirror-descent temperature, > 0.
        is_valid: `[..., k]` bool, members that count; every group needs one.

    Returns:
        `[...]`.

    Source: Kimi k1.5, section 2.3.2 (the partition function in the surrogate of eq. 2).
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if is_valid is None else is_valid
    scaled = (rewards / tau).masked_fill(~mask, -math.inf)
    return tau * (scaled.logsumexp(dim=-1) - mask.sum(dim=-1).to(rewards.dtype).log())


def mean_reward(rewards: Tensor, is_valid: Tensor | None = None) -> Tensor:
    """Mean reward of each group `[..., k] -> [...]` over its valid members.

    Source: Kimi k1.5, eq. 3 (the baseline r-bar that stands in for tau log Z).
    """
    if is_valid is None:
        return rewards.mean(dim=-1)
    return rewards.masked_fill(~is_valid, 0).sum(dim=-1) / is_valid.sum(dim=-1)


def k15_residuals(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, tau: float) -> Tensor:
    """Residual r - b - tau (log pi - log pi_i) of each sequence.

    Source: Kimi k1.5, section 2.3.2 (the surrogate loss below eq. 2).
    """
    return advantages - tau * (logprobs - old_logprobs)


def k15_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    tau: float,
    denominator: float,
    scale: str = "eq3",
) -> Tensor:
    """Sum over sequences of (r - b - tau d)^2 / (2 tau), over `denominator`; its negative gradient is equation 3.

    Args:
        logprobs: `[B]`, log pi(response | prompt) summed over the response's tokens; float32 or float64.
        old_logprobs: `[B]`, the same under the iteration's first parameters.
        advantages: `[B]`, shaped reward minus baseline; no gradient flows through it.
        tau: mirror-descent temperature, > 0.
        denominator: prompts x group size of the whole minibatch.
        scale: `eq3` as above; `k2_squared` leaves out the 1 / (2 tau), as printed for Kimi K2.

    Returns:
        Scalar.

    Source: Kimi k1.5, eq. 3 (written as a loss); Kimi K2, section 3.2.3 for `k2_squared`.
    """
    squares = k15_residuals(logprobs, old_logprobs.detach(), advantages.detach(), tau=tau).square().sum()
    return squares / (denominator * 2 * tau) if scale == "eq3" else squares / denominator


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, *, denominator: float) -> Tensor:
    """-sum A log pi / denominator: REINFORCE with the group-mean baseline, without a regularizer or a reference.

    Source: Williams 1992 (REINFORCE); a comparison of Kimi k1.5's objective with its own limit at theta = theta_i.
    """
    return -(advantages.detach() * logprobs).sum() / denominator


def rest_loss(logprobs: Tensor, is_correct: Tensor, *, denominator: float) -> Tensor:
    """-sum over correct samples of log pi / denominator: imitate what was right, learn nothing from what was wrong.

    Source: ReST (Gulcehre et al. 2023), the comparison of Kimi k1.5, section 3.5 (figure 10).
    """
    return -(is_correct.to(logprobs.dtype) * logprobs).sum() / denominator


def group_advantages(rewards: Tensor, is_valid: Tensor, config: ObjectiveConfig) -> Tensor:
    """Shaped rewards minus the baseline the objective asks for.

    Args:
        rewards: `[Q, k]` shaped rewards.
        is_valid: `[Q, k]` bool; an invalid sample gets advantage 0 and has no part in its group's baseline.
        config: kind, baseline and tau.

    Returns:
        `[Q, k]` float32.

    Source: Kimi k1.5, eq. 3.
    """
    if config.kind == "k15" and config.baseline == "log_z":
        baseline = log_partition(rewards, config.tau, is_valid)
    else:
        baseline = mean_reward(rewards, is_valid)
    return (rewards - baseline[:, None]).masked_fill(~is_valid, 0)


def objective_loss(
    config: ObjectiveConfig,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    is_correct: Tensor,
    *,
    denominator: float,
) -> Tensor:
    """The configured loss of some sequences of a minibatch (all `[B]`); see the three losses above."""
    if config.kind == "policy_gradient":
        return policy_gradient_loss(logprobs, advantages, denominator=denominator)
    if config.kind == "rest":
        return rest_loss(logprobs, is_correct, denominator=denominator)
    return k15_loss(logprobs, old_logprobs, advantages, tau=config.tau, denominator=denominator, scale=config.scale)
