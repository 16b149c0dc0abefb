"""What is asked of the engine and what it answers: plain frozen data, checked where it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from perilune.engine.config import RepetitionRule
from perilune.errors import EngineError

MAX_TOP_LOGPROBS = 20
"""Most alternatives that are reported for a position."""

FinishReason = Literal["eos", "length", "context", "repeat", "dead_end", "error"]
"""Why a response ended: a stop token; `max_new_tokens`; the model's context limit; a loop that repeats itself; a
grammar that failed, or options that together allow no token; or logits that are not finite."""

TopLogprobs = tuple[tuple[int, float], ...]
"""(token, log-probability), the most likely first."""


class GrammarState(Protocol):
    """Where one response stands in its grammar."""

    def allowed(self) -> bytes:
        """Tokens that may come next: bit i % 8 of byte i // 8 is token i. All zero when the grammar failed."""
        ...

    def accept(self, token: int) -> None:
        """Go on by one token that `allowed` names."""
        ...

    @property
    def error(self) -> str:
        """Why the grammar failed; empty while all is well."""
        ...


class TokenGrammar(Protocol):
    """What a response must look like; made by `GrammarCompiler`."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a response; allowed only where the grammar may end."""
        ...

    def start(self) -> GrammarState:
        """Return the state before the first token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    What changes the logits comes first: `logit_bias` and what may not be drawn (`allowed_ids`, `blocked_ids`,
    `min_tokens`, `grammar`), then `repetition_penalty`, `frequency_penalty`, `presence_penalty`. Then temperature; then
    min-p, top-k and top-p, which all look at the same distribution. Of all this only the temperature enters the
    log-probabilities that are reported: they are the model's, as training computes them.

    Raises:
        EngineError: a field is out of its range; the message names field, value and range.
    """

    max_new_tokens: int = 256
    """Longest response in tokens, the stop token included."""
    temperature: float = 1.0
    """Logits are divided by it; 0, as anything below 1e-5, picks the most likely token."""
    top_p: float = 1.0
    """Smallest set of most likely tokens whose probability reaches it; 1 keeps all."""
    top_k: int = 0
    """Number of most likely tokens to draw from; 0 keeps all."""
    min_p: float = 0.0
    """Tokens less likely than this share of the most likely one are not drawn; 0 keeps all."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the response already has."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time that the response already has it."""
    repetition_penalty: float = 1.0
    """Tokens that the prompt or the response already has: positive logits are divided by it, others multiplied."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    allowed_ids: tuple[int, ...] | None = None
    """When given, no other token is drawn; stop tokens have to be named too."""
    blocked_ids: tuple[int, ...] = ()
    """Tokens that are never drawn."""
    min_tokens: int = 0
    """No stop token is drawn before the response has this many tokens."""
    ignore_eos: bool = False
    """Stop tokens are drawn like others and do not end the response; for measuring."""
    grammar: TokenGrammar | None = None
    """What the response must look like."""
    top_logprobs: int = 0
    """How many of the most likely tokens are reported for every position, at most 20."""
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
        if not 0 <= self.min_p <= 1:
            raise EngineError(f"min_p must be in [0, 1] (0 keeps every token), got {self.min_p}")
        for name, value in (
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
            *(("logit_bias", bias) for _, bias in self.logit_bias),
        ):
            if not math.isfinite(value):
                raise EngineError(f"{name} must be finite, got {value}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty >= 0.01):
            raise EngineError(
                f"repetition_penalty must be finite and >= 0.01 (1 is none), got {self.repetition_penalty}"
            )
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise EngineError(f"min_tokens must be in [0, max_new_tokens], got {self.min_tokens}")
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise EngineError(f"top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {self.top_logprobs}")
        if self.allowed_ids is not None and not set(self.allowed_ids) - set(self.blocked_ids):
            raise EngineError("allowed_ids leaves no token to draw")
        for name, ids in self.named_ids():
            if any(token < 0 for token in ids):
                raise EngineError(f"{name} must be >= 0, got {ids}")
        self._check_grammar()

    def _check_grammar(self) -> None:
        if self.grammar is None:
            return
        if missing := set(self.grammar.end_ids) - set(self.stop_ids):
            raise EngineError(f"stop_ids must have every token that ends the grammar; {sorted(missing)} are missing")
        if self.ignore_eos or self.min_tokens:
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise EngineError(f"{name} cannot be combined with a grammar, which decides where a response ends")

    def named_ids(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Every field that holds token ids, with its name."""
        return (
            ("stop_ids", self.stop_ids),
            ("allowed_ids", self.allowed_ids or ()),
            ("blocked_ids", self.blocked_ids),
            ("logit_bias", tuple(token for token, _ in self.logit_bias)),
        )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the response when they are drawn."""
        return () if self.ignore_eos else self.stop_ids

    @property
    def is_truncating(self) -> bool:
        """Whether top-p, top-k or min-p leaves tokens out."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def is_shaping(self) -> bool:
        """Whether anything changes the logits before temperature."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
            or bool(self.logit_bias or self.blocked_ids or (self.min_tokens and self.end_ids))
            or self.allowed_ids is not None
            or self.grammar is not None
        )


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
    """log softmax(logits / temperature) of each sampled token, computed in float32, before anything else that
    `SamplingParams` may change; at temperature 0 that of the plain logits."""
    finish_reason: FinishReason
    """Why it ended."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """For each sampled token the most likely ones under the same distribution; empty unless asked for."""
    error: str = ""
    """What went wrong, at the finish reasons `dead_end` and `error`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedToken:
    """One token of a response that is still being written."""

    token_id: int
    """The sampled token."""
    logprob: float
    """As in `Completion.logprobs`."""
    top: TopLogprobs = ()
    """As in `Completion.top_logprobs`."""
    finish_reason: FinishReason | None
    """Set on the last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """One token as it was sampled."""

    token_id: int
    """The token."""
    logprob: float
    """As in `Completion.logprobs`."""
    top: TopLogprobs = ()
    """As in `Completion.top_logprobs`."""


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
        EngineError: an id is outside the vocabulary, or the prompt leaves no room for a response.
    """
    low, high = min(request.prompt_ids), max(request.prompt_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise EngineError(f"request {request.id!r}: prompt has token id {wrong}; ids must be in [0, {vocab_size})")
    for name, ids in request.params.named_ids():
        if any(token >= vocab_size for token in ids):
            raise EngineError(f"request {request.id!r}: {name} {ids} must be below {vocab_size}")
    if context_limit is not None and len(request.prompt_ids) > context_limit - 1:
        raise EngineError(
            f"request {request.id!r}: the prompt has {len(request.prompt_ids)} tokens; with a context limit of "
            f"{context_limit} it may have at most {context_limit - 1}"
        )
