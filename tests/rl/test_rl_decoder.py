"""The whole loop on a real hybrid model with MuonClip and a verified task."""

import json
from dataclasses import replace

import pytest
import torch

from perilune.engine import Engine
from perilune.models import PRESETS, build_model
from perilune.optim import OptimizerConfig, build_optimizer
from perilune.rl import (
    LengthConfig,
    NativeRolloutEngine,
    Prompt,
    RLConfig,
    RLHooks,
    RolloutConfig,
    SamplingConfig,
    Score,
    merge_weights,
    run_rl,
)
from perilune.train import CheckpointStore

CONFIG = RLConfig(
    iterations=2,
    rollout=RolloutConfig(group_size=8, prompts_per_iteration=4, max_response_tokens=6, stop_on_repetition=False),
    length=LengthConfig(weight=0.2, start=0.0),
    sampling=SamplingConfig(strategy=("prioritized",)),
    checkpoint_interval=1,
)
STOPS = tuple(range(100, 512))


def in_lower_half(prompt, token_ids):
    """Reward any first token below 300: half of what the initial policy says."""
    return Score(reward=float(token_ids[0] < 300))


def run(config, seed=0, store=None, lr=2e-3, **hooks):
    model = build_model(PRESETS["smoke"], seed=seed)
    optimizer = build_optimizer(model, OptimizerConfig(lr=lr, weight_decay=0.0))
    prompts = [Prompt(id=str(n), token_ids=(n, n + 1, n + 2), problem=None) for n in range(8)]
    engine = NativeRolloutEngine(Engine(model, max_batch=32))
    result = run_rl(
        model, optimizer, engine, prompts, in_lower_half, config, stop_ids=STOPS, store=store, hooks=RLHooks(**hooks)
    )
    return model, result


def test_reward_rises_on_a_hybrid_model():
    rewards = []
    config = replace(
        CONFIG,
        iterations=8,
        length=LengthConfig(weight=0.0),
        rollout=replace(CONFIG.rollout, group_size=16, prompts_per_iteration=8, max_response_tokens=3),
    )
    run(config, lr=0.04, log=lambda iteration, values: rewards.append(values["reward"]))
    assert sum(rewards[:2]) / 2 < 0.65
    assert sum(rewards[-2:]) / 2 > 0.85


@pytest.mark.parametrize("reset", ["state", "none"])
def test_one_and_one_resumed_equals_two(tmp_path, reset):
    config = replace(CONFIG, update=replace(CONFIG.update, optimizer_reset=reset))
    whole, _ = run(config)
    store = CheckpointStore(tmp_path)
    run(replace(config, iterations=1), store=store)
    resumed, result = run(config, seed=5, store=store)
    assert result.iterations == 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_engine_and_trainer_agree_through_the_loop():
    records = []
    run(CONFIG, log=lambda iteration, values: records.append(dict(values)))
    assert all(values["engine_mismatch_max"] < 1e-4 for values in records)
    json.dumps(records, allow_nan=False)


def test_merging_two_models_gives_a_model_between_them():
    long, short = (build_model(PRESETS["smoke"], seed=seed) for seed in (0, 1))
    merged = build_model(PRESETS["smoke"], seed=2)
    merged.load_state_dict(merge_weights(long.state_dict(), short.state_dict(), long_share=0.25))
    for name, value in merged.named_parameters():
        expected = 0.25 * long.get_parameter(name) + 0.75 * short.get_parameter(name)
        torch.testing.assert_close(value, expected)
