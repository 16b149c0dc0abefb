"""A recommender's run from its recipe to recommendations, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from perilune.errors import RecipeError
from perilune.run import load, load_ablation, load_recommender
from perilune.run.ablation import variants_of

RECIPE = """
name = "small"

[interactions]
kind = "funnel"
funnel = { num_users = 60, num_items = 40, views = 8.0 }

[protocol]
aux = "clean"

[stages.popularity]
kind = "rule"
rule = "popularity"

[stages.item_knn]
kind = "rule"
rule = "item_knn"
behaviors = { view = 1.0, buy = 1.0 }

[stages.cigf]
kind = "recommender"
model = { kind = "cigf", dim = 8 }
train = { epochs = 4, batch_users = 32, lr = 1e-2, eval_interval = 2 }
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_path(recipe: Path) -> Path:
    from perilune.run import run_recipe

    directory = recipe.parent / "run"
    run_recipe(load(recipe), directory)
    return directory


def test_a_run_ranks_every_method_and_a_second_call_skips_them(cli, recipe: Path, run_path: Path) -> None:
    code, out, _ = cli("recsys", "train", recipe, "--run-dir", run_path, "--json")
    assert code == 0
    results = {result["stage"]: result for result in json.loads(out)["results"]}
    assert list(results) == ["popularity", "item_knn", "cigf"]
    for result in results.values():
        assert {"full_ndcg@10", "full_hr@10", "sampled99_mrr"} <= set(result["numbers"])
    assert results["cigf"]["numbers"]["epochs"] == 4
    assert "alpha_std_2" in results["cigf"]["numbers"]
    code, _, err = cli("run", recipe, "--run-dir", run_path)
    assert code == 0
    assert "cigf: complete, skipped" in err
    report = (run_path / "report.html").read_text(encoding="utf-8")
    assert "Methods" in report
    assert "validation NDCG@10" in report


def test_a_broken_off_stage_goes_on_to_the_same_numbers(cli, recipe: Path, run_path: Path, tmp_path: Path) -> None:
    shorter = recipe.parent / "broken"
    cli("recsys", "train", recipe, "--run-dir", shorter, "--quiet")
    (shorter / "results" / "cigf.json").unlink()
    code, _, _ = cli("recsys", "train", recipe, "--run-dir", shorter, "--quiet")
    assert code == 0
    first, second = (
        json.loads((path / "results" / "cigf.json").read_text())["numbers"] for path in (run_path, shorter)
    )
    kept = {name for name in first if "epoch_s" not in name}
    assert {name: second[name] for name in kept} == {name: first[name] for name in kept}


def test_evaluate_shows_intervals_groups_and_conflicts(cli, run_path: Path) -> None:
    code, out, _ = cli("recsys", "evaluate", run_path, "--json", "--conflicts", 2)
    assert code == 0
    found = json.loads(out)
    assert set(found["methods"]) == {"full", "sampled99"}
    methods = found["methods"]["full"]
    assert [method["against_best"] is None for method in methods].count(True) == 1
    for method in methods:
        estimate = method["metrics"]["ndcg@10"]
        assert estimate["low"] <= estimate["mean"] <= estimate["high"]
    assert 0 < found["coverage"] <= 1
    assert found["groups"]["full"]
    assert found["conflicts"]["rows"]
    code, out, _ = cli("recsys", "evaluate", run_path, "--protocol", "full")
    assert code == 0
    assert "Protocol full" in out
    assert "sampled99" not in out


