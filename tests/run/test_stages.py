"""What each kind of stage does with the model it starts from, beyond what its parts are tested for."""

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch

from perilune.data import NeedleConfig, SyntheticSource
from perilune.errors import CheckpointError, DataError, RecipeError
from perilune.models import build_model
from perilune.report import MetricsLog, NullProgress, read_metrics
from perilune.run import StageContext, load, run_recipe
from perilune.run.config import StageConfig, SyntheticStage
from perilune.run.directory import RunDirectory
from perilune.run.loading import load_model, read_recipe, restore_stage
from perilune.run.prepared import prepare_data
from perilune.run.stages import STAGES
from perilune.run.stages.common import settings_hash, starting_model
from perilune.run.stages.reinforce import read_prompts, task_prompts
from perilune.run.stages.supervised import held_out_answers, teacher_examples
from perilune.seeding import derive_seed
from perilune.tasks import TaskMixture
from perilune.train import CheckpointStore, SignalWatch, module_tensors, score_targets
from tests.run import tiny_run
from tests.run.tiny_run import write_recipe


@pytest.fixture
def recipe(finished):
    return read_recipe(RunDirectory(finished))


@pytest.fixture
def data(finished, recipe):
    return prepare_data(recipe, RunDirectory(finished), NullProgress())


@pytest.fixture
def context(finished_copy, recipe):
    """The context of a further stage after the finished ones."""
    directory = RunDirectory(finished_copy)
    with MetricsLog(directory.metrics) as metrics:
        yield StageContext(
            name="further",
            recipe=recipe,
            directory=directory,
            start_from="pretrain",
            metrics=metrics,
            progress=NullProgress(),
            stop=SignalWatch(),
        )


def weights(run, stage):
    return CheckpointStore(run / "checkpoints" / stage).load(groups=["model"]).group("model")


def test_every_kind_that_a_recipe_may_name_has_a_function():
    assert {stage.__dataclass_fields__["kind"].default for stage in get_args(StageConfig)} == STAGES.keys()


def test_a_stage_starts_from_the_weights_it_names(context, finished, recipe):
    fresh = module_tensors(build_model(recipe.model, seed=recipe.seed))
    for stage, expected in (("rl", weights(finished, "rl")), (None, weights(finished, "pretrain"))):
        found = module_tensors(starting_model(context, stage))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    first = module_tensors(starting_model(replace(context, start_from=None)))
    assert all(torch.equal(first[name], tensor) for name, tensor in fresh.items())


def test_the_merge_is_the_weighted_mean_of_both_models(finished):
    long, short, merged = (weights(finished, stage) for stage in ("rl", "sft", "merge"))
    for name, tensor in merged.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.25 * long[name] + 0.75 * short[name])
    assert any(not torch.equal(merged[name], short[name]) for name in merged)


def test_reinforcement_learning_only_sees_prompts_that_curation_kept(finished, data):
    rows = [json.loads(line) for line in (finished / "data/curate/problems.jsonl").read_text().splitlines()]
    prompts = read_prompts(RunDirectory(finished), "curate", data)
    assert [(prompt.id, prompt.pass_rate) for prompt in prompts] == [(r["problem"]["id"], r["rate"]) for r in rows]
    assert all(row["problem"]["split"] == "train" and 0 <= row["rate"] <= 1 for row in rows)
    assert len({prompt.token_ids for prompt in prompts}) == len(prompts) > 1


def test_line_separators_of_unicode_in_a_problem_do_not_split_its_row(finished_copy, data):
    path = finished_copy / "data" / "curate" / "problems.jsonl"
    row = json.loads(path.read_text("utf-8").split("\n")[0])
    row["problem"]["prompt"] = "one\u2028two\x85three"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    (prompt,) = read_prompts(RunDirectory(finished_copy), "curate", data)
    assert prompt.problem.prompt == "one\u2028two\x85three"


