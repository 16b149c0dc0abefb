from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from perilune.errors import DataError, NumericsError, UnknownIdError
from perilune.recsys import NONE, FitConfig, FunnelConfig, InteractionData, fit, from_behaviors, funnel_log, temporal
from perilune.recsys.cigf import CIGF
from perilune.recsys.config import CIGFConfig, FactorConfig, MBGCNConfig
from perilune.recsys.ids import IdMap
from perilune.recsys.models import build_recommender
from perilune.recsys.recommend import Reason, Recommendation, RecommendationEngine
from perilune.recsys.recommender import Recommender
from tests.recsys.cases import model_of, scrambled, small_data

USERS = np.array([f"u{n}" for n in range(7)])
ITEMS = np.array([f"item-{n}" for n in range(9)])


def named(data: InteractionData) -> InteractionData:
    return replace(data, user_ids=USERS[: data.num_users], item_ids=ITEMS[: data.num_items])


def engine_of(data: InteractionData | None = None, model: Recommender | None = None, **settings: Any):
    data = data or named(small_data())
    return RecommendationEngine(model or model_of(data), data, **settings)


def events_of(data: InteractionData, user: int) -> list[tuple[str, str]]:
    return [(f"item-{i}", name) for name, pairs in data.behaviors.items() for i in pairs.items[pairs.users == user]]


def items_of(found: list[Recommendation]) -> list[Any]:
    return [one.item for one in found]


@pytest.mark.parametrize("behavior", ["view", "cart", "buy"])
def test_the_best_items_are_those_of_the_models_scores(behavior: str) -> None:
    engine = engine_of()
    data, task = engine.data, list(engine.data.behaviors).index(behavior)
    for user in range(data.num_users):
        scores = engine.model.scorer(task=task)(np.array([user]))[0]
        bought = [*data.target.items[data.target.users == user], data.test[user]]
        wanted = [i for i in np.argsort(-scores) if i not in bought][:4]
        found = engine.recommend(f"u{user}", k=4, behavior=behavior)
        assert items_of(found) == [f"item-{i}" for i in wanted]
        np.testing.assert_allclose([one.score for one in found], scores[wanted], rtol=1e-5)
        assert {(one.behavior, one.source) for one in found} <= {(behavior, "model")}


def test_filters() -> None:
    engine = engine_of()
    everything = items_of(engine.recommend("u1", k=9, exclude=()))
    assert sorted(everything) == list(ITEMS)
    bought, viewed = ({i for i, b in events_of(engine.data, 1) if b == name} for name in ("buy", "view"))
    assert bought
    assert bought != viewed
    left = engine.recommend("u1", k=9, exclude={"view", "buy"})
    assert items_of(left) == [i for i in everything if i not in bought | viewed | {f"item-{engine.data.test[1]}"}]
    held_out = f"item-{engine.data.test[1]}"
    assert items_of(engine.recommend("u1", k=9)) == [i for i in everything if i not in {*bought, held_out}]
    denied = engine.recommend("u1", k=9, exclude=(), deny=[everything[0], everything[3]])
    assert items_of(denied) == [i for n, i in enumerate(everything) if n not in (0, 3)]
    allowed = engine.recommend("u1", k=2, exclude=(), allow=reversed(everything[4:]), deny=everything[5:6])
    assert items_of(allowed) == [everything[4], everything[6]]
    assert engine.recommend("u1", allow=[]) == []
    assert engine.recommend("u1", deny=list(ITEMS)) == []


def test_quotas_keep_the_best_of_a_category() -> None:
    categories = {name: "book" if n < 5 else "toy" for n, name in enumerate(ITEMS[:8])}
    engine = engine_of(categories=categories)
    ranked = items_of(engine.recommend("u0", k=9, exclude=()))
    found = items_of(engine.recommend("u0", k=9, exclude=(), quotas={"book": 2, "toy": 1}))
    books, toys = ([i for i in ranked if categories.get(i) == name] for name in ("book", "toy"))
    assert found == [i for i in ranked if i in {*books[:2], *toys[:1], "item-8"}]
    assert len(engine.recommend("u0", k=9, exclude=(), quotas={"book": 0})) == 4
    with pytest.raises(UnknownIdError, match=r"no category 'bok' of items$"):
        engine.recommend("u0", quotas={"bok": 1})
    with pytest.raises(UnknownIdError, match="no category 'book' of items; the model knows none"):
        engine_of().recommend("u0", quotas={"book": 1})
    with pytest.raises(ValueError, match="quota of 'book' must be >= 0, got -1"):
        engine.recommend("u0", quotas={"book": -1})


