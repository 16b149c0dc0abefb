"""What is read from attention and expert layers."""

import pytest
import torch

from perilune.train import LayerMonitor, lm_loss
from perilune.train.monitors import load_entropy, load_imbalance, load_shares
from tests.train.tiny import make_model, make_source


def test_a_model_without_such_layers_has_no_such_metrics() -> None:
    monitor = LayerMonitor(torch.nn.Linear(2, 2))
    assert monitor.metrics() == {}
    monitor.finish_step(1e-3)


def test_counts_start_anew_after_a_step_and_after_a_skipped_one() -> None:
    model, _ = make_model()
    monitor = LayerMonitor(model)
    for finish in (lambda: monitor.finish_step(1e-2), monitor.skip_step):
        before = model.moe_layers()[0].router_bias.clone()
        lm_loss(model, make_source().batch(0, 0))
        seen = monitor.metrics()
        assert seen["max_logit"] > -float("inf")
        assert model.moe_layers()[0].expert_load.sum() == 24 * 2
        finish()
        assert monitor.metrics()["max_logit"] == -float("inf")
        assert model.moe_layers()[0].expert_load.sum() == 0
        moved = not torch.equal(before, model.moe_layers()[0].router_bias)
        assert moved == (finish is not monitor.skip_step and finish != monitor.skip_step)


def test_maxima_are_over_all_micro_batches() -> None:
    model, _ = make_model()
    monitor = LayerMonitor(model)
    single = []
    for step in range(3):
        lm_loss(model, make_source().batch(step, 0))
        single.append(monitor.metrics()["max_logit"])
        monitor.skip_step()
    for step in range(3):
        lm_loss(model, make_source().batch(step, 0))
    assert monitor.metrics()["max_logit"] == max(single)


def test_evaluation_counts_nothing() -> None:
    model, _ = make_model()
    monitor = LayerMonitor(model)
    with torch.no_grad():
        lm_loss(model.eval(), make_source().batch(0, 0))
    assert monitor.metrics()["max_logit"] == -float("inf")
    assert model.moe_layers()[0].expert_load.sum() == 0


@pytest.mark.parametrize(
    ("load", "imbalance", "entropy"),
    [([5.0, 5.0, 5.0, 5.0], 1.0, 1.0), ([8.0, 0.0, 0.0, 0.0], 4.0, 0.0), ([0.0, 0.0], 1.0, 1.0), ([3.0], 1.0, 1.0)],
)
def test_load_measures(load: list[float], imbalance: float, entropy: float) -> None:
    shares = load_shares(torch.tensor(load))
    assert float(shares.sum()) == pytest.approx(1)
    assert load_imbalance(shares) == pytest.approx(imbalance)
    assert load_entropy(shares) == pytest.approx(entropy, abs=1e-7)
