"""What is asked of the engine and what it answers: plain frozen data, checked where it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from perilune.engine.config import RepetitionRule
from perilune.errors import EngineError

FinishReason = Literal["eos", "length", "context", "repeat", "error"]
"""Why a response ended: a stop token; `max_new_tokens`; the model's context limit; a loop that repeats itself; or
non-finite logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    Raises:
        EngineError: a field is out of its range; the message names field, value and range.
    """

    max_new_tokens: int = 256
    """Longest response in tokens, the stop token included."""
    temperature: float = 1.0
    """Logits are divided by it; 0 picks the most likely token."""
    top_p: float = 1.0
    """Smallest set of most likely tokens whose probability reaches it; 1 keeps all."""
    top_k: int = 0
    """Number of most likely tokens to draw from; 0 keeps all."""
    seed: int = 0
    """Together with the sample's index and the position it decides every draw of the request."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a response; the one that ended it is its last token."""
    repetition: RepetitionRule | None = None
    """When given, a response that loops is stopped early with finish reason `repeat`."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise EngineError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise EngineError(f"temperature must be finite and >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise EngineError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise EngineError(f"top_k must be >= 0 (0 keeps every token), got {self.top_k}")
        if any(token < 0 for token in self.stop_ids):
            raise EngineError(f"stop_ids must be >= 0, got {self.stop_ids}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how many responses to it are wanted; the prompt is prefilled once for all of them."""

    prompt_ids: Sequence[int]
    """Token ids of the prompt; not empty."""
    params: SamplingParams = field(default_factory=SamplingParams)
    """How to draw."""
    num_samples: int = 1
    """Responses to draw (the group size k)."""
    id: str = ""
    """Name that the completions carry back."""

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise EngineError(f"request {self.id!r}: the prompt is empty; it needs at least one token")
        if self.num_samples < 1:
            raise EngineError(f"request {self.id!r}: num_samples must be >= 1, got {self.num_samples}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One response, exactly as it was sampled."""

    request_id: str
    """`Request.id`."""
    sample: int
    """Index within the request's samples."""
    token_ids: tuple[int, ...]
    """Sampled tokens, the stop token included."""
    logprobs: tuple[float, ...]
    """log softmax(logits / temperature) of each sampled token, before top-p and top-k, computed in float32; at
    temperature 0 that of the plain logits."""
    finish_reason: FinishReason
    """Why it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedToken:
    """One token of a response that is still being written."""

    token_id: int
    """The sampled token."""
    logprob: float
    """As in `Completion.logprobs`."""
    finish_reason: FinishReason | None
    """Set on the last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """One token as it was sampled."""

    token_id: int
    """The token."""
    logprob: float
    """As in `Completion.logprobs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine is doing; counts are since it was made."""

    running: int
    """Rows that decode."""
    waiting: int
    """Prompts, and preempted responses, that have not started."""
    pages_used: int
    """Pages that requests or the prefix cache hold."""
    pages_cached: int
    """Pages that the prefix cache holds; those that no request holds as well are given up when they are needed."""
    pages_total: int
    """Pages there are."""
    cached_tokens: int
    """Tokens that the prefix cache knows."""
    preemptions: int
    """Times that something had to make room."""
    tokens: int
    """Tokens sampled."""
    cache_bytes: int
    """Bytes that the cache's pools have."""


def check_request(request: Request, vocab_size: int, context_limit: int | None) -> None:
    """Refuse a request that the model cannot serve.

    Raises:
        EngineError: a prompt or stop id is outside the vocabulary, or the prompt leaves no room for a response.
    """
    low, high = min(request.prompt_ids), max(request.prompt_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise EngineError(f"request {request.id!r}: prompt has token id {wrong}; ids must be in [0, {vocab_size})")
    if any(token >= vocab_size for token in request.params.stop_ids):
        raise EngineError(f"request {request.id!r}: stop_ids {request.params.stop_ids} must be below {vocab_size}")
    if context_limit is not None and len(request.prompt_ids) > context_limit - 1:
        raise EngineError(
            f"request {request.id!r}: the prompt has {len(request.prompt_ids)} tokens; with a context limit of "
            f"{context_limit} it may have at most {context_limit - 1}"
        )