def test_what_was_held_out_was_bought() -> None:
    data = named(small_data().hold_out(0, least=2))
    assert data.validation is not None
    user = int(np.flatnonzero((data.validation != NONE) & (data.test != NONE))[0])
    held_out = {f"item-{data.validation[user]}", f"item-{data.test[user]}"}
    everything = items_of(engine_of(data).recommend(f"u{user}", k=9, exclude=()))
    answered = items_of(engine_of(data).recommend(f"u{user}", k=9))
    assert held_out <= set(everything)
    assert not held_out & set(answered)
    items, _, _ = engine_of(data).top_k(np.array([user]), k=9)
    assert not held_out & {f"item-{item}" for item in items[0]}


def test_lists_may_name_items_that_the_data_do_not_have() -> None:
    engine = engine_of()
    assert engine.recommend("u0", deny=["item-1", "new", 10**30]) == engine.recommend("u0", deny=["item-1"])
    assert engine.recommend("u0", allow=["item-1", "new"]) == engine.recommend("u0", allow=["item-1"])
    assert engine.recommend("u0", allow=["new"]) == []


@pytest.mark.parametrize(
    ("edges", "weights", "learned"),
    [
        (("buy",), {"view": 0.0, "cart": 0.0}, ("buy",)),
        (("buy",), {"view": 0.0}, ("cart", "buy")),
        (("cart", "buy"), {"view": 0.0, "cart": 0.0}, ("buy", "cart")),
        (None, {"view": 0.0, "cart": 0.0}, ("buy", "view", "cart")),
        (("buy",), None, ("view", "cart", "buy")),
    ],
)
def test_a_user_of_whom_nothing_was_learned_gets_what_is_popular(
    edges: tuple[str, ...] | None, weights: dict[str, float] | None, learned: tuple[str, ...]
) -> None:
    view = (np.array([0, 1, 2, 3]), np.array([1, 2, 3, 3]), None)
    buy = (np.array([0, 1, 1]), np.array([5, 5, 1]), None)
    cart = (np.array([0]), np.array([1]), None)
    made = {"view": view, "cart": cart, "buy": buy}
    data = named(from_behaviors(made, [None] * 4, num_users=4, num_items=7))
    model = CIGF(CIGFConfig(dim=4, graph_behaviors=edges), data)
    assert set(model.learned_from) == {"view", "cart", "buy"}
    fit(model, data, FitConfig(epochs=1, eval_interval=0, behavior_weights=weights))
    assert set(model.learned_from) == set(learned)
    (first,) = engine_of(data, model).recommend("u3", k=1)
    assert first.source == ("model" if "view" in learned else "popular")


def test_what_was_bought_after_a_temporal_splits_moment_was_bought() -> None:
    made = temporal(funnel_log(FunnelConfig(num_users=100, num_items=80))).hold_out(0)
    engine = RecommendationEngine(model_of(made), made)
    assert made.later is not None
    for user in np.unique(made.later.users)[:5]:
        later = made.item_ids[made.later.items[made.later.users == user]]  # pyright: ignore
        found = items_of(engine.recommend(made.user_ids[user].item(), k=80))  # pyright: ignore
        assert not set(later.tolist()) & set(found)


def test_equal_scores_come_in_the_order_of_numbers() -> None:
    data = named(small_data())
    model = model_of(data)
    engine = engine_of(data, model, tables=torch.ones(16, 3, 4).double())
    assert items_of(engine.recommend("u0", k=3, exclude=())) == ["item-0", "item-1", "item-2"]
    found, _, _ = engine.top_k(np.arange(2), k=3, exclude=())
    assert found.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("k", [1, 4, 9, 20])
def test_many_users_at_once_get_what_each_gets(k: int) -> None:
    data = small_data(density=0.6)
    pairs = {name: (p.users[p.users != 2], p.items[p.users != 2], None) for name, p in data.behaviors.items()}
    engine = engine_of(named(from_behaviors(pairs, [None] * 7, num_users=7, num_items=9)))
    items, scores, is_popular = engine.top_k(np.arange(7), k=k)
    assert items.shape == scores.shape == (7, k)
    assert np.flatnonzero(is_popular).tolist() == [2]
    for user in range(7):
        wanted = engine.recommend(f"u{user}", k=k)
        kept = items[user] != NONE
        assert [f"item-{i}" for i in items[user][kept]] == items_of(wanted)
        np.testing.assert_allclose(scores[user][kept], [one.score for one in wanted], rtol=1e-5)
        assert (scores[user][~kept] == -np.inf).all()
    assert engine.top_k(np.zeros(0, np.int64), k=3)[0].shape == (0, 3)


