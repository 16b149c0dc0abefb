"""Inference: batched decoding with the hybrid cache; used by reinforcement learning, evaluation and chat."""

from perilune.engine.config import RepetitionRule
from perilune.engine.engine import Engine, ProgressCallback
from perilune.engine.repetition import find_repetition
from perilune.engine.requests import Completion, FinishReason, Request, SamplingParams, StreamedToken

__all__ = [
    "Completion",
    "Engine",
    "FinishReason",
    "ProgressCallback",
    "RepetitionRule",
    "Request",
    "SamplingParams",
    "StreamedToken",
    "find_repetition",
]
