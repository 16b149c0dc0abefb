"""What a recommender's recipe makes of its source: what is seen, what is held out, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from perilune.errors import DataError, RecipeError
from perilune.recsys import FunnelConfig, InteractionData, Ranker, funnel, item_knn, popularity
from perilune.report import NullProgress
from perilune.run import (
    RunDirectory,
    dump_recipe,
    load,
    load_recommender,
    run_recipe,
)
from perilune.run.interactions import judged, prepare_interactions, read_source
from perilune.run.recommender_config import FilesSource, RuleStage
from perilune.run.stages.recommend import judge, run_rule
from tests.run.shop_log import STAGE, pairs_of, shop_rows

pytest.importorskip("polars")

TIES = ("expected", "pessimistic", "optimistic")


def by_hand(aux: str, *, validation: bool, permute: bool) -> InteractionData:
    data = funnel(FunnelConfig(num_users=60, num_items=40, views=8.0))
    data = data.permuted(5) if permute else data
    data = data.hold_out(5) if validation else data
    return data.clean() if aux == "clean" else data


@pytest.mark.parametrize("aux", ["open", "clean"])
@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("permute", [True, False])
def test_the_protocol_of_a_recipe_reaches_the_data(tmp_path: Path, aux: str, validation: bool, permute: bool) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        'name = "x"\ndata_seed = 5\n[interactions]\nkind = "funnel"\n'
        "funnel = { num_users = 60, num_items = 40, views = 8.0 }\n"
        f'[protocol]\naux = "{aux}"\nvalidation = {str(validation).lower()}\npermute = {str(permute).lower()}\n{STAGE}'
    )
    recipe = load(path).recipe
    data = judged(read_source(recipe.interactions, recipe.data_seed), recipe)
    wanted = by_hand(aux, validation=validation, permute=permute)
    assert pairs_of(data) == pairs_of(wanted)
    np.testing.assert_array_equal(data.item_ids, wanted.item_ids) if permute else None
    found, held_out = pairs_of(data), pairs_of(data)["test"] | pairs_of(data)["validation"]
    assert bool(found["validation"]) is validation
    assert bool((found["view"] | found["cart"]) & held_out) is (aux == "open")
    assert (list(data.item_ids if data.item_ids is not None else range(40)) != list(range(40))) is permute


def test_a_log_is_cut_to_its_core(shop: Callable[..., Path]) -> None:
    rows = [*shop_rows(), "u0,rare,buy,1700000001", "once,i1,buy,1700000002"]
    recipe = load(shop(rows, '[interactions.split]\nkind = "leave_last_out"\ncore_users = 2\ncore_items = 2')).recipe
    whole = load(shop(rows)).recipe
    for kept, one in ((True, whole), (False, recipe)):
        data = read_source(one.interactions, 0)
        assert ("rare" in data.item_ids) is kept  # pyright: ignore
        assert ("once" in data.user_ids) is kept  # pyright: ignore


@pytest.mark.parametrize("ties", TIES)
def test_ranks_are_those_of_the_recipes_protocol(tmp_path: Path, ties: str) -> None:
    data = by_hand("clean", validation=True, permute=True)
    few = replace(data, behaviors={name: pairs.where(pairs.users < 9) for name, pairs in data.behaviors.items()})
    protocol = SimpleNamespace(protocols=("sampled99", "full"), cutoffs=(3, 10), ties=ties, negatives_seed=11)
    source = SimpleNamespace(protocol=protocol, interactions=None)
    directory = RunDirectory(tmp_path)
    directory.data("").mkdir()
    context: Any = SimpleNamespace(recipe=source, directory=directory, name="x")
    numbers = judge(context, popularity(few), few)
    for name in protocol.protocols:
        ranks = Ranker(few, protocol=name, seed=11).rank(popularity(few))
        for metric, value in ranks.summary((3, 10), ties).items():  # pyright: ignore
            assert numbers[f"{name}_{metric}"] == value
        least, most = ranks.candidates.min(), ranks.candidates.max()
        assert (numbers[f"{name}_candidates_least"], numbers[f"{name}_candidates_most"]) == (least, most)
    means = {one: Ranker(few, protocol="full").rank(popularity(few)).summary((10,), one)["mrr"] for one in TIES}
    assert len(set(means.values())) == 3, "the three do differ on these data"


def test_negatives_are_drawn_by_the_recipes_seed(tmp_path: Path) -> None:
    data = funnel(FunnelConfig(num_users=60, num_items=400, views=8.0))
    directory = RunDirectory(tmp_path)
    directory.data("").mkdir()

    def ranked(seed: int) -> float:
        protocol = SimpleNamespace(protocols=("sampled99",), cutoffs=(10,), ties="expected", negatives_seed=seed)
        recipe = SimpleNamespace(protocol=protocol, interactions=None)
        return judge(SimpleNamespace(recipe=recipe, directory=directory, name="x"), popularity(data), data)[  # pyright: ignore
            "sampled99_mrr"
        ]

    wanted = Ranker(data, protocol="sampled99", seed=3).rank(popularity(data)).summary()["mrr"]
    assert ranked(3) == wanted
    assert ranked(4) != wanted


def test_a_rule_reads_its_own_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        f'name = "x"\n[interactions]\nkind = "funnel"\nfunnel = {{ num_users = 60, num_items = 80 }}\n{STAGE}'
    )
    directory = RunDirectory(tmp_path / "run")
    recipe = load(path).recipe
    directory.prepare({})
    context: Any = SimpleNamespace(recipe=recipe, directory=directory, name="x", progress=NullProgress())
    settings = RuleStage(rule="item_knn", behaviors={"view": 1.0, "buy": 0.5}, neighbors=2)
    numbers = run_rule(context, settings).numbers
    data = prepare_interactions(recipe, directory, NullProgress())
    ranker = Ranker(data, protocol="full", seed=0)

    def mrr(**changes: Any) -> float:
        return ranker.rank(item_knn(data, **{"behaviors": settings.behaviors, "neighbors": 2, **changes})).summary()[
            "mrr"
        ]

    assert numbers["full_mrr"] == mrr()
    assert len({mrr(), mrr(neighbors=1), mrr(neighbors=100), mrr(behaviors=None)}) == 4


def test_a_held_out_purchase_that_the_target_has_too_may_be_dropped_from_it(tmp_path: Path) -> None:
    for name, text in (("view", "0 0 1\n1 2\n"), ("buy", "0 0 2\n1 1\n"), ("test", "0 2\n1 0\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    source = FilesSource(kind="item_lists", directory=str(tmp_path), behaviors=("view", "buy"))
    with pytest.raises(DataError, match="test item 2 of user 0 is in the target behavior 'buy' too"):
        read_source(source, 0)
    found = pairs_of(read_source(replace(source, on_repeated="drop"), 0))
    assert (found["buy"], found["test"]) == ({(0, 0), (1, 1)}, {(0, 2), (1, 0)})


NONE_HELD_OUT = '[interactions.split]\nkind = "none"\n[protocol]\nvalidation = false'


def test_a_model_of_all_data_is_trained_and_not_judged(cli, shop: Callable[..., Path], tmp_path: Path) -> None:
    rule = '[stages.popularity]\nkind = "rule"\nrule = "popularity"\n'
    path, run = shop(more=NONE_HELD_OUT, stages=rule + STAGE), tmp_path / "run"
    code, out, err = cli("recsys", "train", path, "--run-dir", run)
    assert code == 0, err
    assert "Nothing was held out to rank by." in " ".join(out.split())
    assert "cigf" in out
    trained = load_recommender(run)
    bought = {tuple(row.split(",")[:2]) for row in shop_rows() if ",buy," in row}
    assert pairs_of(trained.data)["buy"] == bought
    assert not pairs_of(trained.data)["test"] | pairs_of(trained.data)["validation"]
    results = json.loads(cli("recsys", "train", path, "--run-dir", run, "--json")[1])["results"]
    assert [name for name in results[1]["numbers"] if "ndcg" in name] == []
    assert "validation NDCG@10" not in (run / "report.html").read_text()
    code, _, err = cli("recsys", "evaluate", run)
    assert code == 1
    assert "held nothing out" in err
    code, out, _ = cli("recsys", "recommend", run, "--user", "u3", "--json", "--k", 12)
    assert code == 0
    assert not {item["item"] for item in json.loads(out)} & {item for user, item in bought if user == "u3"}


@pytest.mark.parametrize(
    "split", ['kind = "leave_last_out"', 'kind = "temporal"\nquantile = 0.5', 'kind = "temporal"\nper = "user"']
)
def test_nothing_that_the_log_says_was_bought_is_recommended(
    shop: Callable[..., Path], tmp_path: Path, split: str
) -> None:
    rows = shop_rows()
    run_recipe(load(shop(rows, f"[interactions.split]\n{split}")), tmp_path / "run")
    trained = load_recommender(tmp_path / "run")
    engine, pairs = trained.engine(), pairs_of(trained.data)
    assert pairs["test"]
    assert pairs["validation"]
    bought = {tuple(row.split(",")[:2]) for row in rows if ",buy," in row}
    for user in range(20):
        answer = {(f"u{user}", one.item) for one in engine.recommend(f"u{user}", k=12)}
        assert not answer & bought


def test_a_log_without_times_is_named_by_an_empty_column(cli, shop: Callable[..., Path], tmp_path: Path) -> None:
    rows = [row.rpartition(",")[0] for row in shop_rows()]
    path = shop(rows, 'columns = { time = "" }', header="user,item,behavior")
    code, out, _ = cli("recsys", "train", path, "--dry-run")
    assert code == 0
    (tmp_path / "resolved.toml").write_text(out)
    for recipe in (path, tmp_path / "resolved.toml"):
        code, _, err = cli("recsys", "train", recipe, "--run-dir", tmp_path / "run", "--quiet")
        assert code == 0, err
    assert load_recommender(tmp_path / "run").data.target.times is None
    resolved = load(tmp_path / "resolved.toml").recipe
    assert resolved == load(path).recipe
    assert dump_recipe(resolved) == out
    with pytest.raises(RecipeError, match=r"split.kind must be another where columns.time is empty, got 'temporal'"):
        load(path, ["interactions.split.kind=temporal"])
