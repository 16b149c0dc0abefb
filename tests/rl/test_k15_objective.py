import math

import pytest
import torch

from perilune.rl.config import ObjectiveConfig
from perilune.rl.objective import (
    group_advantages,
    k15_loss,
    k15_residuals,
    log_partition,
    mean_reward,
    objective_loss,
    policy_gradient_loss,
    rest_loss,
)

REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
LOGPROBS = [-10.0, -12.0, -8.0, -20.0]
OLD = torch.tensor([-11.0, -12.0, -8.5, -19.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 0], {0.1: 0.861384, 0.5: 0.477229, 1: 0.357374, 5: 0.269366}),
        ([1, 1, 1, 0], {0.1: 0.971233, 0.5: 0.878221, 1: 0.827989, 5: 0.768119}),
    ],
)
def test_log_partition_matches_the_published_numbers(rewards, expected):
    for tau, value in expected.items():
        got = log_partition(torch.tensor([rewards], dtype=torch.float64), tau)
        assert got.item() == pytest.approx(value, abs=1e-6)


def test_log_partition_is_stable_and_tends_to_the_largest_reward():
    got = log_partition(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 1e-3)
    assert got.item() == pytest.approx(1 - 1e-3 * math.log(4), abs=1e-6)


def test_invalid_members_have_no_part_in_a_baseline():
    rewards = torch.tensor([[1.0, math.nan, 0.0]])
    is_valid = torch.tensor([[True, False, True]])
    assert mean_reward(rewards, is_valid).item() == 0.5
    expected = log_partition(torch.tensor([[1.0, 0.0]]), 0.3)
    assert torch.equal(log_partition(rewards, 0.3, is_valid), expected)
    advantages = group_advantages(rewards, is_valid, ObjectiveConfig())
    assert advantages.tolist() == [[0.5, 0.0, -0.5]]


@pytest.mark.parametrize(
    ("tau", "residuals", "loss", "gradient"),
    [
        (0.2, [0.3, -0.5, 0.4, -0.3], 0.36875, [-0.075, 0.125, -0.1, 0.075]),
        (0.1, [0.4, -0.5, 0.45, -0.4], 0.965625, [-0.1, 0.125, -0.1125, 0.1]),
    ],
)
def test_k15_loss_matches_the_worked_example(tau, residuals, loss, gradient):
    logprobs = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    advantages = REWARDS - REWARDS.mean()
    got = k15_loss(logprobs, OLD, advantages, tau=tau, denominator=4)
    torch.testing.assert_close(
        k15_residuals(logprobs, OLD, advantages, tau=tau), torch.tensor(residuals, dtype=torch.float64)
    )
    assert got.item() == pytest.approx(loss, abs=1e-12)
    (grad,) = torch.autograd.grad(got, logprobs)
    torch.testing.assert_close(grad, torch.tensor(gradient, dtype=torch.float64))
    squared = k15_loss(logprobs, OLD, advantages, tau=tau, denominator=4, scale="k2_squared")
    assert squared.item() == pytest.approx(loss * 2 * tau, abs=1e-12)


@pytest.mark.parametrize("baseline", ["mean", "log_z"])
def test_negative_gradient_is_equation_3(baseline):
    """Ascent direction 1/k sum [grad l (r - b) - tau/2 grad d^2], computed by hand for a softmax policy."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, generator=generator)
    old_logits = torch.randn(6, dtype=torch.float64, generator=generator)
    arms = torch.tensor([0, 3, 5, 3])
    rewards = torch.tensor([[1.0, 0.0, 0.3, 1.0]], dtype=torch.float64)
    config = ObjectiveConfig(tau=0.3, baseline=baseline)
    advantages = group_advantages(rewards, torch.ones(1, 4, dtype=torch.bool), config)[0]
    parameter = logits.clone().requires_grad_()
    logprobs = parameter.log_softmax(-1)[arms]
    old = old_logits.log_softmax(-1)[arms]
    loss = objective_loss(config, logprobs, old, advantages, rewards[0] > 0.5, denominator=4)
    (grad,) = torch.autograd.grad(loss, parameter)

    one_hot = torch.nn.functional.one_hot(arms, 6).double()
    score = one_hot - logits.softmax(-1)
    d = (logprobs - old).detach()
    ascent = (score * advantages[:, None] - 0.3 * d[:, None] * score).mean(0)
    assert (grad + ascent).abs().max() < 1e-15


def test_at_the_reference_the_gradient_is_reinforce_with_a_group_mean_baseline():
    logits = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    arms, rewards = torch.tensor([1, 2, 2, 4]), torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    logprobs = logits.log_softmax(-1)[arms]
    advantages = rewards - rewards.mean()
    k15 = k15_loss(logprobs, logprobs.detach(), advantages, tau=0.1, denominator=4)
    plain = policy_gradient_loss(logprobs, advantages, denominator=4)
    left_out_one = rewards - (rewards.sum() - rewards) / 3
    rloo = policy_gradient_loss(logprobs, left_out_one, denominator=4)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (k15, plain, rloo)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grads[2], grads[1] * 4 / 3, rtol=1e-12, atol=1e-15)


def minimize_surrogate(reward, old, tau, baseline):
    """Minimize the exact expectation of the squared residual over all arms by Newton-like full-batch descent."""
    logits = old.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        d = logits.log_softmax(-1) - old.log()
        loss = (old * (reward - baseline - tau * d).square()).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return logits.detach().softmax(-1)


def test_exact_log_z_surrogate_recovers_the_optimum_and_the_mean_baseline_does_not():
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(6, dtype=torch.float64, generator=generator).softmax(-1)
    reward = torch.rand(6, dtype=torch.float64, generator=generator)
    tau = 0.3
    optimum = old * (reward / tau).exp()
    normalizer = optimum.sum()
    optimum = optimum / normalizer
    exact = minimize_surrogate(reward, old, tau, tau * normalizer.log())
    mean = minimize_surrogate(reward, old, tau, (old * reward).sum())
    assert (exact - optimum).abs().max() < 1e-7
    assert (mean - optimum).abs().max() > 0.01
    start, with_mean, best = ((p * reward).sum().item() for p in (old, mean, optimum))
    assert start < with_mean < best


def test_identity_of_the_optimum_holds_off_policy():
    """r - tau log Z = tau log(pi*/pi_i) for every arm, so the surrogate is zero under any sampling of arms."""
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reward = torch.tensor([0.0, 1.0, 0.4], dtype=torch.float64)
    tau = 0.7
    log_z = (old * (reward / tau).exp()).sum().log()
    best = (old * (reward / tau).exp()).log() - log_z
    residual = k15_residuals(best, old.log(), reward - tau * log_z, tau=tau)
    assert residual.abs().max() < 1e-15


@pytest.mark.parametrize("kind", ["k15", "policy_gradient", "rest"])
def test_losses_add_up_over_any_cut_of_a_minibatch(kind):
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    is_correct = advantages > 0
    config = ObjectiveConfig(kind=kind)
    order = torch.randperm(12, generator=generator)
    whole = objective_loss(config, logprobs, old, advantages, is_correct, denominator=12)
    for size in (1, 5, 12):
        parts = sum(
            objective_loss(config, logprobs[i], old[i], advantages[i], is_correct[i], denominator=12)
            for i in order.split(size)
        )
        assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


def test_rest_ignores_wrong_samples():
    logprobs = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    loss = rest_loss(logprobs, torch.tensor([True, False, True]), denominator=4)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert grad.tolist() == [-0.25, 0.0, -0.25]