def test_a_user_without_events_gets_what_is_popular_and_it_says_so() -> None:
    view = (np.array([0, 1, 2, 0]), np.array([3, 3, 3, 4]), None)
    buy = (np.array([0, 1, 2]), np.array([5, 5, 1]), None)
    data = named(from_behaviors({"view": view, "buy": buy}, [None] * 4, num_users=4, num_items=9))
    engine = engine_of(data, model_of(data))
    found = engine.recommend("u3", k=3)
    assert found[0] == Recommendation(item="item-5", score=2.0, behavior="buy", source="popular")
    assert items_of(found) == ["item-5", "item-1", "item-0"]
    viewed = engine.recommend("u3", k=2, behavior="view", deny=["item-3"])
    assert items_of(viewed) == ["item-4", "item-0"]
    assert items_of(engine.recommend_events([], k=1)) == ["item-5"]
    assert items_of(engine.recommend("u3", k=5, allow=["item-1", "item-2"])) == ["item-1", "item-2"]


def test_views_tell_nothing_to_a_model_of_purchases() -> None:
    pairs = {"view": (np.array([0, 1]), np.array([1, 2]), None), "buy": (np.array([0]), np.array([3]), None)}
    data = named(from_behaviors(pairs, [None] * 2, num_users=2, num_items=9))
    for kind, new in (("mf", "model"), ("lightgcn", "popular")):
        model = scrambled(build_recommender(FactorConfig(kind=kind, dim=4), data, seed=0), 1, 0.5)  # pyright: ignore
        engine = engine_of(data, model)  # pyright: ignore[reportArgumentType]
        assert engine.recommend("u1")[0].source == "popular"
        assert engine.recommend("u0")[0].source == "model"
        assert engine.recommend_events([("item-2", "view")])[0].source == new


@pytest.mark.parametrize("config", [CIGFConfig(dim=4), FactorConfig(dim=4), MBGCNConfig(dim=4)], ids=str)
def test_events_of_a_user_whose_embedding_is_zero_give_the_users_own_answer(config: Any) -> None:
    data = named(small_data())
    model = scrambled(build_recommender(config, data, seed=0), 1, 0.5).double()
    with torch.no_grad():
        model.user_embedding.weight[3] = 0  # pyright: ignore
    engine = engine_of(data, model)  # pyright: ignore[reportArgumentType]
    known = engine.recommend("u3")
    new = engine.recommend_events([*events_of(data, 3), *events_of(data, 3)[:2]], deny=[f"item-{data.test[3]}"])
    assert [(one.item, one.because) for one in new] == [(one.item, one.because) for one in known]
    np.testing.assert_allclose([one.score for one in new], [one.score for one in known], rtol=1e-5)
    torch.testing.assert_close(engine.fold_in(events_of(data, 3)), engine.rows(np.array([3]))[0])


def test_a_new_item_is_represented_by_its_users() -> None:
    data = named(small_data())
    model = model_of(data)
    with torch.no_grad():
        model.item_embedding.weight[4] = 0
    engine = engine_of(data, model)
    events = [(f"u{u}", name) for name, pairs in data.behaviors.items() for u in pairs.users[pairs.items == 4]]
    row = engine.fold_in_item(events)
    torch.testing.assert_close(row, model.tables().detach()[data.num_users + 4], rtol=1e-6, atol=1e-7)


def test_items_of_events_that_the_data_do_not_have() -> None:
    engine = engine_of()
    events = [("item-1", "view"), ("item-99", "buy")]
    with pytest.raises(UnknownIdError, match="no item 'item-99' in the data"):
        engine.recommend_events(events)
    assert engine.recommend_events(events, on_unknown="skip") == engine.recommend_events(events[:1])
    assert engine.recommend_events(events[1:], on_unknown="skip")[0].source == "popular"


def test_the_reason_is_the_event_with_the_largest_share_of_the_score() -> None:
    """One hop, so that an event (j, i') gives scale * g_j * 1 / degree_j(u) * <x_i', y_ij>, with a weight of L = 1."""
    data = named(small_data(density=0.5))
    model = model_of(data, layers=1)
    engine, tables = engine_of(data, model), model.tables().detach()
    for user in range(data.num_users):
        events = [
            (j, int(i), 1 / (pairs.users == user).sum())
            for j, pairs in enumerate(data.behaviors.values())
            for i in pairs.items[pairs.users == user]
        ]
        for one in engine.recommend(f"u{user}", k=9):
            item = data.num_users + list(ITEMS).index(one.item)
            gates = model.decoder.gates(tables[user], tables[item], 2).detach()  # pyright: ignore
            shares = [
                float(300 * gates[j] * weight * (model.item_embedding.weight[i].detach() @ tables[item, j]))
                for j, i, weight in events
            ]
            best = int(np.argmax(shares))
            j, i, _ = events[best]
            wanted = Reason(list(data.behaviors)[j], f"item-{i}") if shares[best] > 0 else None
            assert one.because == wanted


