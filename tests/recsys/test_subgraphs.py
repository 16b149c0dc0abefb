from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import DataError
from perilune.recsys import InteractionData, from_behaviors
from perilune.recsys.config import CIGFConfig, FactorConfig, FitConfig, SubgraphConfig
from perilune.recsys.fit import EpochPlan, fit
from perilune.recsys.models import build_recommender
from perilune.recsys.subgraphs import SubgraphSampler, restricted
from perilune.train import CheckpointStore, TrainContext
from tests.recsys.cases import model_of, small_data

SETTINGS = FitConfig(epochs=4, batch_users=3, samples_per_user=4, lr=1e-2, eval_interval=2, checkpoint_interval_s=0)
EVERYTHING = SubgraphConfig(chunk_users=1000, rounds=3, nodes_per_round=1000)


def _union(data: InteractionData) -> np.ndarray:
    found = np.zeros((data.num_users, data.num_items), bool)
    for pairs in data.behaviors.values():
        found[pairs.users, pairs.items] = True
    return found


def _reached(union: np.ndarray, seeds: list[int], rounds: int) -> tuple[set[int], set[int]]:
    """Who is reached in rounds without limits: both sides grow at once from what the round before had."""
    users, items = set(seeds), {int(i) for u in seeds for i in np.flatnonzero(union[u])}
    known = set(users)  # whose items are weighed already
    touched = {int(u) for i in items for u in np.flatnonzero(union[:, i])}
    for _ in range(rounds):
        new_users = touched - users
        users |= new_users
        new_items = {int(i) for u in known for i in np.flatnonzero(union[u])} - items
        items |= new_items
        touched |= {int(u) for i in new_items for u in np.flatnonzero(union[:, i])}
        known |= new_users
    return users, items


@given(
    seed=st.integers(0, 10**6), density=st.floats(0, 0.3), count=st.integers(1, 5),
    rounds=st.integers(0, 3), most=st.integers(0, 6),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_a_part_grows_from_its_seeds_within_its_limits(
    seed: int, density: float, count: int, rounds: int, most: int
) -> None:
    data = small_data(num_users=8, num_items=11, density=density, seed=seed)
    generator = np.random.default_rng(seed)
    seeds = generator.permutation(8)[:count]
    part = SubgraphSampler(data, SubgraphConfig(rounds=rounds, nodes_per_round=most)).draw(seeds, generator)
    assert set(seeds.tolist()) <= set(part.users.tolist())
    assert len(part.users) <= count + rounds * most
    assert len(part.items) <= count + rounds * most
    union, within = _union(data), _union(part.data)
    for name, pairs in part.data.behaviors.items():
        whole = data.behaviors[name]
        expected = {
            (int(u), int(i))
            for u, i in zip(whole.users, whole.items, strict=True)
            if u in part.users and i in part.items
        }
        assert set(zip(part.users[pairs.users].tolist(), part.items[pairs.items].tolist(), strict=True)) == expected
    assert within.any(0).all()  # nobody is in without a pair, but for seeds
    others = ~np.isin(part.users, seeds)
    assert within[others].any(1).all()
    assert (within == union[np.ix_(part.users, part.items)]).all()


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_without_limits_all_that_is_reached_is_in(rounds: int) -> None:
    compared = 0
    for seed in range(20):
        data = small_data(num_users=40, num_items=30, behaviors=("buy",), density=0.05, seed=seed)
        seeds = [u for u in range(40) if u % 2 == 0]
        union = _union(data)
        if union[seeds].any(0).sum() > len(seeds):  # the first draw takes no more items than there are seeds
            continue
        compared += 1
        sampler = SubgraphSampler(data, SubgraphConfig(rounds=rounds, nodes_per_round=1000))
        part = sampler.draw(np.array(seeds), np.random.default_rng(seed))
        # What no round could fill is asked for once more.
        users, items = _reached(union, seeds, rounds + 1 if rounds else 0)
        assert (set(part.users.tolist()), set(part.items.tolist())) == (users, items)
    assert compared > 5


def test_draws_are_by_the_squares_of_the_shares_without_replacement() -> None:
    """Two seeds with items {0, 1} and {1, 2, 3}: shares 1/2, 1/2 + 1/3, 1/3, 1/3, of which two are drawn."""
    pairs = {"buy": (np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 1, 2, 3, 4]), None)}
    data = from_behaviors(pairs, [None] * 3, num_users=3, num_items=5)
    sampler = SubgraphSampler(data, SubgraphConfig(rounds=0, nodes_per_round=0))
    generator, draws = np.random.default_rng(0), 20_000
    counts = Counter(tuple(sampler.draw(np.array([0, 1]), generator).items.tolist()) for _ in range(draws))
    weights = np.square([1 / 2, 5 / 6, 1 / 3, 1 / 3])
    expected: Counter[tuple[int, ...]] = Counter()
    for first, second in permutations(range(4), 2):
        expected[tuple(sorted((first, second)))] += (
            weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        )
    assert set(counts) == set(expected)
    for drawn, probability in expected.items():
        error = np.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[drawn] / draws - probability) < 5 * error


