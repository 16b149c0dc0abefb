from dataclasses import replace

import pytest

from perilune.errors import DataError, RecipeError
from perilune.report import LineProgress, StageResult, read_metrics
from perilune.run.directory import RunDirectory
from perilune.run.pipeline import run_pipeline
from perilune.run.recipe import LoadedRecipe, recipe_tree
from perilune.run.sweep import plan_sweep, run_sweep
from perilune.train import Interrupted
from tests.run.local_recipe import LocalRecipe, Model, Reward, Sweep, Teach


class Stop:
    """A stop request without signals."""

    def __init__(self):
        self.is_set = False

    def should_stop(self):
        return self.is_set

    def stopped(self):
        return Interrupted()


class Stages:
    """Two kinds of stage that leave numbers, and remember what they were given."""

    def __init__(self, stop=None, stop_in=None):
        self.calls, self.stop, self.stop_in = [], stop, stop_in
        self.registry = {"teach": self.teach, "reward": self.reward}

    def teach(self, context, settings):
        self.calls.append((context.name, context.start_from))
        done = context.directory.checkpoints(context.name) / "step"
        done.parent.mkdir(exist_ok=True)
        start = int(done.read_text()) if done.exists() else 0
        context.metrics.rewind(context.name, start - 1)
        for step in range(start, settings.steps):
            if step == settings.fail_at:
                raise DataError(f"{context.name} broke at step {step}")
            context.log(step, {"loss": 1.0 / (step + 1)})
            done.write_text(str(step + 1))
            if self.stop is not None and self.stop_in == (context.name, step):
                self.stop.is_set = True
            if context.should_stop():
                raise context.stopped()
        return StageResult(
            stage=context.name,
            kind="teach",
            time_s=1.0,
            tokens=settings.steps,
            checkpoint=f"checkpoints/{context.name}",
        )

    def reward(self, context, settings):
        self.calls.append((context.name, context.start_from))
        return StageResult(stage=context.name, kind="reward", time_s=1.0)


RECIPE = LocalRecipe(
    name="x", stages={"a": Teach(steps=3), "choose": Reward(), "b": Teach(steps=2), "c": Teach(steps=1, start_from="a")}
)


def run(path, stages, recipe=RECIPE, **arguments):
    return run_pipeline(recipe, recipe_tree(recipe), RunDirectory(path), stages.registry, **arguments)


def test_stages_run_in_order_each_from_the_last_model_or_the_one_it_names(tmp_path):
    stages = Stages()
    summary = run(tmp_path, stages)
    assert stages.calls == [("a", None), ("choose", "a"), ("b", "a"), ("c", "a")]
    assert [result.stage for result in summary.results] == ["a", "choose", "b", "c"]
    assert [result.start_from for result in summary.results] == [None, "a", "a", "a"]
    assert summary.results[0].peak_memory_bytes > 1_000_000
    assert "<h2>Summary</h2>" in summary.report.read_text()
    assert "torch" in (tmp_path / "machine.json").read_text()


def test_a_second_start_skips_what_is_complete(tmp_path):
    first = run(tmp_path, Stages())
    again = Stages()
    assert run(tmp_path, again).results == first.results
    assert again.calls == []


def test_a_failed_run_reports_what_was_finished_and_goes_on_later(tmp_path, capsys):
    broken = replace(RECIPE, stages={**RECIPE.stages, "b": Teach(steps=2, fail_at=1)})
    with pytest.raises(DataError, match="b broke at step 1"):
        run(tmp_path, Stages(), broken, progress=LineProgress())
    assert (tmp_path / "results" / "choose.json").is_file()
    assert "choose" in (tmp_path / "report.html").read_text()
    assert "report so far" in capsys.readouterr().err
    again = Stages()
    with pytest.raises(DataError, match="broke"):
        run(tmp_path, again, broken)
    assert again.calls == [("b", "a")]


def test_a_stopped_and_resumed_run_has_the_metrics_of_an_uninterrupted_one(tmp_path):
    run(tmp_path / "whole", Stages())
    stop = Stop()
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", Stages(stop, ("b", 0)), stop=stop)
    assert (tmp_path / "cut" / "report.html").is_file()
    resumed = Stages()
    run(tmp_path / "cut", resumed)
    assert resumed.calls == [("b", "a"), ("c", "a")]
    assert read_metrics(tmp_path / "cut" / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")


def test_a_stop_between_stages_starts_no_further_one(tmp_path):
    stop, stages = Stop(), Stages()
    stop.is_set = True
    with pytest.raises(Interrupted):
        run(tmp_path, stages, stop=stop)
    assert stages.calls == []


def test_a_changed_recipe_is_refused_in_the_same_directory(tmp_path):
    run(tmp_path, Stages())
    with pytest.raises(RecipeError, match=r"stages\.a\.steps was 3 and is now 4"):
        run(tmp_path, Stages(), replace(RECIPE, stages={"a": Teach(steps=4)}))


@pytest.mark.parametrize("name", ["../a", "", "a b", ".hidden/x", "ä"])
def test_a_stage_name_that_could_leave_the_directory_is_refused(tmp_path, name):
    with pytest.raises(RecipeError, match="stage name"):
        run(tmp_path / "run", Stages(), replace(RECIPE, stages={name: Reward()}))
    assert not (tmp_path / "run").exists()


def test_a_kind_without_a_function_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(RecipeError, match=r"stages\.a\.kind must be one of reward; got 'teach'"):
        run_pipeline(RECIPE, recipe_tree(RECIPE), RunDirectory(tmp_path), {"reward": Stages().reward})


def sweep_children(**changes):
    variants = {"wide": {"model": {"width": 32}}, "plain": {}}
    recipe = replace(RECIPE, sweep=Sweep(seeds=(0, 1), variants=variants | changes))
    loaded = LoadedRecipe(recipe=recipe, tree=recipe_tree(recipe), source="r.toml")
    return plan_sweep(loaded, recipe.sweep, LocalRecipe, {})


def test_a_sweep_is_variants_times_seeds():
    children = sweep_children()
    assert [child.name for child in children] == ["wide-seed0", "wide-seed1", "plain-seed0", "plain-seed1"]
    assert [child.recipe.seed for child in children] == [0, 1, 0, 1]
    assert children[0].recipe.model == Model(width=32)
    assert children[0].recipe.sweep is None
    assert children[3].recipe.name == "x-plain-seed1"


def test_without_a_sweep_there_are_no_children():
    loaded = LoadedRecipe(recipe=RECIPE, tree=recipe_tree(RECIPE), source="r.toml")
    assert plan_sweep(loaded, None, LocalRecipe, {}) == []


def test_a_wrong_variant_is_named():
    with pytest.raises(RecipeError, match=r"r\.toml: sweep\.variants\.odd: model\.widht is not a key"):
        sweep_children(odd={"model": {"widht": 3}})


def test_a_sweep_runs_each_child_once_and_compares_them(tmp_path):
    stages = Stages()
    summary = run_sweep(sweep_children(), RunDirectory(tmp_path), stages.registry)
    assert len(stages.calls) == 16
    assert (tmp_path / "wide-seed1" / "report.html").is_file()
    assert "Stage a" in summary.report.read_text()
    again = Stages()
    run_sweep(sweep_children(), RunDirectory(tmp_path), again.registry)
    assert again.calls == []


def test_a_stopped_sweep_compares_what_there_is(tmp_path):
    stop = Stop()
    with pytest.raises(Interrupted):
        run_sweep(sweep_children(), RunDirectory(tmp_path), Stages(stop, ("b", 1)).registry, stop=stop)
    assert "wide" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "plain-seed0").exists()