def test_a_constructed_reason() -> None:
    """The user viewed 0 and 1 and carted 2; item 3 points where 1 does, and item 4 where 2 does."""
    view = (np.array([0, 0]), np.array([0, 1]), None)
    cart = (np.array([0]), np.array([2]), None)
    buy = (np.array([1]), np.array([0]), None)
    data = from_behaviors({"view": view, "cart": cart, "buy": buy}, [None] * 2, num_users=2, num_items=5)
    model = model_of(data, layers=1)
    with torch.no_grad():
        model.user_embedding.weight[:] = 0
        model.item_embedding.weight[:] = torch.eye(4)[[0, 1, 2, 1, 2]]
    found = {one.item: one.because for one in RecommendationEngine(model, data).recommend(0, exclude=("view", "cart"))}
    assert found == {3: Reason("view", 1), 4: Reason("cart", 2)}


def test_no_reason_is_made_up() -> None:
    data = named(small_data())
    for model in (model_of(data, decoder="mmoe"), model_of(data, encoder="gcn")):
        assert {one.because for one in engine_of(data, model).recommend("u0")} == {None}
    model = scrambled(build_recommender(FactorConfig(kind="mf", dim=4), data, seed=0), 1, 0.5)
    engine = engine_of(data, model)  # pyright: ignore[reportArgumentType]
    assert {one.because for one in engine.recommend("u0")} == {None}
    assert engine.recommend_events(events_of(data, 0))[0].because is not None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"user_id": "nobody"}, UnknownIdError, "no user 'nobody' in the data"),
        ({"user_id": 0}, UnknownIdError, "no user 0 in the data"),
        ({"user_id": "y" * 200}, UnknownIdError, r"no user 'y{76}\.\.\. in the data"),
        ({"behavior": "like"}, DataError, "no behavior 'like' in the data; there are: view, cart, buy"),
        ({"exclude": ["like"]}, DataError, "no behavior 'like'"),
        ({"k": 0}, ValueError, "k must be >= 1, got 0"),
    ],
)
def test_wrong_requests(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        engine_of().recommend(**{"user_id": "u0", **call})


def test_a_model_of_the_target_alone_recommends_for_it_alone() -> None:
    data = named(small_data())
    engine = engine_of(data, build_recommender(FactorConfig(dim=4), data, seed=0))
    with pytest.raises(DataError, match="the model has no scores for behavior 'view'; it has for: buy"):
        engine.recommend("u0", behavior="view")


def test_model_and_data_must_fit() -> None:
    data = small_data()
    with pytest.raises(DataError, match="7 users, 9 items and behaviors view, cart, buy, the data of 7, 8 and view"):
        RecommendationEngine(model_of(data), small_data(num_items=8))
    with pytest.raises(DataError, match="tables have 3 rows for 7 users and 9 items"):
        RecommendationEngine(model_of(data), data, tables=torch.ones(3, 3, 4))
    with pytest.raises(NumericsError, match="not finite"):
        RecommendationEngine(model_of(data), data, tables=torch.full((16, 3, 4), torch.nan))
    with pytest.raises(UnknownIdError, match="no item 9"):
        RecommendationEngine(model_of(data), data, categories={9: "toy"})


def test_threads_share_an_engine() -> None:
    engine = engine_of()
    wanted = {user: engine.recommend(user) for user in USERS}
    wrong: list[str] = []

    def ask() -> None:
        wrong.extend(user for user in list(USERS) * 10 if engine.recommend(user) != wanted[user])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_answer_leaves_no_trace() -> None:
    data = named(small_data())
    model = model_of(data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = engine_of(data, model)
    first = engine.recommend("u0"), engine.recommend_events(events_of(data, 0))
    assert (engine.recommend("u0"), engine.recommend_events(events_of(data, 0))) == first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model, CIGF)


def test_names_are_compared_by_their_text() -> None:
    numbered = IdMap("item", 12)
    assert [numbered.number(name) for name in (7, "7", "11")] == [7, 7, 11]
    for wrong in (12, -1, "07", "1.0", "", "x", "٣", True, 10**30, "9" * 5000, "\ud800"):
        with pytest.raises(UnknownIdError) as raised:
            numbered.number(wrong)
        str(raised.value).encode()
    named = IdMap("user", 2, np.array([30, 10]))
    assert (named.number(10), named.number("30"), named.name(1)) == (1, 0, 10)
    assert named.numbers([10, 30, "10"]).tolist() == [0, 1]
    assert numbered.numbers([]).tolist() == []
    assert named.names(np.array([1, 1, 0])).tolist() == [10, 10, 30]
    with pytest.raises(DataError, match="two users are called 'a'"):
        IdMap("user", 2, np.array(["a", "a"]))
    with pytest.raises(DataError, match="1 names for 2 users"):
        IdMap("user", 2, np.array(["a"]))
