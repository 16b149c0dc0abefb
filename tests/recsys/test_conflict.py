"""Conflicts of tasks: cases in which what the gradients do is known, and every decoder."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from perilune.recsys import from_behaviors
from perilune.recsys.cigf import CIGF
from perilune.recsys.config import DecoderName, FitConfig
from perilune.recsys.conflict import SHARED, gradient_conflict
from perilune.recsys.decoders import MESI
from perilune.recsys.fit import EpochPlan, bpr_loss
from perilune.recsys.sampling import TripleSampler
from perilune.seeding import make_generator
from tests.recsys.cases import model_of, small_data

SETTINGS = FitConfig(batch_users=4, samples_per_user=3)


def choose(model: CIGF, biases: list[list[float]]) -> None:
    """Make each task's gate a constant."""
    assert isinstance(model.decoder, MESI)
    for task, bias in enumerate(biases):
        gate = model.decoder.gate_of(task)
        gate.weight.data.zero_()
        gate.bias.data.copy_(torch.tensor(bias))


@pytest.mark.parametrize(("bought", "cosine"), [(1, -1.0), (0, 1.0)])
def test_one_who_buys_what_was_not_viewed_is_in_conflict(bought, cosine):
    """Of two items one is viewed; under one even gate both tasks score alike, so the gradients are along one line."""
    one = np.array([0])
    pairs = {"view": (one, one, None), "buy": (one, np.array([bought]), None)}
    data = from_behaviors(pairs, [None], num_users=1, num_items=2)
    model = model_of(data, logit_scale=1.0)
    choose(model, [[0.0, 0.0]])
    found = gradient_conflict(model, data, steps=3, config=SETTINGS)
    assert [row.place for row in found.rows] == ["view", "buy", SHARED]
    for row in found.rows:
        assert (row.users, row.negative) == (3, float(cosine < 0))
        assert row.cosine == pytest.approx(cosine)
        assert 0 < row.magnitude <= 1


def test_gates_that_read_their_own_expert_alone_leave_no_conflict_but_in_the_embeddings():
    data = small_data()
    model = model_of(data, gate_sharing="per_task")
    choose(model, [[1e4 * (task == expert) for expert in range(3)] for task in range(3)])
    found = gradient_conflict(model, data, steps=4, config=SETTINGS)
    for row in found.rows:
        assert (row.users > 0) == (row.place == SHARED)
        assert (row.negative is None) == (row.place != SHARED)
    choose(model, [[8.0 * (task == expert) for expert in range(3)] for task in range(3)])
    nearly = gradient_conflict(model, data, steps=4, config=SETTINGS)
    assert nearly.row("cart", "buy", "cart").users > 0
    assert nearly.row("cart", "buy", "cart").magnitude < 0.1
    with pytest.raises(KeyError):
        nearly.row("cart", "buy", "wish")


@pytest.mark.parametrize("decoder", get_args(DecoderName))
def test_every_decoder_has_the_cosines_of_a_loop(decoder):
    data = small_data(num_users=9, density=0.3)
    model = model_of(data, decoder=decoder, logit_scale=3.0)
    before = [p.clone() for p in model.parameters()]
    found = gradient_conflict(model, data, steps=5, seed=2, config=SETTINGS)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    plan, sampler = EpochPlan(9, SETTINGS, 2), TripleSampler(data, 3)
    cosines: dict[tuple[str, int, int], list[float]] = {}
    batches = [*plan.epoch(0), *plan.epoch(1)][:5]
    for step, users in enumerate(batches):
        generator = make_generator(2, "recsys", "conflict", step)
        triples = [sampler.draw(task, users, generator) for task in range(3)]
        gradients = []
        for task in range(3):
            model.zero_grad()
            tables = model.tables()
            tables.retain_grad()
            bpr_loss(model, (tables[:9], tables[9:]), triples[task], task).backward()
            assert tables.grad is not None
            shared = model.user_embedding.weight.grad
            gradients.append({**{name: tables.grad[:, j] for j, name in enumerate(model.behaviors)}, SHARED: shared})
        for first, second in ((0, 1), (0, 2), (1, 2)):
            for place in (*model.behaviors, SHARED):
                for user in users.tolist():
                    a, b = gradients[first][place][user], gradients[second][place][user]
                    if a.norm() > 0 and b.norm() > 0:
                        value = float(a @ b / a.norm() / b.norm())
                        cosines.setdefault((place, first, second), []).append(value)
    for row in found.rows:
        first, second = (model.behaviors.index(task) for task in row.tasks)
        expected = cosines.get((row.place, first, second), [])
        assert (row.decoder, row.users) == (decoder, len(expected))
        assert row.cosine == (pytest.approx(np.mean(expected)) if expected else None)
        assert row.negative == (pytest.approx(np.mean(np.array(expected) < 0)) if expected else None)
    experts = [row for row in found.rows if row.place != SHARED]
    if decoder in ("dot", "bilinear", "shared_bottom_linear"):
        # the first two read one table a task; the users' part of the last cancels between an item and another
        assert not any(row.users for row in experts)
    else:
        assert all(row.users for row in experts)


def test_a_task_without_pairs_meets_nobody():
    data = small_data(empty=("cart",))
    found = gradient_conflict(model_of(data), data, steps=2, config=SETTINGS)
    assert not any(row.users for row in found.rows if "cart" in row.tasks)
    assert found.row(SHARED, "view", "buy").users > 0
    nobody = gradient_conflict(model_of(data), data, steps=0)
    assert nobody.row(SHARED, "view", "buy").cosine is None
