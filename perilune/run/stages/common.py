"""Steps that several kinds of stage share: the model to start from, training, measuring, and the stage's numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

from torch import nn

from perilune.data import BatchSource
from perilune.models import Decoder, build_model, set_attention_mode
from perilune.optim import build_optimizer
from perilune.report import MetricValue, StageResult
from perilune.run.config import Recipe, StageConfig
from perilune.run.evaluation import evaluate_model
from perilune.run.loading import restore_stage
from perilune.run.pipeline import StageContext
from perilune.run.prepared import PreparedData
from perilune.run.tree import flatten
from perilune.train import CheckpointStore, Loss, TrainConfig, TrainContext, TrainResult, score_text, train


def starting_model(context: StageContext, stage: str | None = None, *, moba_full_last_n: int | None = None) -> Decoder:
    """Return the model that a stage starts with.

    Args:
        context: the stage's.
        stage: whose model; None for the one that this stage starts from, or a fresh one if there is none.
        moba_full_last_n: in place of the recipe's: all other MoBA layers that it names read blocks, whatever they read
            before. None: layers read what they did when they were saved.
    """
    recipe: Recipe = context.recipe
    config = recipe.model
    if moba_full_last_n is not None:
        config = replace(config, moba_full_last_n=moba_full_last_n)
    model = build_model(config, seed=recipe.seed)
    source = stage if stage is not None else context.start_from
    if source is not None:
        restore_stage(model, context.directory.checkpoints(source))
        if moba_full_last_n is not None:
            set_attention_mode(model, "moba")
    return model


def checkpoint_store(context: StageContext) -> CheckpointStore:
    """Return the store of this stage's checkpoints."""
    return CheckpointStore(context.directory.checkpoints(context.name))


def settings_hash(settings: Any) -> str:
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
        config = recipe.evaluation
        score = score_text(
            model, data.held_out_tokens, data.held_out_bytes, context=config.context, parts=config.loss_parts
        )
        values = {"bits_per_byte": score.bits_per_byte, "validation_loss": score.nats_per_token}
        return values | part_losses(score.nats_by_part)

    return evaluate


def part_losses(nats: Sequence[float], name: str = "loss") -> dict[str, float]:
    """Return the losses of the parts of held-out sequences by name; nothing of the whole alone, or of an empty part."""
    if len(nats) == 1:
        return {}
    return {f"{name}_part_{part}": value for part, value in enumerate(nats, start=1) if math.isfinite(value)}


def last_numbers(trained: TrainResult, prefix: str) -> dict[str, float]:
    """Return the numbers of a stage's last evaluation whose names begin so."""
    found = trained.evaluation.items()
    return {name: value for name, value in found if name.startswith(prefix) and isinstance(value, float)}


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
