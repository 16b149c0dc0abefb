"""What a recommender's recipe makes of its source: what is seen, what is held out, and what is told when."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from perilune.errors import DataError, RecipeError
from perilune.recsys import NONE, FunnelConfig, InteractionData, Ranker, funnel, item_knn, popularity
from perilune.report import NullProgress
from perilune.run import (
    RecommenderRecipe,
    RunDirectory,
    dump_recipe,
    load,
    load_ablation,
    load_recommender,
    run_recipe,
)
from perilune.run.interactions import describe, judged, prepare_interactions, read_source
from perilune.run.recommender_config import FilesSource, RuleStage
from perilune.run.schema import explain
from perilune.run.stages.recommend import judge, run_rule

pytest.importorskip("polars")

TIES = ("expected", "pessimistic", "optimistic")
STAGE = '[stages.cigf]\nkind = "recommender"\nmodel = { kind = "cigf", dim = 4 }\ntrain = { epochs = 1 }\n'
SOURCE = 'kind = "log"\nbehaviors = ["view", "buy"]\n'


def write_log(path: Path, rows: list[str], header: str = "user,item,behavior,time") -> None:
    path.write_text("\n".join([header, *rows]) + "\n")


def shop_rows(count: int = 400, users: int = 20, items: int = 12) -> list[str]:
    generator = np.random.default_rng(0)
    return [
        f"u{generator.integers(users)},i{generator.integers(items)},"
        f"{['view', 'buy'][int(generator.random() < 0.4)]},{1_700_000_000 + event}"
        for event in range(count)
    ]


@pytest.fixture
def shop(tmp_path: Path) -> Callable[..., Path]:
    """Write a log and a recipe of it; returns the recipe's path."""

    def write(rows: list[str] | None = None, more: str = "", stages: str = STAGE, **log: str) -> Path:
        write_log(tmp_path / "shop.csv", shop_rows() if rows is None else rows, **log)
        path = tmp_path / "shop.toml"
        source = f'[interactions]\npath = "{tmp_path / "shop.csv"}"\n{SOURCE}'
        path.write_text(f'name = "shop"\n{source}{more}\n{stages}')
        return path

    return write


def pairs_of(data: InteractionData) -> dict[str, set[tuple[Any, Any]]]:
    """Pairs by behaviour, test and validation, by what users and items are called."""
    users, items = (
        np.arange(count) if ids is None else ids
        for count, ids in ((data.num_users, data.user_ids), (data.num_items, data.item_ids))
    )
    found = {
        name: set(zip(users[p.users].tolist(), items[p.items].tolist(), strict=True))
        for name, p in data.behaviors.items()
    }
    for name, held_out in (("test", data.test), ("validation", data.validation)):
        of = np.zeros(0, np.int64) if held_out is None else np.flatnonzero(held_out != NONE)
        there = held_out if held_out is not None else np.zeros(0, np.int64)
        found[name] = set(zip(users[of].tolist(), items[there[of]].tolist(), strict=True))
    return found


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


def test_a_source_that_has_changed_is_refused(cli, shop: Callable[..., Path], tmp_path: Path) -> None:
    path, run = shop(), tmp_path / "run"
    assert cli("recsys", "train", path, "--run-dir", run, "--quiet")[0] == 0
    assert cli("recsys", "train", path, "--run-dir", run, "--quiet")[0] == 0
    whole = (tmp_path / "shop.csv").read_bytes()
    write_log(tmp_path / "shop.csv", shop_rows()[:300])
    code, _, err = cli("recsys", "train", path, "--run-dir", run)
    assert code == 1
    assert f"{tmp_path / 'shop.csv'} has changed since the run in {run} began" in err.replace("\n", "")
    assert "choose another --run-dir" in err
    with pytest.raises(DataError, match=r"shop\.csv has changed"):
        prepare_interactions(load(path).recipe, RunDirectory(run), NullProgress())
    (tmp_path / "shop.csv").write_bytes(whole)
    assert cli("recsys", "train", path, "--run-dir", run, "--quiet")[0] == 0
    record = json.loads((run / "data" / "source.json").read_text())
    assert list(record["sha256"]) == [str(tmp_path / "shop.csv")]


