import pytest

from perilune.rl import (
    Group,
    Prompt,
    RolloutConfig,
    Score,
    Trajectory,
    preference_pairs,
    score_groups,
    shortest_examples,
)


def scored(rewards, lengths, reasons=None):
    reasons = reasons or ["eos"] * len(rewards)
    trajectories = tuple(
        Trajectory(
            prompt_ids=(1, 2),
            token_ids=(int(reward), *[9] * (length - 1)),
            behavior_logprobs=(0.0,) * length,
            finish_reason=reason,
            version=0,
        )
        for reward, length, reason in zip(rewards, lengths, reasons, strict=True)
    )
    group = Group(prompt=Prompt(id="p", token_ids=(1, 2), problem=None), trajectories=trajectories)
    return score_groups([group], lambda prompt, ids: Score(reward=float(ids[0]) if ids else None), RolloutConfig())


def test_the_shortest_right_response_becomes_an_example_with_its_response_as_target():
    (example,) = shortest_examples(scored([0, 1, 1, 1], [2, 5, 3, 4]))
    assert example.tokens == (1, 2, 1, 9, 9)
    assert example.mask == (False, False, True, True, True)
    assert example.prompt_length == 2
    assert shortest_examples(scored([0, 0], [2, 3])) == []


def test_preference_pairs_follow_the_worked_example():
    pairs = preference_pairs(scored([1, 1, 1, 0, 0, 1], [100, 149, 150, 90, 400, 1000]))
    assert [(len(p.chosen.tokens) - 2, len(p.rejected.tokens) - 2) for p in pairs] == [
        (100, 150),
        (100, 400),
        (100, 1000),
    ]


def test_cut_responses_are_wrong_and_failed_ones_left_out():
    groups = scored([1, 1, 0], [4, 9, 0], ["eos", "length", "error"])
    (pair,) = preference_pairs(groups)
    assert (len(pair.chosen.tokens), len(pair.rejected.tokens)) == (6, 11)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_number_of_negatives_is_limited(limit):
    pairs = preference_pairs(scored([1, 0, 0, 1], [4, 9, 8, 20]), max_negatives=limit)
    assert len(pairs) == limit
