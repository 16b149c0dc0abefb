"""From sampled groups to rewards: verification, what is cut or repetitive, and the length reward on top."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from perilune.engine import FinishReason
from perilune.errors import DataError, NumericsError
from perilune.rl.config import RLConfig, RolloutConfig
from perilune.rl.length import length_reward, length_weight
from perilune.rl.rollout import Group, Prompt, Trajectory
from perilune.seeding import make_generator

_LOG = logging.getLogger(__name__)

CORRECT_THRESHOLD = 0.5
"""Rewards at or above it count as right answers."""

_CUT: tuple[FinishReason, ...] = ("length", "context")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A verifier's judgment of one response."""

    reward: float | None
    """In [0, 1]; None or NaN excludes the sample."""
    error: str | None = None
    """Why verification failed, if it did; the reward is then 0."""


class Scorer(Protocol):
    """Judges a response to a prompt."""

    def __call__(self, prompt: Prompt, token_ids: Sequence[int]) -> Score:
        """Return the score of the response `token_ids` (its end token included)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroups:
    """An iteration's groups with everything that is known about each sample; all tensors are `[Q, k]`."""

    groups: tuple[Group, ...]
    """Q groups of k trajectories."""
    rewards: Tensor
    """float32, the verifier's rewards (0 for what was cut or stopped)."""
    shaped: Tensor
    """float32, what is trained on."""
    is_correct: Tensor
    """bool."""
    is_valid: Tensor
    """bool; False excludes a sample from loss and baseline."""
    lengths: Tensor
    """int64, sampled tokens."""
    is_truncated: Tensor
    """bool, cut at a limit."""
    is_repetitive: Tensor
    """bool, stopped for repeating itself."""
    has_error: Tensor
    """bool, verification failed."""

    @property
    def has_signal(self) -> Tensor:
        """`[Q]` bool: the shaped rewards of the valid samples are not all equal."""
        largest = self.shaped.masked_fill(~self.is_valid, -math.inf).amax(dim=1)
        smallest = self.shaped.masked_fill(~self.is_valid, math.inf).amin(dim=1)
        return largest > smallest


def score_groups(groups: Sequence[Group], scorer: Scorer, config: RolloutConfig) -> ScoredGroups:
    """Verify every response; nothing is shaped yet except that a repetitive response is penalized.

    A response that was cut earns 0 whatever it says. A sample without a finite reward is excluded, and a group with
    fewer than two samples left is excluded whole.

    Args:
        groups: all of one size k.
        scorer: judges responses; an exception counts as a failed verification.
        config: the penalty for repetition.
    """
    reasons = [[trajectory.finish_reason for trajectory in group.trajectories] for group in groups]
    scores = [[_score(scorer, group.prompt, trajectory) for trajectory in group.trajectories] for group in groups]
    rewards = torch.tensor([[_number(score.reward) for score in row] for row in scores], dtype=torch.float32)
    is_truncated = torch.tensor([[reason in _CUT for reason in row] for row in reasons])
    is_repetitive = torch.tensor([[reason == "repeat" for reason in row] for row in reasons])
    is_valid = rewards.isfinite()
    is_valid &= (is_valid.sum(dim=1) >= 2)[:, None]
    rewards = rewards.masked_fill(~is_valid, 0)
    return ScoredGroups(
        groups=tuple(groups),
        rewards=rewards,
        shaped=rewards - config.repetition_penalty * is_repetitive,
        is_correct=(rewards >= CORRECT_THRESHOLD) & is_valid,
        is_valid=is_valid,
        lengths=torch.tensor([[len(trajectory.token_ids) for trajectory in group.trajectories] for group in groups]),
        is_truncated=is_truncated,
        is_repetitive=is_repetitive,
        has_error=torch.tensor([[score.error is not None for score in row] for row in scores]),
    )


def shape_rewards(scored: ScoredGroups, config: RLConfig, progress: float) -> ScoredGroups:
    """Add the length reward: r + w(progress) * len_reward.

    Source: Kimi k1.5, section 2.3.3.
    """
    weight = length_weight(progress, config.length.weight, config.length.start)
    if weight == 0:
        return scored
    bonus = length_reward(scored.lengths, scored.is_correct, scored.is_valid)
    return replace(scored, shaped=scored.shaped + weight * bonus)


def shuffle_rewards(scored: ScoredGroups, seed: int, iteration: int) -> ScoredGroups:
    """Give the rewards of the iteration to random samples: the negative control, in which nothing can be learned."""
    order = torch.randperm(scored.rewards.numel(), generator=make_generator(seed, "shuffle", iteration))
    names = (scored.rewards, scored.shaped, scored.is_correct)
    rewards, shaped, is_correct = (values.flatten()[order].view_as(values) for values in names)
    return replace(scored, rewards=rewards, shaped=shaped, is_correct=is_correct & scored.is_valid)


def check_verifier(scored: ScoredGroups, config: RLConfig) -> None:
    """Stop when verification fails too often to trust the rewards.

    Raises:
        DataError: the share of failures is above `max_verifier_error_rate`.
    """
    rate = scored.has_error.float().mean().item()
    if rate > config.max_verifier_error_rate:
        raise DataError(
            f"the verifier failed on {rate:.0%} of the responses, more than max_verifier_error_rate = "
            f"{config.max_verifier_error_rate:.0%}; its errors are in the log"
        )


def check_policy(scored: ScoredGroups, iteration: int) -> None:
    """Stop when the policy itself is broken.

    Raises:
        NumericsError: no response could be sampled, as its logits are NaN or infinite.
    """
    reasons = {trajectory.finish_reason for group in scored.groups for trajectory in group.trajectories}
    if reasons == {"error"}:
        raise NumericsError(
            f"iteration {iteration}: the policy's logits are not finite in any response, so earlier steps have ruined "
            "its weights; lower the learning rate and start the stage anew"
        )


def safe_score(scorer: Scorer, prompt: Prompt, token_ids: Sequence[int]) -> Score:
    """Score a response; whatever goes wrong in the verifier is a score of 0 with an error, and is logged."""
    try:
        score = scorer(prompt, token_ids)
    except Exception as error:  # a verifier is foreign code: whatever it raises must cost one sample, not the run
        _LOG.warning("verifier failed on prompt %s", prompt.id, exc_info=True)
        return Score(reward=0.0, error=f"{type(error).__name__}: {error}")
    if score.error is not None:
        _LOG.warning("verifier failed on prompt %s: %s", prompt.id, score.error)
        return Score(reward=0.0, error=score.error)
    return score


def _score(scorer: Scorer, prompt: Prompt, trajectory: Trajectory) -> Score:
    """Only responses that ended by themselves are worth verifying."""
    match trajectory.finish_reason:
        case "eos":
            return safe_score(scorer, prompt, trajectory.token_ids)
        case "error" | "dead_end":
            return Score(reward=None)
        case _:
            return Score(reward=0.0)


def _number(reward: float | None) -> float:
    return math.nan if reward is None else reward
