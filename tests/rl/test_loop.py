import logging
from dataclasses import replace

import pytest
import torch

from perilune.engine import Engine
from perilune.errors import CheckpointError, DataError
from perilune.models import PRESETS, build_model
from perilune.optim import Muon, MuonClip, parameter_groups, qk_clip_specs
from perilune.rl import (
    LengthConfig,
    NativeRolloutEngine,
    ObjectiveConfig,
    RLConfig,
    RLHooks,
    RolloutConfig,
    SamplingConfig,
    Score,
    UpdateConfig,
    run_rl,
)
from perilune.rl.loop import RLLoop, config_warnings
from perilune.rl.metrics import alarms
from perilune.train import CheckpointStore

STOP_IDS = (0, *range(10, 24))
CONFIG = RLConfig(
    iterations=4,
    rollout=RolloutConfig(group_size=8, prompts_per_iteration=8, max_response_tokens=4, stop_on_repetition=False),
    length=LengthConfig(weight=0.0),
    sampling=SamplingConfig(strategy=()),
    checkpoint_interval=1,
)


def reward_curve(make_model, native, prompts, scorer, config, lr=0.03):
    model = make_model()
    rewards = []
    run_rl(
        model,
        torch.optim.Adam(model.parameters(), lr=lr),
        native(model),
        prompts,
        scorer,
        config,
        stop_ids=STOP_IDS,
        hooks=RLHooks(log=lambda iteration, values: rewards.append(values["pass_at_1"])),
    )
    return rewards


@pytest.mark.parametrize("kind", ["k15", "policy_gradient", "rest"])
def test_reward_rises_on_a_task_that_can_be_learned(make_model, native, prompts, scorer, kind):
    config = replace(CONFIG, iterations=25, objective=ObjectiveConfig(kind=kind))
    rewards = reward_curve(make_model, native, prompts, scorer, config)
    assert sum(rewards[:2]) / 2 < 0.2
    assert sum(rewards[-5:]) / 5 > 0.6


def test_reward_does_not_rise_when_rewards_are_shuffled(make_model, native, prompts, scorer):
    """The logged rewards are the shuffled ones, whose mean is that of the real ones."""
    config = replace(CONFIG, iterations=25, shuffle_rewards=True)
    rewards = reward_curve(make_model, native, prompts, scorer, config)
    assert sum(rewards[-5:]) / 5 < 0.2


def test_the_length_reward_shortens_right_answers(make_model, native, prompts):
    def ends(prompt, token_ids):
        return Score(reward=float(token_ids[-1] == 0))

    base = replace(CONFIG, iterations=20, rollout=replace(CONFIG.rollout, max_response_tokens=24))
    lengths = {}
    for weight in (0.0, 0.5):
        seen = []
        model = make_model()
        run_rl(
            model,
            torch.optim.Adam(model.parameters(), lr=0.02),
            native(model),
            prompts,
            ends,
            replace(base, length=LengthConfig(weight=weight, start=0.0)),
            stop_ids=(0,),
            hooks=RLHooks(log=lambda i, v, seen=seen: seen.append((v["pass_at_1"], v["response_tokens_correct"]))),
        )
        assert seen[-1][0] > 0.9
        lengths[weight] = seen[-1][1]
    assert lengths[0.5] < 0.7 * lengths[0.0]


def run(model, native, prompts, scorer, config, store=None, **hooks):
    optimizer = Muon([{"params": list(model.parameters()), "kind": "muon"}], lr=0.02)
    return run_rl(
        model, optimizer, native(model), prompts, scorer, config, stop_ids=STOP_IDS, store=store, hooks=RLHooks(**hooks)
    )


def collector(records):
    """Log hook that keeps everything but timings."""

    def log(iteration, values):
        records[iteration] = {k: v for k, v in values.items() if not k.startswith("time_") and "per_s" not in k}

    return log