def test_recommendations_for_users_and_events(cli, run_path: Path, tmp_path: Path) -> None:
    trained = load_recommender(run_path)
    user = trained.data.user_ids[0] if trained.data.user_ids is not None else 0
    code, out, _ = cli("recsys", "recommend", run_path, "--user", user, "--k", 5, "--json")
    assert code == 0
    items = json.loads(out)
    assert len(items) == 5
    assert [item["score"] for item in items] == sorted((item["score"] for item in items), reverse=True)
    item = items[0]["item"]
    code, out, _ = cli("recsys", "recommend", run_path, "--event", f"view={item}", "--k", 3)
    assert code == 0
    assert f"view {item}" in out
    code, out, _ = cli("recsys", "recommend", run_path, "--out", tmp_path / "all.parquet", "--k", 4, "--quiet")
    assert code == 0
    import polars as pl

    assert pl.read_parquet(tmp_path / "all.parquet").height == 60 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--user", "nobody"), "nobody"),
        (("--event", "view=no-such-item"), "no-such-item"),
        (("--event", "love=1"), "love"),
        (("--event", "view"), "must be BEHAVIOR=ITEM"),
        ((), "give one of them"),
        (("--user", "1", "--behavior", "pv"), "pv"),
        (("--user", "1", "--stage", "popularity"), "stages with a model: cigf"),
    ],
)
def test_wrong_requests_are_told(cli, run_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = cli("recsys", "recommend", run_path, *arguments)
    assert code in (1, 2)
    assert message in err
    assert "Traceback" not in err


def test_a_warm_start_keeps_rows_by_id(recipe: Path, run_path: Path) -> None:
    from perilune.run import run_recipe

    directory = recipe.parent / "warm"
    changes = ["interactions.funnel.num_users=70", "stages.cigf.train.lr=1e-12", "stages.cigf.train.l2=0.0"]
    run_recipe(load(recipe, [*changes, f"stages.cigf.warm_start='{run_path}'"]), directory)
    before, after = load_recommender(run_path), load_recommender(directory)
    old, new = (x.data.item_ids for x in (before, after))
    assert old is not None
    assert new is not None
    _, there, here = np.intersect1d(old, new, return_indices=True)
    assert len(here) > 30
    was, now = (x.model.item_embedding.weight.detach().numpy() for x in (before, after))
    np.testing.assert_allclose(now[here], was[there], atol=1e-6)
    assert after.data.num_users == 70


def test_a_loaded_model_knows_what_it_was_trained_by(recipe: Path, run_path: Path, tmp_path: Path) -> None:
    from perilune.run import run_recipe

    *others, target = load_recommender(run_path).model.behaviors
    zeros = ",".join(f"{name}=0.0" for name in others)
    changes = [
        f"stages.cigf.train.behavior_weights={{{zeros}}}",
        f"stages.cigf.model.graph_behaviors=['{target}']",
        "stages.cigf.train.epochs=1",
    ]
    run_recipe(load(recipe, changes), tmp_path / "run")
    assert load_recommender(tmp_path / "run").model.learned_from == (target,)


def test_an_ablation_is_a_sweep_of_one_stage(cli, recipe: Path, tmp_path: Path) -> None:
    loaded = load_ablation(recipe, "decoders", seeds=(0, 1))
    assert list(loaded.recipe.stages) == ["cigf"]
    swept = tmp_path / "swept.toml"
    swept.write_text(RECIPE + "\n[sweep.variants.mine]\n")
    assert set(load_ablation(swept, "order").recipe.sweep.variants) == {"official", "paper"}
    assert set(loaded.recipe.sweep.variants) >= {"mesi", "mmoe", "ple", "bilinear", "shared_bottom"}
    options = ["stages.cigf.train.epochs=1", "--run-dir", tmp_path / "a", "--json", "--quiet"]
    code, out, _ = cli("recsys", "ablate", recipe, "order", *options)
    assert code == 0
    assert {result["variant"] for result in json.loads(out)["results"]} == {"official", "paper"}
    with pytest.raises(RecipeError, match="an ablation needs a stage with a cigf, got 'popularity'"):
        load_ablation(recipe, "layers", stage="popularity")


@pytest.mark.parametrize("ablation", ["parts", "decoders", "encoders", "layers", "dims", "attention", "gates", "norms"])
def test_every_variant_is_a_valid_recipe(recipe: Path, ablation) -> None:
    variants = variants_of(ablation, ("view", "cart", "buy"))
    assert len(load_ablation(recipe, ablation).recipe.sweep.variants) == len(variants) >= 2


def test_behaviors_are_dropped_from_edges_and_from_labels(recipe: Path) -> None:
    variants = variants_of("behaviors", ("view", "cart", "buy"))
    assert variants["no-view"]["model"]["graph_behaviors"] == ["cart", "buy"]
    assert variants["no-view"]["train"]["behavior_weights"] == {"view": 0.0}
    assert variants["labels-alone"] == {"model": {"graph_behaviors": ["buy"]}}
    assert variants["edges-alone"] == {"train": {"behavior_weights": {"view": 0.0, "cart": 0.0}}}
    assert load_ablation(recipe, "behaviors").recipe.sweep.variants.keys() == variants.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.cigf.model.decoder=mesy", "decoder must be one of mesi"),
        ("stages.cigf.start_from=popularity", "must name an earlier stage with a model"),
        ("interactions.funnel.num_usres=3", "num_usres is not a key"),
        ("protocol.protocols=[]", "protocols must be distinct"),
        ("protocol.cutoffs=[5]", "cutoffs must be numbers >= 1 with 10 among them"),
        ("stages.cigf={kind='recommender',model={kind='mf'},train={subgraph={}}}", "subgraph must be absent for mf"),
        ("stages.cigf.train.subgraph.chunk_users=0", "chunk_users must be >= 1"),
        ("stages.popularity.behaviors={view=1.0}", "behaviors must be absent for popularity"),
    ],
)
def test_wrong_recipes_are_told_before_anything_starts(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(recipe, [override])


def test_a_missing_source_is_told_before_anything_is_made(cli, tmp_path: Path) -> None:
    path = tmp_path / "log.toml"
    path.write_text(
        'name = "log"\n[interactions]\nkind = "log"\npath = "no-such.csv"\nbehaviors = ["view", "buy"]\n'
        '[stages.popularity]\nkind = "rule"\nrule = "popularity"\n'
    )
    code, _, err = cli("recsys", "train", path, "--run-dir", tmp_path / "run")
    assert code == 1
    assert "interactions.path: no-such.csv is not a file" in err
    assert not (tmp_path / "run").exists()


def test_a_log_becomes_recommendations(cli, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lines = ["user,item,behavior,time"]
    for event in range(900):
        user, item = generator.integers(30), generator.integers(20)
        lines.append(f"u{user},i{item},{['pv', 'buy'][int(generator.random() < 0.4)]},{1_700_000_000 + event}")
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    path = tmp_path / "log.toml"
    path.write_text(
        f'name = "log"\n[interactions]\nkind = "log"\npath = "{tmp_path / "log.csv"}"\nbehaviors = ["view", "buy"]\n'
        'event_map = { pv = "view", buy = "buy" }\n'
        '[interactions.split]\nkind = "temporal"\nquantile = 0.8\n'
        '[stages.cigf]\nkind = "recommender"\ntrain = { epochs = 2 }\n'
    )
    code, _, err = cli("recsys", "train", path, "--run-dir", tmp_path / "run", "--quiet")
    assert code == 0, err
    code, out, _ = cli("recsys", "recommend", tmp_path / "run", "--user", "u3", "--json")
    assert code == 0
    assert all(item["item"].startswith("i") for item in json.loads(out))


def test_the_command_line_offers_every_ablation() -> None:
    from typing import get_args, get_type_hints

    from perilune.cli_recsys import ablate
    from perilune.run.ablation import Ablation

    assert get_args(get_type_hints(ablate)["ablation"]) == get_args(Ablation)
