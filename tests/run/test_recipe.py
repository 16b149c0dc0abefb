import tomllib
from pathlib import Path

import pytest

from perilune.errors import RecipeError
from perilune.run.recipe import build_recipe, dump_recipe, load_recipe
from tests.run.local_recipe import PRESETS, Books, Films, LocalRecipe, Optim, Reward, Teach

GOOD = {
    "name": "x",
    "data": "/some/where",
    "model": {"preset": "small", "depth": 5},
    "tasks": ["a", "b"],
    "stages": {
        "second": {"kind": "reward", "optim": {"lr": 1}},
        "first": {"kind": "teach", "steps": 3, "optim": {"betas": [0.1, 0.2]}, "source": {"kind": "films"}},
    },
}


def build(tree):
    return build_recipe(tree, LocalRecipe, source="r.toml", presets=PRESETS)


def errors_of(tree):
    with pytest.raises(RecipeError) as caught:
        build(tree)
    return str(caught.value).splitlines()


def test_a_tree_becomes_typed_objects_in_the_files_order():
    recipe = build(GOOD)
    assert recipe.data == Path("/some/where")
    assert (recipe.model.width, recipe.model.depth) == (16, 5)
    assert recipe.tasks == ("a", "b")
    assert list(recipe.stages) == ["second", "first"]
    assert recipe.stages["second"] == Reward(optim=Optim(lr=1.0))
    assert recipe.stages["first"] == Teach(steps=3, optim=Optim(betas=(0.1, 0.2)), source=Films())


def test_the_resolved_recipe_is_itself_that_recipe():
    recipe = build(GOOD)
    text = dump_recipe(recipe)
    assert build_recipe(tomllib.loads(text), LocalRecipe, source="again") == recipe
    assert "preset" not in text
    assert text.index("[stages.second]") < text.index("[stages.first]")


def with_stage(**settings):
    return {"name": "x", "stages": {"s": settings}}


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({}, "name is missing; it is required"),
        ({"name": 3}, "name must be a valid text, got 3"),
        ({"name": "x", "sed": 1}, "sed is not a key (did you mean seed?); allowed here: name, seed, data, model,"),
        ({"name": "x", "seed": True}, "seed must be a valid integer, got True"),
        ({"name": "x", "seed": "3"}, "seed must be a valid integer, got '3'"),
        ({"name": "x", "seed": 2.0}, "seed must be a valid integer, got 2.0"),
        ({"name": "x", "tasks": "abc"}, "tasks must be a valid list, got 'abc'"),
        ({"name": "x", "tasks": ["a", 3]}, "tasks.1 must be a valid text, got 3"),
        ({"name": "x", "stages": {"s": 3}}, "stages.s must be a"),
        ({"name": "x", "model": {"preset": "tiny"}}, "model.preset must be one of large, small; got 'tiny'"),
        (
            with_stage(kind="reward", mode="men"),
            "stages.s.mode must be one of mean, log_z; got 'men' (did you mean mean?)",
        ),
        (with_stage(kind="rewrd"), "stages.s.kind must be one of teach, reward; got 'rewrd' (did you mean reward?)"),
        (with_stage(steps=3), "stages.s.kind must be one of teach, reward; it has none"),
        (with_stage(kind="teach"), "stages.s.steps is missing; it is required"),
        (
            with_stage(kind="teach", steps=1, optim={"mometum": 0.5}),
            "stages.s.optim.mometum is not a key (did you mean momentum?); allowed here: lr, momentum, betas",
        ),
        (
            with_stage(kind="reward", optim={"momentum": 2.0}),
            "stages.s.optim: momentum must be in [0, 1), got 2.0",
        ),
        (
            with_stage(kind="teach", steps=1, optim={"lr": float("nan")}),
            "stages.s.optim.lr must be a finite number, got nan",
        ),
        (
            with_stage(kind="teach", steps=1, optim={"betas": [0.1, "x"]}),
            "stages.s.optim.betas.1 must be a valid number",
        ),
        (
            with_stage(kind="teach", steps=1, source={"kind": "films", "shelf": "b"}),
            "stages.s.source.shelf is not a key; allowed here: kind, minutes",
        ),
        (
            with_stage(kind="teach", steps=1, source={"kind": "film"}),
            "stages.s.source.kind must be one of books, films; got 'film' (did you mean films?)",
        ),
        (
            with_stage(kind="teach", steps=1, source={"shlf": "b"}),
            "stages.s.source.shlf is not a key (did you mean shelf?)",
        ),
    ],
)
def test_each_fault_is_one_line_with_file_key_and_what_is_allowed(tree, line):
    lines = errors_of(tree)
    assert len(lines) == 1
    assert lines[0].startswith(f"r.toml: {line}")


def test_all_faults_are_told_at_once():
    tree = {"sed": 1, "tasks": 3, "stages": {"s": {"kind": "teach", "optim": {"lrr": 1}}, "t": {"kind": "x"}}}
    lines = errors_of(tree)
    for part in ("sed is not", "name is missing", "tasks must", "steps is missing", "lrr is not", "stages.t.kind"):
        assert any(part in line for line in lines), part


def test_a_stage_may_bear_the_name_of_a_kind_or_of_a_key():
    tree = {
        "name": "x",
        "stages": {"teach": {"kind": "reward", "modee": "mean"}, "optim": {"kind": "teach", "steps": "x"}},
    }
    assert errors_of(tree) == [
        "r.toml: stages.teach.modee is not a key (did you mean mode?); allowed here: kind, start_from, mode, optim",
        "r.toml: stages.optim.steps must be a valid integer, got 'x'",
    ]


def test_a_union_without_a_kind_takes_its_first_member():
    assert build(with_stage(kind="teach", steps=1, source={"shelf": "b"})).stages["s"].source == Books(shelf="b")


def test_dates_are_refused_by_key(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\n[model]\nwidth = [1, 2024-01-01]\n')
    with pytest.raises(RecipeError, match=r"model\.width\[1\] is a date or time"):
        load_recipe(path, [], LocalRecipe)


def test_overrides_come_last_and_are_checked_like_the_file(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\n[stages.s]\nkind = "teach"\nsteps = 3\n')
    loaded = load_recipe(path, ["stages.s.steps=5", "model.width=3", "tasks=['z']"], LocalRecipe)
    assert loaded.recipe.stages["s"].steps == 5
    assert (loaded.recipe.model.width, loaded.recipe.tasks) == (3, ("z",))
    with pytest.raises(RecipeError, match=r"r\.toml: stages\.s\.step is not a key \(did you mean steps\?\)"):
        load_recipe(path, ["stages.s.step=5"], LocalRecipe)


def test_a_long_value_is_shortened_in_the_message():
    assert len(errors_of({"name": "x", "seed": "y" * 10_000})[0]) < 120
