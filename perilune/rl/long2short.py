"""From long reasoning to short: merged weights, shortest rejection sampling, DPO pairs and a second RL phase.

Source: Kimi k1.5, section 2.4 (long2short).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perilune.errors import CheckpointError
from perilune.rl.config import RLConfig


def merge_weights(
    long_weights: Mapping[str, Tensor], short_weights: Mapping[str, Tensor], *, long_share: float = 0.5
) -> dict[str, Tensor]:
    """Average two models: theta = s theta_long + (1 - s) theta_short, in float32 and cast back.

    float64 tensors are averaged in float64.

    Args:
        long_weights: state of the long-reasoning model; tensors that share memory (tied) stay tied in the result.
        short_weights: state of the short-reasoning model: same names, shapes and dtypes.
        long_share: s in [0, 1].

    Returns:
        New tensors under the same names.

    Raises:
        CheckpointError: names, shapes or dtypes differ, or an integer or boolean buffer is not equal in both.
        ValueError: `long_share` is outside [0, 1].

    Source: Kimi k1.5, section 2.4 (model merging).
    """
    if not 0 <= long_share <= 1:
        raise ValueError(f"long_share must be in [0, 1], got {long_share}")
    _check_mergeable(long_weights, short_weights)
    merged: dict[str, Tensor] = {}
    known: dict[tuple[int, ...], str] = {}
    for name, long in long_weights.items():
        short = short_weights[name]
        place = (long.data_ptr(), short.data_ptr(), *long.shape, *long.stride())
        if long.numel() and place in known:
            merged[name] = merged[known[place]]
        else:
            merged[name] = _average(long, short, long_share)
            known[place] = name
    return merged


def _average(long: Tensor, short: Tensor, long_share: float) -> Tensor:
    if not long.is_floating_point():
        return long.clone()
    wide = torch.promote_types(long.dtype, torch.float32)
    return (long_share * long.to(wide) + (1 - long_share) * short.to(long.device, wide)).to(long.dtype)


def _check_mergeable(long_weights: Mapping[str, Tensor], short_weights: Mapping[str, Tensor]) -> None:
    only_long = sorted(long_weights.keys() - short_weights.keys())
    only_short = sorted(short_weights.keys() - long_weights.keys())
    if only_long or only_short:
        raise CheckpointError(
            f"the models to merge have different tensors: only in the long one {only_long}, "
            f"only in the short one {only_short}"
        )
    for name, long in long_weights.items():
        short = short_weights[name]
        if long.shape != short.shape or long.dtype != short.dtype:
            raise CheckpointError(
                f"the models to merge differ in {name}: {long.dtype} {tuple(long.shape)} in the long one, "
                f"{short.dtype} {tuple(short.shape)} in the short one"
            )
        if not long.is_floating_point() and not torch.equal(long, short.to(long.device)):
            raise CheckpointError(f"the models to merge differ in {name}, a {long.dtype} buffer that must be equal")


def shortest_correct(is_correct: Sequence[bool], lengths: Sequence[int]) -> int | None:
    """Index of the shortest right response (the first of equals), or None if none is right.

    Source: Kimi k1.5, section 2.4 (shortest rejection sampling).
    """
    right = [index for index, is_right in enumerate(is_correct) if is_right]
    return min(right, key=lambda index: (lengths[index], index), default=None)


def dpo_pairs(
    is_correct: Sequence[bool], lengths: Sequence[int], *, ratio: float = 1.5, max_negatives: int = 4
) -> list[tuple[int, int]]:
    """(positive, negative) indices: the shortest right response against longer ones.

    Negatives are the wrong responses longer than the positive and the right ones at least `ratio` times as long. Of
    more than `max_negatives` half are wrong and half right where there are enough of both, lowest index first.

    Source: Kimi k1.5, section 2.4 (DPO); the limit on negatives is this project's.
    """
    positive = shortest_correct(is_correct, lengths)
    if positive is None:
        return []
    shortest = lengths[positive]
    others = [index for index in range(len(lengths)) if index != positive]
    wrong = [index for index in others if not is_correct[index] and lengths[index] > shortest]
    right = [index for index in others if is_correct[index] and lengths[index] >= ratio * shortest]
    num_right = min(len(right), max(max_negatives // 2, max_negatives - len(wrong)))
    num_wrong = min(len(wrong), max_negatives - num_right)
    return [(positive, negative) for negative in sorted(wrong[:num_wrong] + right[:num_right])]


def short_phase(config: RLConfig, *, length_fraction: float, length_weight: float) -> RLConfig:
    """The second phase of RL: length reward on from the start and a much smaller longest response.

    Args:
        config: the first phase.
        length_fraction: longest response as a share of the first phase's, in (0, 1].
        length_weight: weight of the length reward.

    Source: Kimi k1.5, section 2.4 (long2short RL).
    """
    longest = max(1, round(config.rollout.max_response_tokens * length_fraction))
    return replace(
        config,
        rollout=replace(config.rollout, max_response_tokens=longest),
        length=replace(config.length, weight=length_weight, start=0.0),
    )
