"""An engine that says what it is told to, and a model with a byte-level tokenizer in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perilune.data import ChatTemplate
from perilune.engine import Chunk, EngineStats, Request, SampledToken, ServiceStats
from perilune.errors import EngineBusyError, EngineError
from perilune.serve.openai.grammars import Grammars
from perilune.serve.openai.service import ServedModel
from perilune.tool_calls import MARKERS

SPECIALS = {name: 256 + i for i, name in enumerate(("<|im_end|>", "<|im_user|>", *MARKERS))}
END = SPECIALS["<|im_end|>"]


class ByteTokenizer:
    """A token a byte, and special ones."""

    vocab_size = 256 + len(SPECIALS)
    special_ids: Mapping[str, int] = SPECIALS
    bos_id = None
    prefix_ids = (1,)
    stop_ids = (END,)

    def encode(self, text: str, *, parse_specials: bool = False) -> list[int]:
        if not parse_specials:
            return list(text.encode())
        found: list[int] = []
        while text:
            name = next((name for name in SPECIALS if text.startswith(name)), None)
            found += [SPECIALS[name]] if name else list(text[0].encode())
            text = text[len(name or "_") :]
        return found

    def decode_bytes(self, tokens: Iterable[int], *, skip_specials: bool = False) -> bytes:
        names = {} if skip_specials else {token: name for name, token in SPECIALS.items()}
        return b"".join(bytes([one]) if one < 256 else names.get(one, "").encode() for one in tokens)

    def decode(self, tokens: Iterable[int], *, skip_specials: bool = False) -> str:
        return self.decode_bytes(tokens, skip_specials=skip_specials).decode("utf-8", "replace")


TOKENIZER = ByteTokenizer()


# A variable `think` begins the answer with a thought.
TEMPLATE = ChatTemplate(
    "{%- for tool in tools or [] %}{{ 'tool:' ~ tool.function.name ~ '\\n' }}{% endfor %}"
    "{%- for message in messages %}{{ message.role ~ ':' ~ message.content ~ '\\n' }}{% endfor %}"
    "{%- if messages[-1].role == 'assistant' %}{{ raise_exception('the last message is the assistant') }}{% endif %}"
    "{%- if think %}{{ '<think>' }}{% endif %}",
    title="test",
)


def sampled(token: int) -> SampledToken:
    return SampledToken(token_id=token, logprob=-0.5, top=((token, -0.5), (0, -2.0)))


def say(text: str) -> Callable[[Request], str]:
    return lambda request: text


@dataclass
class FakeService:
    """Streams `answer(request)`, then the end token; at most `most` requests at a time."""

    answer: Callable[[Request], str | BaseException] = field(default_factory=lambda: say("Hello, wörld!"))
    size: int = 1
    """Tokens of a chunk."""
    pause_s: float = 0.0
    most: int = 1000
    cached: int = 0
    error: str | None = None
    """What the engine died of."""
    is_running: bool = False
    seen: list[Request] = field(default_factory=list)
    open: set[FakeStream] = field(default_factory=set)
    canceled: list[int] = field(default_factory=list)
    """Single samples that nobody wanted any more."""

    def submit_all(self, requests: Sequence[Request]) -> list[FakeStream]:
        if self.error is not None:
            raise EngineError(self.error)
        if len(self.open) + len(requests) > self.most:
            raise EngineBusyError(f"{self.most} requests wait; come back")
        self.seen += requests
        streams = [FakeStream(self, request) for request in requests]
        self.open |= set(streams)
        return streams

    def stats(self) -> ServiceStats:
        count = len(self.open)
        engine = EngineStats(
            running=count, waiting=0, pages_used=count, pages_cached=0, pages_total=64, cached_tokens=0, preemptions=0,
            tokens=0, cache_bytes=0,
        )  # fmt: skip
        return ServiceStats(engine=engine, requests=count, error=self.error)

    async def __aenter__(self) -> FakeService:
        self.is_running = True
        return self

    async def __aexit__(self, *error: object) -> None:
        self.is_running = False


@dataclass(eq=False)
class FakeStream:
    service: FakeService
    request: Request

    @property
    def cached_tokens(self) -> int:
        return self.service.cached

    def cancel(self, sample: int | None = None) -> None:
        if sample is None:
            self.service.open.discard(self)
        else:
            self.service.canceled.append(sample)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        answer = self.service.answer(self.request)
        if isinstance(answer, BaseException):
            raise answer
        params, size = self.request.params, self.service.size
        tokens = [*TOKENIZER.encode(answer, parse_specials=True), END][: params.max_new_tokens]
        reason = "eos" if tokens[-1] == END else "length"
        for start in range(0, len(tokens), size):
            for sample in range(self.request.num_samples):
                await asyncio.sleep(self.service.pause_s)
                part = tuple(sampled(token) for token in tokens[start : start + size])
                last = reason if start + size >= len(tokens) else None
                yield Chunk(sample=sample, tokens=part, finish_reason=last)
        self.service.open.discard(self)


def served_by(service: Any, **changes: Any) -> ServedModel:
    settings: dict[str, Any] = {
        "name": "fake", "service": service, "tokenizer": TOKENIZER, "template": TEMPLATE,
        "grammars": Grammars(TOKENIZER), "context_limit": 2000,
    }  # fmt: skip
    return ServedModel(**{**settings, **changes})
