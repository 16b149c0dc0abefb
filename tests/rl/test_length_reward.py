import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.rl.length import length_reward, length_weight


@pytest.mark.parametrize(
    ("correct", "lengths", "expected"),
    [
        ([1, 1, 0, 0], [100, 300, 100, 200], [0.5, -0.5, 0, 0]),
        ([0, 0, 0, 0], [10, 20, 30, 50], [0, 0, 0, -0.5]),
        ([1, 1, 1], [7, 7, 7], [0, 0, 0]),
        ([1, 1], [10, 20], [0.5, -0.5]),
        ([1], [9], [0]),
    ],
)
def test_length_reward_matches_the_worked_examples(correct, lengths, expected):
    got = length_reward(torch.tensor(lengths), torch.tensor(correct).bool())
    assert got.tolist() == expected


def test_shaped_rewards_of_the_worked_examples():
    reward = torch.tensor([1.0, 1.0, 0.0, 0.0])
    shaped = reward + 0.2 * length_reward(torch.tensor([100, 300, 100, 200]), reward > 0.5)
    torch.testing.assert_close(shaped - shaped.mean(), torch.tensor([0.6, 0.4, -0.5, -0.5]))
    shaped = torch.ones(2) + 0.5 * length_reward(torch.tensor([10, 20]), torch.tensor([True, True]))
    assert shaped.tolist() == [1.25, 0.75]


def test_groups_are_independent_and_invalid_members_do_not_count():
    lengths = torch.tensor([[10, 20, 1000], [5, 5, 5]])
    is_correct = torch.tensor([[True, True, True], [True, False, True]])
    is_valid = torch.tensor([[True, True, False], [True, True, True]])
    assert length_reward(lengths, is_correct, is_valid).tolist() == [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 500)), min_size=2, max_size=8), st.floats(0, 1.999))
def test_a_right_answer_always_beats_a_wrong_one_below_weight_2(members, weight):
    is_correct = torch.tensor([right for right, _ in members])
    lengths = torch.tensor([length for _, length in members])
    shaped = is_correct.double() + weight * length_reward(lengths, is_correct).double()
    if is_correct.any() and not is_correct.all():
        assert shaped[is_correct].min() > shaped[~is_correct].max()


def test_length_weight_is_off_until_its_start():
    assert [length_weight(p, 0.2, 0.4) for p in (0.0, 0.39, 0.4, 1.0)] == [0.0, 0.0, 0.2, 0.2]
    assert length_weight(0.0, 0.2, 0.0) == 0.2
