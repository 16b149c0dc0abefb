import json
import logging

import numpy as np
import pytest

from perilune.errors import CheckpointError, DataError
from perilune.rl.config import SamplingConfig
from perilune.rl.sampling import PromptSampler, priority_weights


def test_priorities_match_the_worked_example():
    got = priority_weights(np.array([0, 0.25, 0.5, 1.0]), 0.0)
    np.testing.assert_allclose(got, [4 / 9, 1 / 3, 2 / 9, 0])


def test_solved_prompts_keep_the_floor_and_all_solved_is_uniform():
    assert priority_weights(np.array([1.0, 0.0]), 0.02)[0] == pytest.approx(0.02 / 1.04)
    np.testing.assert_allclose(priority_weights(np.ones(4), 0.0), 0.25)


def test_success_rates_decay_towards_what_was_seen_last():
    sampler = PromptSampler([0.5], SamplingConfig(), seed=0)
    assert sampler.success_rates().tolist() == [0.5]
    sampler.update([0], [8], [8])
    assert sampler.success_rates()[0] == pytest.approx((8 + 1) / (8 + 2))
    sampler.update([0], [0], [8])
    assert sampler.success_rates()[0] == pytest.approx((0.9 * 8 + 1) / (0.9 * 8 + 8 + 2))


@pytest.mark.parametrize("strategy", [(), ("prioritized",), ("curriculum",), ("curriculum", "prioritized")])
def test_draws_repeat_for_the_same_iteration_and_do_not_repeat_prompts(strategy):
    rates = np.linspace(0.1, 0.9, 30).tolist()
    sampler = PromptSampler(rates, SamplingConfig(strategy=strategy), seed=4)
    first = sampler.draw(3, 10, 0.0)
    assert first == sampler.draw(3, 10, 0.0)
    assert first != sampler.draw(4, 10, 0.0)
    assert len(set(first)) == 10


def test_prioritized_draws_hard_prompts_more_often():
    rates = [0.95] * 20 + [0.05] * 20
    sampler = PromptSampler(rates, SamplingConfig(strategy=("prioritized",)), seed=0)
    drawn = [index for iteration in range(200) for index in sampler.draw(iteration, 4, 0.0)]
    share = np.mean(np.array(drawn) >= 20)
    assert share == pytest.approx(0.97 / (0.97 + 0.07), abs=0.04)


def test_curriculum_draws_only_hard_prompts_after_its_warm_up():
    rates = [0.2, 0.4, 0.6, 0.8]
    sampler = PromptSampler(rates, SamplingConfig(strategy=("curriculum",), warmup=0.5), seed=0)
    assert set(sampler.draw(0, 4, 0.49)) == {0, 1, 2, 3}
    assert set(sampler.draw(0, 2, 0.5)) == {0, 1}
    assert sorted(sampler.draw(0, 4, 0.5)) == [0, 0, 1, 1]


def test_unsolved_prompts_wait_for_their_time():
    config = SamplingConfig(strategy=(), hard_zero_from=0.8)
    sampler = PromptSampler([0.0, 0.5, None], config, seed=0)
    assert set(sampler.draw(0, 2, 0.79)) == {1, 2}
    assert set(sampler.draw(0, 3, 0.8)) == {0, 1, 2}


def test_an_empty_pool_falls_back_with_a_warning(caplog):
    sampler = PromptSampler([0.7, 0.8], SamplingConfig(strategy=("curriculum",), warmup=0.0), seed=0)
    with caplog.at_level(logging.WARNING):
        assert set(sampler.draw(0, 2, 1.0)) == {0, 1}
    assert "pass rate below" in caplog.text


def test_state_survives_json():
    sampler = PromptSampler([0.3, 0.6, 0.9], SamplingConfig(), seed=1)
    sampler.update([0, 2], [3, 7], [8, 8])
    other = PromptSampler([0.3, 0.6, 0.9], SamplingConfig(), seed=1)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert other.success_rates().tolist() == sampler.success_rates().tolist()
    assert other.draw(7, 2, 1.0) == sampler.draw(7, 2, 1.0)
    with pytest.raises(CheckpointError, match="3 prompts but the prompt set has 1"):
        PromptSampler([0.3], SamplingConfig(), seed=1).load_state_dict(sampler.state_dict())


def test_an_empty_prompt_set_is_refused():
    with pytest.raises(DataError, match="prompt set is empty"):
        PromptSampler([], SamplingConfig(), seed=0)