@pytest.mark.parametrize("content", [None, "nonsense", '{"rate": 1}\n', '{"problem": {"tags": []}, "rate": 0.5}\n'])
def test_a_damaged_prompt_set_is_named_with_what_to_do(finished_copy, data, content):
    path = finished_copy / "data" / "curate" / "problems.jsonl"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=r"remove results/curate\.json to make it again") as caught:
        read_prompts(RunDirectory(finished_copy), "curate", data)
    assert str(path) in str(caught.value)


def test_curation_keeps_out_what_its_rules_remove(context, recipe, data):
    settings = recipe.stages["curate"]
    strict = replace(settings, curation=replace(settings.curation, drop_at_or_above=0.01))
    result = STAGES["curate"](replace(context, start_from="sft"), strict)
    assert result.numbers["kept"] + result.numbers["removed_trivial"] == result.numbers["candidates"] == 10
    assert 0 < result.numbers["kept"] < 10
    assert {prompt.pass_rate for prompt in read_prompts(context.directory, "further", data)} == {0.0}
    assert result.checkpoint is None


def test_the_short_phase_has_a_smaller_limit(finished):
    longest = {
        stage: max(record.values["response_tokens_max"] for record in read_metrics(finished / "metrics.jsonl", stage))
        for stage in ("rl", "shorter")
    }
    assert longest["rl"] > 3
    assert longest["shorter"] <= 3  # half of 6


def test_each_iteration_is_one_line_of_metrics_with_accuracy_when_asked(finished):
    for stage in ("rl", "shorter"):
        records = read_metrics(finished / "metrics.jsonl", stage)
        assert [record.step for record in records] == [1, 2, 3, 4, 5]
        assert all({"reward", "response_tokens", "progress"} <= record.values.keys() for record in records)
    records = read_metrics(finished / "metrics.jsonl", "rl")
    assert [record.step for record in records if "accuracy" in record.values] == [2, 4, 5]


def test_training_stages_log_every_step_and_evaluate_when_told(finished):
    records = read_metrics(finished / "metrics.jsonl", "pretrain")
    assert [record.step for record in records if "loss" in record.values] == [1, 2, 3, 4, 5]
    assert [record.step for record in records if "bits_per_byte" in record.values] == [2, 4, 5]
    measured = [record.values["bits_per_byte"] for record in records if "bits_per_byte" in record.values][-1]
    assert json.loads((finished / "results" / "pretrain.json").read_text())["bits_per_byte"] == measured


def test_supervised_examples_teach_the_answer_and_not_the_question(recipe, data):
    examples = teacher_examples(recipe, data, recipe.stages["sft"], seed=0)
    tasks = TaskMixture(recipe.tasks)
    assert len(examples) == 64
    for example, (problem, trace) in zip(examples, tasks.exercises(64, 0), strict=True):
        taught = [token for token, is_target in zip(example.tokens, example.mask, strict=True) if is_target]
        assert taught == [*data.tokenizer.encode(trace.answer), data.tokenizer.end_id]
        assert problem.split == "train"


def test_the_loss_of_answers_is_measured_on_problems_that_are_not_trained_on(finished, recipe, data):
    settings = recipe.stages["sft"]
    answers = held_out_answers(recipe, data, settings)
    assert sum(batch.cu_seqlens.numel() - 1 for batch in answers) == recipe.evaluation.problems
    assert all(int(batch.prompt_lengths.min()) > 3 for batch in answers)
    plain = held_out_answers(recipe, data, replace(settings, answers_as_generated=False))
    assert {batch.prompt_lengths for batch in plain} == {None}
    trained = teacher_examples(recipe, data, settings, seed=0)
    seen = {example.tokens[: example.prompt_length] for example in trained}
    for batch in answers:
        starts = zip(batch.cu_seqlens.tolist(), batch.prompt_lengths.tolist(), strict=False)
        assert not {tuple(batch.tokens[start : start + length].tolist()) for start, length in starts} & seen
    model = build_model(recipe.model, seed=0)
    restore_stage(model, finished / "checkpoints" / "sft")
    measured = score_targets(model.eval(), answers).nats_per_target
    numbers = json.loads((finished / "results" / "sft.json").read_text())["numbers"]
    assert numbers["answer_loss"] == pytest.approx(measured, rel=1e-6)
    assert numbers.keys().isdisjoint({"answer_loss_part_1", "loss_part_1"})


