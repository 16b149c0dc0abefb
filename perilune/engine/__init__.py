"""Inference: batched decoding with the hybrid cache; used by reinforcement learning, evaluation and chat."""

from perilune.engine.config import RepetitionRule
from perilune.engine.engine import Engine, ProgressCallback
from perilune.engine.grammar import CompiledGrammar, GrammarCompiler
from perilune.engine.repetition import find_repetition
from perilune.engine.requests import (
    Completion,
    EngineStats,
    FinishReason,
    GrammarState,
    Request,
    SampledToken,
    SamplingParams,
    StreamedToken,
    TokenGrammar,
    TopLogprobs,
)
from perilune.engine.service import Chunk, EngineService, ResponseStream, ServiceStats
from perilune.engine.text import StopFinder, TextPiece, TextStream, token_text
from perilune.engine.tickets import StepOutput
from perilune.engine.tool_grammar import ToolShape, ToolTokens, compile_tool_calls

__all__ = [
    "Chunk",
    "CompiledGrammar",
    "Completion",
    "Engine",
    "EngineService",
    "EngineStats",
    "FinishReason",
    "GrammarCompiler",
    "GrammarState",
    "ProgressCallback",
    "RepetitionRule",
    "Request",
    "ResponseStream",
    "SampledToken",
    "SamplingParams",
    "ServiceStats",
    "StepOutput",
    "StopFinder",
    "StreamedToken",
    "TextPiece",
    "TextStream",
    "TokenGrammar",
    "ToolShape",
    "ToolTokens",
    "TopLogprobs",
    "compile_tool_calls",
    "find_repetition",
    "token_text",
]
