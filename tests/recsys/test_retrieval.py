from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from perilune.errors import DataError
from perilune.recsys import InteractionData, from_behaviors
from perilune.recsys.config import CIGFConfig, FactorConfig, MBGCNConfig
from perilune.recsys.models import build_recommender
from perilune.recsys.recommend import RecommendationEngine
from perilune.recsys.recommender import Recommender
from perilune.recsys.retrieval import CandidateIndex, Kind, recall
from tests.recsys.cases import model_of, scrambled, small_data

pytest.importorskip("faiss")


def large_data(num_users: int = 6, num_items: int = 3000, bought: int = 20) -> InteractionData:
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(num_users), bought)
    pairs = {name: (users, generator.integers(num_items, size=len(users)), None) for name in ("view", "cart", "buy")}
    return from_behaviors(pairs, [None] * num_users, num_users=num_users, num_items=num_items)


def engines(model: Recommender, data: InteractionData, kind: Kind = "flat", per_expert: int = 200, **settings: Any):
    """One engine that scores all items, and one with an index."""
    with torch.no_grad():
        tables = model.tables()
    index = CandidateIndex.build(model, tables, kind, per_expert)
    exact = RecommendationEngine(model, data, tables=tables, **settings)
    return exact, RecommendationEngine(model, data, tables=tables, candidates=index, **settings)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_candidates_of_mesi_are_the_best_of_each_expert(kind: Kind) -> None:
    data = large_data()
    model = model_of(data)
    tables = model.tables().detach()
    index = CandidateIndex.build(model, tables, kind, per_expert=30)
    found = index.search(tables[:6], 2)
    shares = []
    for user in range(6):
        scores = torch.einsum("kd,ikd->ki", tables[user], tables[6:])
        wanted = np.unique(scores.topk(30).indices)
        assert len(wanted) <= len(found[user]) <= 4 * 30
        assert (np.diff(found[user]) > 0).all()
        shares.append(np.isin(wanted, found[user]).mean())
    assert np.mean(shares) >= (1.0 if kind == "flat" else 0.9)


@pytest.mark.parametrize(
    "config",
    [CIGFConfig(dim=4, decoder="bilinear"), CIGFConfig(dim=4, decoder="dot"), FactorConfig(dim=8), MBGCNConfig(dim=4)],
    ids=str,
)
def test_scores_that_are_products_are_found_exactly_with_k_candidates(config: Any) -> None:
    data = large_data()
    model = scrambled(build_recommender(config, data, seed=0), 1, 0.5)
    exact, indexed = engines(model, data, per_expert=10)  # pyright: ignore[reportArgumentType]
    for user in range(6):
        for behavior in exact.behaviors:
            wanted, found = (e.recommend(user, behavior=behavior) for e in (exact, indexed))
            assert [(one.item, one.because) for one in found] == [(one.item, one.because) for one in wanted]
            np.testing.assert_allclose([o.score for o in found], [o.score for o in wanted], rtol=1e-4, atol=1e-5)


def test_an_index_is_asked_for_candidates_and_the_model_scores_them(monkeypatch: pytest.MonkeyPatch) -> None:
    data = large_data()
    exact, indexed = engines(model_of(data), data, per_expert=300)
    monkeypatch.setattr(indexed, "_exact", None)
    for user in range(6):
        wanted = {one.item: one.score for one in exact.recommend(user, k=100, exclude=())}
        found = indexed.recommend(user, exclude=())
        assert len(found) == 10
        for one in found:
            assert wanted[one.item] == pytest.approx(one.score, rel=1e-5)
    events = [(5, "view"), (7, "buy")]
    assert len(indexed.recommend_events(events)) == 10


def test_filters_do_not_starve_an_answer() -> None:
    """Everything an index would give first is left out: by purchases, by name, by quota."""
    data = large_data(bought=100)
    exact, indexed = engines(model_of(data), data, per_expert=5, categories=dict.fromkeys(range(0, 3000, 2), "x"))
    for user in range(3):
        best = [one.item for one in exact.recommend(user, k=300)]
        for filters in ({"deny": best[:290]}, {"quotas": {"x": 0}}, {"allow": best[200:]}, {"deny": best, "k": 50}):
            found = indexed.recommend(user, **filters)
            assert len(found) == filters.get("k", 10)
            assert not {one.item for one in found} & set(filters.get("deny", ()))
            if "quotas" in filters:
                assert all(one.item % 2 for one in found)
        assert [one.item for one in indexed.recommend(user, allow=best[200:])] == best[200:210]
        assert len(indexed.recommend(user, k=3000)) == 3000 - len(
            np.unique(data.target.items[data.target.users == user])
        )


def test_recall_rises_with_the_number_of_candidates_to_one() -> None:
    data = large_data()
    exact, indexed = engines(model_of(data), data)
    assert indexed.candidates is not None
    shares = recall(exact, indexed.candidates, range(6), sizes=(1, 10, 100, 3000))
    assert list(shares) == [1, 10, 100, 3000]
    assert list(shares.values()) == sorted(shares.values())
    assert shares[1] < 0.6
    assert shares[3000] == 1
    assert recall(exact, indexed.candidates, [0], behavior="view", sizes=(3000,)) == {3000: 1}


def test_items_that_no_expert_likes_best_are_found_by_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    data = large_data()
    model = model_of(data)
    tables = torch.randn(data.num_users + data.num_items, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        model.decoder.gate.weight.mul_(0.01)  # pyright: ignore
    engine = RecommendationEngine(model, data, tables=tables)
    index = CandidateIndex.build(model, tables)
    mixed = recall(engine, index, range(6), sizes=(20,))[20]
    monkeypatch.setattr(model, "queries", lambda x, task: {j: x[:, j] for j in range(3)})
    alone = recall(engine, index, range(6), sizes=(20,))[20]
    assert alone < 0.9 < mixed


def test_small_catalogs_are_scored_whole() -> None:
    data = small_data()
    for kind in ("flat", "ivf", "hnsw"):
        exact, indexed = engines(model_of(data), data, kind)
        assert indexed.recommend(0, k=9) == exact.recommend(0, k=9)
        assert indexed.candidates is not None
        assert indexed.candidates.search(exact.rows(np.array([0])), 2)[0].tolist() == list(range(9))


def test_what_cannot_be_searched_says_so() -> None:
    data = small_data()
    model = model_of(data, decoder="ple")
    with pytest.raises(DataError, match="candidates need a decoder whose experts are inner products"):
        CandidateIndex.build(model, model.tables())
    model = model_of(data)
    with pytest.raises(ValueError, match="kind must be one of flat, ivf, hnsw, got 'annoy'"):
        CandidateIndex.build(model, model.tables(), "annoy")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="per_expert must be >= 1, got 0"):
        CandidateIndex.build(model, model.tables(), per_expert=0)


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    model = model_of(small_data())
    with pytest.raises(DataError, match=r"pip install 'perilune\[recsys\]'"):
        CandidateIndex.build(model, model.tables())