def test_a_share_of_the_examples_may_be_short(recipe, data):
    tasks = (replace(recipe.tasks[0], style="long"),)
    settings = replace(recipe.stages["sft"], short_share=0.25)
    lengths = [example.length for example in teacher_examples(replace(recipe, tasks=tasks), data, settings, seed=0)]
    alone = [example.length for example in teacher_examples(replace(recipe, tasks=tasks), data, settings, seed=0)[48:]]
    assert len(lengths) == 64
    assert sum(alone) / 16 < 0.75 * sum(lengths[:48]) / 48


def test_prompts_without_curation_are_training_problems_without_a_rate(recipe, data):
    prompts = task_prompts(TaskMixture(recipe.tasks), 12, 0, data.tokenizer)
    assert len({prompt.id for prompt in prompts}) == 12
    assert {prompt.pass_rate for prompt in prompts} == {None}


@pytest.mark.parametrize(
    ("kind", "message"), [("reject", "none of 10 problems was solved"), ("prefer", "no problem gave")]
)
def test_a_model_that_solves_nothing_has_nothing_to_learn_from(context, recipe, kind, message):
    settings = recipe.stages[kind]
    with pytest.raises(DataError, match=rf"stages\.further: {message}"):
        STAGES[settings.kind](context, settings)
    assert not context.directory.is_complete("further")
    assert not context.directory.checkpoints("further").exists()


def test_what_decides_a_stages_numbers_is_in_its_hash(recipe):
    settings = recipe.stages["sft"]
    same = replace(settings, train=replace(settings.train, checkpoint_interval=7, eval_interval=3, log_interval=2))
    assert settings_hash(same) == settings_hash(settings)
    for changed in (
        replace(settings, text_share=0.5),
        replace(settings, train=replace(settings.train, optimizer=replace(settings.train.optimizer, lr=1e-3))),
        replace(settings, style="long"),
    ):
        assert settings_hash(changed) != settings_hash(settings)


def test_a_checkpoint_of_another_model_is_refused(finished, recipe):
    wide = build_model(replace(recipe.model, d_ff=96), seed=0)
    with pytest.raises(CheckpointError, match=r"has shape .* the model needs"):
        restore_stage(wide, finished / "checkpoints" / "sft")


def test_a_stage_without_a_checkpoint_is_named(finished, recipe, tmp_path):
    with pytest.raises(CheckpointError, match=r"none: holds no checkpoint.*results/none\.json"):
        restore_stage(build_model(recipe.model, seed=0), tmp_path / "none")


PROBE = {
    "kind": "synthetic",
    "sequences": 8,
    "evaluation_sequences": 16,
    "task": {"kind": "palindrome", "length": 9, "num_symbols": 8},
    "train": {"steps": 3, "eval_interval": 2},
}


