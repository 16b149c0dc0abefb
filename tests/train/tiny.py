"""A real decoder of a few thousand parameters with both kinds of layers, and a stage to train it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from perilune.data import Batch, WindowSource
from perilune.models import Decoder, ModelConfig, build_model
from perilune.nn.config import KDAConfig, MLAConfig, MoEConfig
from perilune.optim import MuonClip, OptimizerConfig, ScheduleConfig, build_optimizer
from perilune.train import (
    CheckpointStore,
    LanguageModel,
    LossStats,
    TrainConfig,
    TrainContext,
    TrainResult,
    lm_loss,
    train,
)

MODEL = ModelConfig(
    vocab_size=32,
    d_model=16,
    layers=("kda", "mla"),
    d_ff=24,
    kda=KDAConfig(num_heads=2, head_dim=8, chunk_size=16),
    mla=MLAConfig(num_heads=2, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
    moe=MoEConfig(num_experts=4, top_k=2, d_expert=8),
    first_k_dense=1,
)


class Recorder:
    """A metrics sink in memory."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, dict[str, Any]]] = []

    def log(self, step: int, values: Mapping[str, Any], stage: str = "") -> None:
        self.lines.append((stage, step, dict(values)))

    def rewind(self, stage: str, step: int) -> int:
        before = len(self.lines)
        self.lines = [line for line in self.lines if line[0] != stage or line[1] <= step]
        return before - len(self.lines)

    def series(self, name: str) -> list[tuple[int, Any]]:
        return [(step, values[name]) for _, step, values in self.lines if name in values]


def make_model(seed: int = 0) -> tuple[Decoder, MuonClip]:
    model = build_model(MODEL, seed=seed)
    return model, build_optimizer(model, make_config().optimizer)


def make_config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "steps": 6,
        "optimizer": OptimizerConfig(lr=1e-2, tau=0.01),
        "schedule": ScheduleConfig(warmup=0.1, decay=0.5),
        "checkpoint_interval_s": 0.0,
    }
    return TrainConfig(**(settings | changes))


def make_source(micro_batches: int = 1, windows: int = 2) -> WindowSource:
    stream = np.random.default_rng(0).integers(32, size=4000) // 2
    return WindowSource(stream, context=12, windows=windows, seed=0, micro_steps=micro_batches)


def context_for(directory: Path | None = None, **changes: Any) -> TrainContext:
    store = None if directory is None else CheckpointStore(directory)
    return TrainContext(**({"store": store, "peak_flops": 1e12} | changes))


def run(
    config: TrainConfig,
    context: TrainContext | None = None,
    loss: Callable[..., tuple[Tensor, LossStats]] = lm_loss,
    source: Any = None,
) -> tuple[Decoder, MuonClip, TrainResult]:
    """Train a fresh model (resuming if the context's store holds a checkpoint)."""
    model, optimizer = make_model()
    result = train(model, optimizer, source or make_source(config.micro_batches), loss, config, context)
    return model, optimizer, result


class Faulty:
    """`lm_loss` with a wrong number at the given calls, counted from 0."""

    def __init__(self, bad_calls: set[int], factor: float = float("nan")) -> None:
        self.bad_calls, self.factor, self.calls = bad_calls, factor, 0

    def __call__(self, model: LanguageModel, batch: Batch) -> tuple[Tensor, LossStats]:
        loss, stats = lm_loss(model, batch)
        is_bad = self.calls in self.bad_calls
        self.calls += 1
        return (loss * self.factor if is_bad else loss), stats
