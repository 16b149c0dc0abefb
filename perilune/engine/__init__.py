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
from perilune.engine.service import Chunk, EngineService, ResponseStream, ServiceStats
from perilune.engine.tickets import StepOutput

__all__ = [
    "Chunk",
    "Completion",
    "Engine",
    "EngineService",
    "EngineStats",
    "FinishReason",
    "ProgressCallback",
    "RepetitionRule",
    "Request",
    "ResponseStream",
    "SampledToken",
    "SamplingParams",
    "ServiceStats",
    "StepOutput",
    "StreamedToken",
    "find_repetition",
]
