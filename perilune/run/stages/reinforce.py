"""Stages around reinforcement learning: curation of prompts, the iterations, and the long2short phase."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256

import torch

from perilune.data import Tokenizer
from perilune.engine import Engine
from perilune.errors import DataError
from perilune.files import write_atomic
from perilune.models import Decoder
from perilune.optim import OptimizerConfig, build_optimizer
from perilune.report import MetricValue, NullProgress, ProgressTask, StageResult
from perilune.rl import (
    NativeRolloutEngine,
    Prompt,
    RLConfig,
    RLHooks,
    TaskScorer,
    curate,
    problem_prompt,
    run_rl,
    short_phase,
    task_candidates,
)
from perilune.run.config import CurateStage, Recipe, RLStage, ShortRLStage
from perilune.run.directory import RunDirectory
from perilune.run.evaluation import evaluation_problems, judge_problems
from perilune.run.pipeline import StageContext
from perilune.run.prepared import PreparedData, prepare_data
from perilune.run.stages.common import checkpoint_store, stage_result, starting_model
from perilune.seeding import derive_seed
from perilune.tasks import Problem, TaskMixture
from perilune.train import module_tensors

_PROBLEMS = "problems.jsonl"
_SHOWN = ("reward", "response_tokens", "tokens_per_s")
Metrics = Mapping[str, MetricValue]


def run_curate(context: StageContext, settings: CurateStage) -> StageResult:
    """Choose prompts by the model's own pass rate; makes no model."""
    recipe: Recipe = context.recipe
    started_s = time.monotonic()
    data = prepare_data(recipe, context.directory, context.progress)
    model, tasks = starting_model(context), TaskMixture(recipe.tasks)
    seed = derive_seed(recipe.seed, context.name, "problems")
    problems = tasks.sample("train", settings.problems, seed, allow_fewer=True)
    with context.progress.task("curating prompts", total=len(problems), unit="problem") as task:
        curation = curate(
            task_candidates(data.tokenizer, tasks, problems),
            NativeRolloutEngine(Engine(model)),
            TaskScorer(data.tokenizer, tasks),
            replace(settings.curation, seed=derive_seed(recipe.seed, context.name, settings.curation.seed)),
            context.directory.data(context.name),
            stop_ids=data.tokenizer.stop_ids,
            model_name=_fingerprint(model),
            held_out=[problem.prompt for problem in evaluation_problems(recipe.tasks, recipe.evaluation)],
            progress=lambda done, _: _advance(context, task, done),
        )
    kept = {prompt.id: prompt.pass_rate for prompt in curation.prompts}
    _write_problems(context.directory, context.name, [problem for problem in problems if problem.id in kept], kept)
    rates = [rate for rate in kept.values() if rate is not None]
    removed = {f"removed_{rule}": float(count) for rule, count in curation.manifest["removed"].items()}
    return StageResult(
        stage=context.name,
        kind=settings.kind,
        time_s=time.monotonic() - started_s,
        numbers={
            "candidates": float(len(problems)),
            "kept": float(len(kept)),
            "mean_pass_rate": sum(rates) / len(rates) if rates else 0.0,
            **removed,
        },
    )


def run_rl_stage(context: StageContext, settings: RLStage) -> StageResult:
    """Improve the policy by the iterations of Kimi k1.5."""
    return _reinforce(context, settings, settings.rl, settings.optimizer)


def run_short_rl(context: StageContext, settings: ShortRLStage) -> StageResult:
    """Shorten the policy's responses by a second phase: length reward from the start, a much smaller limit."""
    config = short_phase(settings.rl, length_fraction=settings.length_fraction, length_weight=settings.length_weight)
    return _reinforce(context, settings, config, settings.optimizer)


def _reinforce(
    context: StageContext, settings: RLStage | ShortRLStage, config: RLConfig, optimizer_config: OptimizerConfig
) -> StageResult:
    recipe: Recipe = context.recipe
    data = prepare_data(recipe, context.directory, context.progress)
    model, tasks = starting_model(context), TaskMixture(recipe.tasks)
    prompts = read_prompts(context.directory, settings.prompts, data)
    store = checkpoint_store(context)
    newest = store.latest()
    context.metrics.rewind(context.name, -1 if newest is None else newest)
    with context.progress.task(context.name, total=1.0, unit="") as task:

        def log(iteration: int, values: Metrics) -> None:
            context.log(iteration, values)
            task.update(_number(values, "progress"), {name: _number(values, name) for name in _SHOWN})

        result = run_rl(
            model,
            build_optimizer(model, optimizer_config),
            NativeRolloutEngine(Engine(model)),
            prompts,
            TaskScorer(data.tokenizer, tasks),
            replace(config, seed=derive_seed(recipe.seed, context.name, config.seed)),
            stop_ids=data.tokenizer.stop_ids,
            store=store,
            hooks=RLHooks(log=log, evaluate=lambda: _validate(context, model, data), should_stop=context.should_stop),
        )
    if not result.is_complete:
        raise context.stopped()
    model.eval()
    return stage_result(
        context,
        settings,
        model,
        data,
        time_s=result.elapsed_s,
        tokens=result.tokens,
        numbers={"iterations": float(result.iterations), "prompts": float(len(prompts))},
    )


def read_prompts(directory: RunDirectory, stage: str, data: PreparedData) -> list[Prompt]:
    """Return the prompts that a curate stage kept.

    Raises:
        DataError: its file is missing or damaged.
    """
    path = directory.data(stage) / _PROBLEMS
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        problems = [(Problem(**{**row["problem"], "tags": tuple(row["problem"]["tags"])}), row["rate"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is missing or damaged ({error}); remove results/{stage}.json to make it again"
        ) from error
    return [problem_prompt(data.tokenizer, problem, rate) for problem, rate in problems]


def _write_problems(
    directory: RunDirectory, stage: str, problems: Sequence[Problem], rates: Mapping[str, float | None]
) -> None:
    rows = [{"problem": asdict(problem), "rate": rates[problem.id]} for problem in problems]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(directory.data(stage) / _PROBLEMS, text)


def task_prompts(tasks: TaskMixture, count: int, seed: int, tokenizer: Tokenizer) -> list[Prompt]:
    """Return prompts of training problems without curation."""
    return [problem_prompt(tokenizer, problem) for problem in tasks.sample("train", count, seed, allow_fewer=True)]


def _advance(context: StageContext, task: ProgressTask, done: int) -> None:
    """Show progress, and stop where that loses little."""
    task.update(done)
    if context.should_stop():
        raise context.stopped()


def _validate(context: StageContext, model: Decoder, data: PreparedData) -> Metrics:
    """Greedy accuracy on validation problems, which are neither trained on nor reported after the stage."""
    recipe: Recipe = context.recipe
    config = replace(recipe.evaluation, split="validation", samples=0)
    judged = judge_problems(model, data.tokenizer, TaskMixture(recipe.tasks), config, NullProgress())
    rows = [row for task_rows in judged.values() for row in task_rows]
    return {"accuracy": sum(row.is_correct for row in rows) / len(rows)}


def _fingerprint(model: Decoder) -> str:
    """Hash of a model's weights."""
    digest = sha256()
    for name, tensor in sorted(module_tensors(model).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _number(values: Metrics, name: str) -> float:
    value = values.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0
