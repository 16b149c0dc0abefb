"""Stages of gradient descent on given targets: pre-training, synthetic tasks, SFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from perilune.data import (
    BatchSource,
    ConversationSource,
    Example,
    MixtureSource,
    SyntheticSource,
    WindowSource,
)
from perilune.models import Decoder
from perilune.report import MetricValue, StageResult
from perilune.run.config import PretrainStage, Recipe, SFTStage, SyntheticStage
from perilune.run.pipeline import StageContext
from perilune.run.prepared import PreparedData, prepare_data
from perilune.run.stages.common import stage_result, starting_model, text_evaluation, train_model
from perilune.seeding import derive_seed
from perilune.tasks import TaskMixture, encode_trace
from perilune.train import lm_loss, score_targets


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
    model = starting_model(context)
    trained = train_model(context, settings, model, source, lm_loss, settings.train, text_evaluation(data, recipe))
    numbers = {"steps": float(trained.steps), "skipped_steps": float(trained.skipped_steps)}
    return stage_result(
        context, settings, model, data, time_s=trained.elapsed_s, tokens=trained.tokens, numbers=numbers
    )


def run_synthetic(context: StageContext, settings: SyntheticStage) -> StageResult:
    """Train on a synthetic recall task and measure accuracy on a fixed set."""
    recipe: Recipe = context.recipe
    source = SyntheticSource(
        settings.task,
        sequences=settings.sequences,
        seed=derive_seed(recipe.seed, context.name, "sequences"),
        micro_steps=settings.train.micro_batches,
    )
    held_out = source.evaluation_batch(settings.evaluation_sequences)

    def evaluate(model: nn.Module) -> Mapping[str, MetricValue]:
        assert isinstance(model, Decoder)
        return {"accuracy": score_targets(model, [held_out]).accuracy}

    model = starting_model(context)
    trained = train_model(context, settings, model, source, lm_loss, settings.train, evaluate)
    score = score_targets(model, [held_out])
    return StageResult(
        stage=context.name,
        kind=settings.kind,
        time_s=trained.elapsed_s,
        tokens=trained.tokens,
        tokens_per_s=trained.tokens_per_s,
        numbers={"accuracy": score.accuracy, "sequence_accuracy": score.sequence_accuracy},
        checkpoint=f"checkpoints/{context.name}",
    )


def run_sft(context: StageContext, settings: SFTStage) -> StageResult:
    """Train on the scripted teacher's traces."""
    recipe: Recipe = context.recipe
    data = prepare_data(recipe, context.directory, context.progress)
    examples = teacher_examples(recipe, data, settings, derive_seed(recipe.seed, context.name, "traces"))
    source = _sft_source(examples, data, settings, derive_seed(recipe.seed, context.name, "order"), recipe)
    model = starting_model(context)
    trained = train_model(context, settings, model, source, lm_loss, settings.train, text_evaluation(data, recipe))
    numbers = {
        "examples": float(len(examples)),
        "example_tokens": sum(example.length for example in examples) / len(examples),
        "steps": float(trained.steps),
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
    return [encode_trace(data.tokenizer, problem, trace) for problem, trace in exercises]


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
