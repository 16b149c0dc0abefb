import logging
import math
from dataclasses import replace

import pytest
import torch

from perilune.errors import NumericsError
from perilune.rl import ObjectiveConfig, RLConfig, RolloutConfig, Score, UpdateConfig, collect_groups, score_groups
from perilune.rl.update import PolicyTrainer, iteration_lr_factor, plan_minibatches, reset_optimizer


def sample(model, native, prompts, scorer, config, count=8):
    groups = collect_groups(
        native(model),
        prompts[:count],
        config.rollout,
        stop_ids=(0, *range(10, 24)),
        vocab_size=24,
        seed=config.seed,
        version=0,
    )
    return score_groups(groups, scorer, config.rollout)


def half_right(prompt, token_ids):
    return Score(reward=float(token_ids[0] % 2))


CONFIG = RLConfig(rollout=RolloutConfig(group_size=4, max_response_tokens=6), update=UpdateConfig(iter_warmup_steps=0))


def gradients(model, native, prompts, config):
    """What one optimizer step would see: SGD with rate 1 and no clipping."""
    scored = sample(model, native, prompts, half_right, config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    PolicyTrainer(model, optimizer, config).train(scored, 0, 0.0)
    return [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]


def with_update(**changes):
    return replace(CONFIG, update=replace(CONFIG.update, grad_clip=1e9, minibatches_per_iteration=1, **changes))


def test_the_first_step_does_not_depend_on_micro_batches(make_model, native, prompts):
    whole = gradients(make_model(dtype=torch.float64), native, prompts, with_update())
    cut = gradients(make_model(dtype=torch.float64), native, prompts, with_update(micro_batch_tokens=7))
    for a, b in zip(whole, cut, strict=True):
        assert a.abs().max() > 0
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()


def test_the_first_step_is_reinforce_with_a_group_mean_baseline(make_model, native, prompts):
    config = with_update()
    plain = replace(config, objective=ObjectiveConfig(kind="policy_gradient"))
    for a, b in zip(
        gradients(make_model(), native, prompts, config), gradients(make_model(), native, prompts, plain), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_skipping_groups_without_signal_leaves_the_first_step_unchanged(make_model, native, prompts):
    skipped = gradients(make_model(), native, prompts, with_update(zero_signal="skip"))
    kept = gradients(make_model(), native, prompts, with_update(zero_signal="keep"))
    for a, b in zip(skipped, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_minibatches_share_the_groups_with_a_signal(make_model, native, prompts):
    def only_first(prompt, token_ids):
        return Score(reward=float(prompt.id in ("p2", "p3", "p4", "p5") and token_ids[0] % 2))

    scored = sample(make_model(), native, prompts, only_first, CONFIG)
    assert scored.has_signal.sum() == 4
    plan = plan_minibatches(scored, CONFIG, 0)
    assert [len(samples) for samples in plan] == [4] * 4
    assert sorted(s for samples in plan for s in samples) == list(range(16))
    assert any(plan != plan_minibatches(scored, CONFIG, iteration) for iteration in range(1, 5))
    keep = replace(CONFIG, update=replace(CONFIG.update, zero_signal="keep"))
    assert [len(samples) for samples in plan_minibatches(scored, keep, 0)] == [8] * 4


def test_rest_trains_on_right_samples_only(make_model, native, prompts):
    config = replace(CONFIG, objective=ObjectiveConfig(kind="rest"))
    scored = sample(make_model(), native, prompts, half_right, config)
    samples = sorted(s for part in plan_minibatches(scored, config, 0) for s in part)
    assert samples == scored.is_correct.flatten().nonzero()[:, 0].tolist()


def test_all_equal_rewards_change_nothing(make_model, native, prompts):
    model = make_model()
    scored = sample(model, native, prompts, lambda prompt, ids: Score(reward=1.0), CONFIG)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    statistics = PolicyTrainer(model, torch.optim.Adam(model.parameters(), lr=1.0), CONFIG).train(scored, 0, 0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert statistics.metrics() == {"steps": 0.0, "empty_steps": 4.0, "skipped_steps": 0.0}


def test_metrics_see_the_policy_move(make_model, native, prompts):
    model = make_model()
    scored = sample(model, native, prompts, half_right, CONFIG)
    metrics = (
        PolicyTrainer(model, torch.optim.Adam(model.parameters(), lr=0.01), CONFIG).train(scored, 0, 0.0).metrics()
    )
    assert metrics["steps"] == 4
    assert metrics["engine_mismatch_max"] < 1e-5
    assert 0 < metrics["kl"] < 1
    assert metrics["logratio_sequence_max"] > metrics["logratio_sequence"] > 0
    assert 2.5 < metrics["entropy"] <= math.log(24)


def test_the_first_minibatch_starts_at_ratio_one(make_model, native, prompts):
    model = make_model()
    config = with_update()
    scored = sample(model, native, prompts, half_right, config)
    metrics = PolicyTrainer(model, torch.optim.SGD(model.parameters(), lr=1.0), config).train(scored, 0, 0.0).metrics()
    assert metrics["logratio_token_max"] == 0
    assert metrics["kl"] == 0


def test_non_finite_steps_are_skipped_and_then_stop_the_run(make_model, native, prompts, caplog):
    model = make_model()
    scored = sample(model, native, prompts, half_right, CONFIG)
    poison = scored.shaped.clone()
    poison[scored.has_signal.nonzero()[0], 0] = math.inf
    broken = replace(scored, shaped=poison)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    config = replace(CONFIG, update=replace(CONFIG.update, minibatches_per_iteration=1))
    trainer = PolicyTrainer(model, torch.optim.SGD(model.parameters(), lr=1.0), config)
    with caplog.at_level(logging.WARNING):
        assert trainer.train(broken, 0, 0.0).skipped_steps == 1
    assert "step skipped" in caplog.text
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    trainer.train(scored, 1, 0.0)
    assert trainer.bad_steps == 0
    trainer.train(broken, 2, 0.0)
    trainer.train(broken, 3, 0.0)
    with pytest.raises(NumericsError, match="3 steps in a row"):
        trainer.train(broken, 4, 0.0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_learning_rate_rises_inside_an_iteration_and_falls_over_the_run():
    config = UpdateConfig(iter_warmup_steps=1, final_lr_ratio=0.2)
    assert [iteration_lr_factor(step, 0.0, config) for step in range(3)] == [0.5, 1.0, 1.0]
    assert iteration_lr_factor(2, 1.0, config) == pytest.approx(0.2)
    assert iteration_lr_factor(0, 0.5, config) == pytest.approx(0.3)
    assert iteration_lr_factor(0, 0.0, UpdateConfig(iter_warmup_steps=0)) == 1.0


def test_reset_forgets_moments(make_model):
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    model.embedding.square().sum().backward()
    optimizer.step()
    assert optimizer.state
    reset_optimizer(optimizer)
    assert not optimizer.state


@pytest.mark.parametrize(("reset", "expected"), [("state", 4), ("none", 8)])
def test_the_optimizer_is_reset_each_iteration_unless_told_not_to(make_model, native, prompts, reset, expected):
    model = make_model()
    config = replace(CONFIG, update=replace(CONFIG.update, optimizer_reset=reset))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    trainer = PolicyTrainer(model, optimizer, config)
    scored = sample(model, native, prompts, half_right, config)
    for iteration in range(2):
        trainer.train(scored, iteration, 0.0)
    assert optimizer.state[model.embedding]["step"] == expected
    assert optimizer.param_groups[0]["lr"] == 1e-4


def test_several_epochs_repeat_the_minibatches(make_model, native, prompts):
    config = replace(CONFIG, update=replace(CONFIG.update, epochs=3))
    model = make_model()
    scored = sample(model, native, prompts, half_right, config)
    metrics = PolicyTrainer(model, torch.optim.SGD(model.parameters(), lr=1e-3), config).train(scored, 0, 0.0).metrics()
    assert metrics["steps"] == 12