@pytest.mark.parametrize("reset", ["state", "none"])
def test_two_and_two_resumed_equals_four(make_model, native, prompts, scorer, tmp_path, reset):
    config = replace(
        CONFIG,
        sampling=SamplingConfig(strategy=("curriculum", "prioritized")),
        rollout=replace(CONFIG.rollout, prompts_per_iteration=4),
        update=UpdateConfig(optimizer_reset=reset),
    )
    prompts = [replace(prompt, pass_rate=0.1 * i) for i, prompt in enumerate(prompts)]
    whole, parts, tokens = {}, {}, {}

    def keep(name):
        return lambda i, scored: tokens.setdefault(
            (name, i), [t.token_ids for g in scored.groups for t in g.trajectories]
        )

    one = make_model()
    run(one, native, prompts, scorer, config, log=collector(whole), observe=keep("whole"))
    store = CheckpointStore(tmp_path)
    stops = iter([False, True])
    first = run(
        make_model(), native, prompts, scorer, config, store, log=collector(parts), observe=keep("parts"),
        should_stop=lambda: next(stops),
    )  # fmt: skip
    assert (first.iterations, first.is_complete) == (2, False)
    two = make_model(seed=9)
    second = run(two, native, prompts, scorer, config, store, log=collector(parts), observe=keep("parts"))
    assert (second.iterations, second.is_complete) == (4, True)
    assert parts == whole
    assert all(tokens["parts", i] == tokens["whole", i] for i in range(4))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_does_nothing_more(make_model, native, prompts, scorer, tmp_path):
    config = replace(CONFIG, iterations=1)
    run(make_model(), native, prompts, scorer, config, CheckpointStore(tmp_path))
    again = run(make_model(), native, prompts, scorer, config, CheckpointStore(tmp_path), log=lambda i, v: 1 / 0)
    assert (again.iterations, again.is_complete) == (1, True)


def test_resuming_refuses_other_settings_and_other_prompts(make_model, native, prompts, scorer, tmp_path):
    run(make_model(), native, prompts, scorer, replace(CONFIG, iterations=1), CheckpointStore(tmp_path))
    longer = replace(CONFIG, iterations=2, objective=ObjectiveConfig(tau=0.2))
    with pytest.raises(CheckpointError, match="other settings"):
        run(make_model(), native, prompts, scorer, longer, CheckpointStore(tmp_path))
    with pytest.raises(CheckpointError, match="another prompt set"):
        run(make_model(), native, prompts[1:], scorer, replace(CONFIG, iterations=2), CheckpointStore(tmp_path))
    resumed = run(make_model(), native, prompts, scorer, replace(CONFIG, iterations=2), CheckpointStore(tmp_path))
    assert resumed.iterations == 2


def test_a_budget_ends_the_run_but_not_before_its_minimum(make_model, native, prompts, scorer):
    config = replace(CONFIG, iterations=1000, budget_s=1e-9, min_iterations=3)
    result = run(make_model(), native, prompts, scorer, config)
    assert (result.iterations, result.is_complete) == (3, True)


def test_evaluation_runs_on_its_interval_and_after_the_last(make_model, native, prompts, scorer):
    records = {}
    run(
        make_model(), native, prompts, scorer, replace(CONFIG, iterations=5, eval_interval=2),
        evaluate=lambda: {"accuracy": 0.5}, log=collector(records),
    )  # fmt: skip
    assert [i for i, values in records.items() if "accuracy" in values] == [2, 4, 5]


def test_metrics_are_complete_and_finite(make_model, native, prompts, scorer):
    records = {}
    run(make_model(), native, prompts, scorer, CONFIG, log=lambda i, v: records.update({i: v}))
    wanted = {
        "reward", "reward_shaped", "pass_at_1", "pass_at_k", "response_tokens", "response_tokens_p95", "entropy",
        "zero_signal_share", "truncated_share", "engine_mismatch", "engine_mismatch_max", "grad_norm", "kl",
        "rollout_tokens_per_s", "train_tokens_per_s", "time_rollout_s", "time_train_s", "time_reward_s",
    }  # fmt: skip
    assert wanted <= records[1].keys()
    assert all(abs(value) < float("inf") for values in records.values() for value in values.values())
    assert records[4]["engine_mismatch_max"] < 1e-4


def test_an_engine_on_a_copy_gets_the_new_weights(make_model, native, prompts, scorer):
    policy, copy = make_model(), make_model(seed=5)
    records = {}
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    run_rl(
        policy,
        optimizer,
        native(copy),
        prompts,
        scorer,
        CONFIG,
        stop_ids=STOP_IDS,
        hooks=RLHooks(log=collector(records)),
    )
    assert max(values["engine_mismatch_max"] for values in records.values()) < 1e-4
    assert not torch.equal(policy.embedding, copy.embedding)


