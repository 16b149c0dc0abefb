"""What a recommender's run refuses, says and reports, and when it is told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from perilune.errors import DataError, RecipeError
from perilune.recsys import FunnelConfig, funnel
from perilune.report import NullProgress
from perilune.run import (
    RecommenderRecipe,
    RunDirectory,
    load,
    load_ablation,
    load_recommender,
    run_recipe,
)
from perilune.run.interactions import describe, prepare_interactions
from perilune.run.schema import explain
from tests.run.shop_log import STAGE, shop_rows, write_log

pytest.importorskip("polars")


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
    assert (record["repeated"], record["of other behaviors"]) == (401 - len(distinct), 1)
    told = " ".join(err.split())
    assert f"rows left out: {401 - len(distinct)} repeated, 1 of other behaviors" in told
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
        ("b", 'kind = "leave_last_out"', "Other behaviors kept the pairs of held-out purchases (protocol open)."),
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
