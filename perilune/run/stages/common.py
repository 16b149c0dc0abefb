"""Steps that several kinds of stage share: the model to start from, training, measuring, and the stage's numbers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from torch import nn

from perilune.data import BatchSource
from perilune.models import Decoder, build_model
from perilune.optim import build_optimizer
from perilune.report import MetricValue, StageResult
from perilune.run.config import Recipe, StageConfig
from perilune.run.evaluation import evaluate_model
from perilune.run.loading import restore_stage
from perilune.run.pipeline import StageContext
from perilune.run.prepared import PreparedData
from perilune.run.tree import flatten
from perilune.train import CheckpointStore, Loss, TrainConfig, TrainContext, TrainResult, score_text, train


def starting_model(context: StageContext, stage: str | None = None) -> Decoder:
    """Return the model of `stage` (None: the one this stage starts from), or a fresh one if there is none."""
    recipe: Recipe = context.recipe
    model = build_model(recipe.model, seed=recipe.seed)
    source = stage if stage is not None else context.start_from
    if source is not None:
        restore_stage(model, context.directory.checkpoints(source))
    return model


def checkpoint_store(context: StageContext) -> CheckpointStore:
    """Return the store of this stage's checkpoints."""
    return CheckpointStore(context.directory.checkpoints(context.name))


def settings_hash(settings: StageConfig) -> str:
    """Return what identifies a stage's settings in its checkpoints; how often it logs or saves may change."""
    deciding = sorted((key, repr(value)) for key, value in flatten(asdict(settings)) if "interval" not in key)
    return sha256(repr(deciding).encode()).hexdigest()


def train_model(
    context: StageContext,
    settings: StageConfig,
    model: Decoder,
    source: BatchSource,
    loss: Loss,
    config: TrainConfig,
    evaluate: Any = None,
) -> TrainResult:
    """Run the training loop for a stage, with its checkpoints, metrics, progress and stop requests."""
    return train(
        model,
        build_optimizer(model, config.optimizer),
        source,
        loss,
        config,
        TrainContext(
            stage=context.name,
            store=checkpoint_store(context),
            metrics=context.metrics,
            progress=context.progress,
            evaluate=evaluate,
            should_stop=context.should_stop,
            stopped=context.stopped,
            config_hash=settings_hash(settings),
        ),
    )


def text_evaluation(data: PreparedData, recipe: Recipe) -> Any:
    """Return a function that measures a model on the held-out text, for the training loop."""

    def evaluate(model: nn.Module) -> Mapping[str, MetricValue]:
        assert isinstance(model, Decoder)
        score = score_text(model, data.held_out_tokens, data.held_out_bytes, context=recipe.evaluation.context)
        return {"bits_per_byte": score.bits_per_byte, "validation_loss": score.nats_per_token}

    return evaluate


def stage_result(
    context: StageContext,
    settings: StageConfig,
    model: Decoder,
    data: PreparedData,
    *,
    time_s: float,
    tokens: int = 0,
    numbers: Mapping[str, float] | None = None,
) -> StageResult:
    """Measure the model a stage made, keep its transcripts, and return the stage's numbers."""
    started_s = time.monotonic()
    scores = evaluate_model(model, data, context.recipe, context.progress)
    context.directory.write_samples(context.name, scores.samples)
    return StageResult(
        stage=context.name,
        kind=settings.kind,
        time_s=time_s,
        tokens=tokens,
        tokens_per_s=tokens / time_s if tokens and time_s > 0 else None,
        bits_per_byte=scores.bits_per_byte,
        compressors=data.compressors,
        tasks=scores.tasks,
        numbers={**(numbers or {}), "evaluation_s": time.monotonic() - started_s},
        checkpoint=f"checkpoints/{context.name}",
    )
