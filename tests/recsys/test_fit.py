from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perilune.errors import BackendError, CheckpointError, DataError, NumericsError
from perilune.nn import initialize
from perilune.recsys.cigf import CIGF
from perilune.recsys.config import CIGFConfig, FactorConfig, FitConfig, MBGCNConfig, RecommenderConfig
from perilune.recsys.data import InteractionData
from perilune.recsys.fit import EpochPlan, _Trainer, bpr_loss, fit
from perilune.recsys.models import build_recommender
from perilune.recsys.recommender import Recommender
from perilune.recsys.sampling import Triples, TripleSampler
from perilune.report import MetricsLog, read_metrics
from perilune.seeding import make_generator
from perilune.train import CheckpointStore, TrainContext
from tests.recsys.cases import model_of, small_data

SETTINGS = FitConfig(epochs=6, batch_users=3, samples_per_user=4, lr=1e-2, eval_interval=2, checkpoint_interval_s=0)


def _data(seed: int = 0) -> InteractionData:
    return small_data(num_users=12, num_items=20, seed=seed).hold_out(0, least=2)


def _model(data: InteractionData, config: RecommenderConfig | None = None) -> Recommender:
    return build_recommender(config or CIGFConfig(dim=4), data, seed=0)


def test_the_loss_is_the_mean_of_softplus_of_differences() -> None:
    data = small_data()
    model = model_of(data)
    tables = model.tables()
    triples = Triples(users=torch.tensor([0, 2]), positives=torch.tensor([1, 3]), negatives=torch.tensor([4, 5]))
    losses = []
    for user, positive, negative in ((0, 1, 4), (2, 3, 5)):
        x = tables[user : user + 1]
        seen, unseen = (model.logits(x, tables[7 + i : 8 + i], 1) for i in (positive, negative))
        losses.append(-torch.log(torch.sigmoid(seen - unseen)))
    torch.testing.assert_close(bpr_loss(model, (tables[:7], tables[7:]), triples, 1), torch.cat(losses).mean())
    nothing = Triples(users=torch.zeros(0).long(), positives=torch.zeros(0).long(), negatives=torch.zeros(0).long())
    assert bpr_loss(model, (tables[:7], tables[7:]), nothing, 1).item() == 0


WEIGHTS = {"view": 0.3, "cart": 1.7}


def _expected_loss(model: CIGF, data: InteractionData, users: torch.Tensor, step: int) -> torch.Tensor:
    """Sum of the behaviors' weighted means over the triples of a step."""
    generator, tables = make_generator(0, "recsys", "triples", step), model.tables()
    sampler = TripleSampler(data, SETTINGS.samples_per_user)
    losses = []
    for task, weight in enumerate((0.3, 1.7, 1.0)):
        triples = sampler.draw(task, users, generator)
        x, *ys = tables[triples.users], *(tables[data.num_users + i] for i in (triples.positives, triples.negatives))
        seen, unseen = (model.logits(x, y, task) for y in ys)
        losses.append(weight * -torch.log(torch.sigmoid(seen - unseen)).mean())
    return torch.stack(losses).sum()


