from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.recsys.config import FitConfig
from perilune.recsys.fit import EpochPlan
from perilune.recsys.sampling import TripleSampler, warn_of_gaps
from tests.recsys.cases import small_data


@given(seed=st.integers(0, 10**6), density=st.floats(0, 0.95), most=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_positives_are_had_and_negatives_are_not(seed: int, density: float, most: int) -> None:
    data = small_data(density=density, seed=seed)
    sampler = TripleSampler(data, most)
    users = torch.randperm(data.num_users)[:5]
    for behavior, pairs in enumerate(data.behaviors.values()):
        had = set(zip(pairs.users.tolist(), pairs.items.tolist(), strict=True))
        drawn = sampler.draw(behavior, users, torch.Generator().manual_seed(seed))
        assert all(pair in had for pair in zip(drawn.users.tolist(), drawn.positives.tolist(), strict=True))
        assert not any(pair in had for pair in zip(drawn.users.tolist(), drawn.negatives.tolist(), strict=True))
        for user in users.tolist():
            degree = int((pairs.users == user).sum())
            expected = 0 if degree == data.num_items else min(most, degree)
            assert int((drawn.users == user).sum()) == expected


def test_draws_are_spread_evenly() -> None:
    data = small_data(num_users=1, num_items=6, behaviors=("buy",), density=0.5, seed=3)
    sampler, owned = TripleSampler(data, 40), len(data.target)
    assert 1 < owned < 5
    positives, negatives = torch.zeros(6), torch.zeros(6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        drawn = sampler.draw(0, torch.tensor([0]), generator)
        positives += torch.bincount(drawn.positives, minlength=6)
        negatives += torch.bincount(drawn.negatives, minlength=6)
    for counts, kinds in ((positives, owned), (negatives, 6 - owned)):
        share = counts[counts > 0] / counts.sum()
        assert len(share) == kinds
        assert (share - 1 / kinds).abs().max() < 0.03


def test_a_user_who_has_everything_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    data = small_data(density=1.1, num_users=3)
    with caplog.at_level(logging.WARNING):
        warn_of_gaps(data)
    sampler = TripleSampler(data, 4)
    assert "3 users have every item" in caplog.text
    assert not len(sampler.draw(0, torch.arange(3), torch.Generator()).users)


def test_a_behavior_without_pairs_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_gaps(small_data(empty=("cart",)))
    sampler = TripleSampler(small_data(empty=("cart",)), 4)
    assert caplog.text.count("cart has no pairs") == 1
    assert not len(sampler.draw(1, torch.arange(7), torch.Generator()).users)


def test_an_epoch_takes_each_user_at_most_once() -> None:
    plan = EpochPlan(10, FitConfig(users_per_epoch=7, batch_users=3), seed=0)
    first, second = plan.epoch(0), plan.epoch(1)
    assert [len(batch) for batch in first] == [3, 3, 1]
    assert len(torch.cat(first).unique()) == 7
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert torch.cat(first).tolist() == torch.cat(EpochPlan(10, FitConfig(users_per_epoch=7), 0).epoch(0)).tolist()
    assert plan.decay_steps == 2