def test_what_a_round_cannot_fill_the_next_may_take() -> None:
    """A chain u0 - i0 - u1 - i1 - u2 ...: each round finds one user; what is missing is asked for again."""
    users = [0, 1, 1, 2, 2, 3, 3, 4, 4]
    items = [0, 0, 1, 1, 2, 2, 3, 3, 4]
    data = from_behaviors({"buy": (np.array(users), np.array(items), None)}, [None] * 5, num_users=5, num_items=5)
    generator = np.random.default_rng(0)
    for rounds, expected in ((0, [0]), (1, [0, 1]), (2, [0, 1, 2])):
        part = SubgraphSampler(data, SubgraphConfig(rounds=rounds, nodes_per_round=1)).draw(np.array([0]), generator)
        assert part.users.tolist() == expected
    # Two a round: of each round one place is left, and the last round finds one more user.
    part = SubgraphSampler(data, SubgraphConfig(rounds=2, nodes_per_round=2)).draw(np.array([0]), generator)
    assert part.users.tolist() == [0, 1, 2]


@pytest.mark.parametrize("order", ["official", "paper"])
@pytest.mark.parametrize("hide", [False, True])
def test_a_part_is_represented_as_by_a_model_of_that_part(order: str, hide: bool) -> None:
    data = small_data(num_users=8, num_items=12, density=0.3)
    model = model_of(data, order=order, hide_target_pairs=hide, layers=3)
    users, items = torch.arange(8), torch.arange(12)
    whole = model.tables_of(users, items, model.graph_of(data))
    torch.testing.assert_close(whole, model.tables())
    part = restricted(data, np.array([1, 4, 6]), np.array([0, 3, 5, 11]))
    users, items = torch.from_numpy(part.users), torch.from_numpy(part.items)
    alone = model_of(part.data, order=order, hide_target_pairs=hide, layers=3)
    alone.load_state_dict(
        model.state_dict()
        | {
            "user_embedding.weight": model.user_embedding.weight[users],
            "item_embedding.weight": model.item_embedding.weight[items],
        }
    )
    torch.testing.assert_close(model.tables_of(users, items, model.graph_of(part.data)), alone.tables())


def test_a_part_with_everything_trains_as_the_whole() -> None:
    data = small_data(num_users=12, num_items=20).hold_out(0, least=2)
    assert _union(data).any(0).all()
    models = [build_recommender(CIGFConfig(dim=4), data, seed=0) for _ in range(2)]
    settings = replace(SETTINGS, batch_users=4)
    whole, by_parts = (
        fit(model, data, replace(settings, subgraph=subgraph))
        for model, subgraph in zip(models, (None, EVERYTHING), strict=True)
    )
    assert (whole.loss, whole.steps, whole.validation) == (by_parts.loss, by_parts.steps, by_parts.validation)
    for mine, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, other)


def test_training_by_parts_lowers_the_loss_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data = small_data(num_users=40, num_items=60, density=0.1)
    parts = SubgraphConfig(chunk_users=10, rounds=1, nodes_per_round=8)
    config = replace(SETTINGS, epochs=20, eval_interval=0, l2=0.0, subgraph=parts)

    def model():
        return build_recommender(CIGFConfig(dim=8), data, seed=0)

    first = fit(model(), data, replace(config, epochs=1)).loss
    whole = model()
    expected = fit(whole, data, config)
    assert expected.loss < 0.8 * first
    store, asked = CheckpointStore(tmp_path), iter([False, True, *[False] * 99])
    stopped = TrainContext(store=store, should_stop=lambda: next(asked), stopped=lambda: InterruptedError("stopped"))
    with pytest.raises(InterruptedError):
        fit(model(), data, config, stopped)
    resumed = model()
    assert fit(resumed, data, config, TrainContext(store=store)).loss == expected.loss
    for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_batches_that_are_not_full_are_left_out_unless_there_is_no_other() -> None:
    plan = EpochPlan(23, FitConfig(batch_users=4, subgraph=SubgraphConfig(chunk_users=10)), seed=0)
    assert [len(chunk) for chunk in plan.chunks(0)] == [10, 10, 3]
    assert [len(batch) for batch in plan.epoch(0)] == [4, 4, 4, 4, 3]
    assert plan.steps == 5


def test_users_without_any_pair_are_a_part_to_learn_nothing_from() -> None:
    data = from_behaviors(
        {"view": (np.zeros(0, int), np.zeros(0, int), None), "buy": (np.array([0]), np.array([1]), None)},
        [None] * 4, num_users=4, num_items=3,
    )  # fmt: skip
    model = build_recommender(CIGFConfig(dim=4), data, seed=0)
    fit(model, data, replace(SETTINGS, eval_interval=0, subgraph=SubgraphConfig(chunk_users=1)))
    assert all(p.isfinite().all() for p in model.parameters())


def test_parts_are_for_a_cigf() -> None:
    data = small_data()
    with pytest.raises(DataError, match="subgraph needs a cigf, the model is a FactorModel"):
        fit(build_recommender(FactorConfig(dim=4), data, seed=0), data, replace(SETTINGS, subgraph=EVERYTHING))