def test_a_low_precision_copy_shows_as_mismatch(make_model, native, prompts, scorer):
    policy, copy = make_model(), make_model(dtype=torch.bfloat16)
    records = {}
    run_rl(
        policy, torch.optim.Adam(policy.parameters(), lr=0.03), native(copy), prompts, scorer, CONFIG,
        stop_ids=STOP_IDS, hooks=RLHooks(log=collector(records)),
    )  # fmt: skip
    assert 1e-4 < records[4]["engine_mismatch"] < 0.1


def test_questionable_settings_are_said(make_model, native, prompts, scorer, caplog):
    config = replace(CONFIG, update=UpdateConfig(minibatches_per_iteration=1), length=LengthConfig(weight=1.5))
    model = make_model()
    with caplog.at_level(logging.WARNING):
        RLLoop(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            native(model),
            prompts,
            scorer,
            config,
            stop_ids=STOP_IDS,
        )
    assert "one step per iteration" in caplog.text
    assert "length weight 1.5 is above 1" in caplog.text


def test_bad_prompt_sets_are_refused(make_model, native, prompts, scorer):
    with pytest.raises(DataError, match="prompt set is empty"):
        run(make_model(), native, [], scorer, CONFIG)
    with pytest.raises(DataError, match="unique"):
        run(make_model(), native, [prompts[0], prompts[0]], scorer, CONFIG)


def test_a_policy_that_learns_nothing_is_said_once(make_model, native, prompts, caplog):
    config = replace(CONFIG, iterations=5)
    with caplog.at_level(logging.WARNING):
        run(make_model(), native, prompts, lambda prompt, ids: Score(reward=0.0), config)
    assert [r.getMessage()[:11] for r in caplog.records if "no group had a signal" in r.getMessage()] == ["iteration 3"]


@pytest.mark.parametrize(
    ("values", "silent", "expected"),
    [
        ({"truncated_share": 0.0, "entropy": 1.0, "engine_mismatch": 0.0}, 2, []),
        ({"truncated_share": 0.31}, 0, ["raise max_response_tokens"]),
        ({"truncated_share": 0.0, "engine_mismatch": 0.3}, 0, ["higher precision"]),
        ({"truncated_share": 0.0, "entropy": 0.001}, 3, ["easier tasks", "raise tau"]),
    ],
)
def test_alarms_say_what_to_do(values, silent, expected):
    found = alarms(values, silent)
    assert len(found) == len(expected)
    assert all(words in text for words, text in zip(expected, found, strict=True))


def test_each_iteration_tells_the_attention_logits_and_what_was_clipped(prompts, scorer):
    tokenless = replace(CONFIG, iterations=2, update=UpdateConfig(minibatches_per_iteration=2))
    model = build_model(replace(PRESETS["smoke"], vocab_size=24), seed=0)
    optimizer = MuonClip(parameter_groups(model, lr=1e-3), 1e-3, attention=qk_clip_specs(model), tau=1e-6)
    logged: dict[int, dict] = {}
    run_rl(
        model, optimizer, NativeRolloutEngine(Engine(model)), prompts, scorer, tokenless, stop_ids=STOP_IDS,
        hooks=RLHooks(log=lambda iteration, values: logged.update({iteration: dict(values)})),
    )  # fmt: skip
    layers = len(qk_clip_specs(model))
    trained = [values for values in logged.values() if values["steps"]]
    assert trained
    for values in trained:
        assert len(values["max_logits"]) == layers
        assert values["max_logit"] == max(values["max_logits"]) > 0
        assert values["clipped_heads"] > 0
        assert values["clipped_share"] > 0
    assert not any(layer.expert_load.any() for layer in model.moe_layers())


def test_a_length_reward_beside_imitation_is_warned_of():
    config = replace(CONFIG, objective=ObjectiveConfig(kind="rest"), length=LengthConfig(weight=0.2))
    assert any("imitates every right response alike" in warning for warning in config_warnings(config))
    assert not config_warnings(CONFIG)
