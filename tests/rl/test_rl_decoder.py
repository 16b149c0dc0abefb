"""The whole loop on a real hybrid model with MuonClip and a verified task."""

import json
from dataclasses import replace

import pytest
import torch

from perilune.data import pack_examples
from perilune.engine import Engine, Request, SamplingParams
from perilune.models import PRESETS, attention_modes, build_model, set_attention_mode
from perilune.nn import MoBAConfig
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
    Trajectory,
    merge_weights,
    response_example,
    run_rl,
)
from perilune.rl.policy import pack_responses, response_logprobs, sum_by_sequence
from perilune.train import CheckpointStore, sequence_logprobs

CONFIG = RLConfig(
    iterations=2,
    rollout=RolloutConfig(group_size=8, prompts_per_iteration=4, max_response_tokens=6, stop_on_repetition=False),
    length=LengthConfig(weight=0.2, start=0.0),
    sampling=SamplingConfig(strategy=("prioritized",)),
    checkpoint_interval=1,
)
STOPS = tuple(range(100, 512))
# blocks so short that a prompt has many
MOBA = MoBAConfig(num_heads=2, head_dim=16, num_kv_heads=1, moba_chunk_size=4, moba_topk=2)
SPARSE = replace(PRESETS["smoke"], layers=("moba", "moba", "kda", "moba"), mla=None, moba=MOBA, init_range=0.3)
DECODES = {
    decode: replace(SPARSE, moba=replace(MOBA, moba_decode=decode), moba_full_last_n=last)
    for decode, last in (("full", 0), ("moba", 1))
}

every_decode = pytest.mark.parametrize("config", DECODES.values(), ids=DECODES)


def in_lower_half(prompt, token_ids):
    """Reward any first token below 300: half of what the initial policy says."""
    return Score(reward=float(token_ids[0] < 300))


def run(config, seed=0, store=None, lr=2e-3, model=None, engine=None, prompt_length=3, **hooks):
    model = model or build_model(PRESETS["smoke"], seed=seed)
    optimizer = build_optimizer(model, OptimizerConfig(lr=lr, weight_decay=0.0))
    prompts = [
        Prompt(id=str(n), token_ids=tuple((n + i * i) % 100 for i in range(prompt_length)), problem=None)
        for n in range(8)
    ]
    engine = engine or NativeRolloutEngine(Engine(model, max_batch=32))
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


@every_decode
def test_engine_and_trainer_agree_where_responses_read_other_keys_than_prompts(config):
    records = []
    run(CONFIG, model=build_model(config, seed=0), prompt_length=30, log=lambda _, values: records.append(dict(values)))
    assert [values["engine_mismatch_max"] < 1e-4 for values in records] == [True, True]


@every_decode
@torch.no_grad()
def test_every_log_probability_is_the_samplers(config):
    """As reinforcement learning, fine-tuning and preferences compute it; and reading as in pre-training is not that."""
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(0, 500, (n,), generator=generator).tolist()) for n in (31, 17, 8, 1)]
    requests = [Request(prompt_ids=p, params=SamplingParams(max_new_tokens=14), num_samples=2) for p in prompts]
    completions = Engine(model, max_batch=3, max_tokens_prefill=9).generate(requests)
    trajectories = [
        Trajectory(
            prompt_ids=prompts[place // 2],
            token_ids=completion.token_ids,
            behavior_logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            version=0,
        )
        for place, completion in enumerate(completions)
    ]
    model.train()
    sampled = torch.tensor([logprob for t in trajectories for logprob in t.behavior_logprobs])
    packed = pack_responses(trajectories, torch.device("cpu"))
    trained, _ = response_logprobs(model, packed, 1.0)
    torch.testing.assert_close(trained, sampled, rtol=0, atol=1e-4)
    batch = pack_examples([response_example(trajectory) for trajectory in trajectories])
    sums = sum_by_sequence(sampled, packed).float()
    torch.testing.assert_close(sequence_logprobs(model, batch), sums, rtol=0, atol=1e-3)
    plain = sequence_logprobs(model, replace(batch, prompt_lengths=None))
    assert torch.allclose(plain, sums, atol=1e-2) == (config.moba.moba_decode == "moba")


def test_an_engine_on_a_copy_reads_as_the_policy_does():
    model, copy = (build_model(SPARSE, seed=seed) for seed in (0, 1))
    set_attention_mode(model, "full")
    records = []
    engine = NativeRolloutEngine(Engine(copy))
    run(CONFIG, model=model, engine=engine, prompt_length=30, log=lambda _, values: records.append(dict(values)))
    assert attention_modes(copy) == attention_modes(model)
    assert all(values["engine_mismatch_max"] < 1e-4 for values in records)


def test_a_resumed_policy_reads_as_it_did(tmp_path):
    store = CheckpointStore(tmp_path)
    model, resumed = (build_model(SPARSE, seed=seed) for seed in (0, 1))
    set_attention_mode(model, "full")
    run(replace(CONFIG, iterations=1), model=model, store=store)
    run(CONFIG, model=resumed, store=store)
    assert set(attention_modes(resumed).values()) == {"full"}


def test_merging_two_models_gives_a_model_between_them():
    long, short = (build_model(PRESETS["smoke"], seed=seed) for seed in (0, 1))
    merged = build_model(PRESETS["smoke"], seed=2)
    merged.load_state_dict(merge_weights(long.state_dict(), short.state_dict(), long_share=0.25))
    for name, value in merged.named_parameters():
        expected = 0.25 * long.get_parameter(name) + 0.75 * short.get_parameter(name)
        torch.testing.assert_close(value, expected)
