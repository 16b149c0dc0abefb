"""Inference: batched decoding with the hybrid cache; used by reinforcement learning, evaluation and chat."""

from perilune.engine.config import RepetitionRule
from perilune.engine.engine import Engine, ProgressCallback
from perilune.engine.repetition import find_repetition
from perilune.engine.requests import (
    Completion,
    EngineStats,
    FinishReason,
    Request,
    SampledToken,
    SamplingParams,
    StreamedToken,
)
from perilune.engine.tickets import StepOutput

__all__ = [
    "Completion",
    "Engine",
    "EngineStats",
    "FinishReason",
    "ProgressCallback",
    "RepetitionRule",
    "Request",
    "SampledToken",
    "SamplingParams",
    "StepOutput",
    "StreamedToken",
    "find_repetition",
]