def test_files_of_matrices_that_have_changed_are_refused(cli, tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    for name, text in (("view", "0 0 1\n1 2\n"), ("buy", "0 0 2\n1 1\n"), ("test", "0 1\n1 0\n")):
        (folder / f"{name}.txt").write_text(text)
    path = tmp_path / "x.toml"
    source = f'[interactions]\nkind = "item_lists"\ndirectory = "{folder}"\nbehaviors = ["view", "buy"]\n'
    path.write_text(f'name = "x"\n{source}[stages.popularity]\nkind = "rule"\nrule = "popularity"\n')
    arguments = ("recsys", "train", path, "--run-dir", tmp_path / "run", "--quiet")
    assert cli(*arguments)[0] == 0
    for name in ("view", "buy", "test"):
        before = (folder / f"{name}.txt").read_text()
        (folder / f"{name}.txt").write_text(before + "\n")
        code, _, err = cli(*arguments)
        assert code == 1
        assert f"{name}.txt has changed" in err
        (folder / f"{name}.txt").write_text(before)
    assert cli(*arguments)[0] == 0


def test_a_held_out_purchase_that_the_target_has_too_may_be_dropped_from_it(tmp_path: Path) -> None:
    for name, text in (("view", "0 0 1\n1 2\n"), ("buy", "0 0 2\n1 1\n"), ("test", "0 2\n1 0\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    source = FilesSource(kind="item_lists", directory=str(tmp_path), behaviors=("view", "buy"))
    with pytest.raises(DataError, match="test item 2 of user 0 is in the target behaviour 'buy' too"):
        read_source(source, 0)
    found = pairs_of(read_source(replace(source, on_repeated="drop"), 0))
    assert (found["buy"], found["test"]) == ({(0, 0), (1, 1)}, {(0, 2), (1, 0)})


def test_a_checkpoint_of_other_data_is_not_gone_on_from(cli, shop: Callable[..., Path], tmp_path: Path) -> None:
    path, run = shop(), tmp_path / "run"
    assert cli("recsys", "train", path, "--run-dir", run, "--quiet")[0] == 0
    (run / "results" / "cigf.json").unlink()
    for made in (run / "data").iterdir():
        made.unlink()
    write_log(tmp_path / "shop.csv", shop_rows()[:390])  # the same users and items
    code, _, err = cli("recsys", "train", path, "--run-dir", run, "--quiet")
    assert code == 1
    assert "was written with settings or data" in err


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


def test_a_corrected_recipe_takes_the_place_of_one_that_failed(cli, shop: Callable[..., Path], tmp_path: Path) -> None:
    path = shop()
    arguments = ("recsys", "train", path, "--run-dir", tmp_path / "run", "--quiet")
    code, _, err = cli(*arguments, "interactions.columns.user=usr")
    assert code == 1
    assert "no column 'usr'" in err
    assert cli(*arguments)[0] == 0
    code, _, err = cli(*arguments, "seed=3")
    assert code == 2
    assert "holds a run of another recipe" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", r"no user has interactions.split.min_target = 2 purchases or more; .*split.kind = \"none\""),
        (
            '[interactions.split]\nkind = "temporal"\ncutoff = 1700000020',
            "there is no purchase from interactions.split.cutoff = 1700000020 on",
        ),
    ],
)
def test_that_nobody_has_a_test_item_is_told_before_training(
    cli, shop: Callable[..., Path], tmp_path: Path, more: str, message: str
) -> None:
    rows = [f"u{n},i{n},buy,{1_700_000_000 + n}" for n in range(9)] + ["u1,i2,view,1700000030"]
    path = shop(rows, more)
    with pytest.raises(DataError, match=f"nobody has a test item: {message}"):
        run_recipe(load(path), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    arguments = ("recsys", "train", path, "--run-dir", tmp_path / "run", "--quiet", "protocol.validation=false")
    assert cli(*arguments, "interactions.split.kind=none")[0] == 0, "what failed does not stand in the way"


def test_a_wrong_run_to_go_on_from_is_told_before_anything_is_made(
    cli, shop: Callable[..., Path], tmp_path: Path
) -> None:
    path = shop()
    code, _, err = cli(
        "recsys", "train", path, "--run-dir", tmp_path / "run", f"stages.cigf.warm_start={tmp_path / 'gone'}"
    )
    assert code == 1
    assert "stages.cigf.warm_start:" in err
    assert "gone is not a run directory" in err.replace("\n", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.cigf.model.graph_behaviors=['like']", r"stages.cigf.model.graph_behaviors must be of .*\(view, buy\)"),
        ("stages.cigf.train.behavior_weights={like=1.0}", r"stages.cigf.train.behavior_weights must be .*\['like'\]"),
        ("stages.x={kind='rule',rule='item_knn',behaviors={like=1.0}}", r"stages.x.behaviors must be of .*\['like'\]"),
        ("stages.x={kind='rule',rule='item_knn',behaviors={view=0.0}}", "behaviors must be weights > 0"),
        ("stages.cigf.model.n_experts=7", "n_experts must be absent for decoder mesi, got 7"),
        ("interactions.split={kind='temporal',min_target=3}", "interactions.split.min_target is not a key"),
        ("interactions.split={kind='leave_last_out',quantile=0.5}", "interactions.split.quantile is not a key"),
        ("interactions.split={kind='leave_last_out',cutoff=5}", "interactions.split.cutoff is not a key"),
        ("interactions.split={kind='none',per='user'}", "interactions.split.per is not a key"),
        ("interactions.split={kind='temporal',per='user',cutoff=5}", 'cutoff must be absent for per = "user", got 5'),
        ("interactions.split={kind='last'}", "interactions.split.kind must be one of none, leave_last_out, temporal"),
        ("interactions.split={min_target=3}", "interactions.split.kind must be one of .*; it has none"),
    ],
)
def test_what_is_not_read_or_not_there_is_refused(shop: Callable[..., Path], override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(shop(), [override])


def test_experts_are_counted_where_a_decoder_has_them(shop: Callable[..., Path]) -> None:
    changes = ["stages.cigf.model.decoder=mmoe", "stages.cigf.model.n_experts=7"]
    assert load(shop(), changes).recipe.stages["cigf"].model.n_experts == 7
    for ablation in ("decoders", "parts"):
        variants = load_ablation(shop(), ablation, overrides=changes).recipe.sweep.variants
        assert len(variants) > 3


def test_every_key_of_a_source_is_explained() -> None:
    for path in ("interactions", "interactions.split", "interactions.columns", "protocol", "stages.rule"):
        assert all(doc.text for doc in explain(RecommenderRecipe, path)), path
    quantile = next(doc for doc in explain(RecommenderRecipe, "interactions.split") if doc.name == "quantile")
    assert "purchases" in quantile.text


def test_what_of_a_log_is_left_out_is_said(cli, shop: Callable[..., Path], tmp_path: Path) -> None:
    rows = [*shop_rows(), shop_rows()[0], "u1,i1,like,1700000000"]
    code, _, err = cli("recsys", "train", shop(rows, 'on_unknown = "drop"'), "--run-dir", tmp_path / "run")
    assert code == 0
    record = json.loads((tmp_path / "run" / "data" / "source.json").read_text())
    distinct = {tuple(row.split(",")[:3]) for row in shop_rows()}
    assert (record["repeated"], record["of other behaviours"]) == (401 - len(distinct), 1)
    told = " ".join(err.split())
    assert f"rows left out: {401 - len(distinct)} repeated, 1 of other behaviours" in told
    data = funnel(FunnelConfig(num_users=60, num_items=80))
    assert "left out" not in describe(data)


def test_quotas_are_of_the_logs_categories(shop: Callable[..., Path], tmp_path: Path) -> None:
    rows = [f"{row},{'shoes' if int(row.split(',')[1][1:]) % 2 else 'hats'}" for row in shop_rows()]
    rows += [
        "u0,once,view,1700009999,shoes",
        "u0,i0,view,1700009999,shoes",
        "u0,i1,view,1700009998,",
        "u0,i2,view,1600000000,shoes",
    ]
    core = "[interactions.split]\nkind = 'leave_last_out'\ncore_items = 2"
    path = shop(rows, f'columns = {{ category = "sort" }}\n{core}', header="user,item,behavior,time,sort")
    run_recipe(load(path), tmp_path / "run")
    trained = load_recommender(tmp_path / "run")
    shoes = {"i0", *(f"i{n}" for n in range(1, 12, 2))}
    assert {item for item, name in trained.categories.items() if name == "shoes"} == shoes
    everything = trained.engine().recommend("u1", k=12, exclude=())
    found = trained.engine().recommend("u1", k=12, exclude=(), quotas={"shoes": 2})
    assert [one.item for one in found] == [
        one.item
        for place, one in enumerate(everything)
        if one.item not in shoes or sum(other.item in shoes for other in everything[:place]) < 2
    ]


def test_the_report_says_what_was_seen(shop: Callable[..., Path], tmp_path: Path) -> None:
    for name, split, seen in (
        ("a", 'kind = "temporal"', "Nothing that happened from a held-out purchase&#39;s moment on was seen"),
        ("b", 'kind = "leave_last_out"', "Other behaviours kept the pairs of held-out purchases (protocol open)."),
    ):
        run_recipe(load(shop(more=f"[interactions.split]\n{split}")), tmp_path / name)
        report = (tmp_path / name / "report.html").read_text()
        assert seen in report
        assert "Candidates: sampled99 " in report


def test_an_evaluation_is_in_the_report(cli, shop: Callable[..., Path], tmp_path: Path) -> None:
    rule = '[stages.popularity]\nkind = "rule"\nrule = "popularity"\n'
    run = tmp_path / "run"
    assert cli("recsys", "train", shop(stages=rule + STAGE), "--run-dir", run, "--quiet")[0] == 0
    assert "Groups of users" not in (run / "report.html").read_text()
    code, out, _ = cli("recsys", "evaluate", run, "--conflicts", 2)
    assert code == 0
    assert f"Report: {run / 'report.html'}" in out.replace("\n", "")
    assert "Candidates: " in out
    report = (run / "report.html").read_text()
    for text in ("Groups of users, full", "Groups of users, sampled99", "Conflicts of tasks", "Stage cigf."):
        assert text in report
    assert 'aria-label="NDCG@10, % by' in report
    assert 'aria-label="users in conflict, % by' in report
    assert cli("recsys", "evaluate", run, "--protocol", "full")[0] == 0
    assert (run / "report.html").read_text() == report, "what is not measured again stays"
    for damage in ('{"groups": 3}', '{"groups": {"x": {"cigf": [{"odd": 1}]}}}'):
        (run / "evaluation.json").write_text(damage)
        code, _, err = cli("recsys", "evaluate", run)
        assert code == 1
        assert "evaluation.json is damaged" in err


def test_methods_names_are_whole_in_a_narrow_terminal(
    cli, shop: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = "popularity_of_all"
    rule = f'[stages.{long}]\nkind = "rule"\nrule = "popularity"\n'
    run = tmp_path / "run"
    path = shop(more="[protocol]\ncutoffs = [5, 10]", stages=rule + STAGE)
    code, out, _ = cli("recsys", "train", path, "--run-dir", run, "--quiet")
    assert code == 0
    assert f"│ {long} " in out
    code, out, _ = cli("recsys", "evaluate", run)
    assert code == 0
    assert f"│ {long} " in out
    assert "│ other interactions: " in out


def test_what_an_export_does_not_read_is_refused(cli, shop: Callable[..., Path], tmp_path: Path) -> None:
    run, out_path = tmp_path / "run", tmp_path / "top.csv"
    assert cli("recsys", "train", shop(), "--run-dir", run, "--quiet")[0] == 0
    code, _, err = cli("recsys", "recommend", run, "--out", out_path, "--index", "ivf")
    assert code == 2
    assert "scores all items" in err
    code, out, _ = cli("recsys", "recommend", run, "--out", out_path, "--json", "--quiet")
    assert code == 0
    assert json.loads(out) == {"path": str(out_path), "rows": len(out_path.read_text().splitlines()) - 1}
    code, _, err = cli("recsys", "recommend", run, "--out", tmp_path / "gone" / "top.csv", "--quiet")
    assert code == 1
    assert "there is no directory" in err


def test_the_address_is_told_once_the_model_is_loaded_and_a_taken_port_is_told(
    cli, shop: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("uvicorn")
    run = tmp_path / "run"
    assert cli("recsys", "train", shop(), "--run-dir", run, "--quiet")[0] == 0
    command = [sys.executable, "-m", "perilune.cli", "recsys", "serve", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            address = process.stderr.readline().split()[0].removesuffix("/docs")
            request = urllib.request.Request(
                f"{address}/v1/recommend", b'{"user": "u3"}', {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=20) as response:
                assert json.loads(response.read())["model"] == "shop/cigf"
            code, _, err = cli("recsys", "serve", run, "--port", address.rpartition(":")[2])
            assert code == 1
            assert "choose another --port" in err
            assert "/docs" not in err
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    code, _, err = cli("recsys", "serve", tmp_path / "gone", "--port", "0")
    assert code == 1
    assert "/docs" not in err, "nothing is announced that was not loaded"
