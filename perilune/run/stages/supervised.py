"""Stages of gradient descent on given targets: pre-training, synthetic tasks, SFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from perilune.data import (
    Batch,
    BatchSource,
    ConversationSource,
    Example,
    MixtureSource,
    SyntheticSource,
    WindowSource,
    pack_examples,
)
from perilune.models import Decoder
from perilune.report import MetricValue, StageResult
from perilune.run.config import PretrainStage, Recipe, SFTStage, SyntheticStage
from perilune.run.evaluation import evaluation_problems
from perilune.run.pipeline import StageContext
from perilune.run.prepared import PreparedData, prepare_data
from perilune.run.stages.common import (
    last_numbers,
    part_losses,
    stage_result,
    starting_model,
    text_evaluation,
    train_model,
)
from perilune.seeding import derive_seed
from perilune.tasks import Problem, TaskMixture, Trace, encode_trace
from perilune.train import Evaluation, lm_loss, score_targets

_EXAMPLES_AT_ONCE = 64


def run_pretrain(context: StageContext, settings: PretrainStage) -> StageResult:
    """Train on windows of the corpus."""
    recipe: Recipe = context.recipe
    data = prepare_data(recipe, context.directory, context.progress)
    source = WindowSource(
        data.train_tokens,
        context=settings.context,
        windows=settings.windows,
        seed=derive_seed(recipe.seed, context.name, "windows"),
        micro_steps=settings.train.micro_batches,
    )
    model = starting_model(context, moba_full_last_n=settings.moba_full_last_n)
    trained = train_model(context, settings, model, source, lm_loss, settings.train, text_evaluation(data, recipe))
    numbers = {"steps": float(trained.steps), "skipped_steps": float(trained.skipped_steps)}
    numbers |= last_numbers(trained, "loss_part_")
    return stage_result(
        context, settings, model, data, time_s=trained.elapsed_s, tokens=trained.tokens, numbers=numbers
    )


def run_synthetic(context: StageContext, settings: SyntheticStage) -> StageResult:
    """Train on a synthetic task and measure accuracy and loss on a fixed set, and on one of each further task."""
    recipe: Recipe = context.recipe
    source = SyntheticSource(
        settings.task,
        sequences=settings.sequences,
        seed=derive_seed(recipe.seed, context.name, "sequences"),
        micro_steps=settings.train.micro_batches,
    )
    held_out = source.evaluation_batch(settings.evaluation_sequences)
    parts = recipe.evaluation.loss_parts

    def evaluate(model: nn.Module) -> Mapping[str, MetricValue]:
        assert isinstance(model, Decoder)
        score = score_targets(model, [held_out], parts=parts)
        losses = {"validation_loss": score.nats_per_target, **part_losses(score.nats_by_part)}
        return {"accuracy": score.accuracy, **losses}

    model = starting_model(context, moba_full_last_n=settings.moba_full_last_n)
    trained = train_model(context, settings, model, source, lm_loss, settings.train, evaluate)
    score = score_targets(model, [held_out], parts=parts)
    accuracies = {"accuracy": score.accuracy, "sequence_accuracy": score.sequence_accuracy}
    further: dict[str, float] = {}
    for name, task in settings.evaluation_tasks.items():
        found = score_targets(model, [source.evaluation_batch(settings.evaluation_sequences, task)])
        further |= {f"accuracy_{name}": found.accuracy, f"loss_{name}": found.nats_per_target}
    return StageResult(
        stage=context.name,
        kind=settings.kind,
        time_s=trained.elapsed_s,
        tokens=trained.tokens,
        tokens_per_s=trained.tokens_per_s,
        numbers={**accuracies, "loss": score.nats_per_target, **part_losses(score.nats_by_part), **further},
        checkpoint=f"checkpoints/{context.name}",
    )


def run_sft(context: StageContext, settings: SFTStage) -> StageResult:
    """Train on the scripted teacher's traces."""
    recipe: Recipe = context.recipe
    data = prepare_data(recipe, context.directory, context.progress)
    examples = teacher_examples(recipe, data, settings, derive_seed(recipe.seed, context.name, "traces"))
    source = _sft_source(examples, data, settings, derive_seed(recipe.seed, context.name, "order"), recipe)
    model = starting_model(context, moba_full_last_n=settings.moba_full_last_n)
    evaluate = _sft_evaluation(held_out_answers(recipe, data, settings), data, recipe)
    trained = train_model(context, settings, model, source, lm_loss, settings.train, evaluate)
    numbers = {
        "examples": float(len(examples)),
        "example_tokens": sum(example.length for example in examples) / len(examples),
        "steps": float(trained.steps),
        **last_numbers(trained, "answer_loss"),
    }
    return stage_result(
        context, settings, model, data, time_s=trained.elapsed_s, tokens=trained.tokens, numbers=numbers
    )


def teacher_examples(recipe: Recipe, data: PreparedData, settings: SFTStage, seed: int) -> list[Example]:
    """Return training traces, each verified by its task."""
    tasks = TaskMixture(recipe.tasks)
    short = round(settings.examples * settings.short_share)
    exercises = tasks.exercises(settings.examples - short, seed, settings.style)
    if short:
        exercises += tasks.exercises(short, derive_seed(seed, "short"), "short")
    return [_example(data, settings, problem, trace) for problem, trace in exercises]


def held_out_answers(recipe: Recipe, data: PreparedData, settings: SFTStage) -> list[Batch]:
    """Return the teacher's answers to validation problems, packed: what the loss of answers is measured on."""
    tasks, config = TaskMixture(recipe.tasks), replace(recipe.evaluation, split="validation")
    examples = [
        _example(data, settings, problem, tasks.teach(problem, derive_seed(config.seed, problem.id), settings.style))
        for problem in evaluation_problems(recipe.tasks, config)
    ]
    return [
        pack_examples(examples[start : start + _EXAMPLES_AT_ONCE])
        for start in range(0, len(examples), _EXAMPLES_AT_ONCE)
    ]


def _example(data: PreparedData, settings: SFTStage, problem: Problem, trace: Trace) -> Example:
    example = encode_trace(data.tokenizer, problem, trace)
    return example if settings.answers_as_generated else replace(example, prompt_length=None)


def _sft_evaluation(answers: list[Batch], data: PreparedData, recipe: Recipe) -> Evaluation:
    """Measure the held-out text and worked answers."""
    measure_text = text_evaluation(data, recipe)

    def evaluate(model: Decoder) -> Mapping[str, MetricValue]:
        score = score_targets(model, answers, parts=recipe.evaluation.loss_parts)
        losses = part_losses(score.nats_by_part, "answer_loss")
        return {**measure_text(model), "answer_loss": score.nats_per_target, **losses}

    return evaluate


def _sft_source(
    examples: list[Example], data: PreparedData, settings: SFTStage, seed: int, recipe: Recipe
) -> BatchSource:
    conversations: Any = ConversationSource(examples, budget=settings.batch_tokens, seed=seed)
    context = recipe.evaluation.context
    windows = round(settings.batch_tokens * settings.text_share / (1 - settings.text_share) / context)
    if windows == 0:
        return ConversationSource(
            examples, budget=settings.batch_tokens, seed=seed, micro_steps=settings.train.micro_batches
        )
    text = WindowSource(data.train_tokens, context=context, windows=windows, seed=seed)
    return MixtureSource([conversations, text], [1.0, 1.0], draws=2, micro_steps=settings.train.micro_batches)