def test_a_synthetic_stage_needs_no_text_and_measures_recall(tmp_path):
    sizes = {"tokenizer": {"vocab_size": 16}, "model": {"preset": "smoke", "vocab_size": 16}, "tasks": []}
    loaded = load(write_recipe(tmp_path / "probe.toml", stages={"probe": PROBE}, **sizes))
    assert isinstance(loaded.recipe.stages["probe"], SyntheticStage)
    (result,) = run_recipe(loaded, tmp_path / "run").results
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    assert result.bits_per_byte is None
    assert 0 <= result.numbers["sequence_accuracy"] <= result.numbers["accuracy"] <= 1
    accuracies = [r.values["accuracy"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "accuracy" in r.values]
    assert len(accuracies) == 2
    assert accuracies[-1] == result.numbers["accuracy"]
    with pytest.raises(DataError, match="synthetic tasks alone has no text and no tokenizer"):
        load_model(tmp_path / "run")


def test_a_synthetic_stage_measures_further_tasks(tmp_path):
    sizes = {"tokenizer": {"vocab_size": 16}, "model": {"preset": "smoke", "vocab_size": 16}, "tasks": []}
    same, longer = ({"kind": "needle", "length": length, "num_symbols": 16} for length in (24, 48))
    stage = {**PROBE, "task": same, "evaluation_tasks": {"same": same, "longer": longer}}
    loaded = load(write_recipe(tmp_path / "probe.toml", stages={"probe": stage}, **sizes))
    (result,) = run_recipe(loaded, tmp_path / "run").results
    numbers = result.numbers
    assert (numbers["accuracy_same"], numbers["loss_same"]) == (numbers["accuracy"], numbers["loss"])
    model = build_model(loaded.recipe.model, seed=0)
    restore_stage(model, tmp_path / "run" / "checkpoints" / "probe")
    seed = derive_seed(loaded.recipe.seed, "probe", "sequences")
    source = SyntheticSource(NeedleConfig(length=48, num_symbols=16), sequences=1, seed=seed)
    measured = score_targets(model.eval(), [source.evaluation_batch(16)])
    assert numbers["loss_longer"] == pytest.approx(measured.nats_per_target, rel=1e-6)
    assert numbers["loss_longer"] != numbers["loss"]


def test_losses_are_told_apart_by_position_where_asked(tmp_path):
    pytest.importorskip("reasoning_gym", reason="the tasks extra is not installed")
    copies = {**PROBE, "task": {"kind": "copies", "length": 96, "min_span": 2, "max_span": 4, "num_symbols": 12}}
    stages = {"probe": copies, "pretrain": tiny_run.STAGES["pretrain"], "sft": tiny_run.STAGES["sft"]}
    evaluation = {**tiny_run.RECIPE["evaluation"], "loss_parts": 3}
    loaded = load(write_recipe(tmp_path / "parts.toml", stages=stages, evaluation=evaluation))
    results = {result.stage: result.numbers for result in run_recipe(loaded, tmp_path / "run").results}
    for stage, name in (("probe", "loss"), ("pretrain", "loss"), ("sft", "answer_loss")):
        parts = [results[stage].get(f"{name}_part_{part}") for part in (1, 2, 3)]
        if stage == "sft":  # a prompt may fill the first part
            parts = [part for part in parts if part is not None]
        assert all(0 < part < 10 for part in parts)
        logged = [record.values for record in read_metrics(tmp_path / "run" / "metrics.jsonl", stage)][-1]
        assert {value for key, value in logged.items() if key.startswith(f"{name}_part_")} == set(parts)
    assert min(results["probe"][f"loss_part_{part}"] for part in (1, 2, 3)) < results["probe"]["loss"]


def test_the_short_phase_takes_its_length_reward_from_its_own_keys(tmp_path):
    stages = {name: tiny_run.STAGES[name] for name in ("pretrain", "curate", "rl")}
    short = {"kind": "l2s_rl", "prompts": "curate", "rl": {"length": {"weight": 0.9}}}
    with pytest.raises(RecipeError, match=r"stages\.short: rl\.length must be left out \(length_weight decides\)"):
        load(write_recipe(tmp_path / "short.toml", stages={**stages, "short": short}))


def test_stages_refer_to_stages_before_them(tmp_path):
    stages = {name: tiny_run.STAGES[name] for name in ("pretrain", "rl", "curate")}
    with pytest.raises(RecipeError, match=r"stages\.rl\.prompts must name an earlier curate stage \(there is none\)"):
        load(write_recipe(tmp_path / "order.toml", stages=stages))
