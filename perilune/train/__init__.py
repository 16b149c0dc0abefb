"""Training: one loop, its losses, evaluation, the checkpoint store, and what the machine does underneath."""

from perilune.train.checkpoint import Checkpoint, CheckpointStore
from perilune.train.config import AttentionPhase, PrecisionName, TrainConfig
from perilune.train.context import Evaluation, MetricsSink, TrainContext, TrainResult
from perilune.train.evaluate import TargetScore, TextScore, score_targets, score_text
from perilune.train.loop import train
from perilune.train.losses import LanguageModel, Loss, LossStats, dpo_loss, lm_loss, sequence_logprobs
from perilune.train.monitors import LayerMonitor, clip_metrics
from perilune.train.runtime import Interrupted, SignalWatch, choose_precision, matmul_rate
from perilune.train.snapshot import (
    flatten_state,
    model_state,
    module_tensors,
    optimizer_state,
    restore_model,
    restore_module,
    restore_optimizer,
    unflatten_state,
)
from perilune.train.step import BadStepGuard, StepTotals, accumulate_gradients, autocast, finish_gradients, trainable

__all__ = [
    "AttentionPhase",
    "BadStepGuard",
    "Checkpoint",
    "CheckpointStore",
    "Evaluation",
    "Interrupted",
    "LanguageModel",
    "LayerMonitor",
    "Loss",
    "LossStats",
    "MetricsSink",
    "PrecisionName",
    "SignalWatch",
    "StepTotals",
    "TargetScore",
    "TextScore",
    "TrainConfig",
    "TrainContext",
    "TrainResult",
    "accumulate_gradients",
    "autocast",
    "choose_precision",
    "clip_metrics",
    "dpo_loss",
    "finish_gradients",
    "flatten_state",
    "lm_loss",
    "matmul_rate",
    "model_state",
    "module_tensors",
    "optimizer_state",
    "restore_model",
    "restore_module",
    "restore_optimizer",
    "score_targets",
    "score_text",
    "sequence_logprobs",
    "train",
    "trainable",
    "unflatten_state",
]