def test_steps_are_adam_on_the_loss_and_the_sum_of_squares() -> None:
    """Adam sees 2 lambda theta in the gradient of embeddings, attention and gate, and nothing of it elsewhere."""
    data = small_data(density=0.3)
    config = replace(
        SETTINGS, epochs=3, batch_users=3, l2=0.05, lr=1e-2, lr_decay=0.5, eval_interval=0, behavior_weights=WEIGHTS
    )
    ours, theirs = (model_of(data, range_=0.1, logit_scale=3.0) for _ in range(2))
    assert fit(ours, data, config).steps == 9
    decayed = {id(p) for p in theirs.decayed()}
    groups = [
        {"params": [p for p in theirs.parameters() if id(p) in decayed], "weight_decay": 2 * config.l2},
        {"params": [p for p in theirs.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    assert len(groups[0]["params"]) == 2 + 3 + 1
    adam = torch.optim.Adam(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    batches = [users for epoch in range(3) for users in EpochPlan(7, config, 0).epoch(epoch)]
    for step, users in enumerate(batches):
        for group in adam.param_groups:
            group["lr"] = 1e-2 * 0.5 ** (step // 2)  # two whole batches of 3 are in 7 users
        adam.zero_grad()
        _expected_loss(theirs, data, users, step).backward()
        adam.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_the_gradient_of_a_step_is_that_of_the_loss_and_lambda_times_the_squares() -> None:
    data = small_data(density=0.3)
    config = replace(SETTINGS, epochs=1, batch_users=100, l2=0.05, eval_interval=0, behavior_weights=WEIGHTS)
    ours, theirs = (model_of(data, range_=0.1, logit_scale=3.0) for _ in range(2))
    trainer = _Trainer(ours, data, config, TrainContext(), 0)
    (users,) = trainer.plan.epoch(0)
    (part,) = trainer._parts()
    trainer._train_step(part, users)
    decayed = {name: p for name, p in theirs.named_parameters() if name.endswith("weight")}
    squares = torch.stack([p.square().sum() for p in decayed.values()]).sum()
    (_expected_loss(theirs, data, users, 0) + 0.05 * squares).backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, other.grad, rtol=1e-10, atol=1e-13, msg=lambda t, name=name: f"{name}: {t}"
        )


@pytest.mark.parametrize("encoder", ["lightgcn", "lrgccf", "gcn", "ngcf"])
def test_encoders_are_not_under_the_l2_term_and_begin_small(encoder: str) -> None:
    data = small_data()
    model = build_recommender(CIGFConfig(dim=32, encoder=encoder), data, seed=0)  # pyright: ignore
    ids = {id(p): name for name, p in model.named_parameters()}
    attention = {f"attn.{k}.1.weight" for k in range(3)}
    wanted = {"user_embedding.weight", "item_embedding.weight", "decoder.gate.weight", *attention}
    assert {ids[id(p)] for p in model.decayed()} == wanted
    drawn = [p for name, p in model.named_parameters() if name.startswith("encoder") and p.ndim == 2]
    assert len(drawn) == {"lightgcn": 0, "lrgccf": 0, "gcn": 2, "ngcf": 4}[encoder]
    for matrix in drawn:
        assert 0.009 < matrix.std() < 0.011


@pytest.mark.parametrize(
    "config",
    [
        CIGFConfig(dim=8), CIGFConfig(dim=8, order="paper"), CIGFConfig(dim=8, decoder="mmoe"),
        FactorConfig(kind="mf", dim=8), FactorConfig(dim=8), MBGCNConfig(dim=8),
    ],
)  # fmt: skip
def test_training_lowers_the_loss_of_every_model(config: RecommenderConfig) -> None:
    data = small_data(num_users=20, num_items=30, density=0.15)
    model = _model(data, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = fit(_model(data, config), data, replace(SETTINGS, epochs=1, eval_interval=0, l2=0.0)).loss
    last = fit(model, data, replace(SETTINGS, epochs=60, eval_interval=0, l2=0.0)).loss
    assert last < 0.8 * first
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    # A task's own constant cancels in a difference of scores.
    assert still <= {"decoder.tower.bias"}


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    data = _data()
    weights = []
    for seed in (0, 0, 1):
        model = _model(data)
        fit(model, data, SETTINGS, seed=seed)
        weights.append(model.item_embedding.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    data = _data()
    whole = _model(data)
    expected = fit(whole, data, SETTINGS)

    asked = iter([False, False, True, *[False] * 99])
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        context = TrainContext(store=CheckpointStore(tmp_path / "store"), metrics=metrics, config_hash="a")
        stopped = TrainContext(
            store=context.store, metrics=metrics, config_hash="a", should_stop=lambda: next(asked),
            stopped=lambda: InterruptedError("stopped"),
        )  # fmt: skip
        with pytest.raises(InterruptedError):
            fit(_model(data), data, SETTINGS, stopped)
        resumed = _model(data)
        result = fit(resumed, data, SETTINGS, context)
    assert (result.epochs, result.steps, result.loss) == (6, expected.steps, expected.loss)
    assert result.validation == expected.validation
    assert result.best_epoch == expected.best_epoch
    for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert [record.step for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(CheckpointError, match="was written with settings or data a, these are b"):
        fit(_model(data), data, SETTINGS, replace(context, config_hash="b", metrics=None))


def test_the_best_epoch_is_kept_and_patience_ends_the_wait() -> None:
    data = _data()
    model = _model(data)
    config = replace(SETTINGS, epochs=200, eval_interval=1, patience=3, lr=0.3)
    result = fit(model, data, config)
    assert result.best_epoch is not None
    assert result.epochs == result.best_epoch + 3 < 200
    from perilune.recsys.evaluation import Ranker

    found = Ranker(data, protocol="full", split="validation").rank(model.scorer()).summary((10,))
    assert found == pytest.approx(result.validation)


def test_the_test_set_is_never_looked_at() -> None:
    data = _data()
    other = replace(data, test=np.full_like(data.test, -1))
    models = []
    for seen in (data, other):
        models.append(_model(seen))
        fit(models[-1], seen, SETTINGS)
    assert torch.equal(models[0].item_embedding.weight, models[1].item_embedding.weight)


def test_a_behavior_without_pairs_leaves_no_nan() -> None:
    data = small_data(empty=("cart",))
    model = _model(data)
    assert math.isfinite(fit(model, data, replace(SETTINGS, eval_interval=0)).loss)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_weight_of_zero_leaves_a_behavior_out_of_the_loss() -> None:
    data = _data()
    models = []
    for weights in ({"view": 0.0, "cart": 0.0}, {"view": 0.0, "cart": 0.0, "buy": 1.0}, None):
        models.append(_model(data))
        fit(models[-1], data, replace(SETTINGS, behavior_weights=weights))
    assert torch.equal(models[0].item_embedding.weight, models[1].item_embedding.weight)
    assert not torch.equal(models[0].item_embedding.weight, models[2].item_embedding.weight)
    with pytest.raises(DataError, match="no behavior 'pv'"):
        fit(_model(data), data, replace(SETTINGS, behavior_weights={"pv": 1.0}))


def test_a_loss_that_is_no_number_is_said() -> None:
    data = _data()
    model = _model(data)
    with torch.no_grad():
        model.user_embedding.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="epoch 1: the loss is nan; lower lr"):
        fit(model, data, SETTINGS)


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = _data()
    with pytest.raises(BackendError, match='fit: device "cuda" was asked for, and there is no GPU'):
        fit(_model(data), data, replace(SETTINGS, device="cuda"))


def test_validation_ranks_no_more_users_than_it_may() -> None:
    data = _data()
    assert data.validation is not None
    there = np.flatnonzero(data.validation >= 0)
    seen: list[np.ndarray] = []

    class Watched(CIGF):
        def score(self, x: torch.Tensor, y: torch.Tensor, task: int) -> torch.Tensor:
            seen.append(np.array(len(x)))
            return super().score(x, y, task)

    assert len(there) > 5
    for most, wanted in ((5, 5), (len(there), len(there)), (0, len(there))):
        seen.clear()
        model = initialize(Watched(CIGFConfig(dim=4), data), seed=0)
        fit(model, data, replace(SETTINGS, epochs=2, validation_users=most))  # pyright: ignore[reportArgumentType]
        assert sum(seen) == wanted
    with pytest.raises(ValueError, match="validation_users must be >= 0, got -1"):
        FitConfig(validation_users=-1)
