"""Training data for long2short from sampled groups: SFT examples and preference pairs, in the tokens as sampled.

Source: Kimi k1.5, section 2.4 (shortest rejection sampling; DPO).
"""

from __future__ import annotations

from perilune.data import Example, PreferencePair
from perilune.rl.long2short import dpo_pairs, shortest_correct
from perilune.rl.rollout import Trajectory
from perilune.rl.scoring import ScoredGroups


def response_example(trajectory: Trajectory) -> Example:
    """The trajectory as a training sequence whose targets are the response tokens."""
    return Example(
        tokens=(*trajectory.prompt_ids, *trajectory.token_ids),
        mask=(False,) * len(trajectory.prompt_ids) + (True,) * len(trajectory.token_ids),
        prompt_length=len(trajectory.prompt_ids),
    )


def shortest_examples(scored: ScoredGroups) -> list[Example]:
    """The shortest right response of each group as an SFT example; a group without a right one gives none.

    Source: Kimi k1.5, section 2.4 (shortest rejection sampling).
    """
    chosen = (
        (group, shortest_correct(is_correct, lengths))
        for group, is_correct, lengths in zip(
            scored.groups, scored.is_correct.tolist(), scored.lengths.tolist(), strict=True
        )
    )
    return [response_example(group.trajectories[index]) for group, index in chosen if index is not None]


def preference_pairs(scored: ScoredGroups, *, ratio: float = 1.5, max_negatives: int = 4) -> list[PreferencePair]:
    """The shortest right response of each group against its longer ones; see `dpo_pairs`.

    Responses that were cut at a limit count as wrong with the length they reached; failed samples are left out.

    Source: Kimi k1.5, section 2.4 (DPO).
    """
    pairs: list[PreferencePair] = []
    for row, group in enumerate(scored.groups):
        valid = scored.is_valid[row].nonzero()[:, 0].tolist()
        found = dpo_pairs(
            scored.is_correct[row, valid].tolist(),
            scored.lengths[row, valid].tolist(),
            ratio=ratio,
            max_negatives=max_negatives,
        )
        examples = [response_example(group.trajectories[member]) for member in valid]
        pairs += [PreferencePair(chosen=examples[good], rejected=examples[bad]) for good, bad in found]
    return pairs
