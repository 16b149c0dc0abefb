import pytest
import torch

from perilune.errors import CheckpointError
from perilune.rl.config import RLConfig
from perilune.rl.long2short import (
    dpo_pairs,
    merge_weights,
    short_phase,
    shortest_correct,
)


def state(value, dtype=torch.float32):
    return {"w": torch.full((2, 3), value, dtype=dtype), "steps": torch.tensor([1, 2])}


def test_merging_averages_in_float32_and_casts_back():
    got = merge_weights(state(1.0, torch.bfloat16), state(1.0078125, torch.bfloat16), long_share=0.5)
    expected = (torch.tensor(1.0) * 0.5 + torch.tensor(1.0078125) * 0.5).bfloat16()
    assert got["w"].dtype == torch.bfloat16
    assert torch.equal(got["w"], expected.expand(2, 3))
    assert torch.equal(got["steps"], torch.tensor([1, 2]))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_merging_weighs_the_long_model(share):
    got = merge_weights(state(4.0), state(0.0), long_share=share)
    assert got["w"].unique().tolist() == [4.0 * share]


def test_tied_weights_stay_tied():
    long, short = torch.ones(3, 2), torch.zeros(3, 2)
    got = merge_weights({"embed": long, "head": long}, {"embed": short, "head": short})
    assert got["embed"].data_ptr() == got["head"].data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(extra=torch.ones(1)), "only in the short one \\['extra'\\]"),
        (lambda s: s.update(w=torch.ones(2, 2)), "differ in w"),
        (lambda s: s.update(w=s["w"].half()), "float16"),
        (lambda s: s.update(steps=torch.tensor([1, 3])), "differ in steps, a torch.int64 buffer"),
    ],
)
def test_models_that_do_not_match_are_refused(change, message):
    short = state(1.0)
    change(short)
    with pytest.raises(CheckpointError, match=message):
        merge_weights(state(1.0), short)


def test_merge_share_is_checked():
    with pytest.raises(ValueError, match=r"long_share must be in \[0, 1\], got 1.5"):
        merge_weights(state(1.0), state(1.0), long_share=1.5)


def test_shortest_correct_prefers_the_first_of_equals():
    assert shortest_correct([False, True, True, True], [1, 9, 5, 5]) == 2
    assert shortest_correct([False, False], [1, 2]) is None


def test_dpo_pairs_match_the_worked_example():
    got = dpo_pairs([True, True, True, False, False, True], [100, 149, 150, 90, 400, 1000])
    assert got == [(0, 2), (0, 4), (0, 5)]


def test_dpo_negatives_are_half_wrong_and_half_right_when_there_are_many():
    is_correct = [True] + [False] * 5 + [True] * 5
    lengths = [10] + [50] * 10
    assert dpo_pairs(is_correct, lengths, max_negatives=4) == [(0, 1), (0, 2), (0, 6), (0, 7)]
    assert dpo_pairs([True] + [False] * 5, [10] + [50] * 5, max_negatives=4) == [(0, n) for n in (1, 2, 3, 4)]
    assert dpo_pairs([True, False] + [True] * 5, [10] + [50] * 6, max_negatives=4) == [(0, n) for n in (1, 2, 3, 4)]


def test_a_group_without_a_right_response_gives_no_pairs():
    assert dpo_pairs([False, False], [3, 4]) == []


def test_short_phase_turns_the_length_reward_on_and_cuts_the_limit():
    short = short_phase(RLConfig(), length_fraction=0.25, length_weight=0.5)
    assert (short.rollout.max_response_tokens, short.length.weight, short.length.start) == (64, 0.5, 0.0)
    assert short.rollout.group_size == RLConfig().rollout.group_size
