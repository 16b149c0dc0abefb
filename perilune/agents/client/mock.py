"""A local OpenAI-compatible endpoint whose model is a policy: over real sockets, with a pace and faults of one's own.

Latency and faults are functions of a seed and of a request's bytes, so the order of requests does not matter.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from perilune.agents.client.base import EndpointError
from perilune.agents.client.body import from_body
from perilune.agents.client.latency import LatencyModel, ScaledClock, unit
from perilune.agents.client.scripted import Policy, answer
from perilune.agents.messages import Reply
from perilune.errors import EngineError, missing_extra

if TYPE_CHECKING:
    from aiohttp.web import AppRunner, Request, StreamResponse

_STATUS = {"rate_limit": 429, "overload": 503, "context_overflow": 400, "refused": 400}
_MAX_BODY_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class MockFaults:
    """Share of the requests that meet each fault; a request meets one at most."""

    rate_limit: float = 0.0
    """429 with `Retry-After`."""
    unavailable: float = 0.0
    """503."""
    truncated: float = 0.0
    """The stream ends in order, but early."""
    dropped: float = 0.0
    """The connection is closed in the middle of the stream."""
    slow_loris: float = 0.0
    """The stream stalls in the middle for `stall_s`, and then the connection is closed."""
    retry_after_s: float = 1.0
    """What a 429 asks to wait."""
    stall_s: float = 120.0
    """How long a stream that stalls is held open."""
    seed: int = 0

    def draw(self, digest: str, attempt: int) -> str | None:
        """Return the fault of a request, or None.

        Args:
            digest: of its body.
            attempt: how many with this body came before.
        """
        left = unit(self.seed, "mock", digest, attempt)
        for share, name in (
            (self.rate_limit, "rate_limit"),
            (self.unavailable, "unavailable"),
            (self.truncated, "truncated"),
            (self.dropped, "dropped"),
            (self.slow_loris, "slow_loris"),
        ):
            left -= share
            if left < 0:
                return name
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MockSettings:
    """How an endpoint behaves."""

    latency: LatencyModel | None = None
    """None: answers come at once."""
    time_scale: float = 1.0
    """Real seconds that a second of the latency and of the faults takes."""
    faults: MockFaults = MockFaults()
    models: tuple[str, ...] = ("mock",)
    """Listed at `/v1/models`; others are answered too."""
    pieces: int = 8
    """Most pieces that a text comes in."""


@dataclass(slots=True)
class MockStats:
    """What an endpoint has seen."""

    requests: int = 0
    active: int = 0
    """Requests that are being answered."""
    peak: int = 0
    """Most at a time."""
    faults: dict[str, int] = field(default_factory=dict)
    """How often each fault struck."""


class MockEndpoint:
    """An endpoint on a free port of the loopback interface, as an asynchronous context that gives its base URL."""

    def __init__(self, policy: Policy, settings: MockSettings = MockSettings()) -> None:
        """Prepare.

        Args:
            policy: answers; what it knows of the agent is in the messages, as agent and turn are not sent.
            settings: how it behaves.
        """
        self.stats = MockStats()
        self._policy, self._settings = policy, settings
        self._clock = ScaledClock(settings.time_scale)
        self._attempts: dict[str, int] = {}
        self._runner: AppRunner | None = None

    async def __aenter__(self) -> str:
        """Start; return the base URL.

        Raises:
            EngineError: aiohttp is not installed.
        """
        try:
            from aiohttp import web
        except ImportError as error:
            raise missing_extra(EngineError, "agents need", error.name, "agents") from error
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/stats", self._show_stats)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def __aexit__(self, *reason: object) -> None:
        """Stop; answers under way are broken off."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _models(self, request: Request) -> StreamResponse:
        models = [{"id": name, "object": "model", "owned_by": "perilune"} for name in self._settings.models]
        return _json({"object": "list", "data": models})

    async def _show_stats(self, request: Request) -> StreamResponse:
        stats = self.stats
        return _json({"requests": stats.requests, "active": stats.active, "peak": stats.peak, "faults": stats.faults})

    async def _complete(self, request: Request) -> StreamResponse:
        self.stats.requests += 1
        self.stats.active += 1
        self.stats.peak = max(self.stats.peak, self.stats.active)
        try:
            return await self._answer(request, await request.read())
        finally:
            self.stats.active -= 1

    async def _answer(self, request: Request, data: bytes) -> StreamResponse:
        digest = sha256(data).hexdigest()[:16]
        fault = self._fault(digest)
        if fault in ("rate_limit", "unavailable"):
            return self._refusal(429 if fault == "rate_limit" else 503, fault)
        try:
            asked = from_body(json.loads(data))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return self._refusal(400, f"the body is no request: {type(error).__name__}: {error}")
        try:
            reply = answer(self._policy, asked)
        except EndpointError as error:
            return self._refusal(error.status or _STATUS.get(error.fault, 500), str(error), error.retry_after_s)
        first, total = 0.0, 0.0
        if self._settings.latency is not None:
            first, total = self._settings.latency.delays(reply.usage.completion_tokens, digest)
        if asked.stream:
            return await self._stream(request, reply, (first, total), fault)
        if total:
            await self._clock.sleep(total)
        if fault:
            return await self._hang_up(request, fault)
        return _json(_body(reply))

    async def _stream(
        self, request: Request, reply: Reply, times: tuple[float, float], fault: str | None
    ) -> StreamResponse:
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in _chunks(reply, self._settings.pieces)]
        await response.prepare(request)
        if fault:
            del events[len(events) // 2 :]
        else:
            events.append(b"data: [DONE]\n\n")
        async for data in self._paced(events, *times):
            await response.write(data)
        if fault in ("dropped", "slow_loris"):
            return await self._hang_up(request, fault, response)
        await response.write_eof()
        return response

    async def _paced(self, events: list[bytes], first: float, total: float) -> AsyncIterator[bytes]:
        """Give events one by one over the time they take, or all at once if that is none."""
        if not total:
            yield b"".join(events)
            return
        await self._clock.sleep(first)
        rest = (total - first) / max(1, len(events) - 1)
        for place, event in enumerate(events):
            if place and rest:
                await self._clock.sleep(rest)
            yield event

    async def _hang_up(self, request: Request, fault: str, response: StreamResponse | None = None) -> StreamResponse:
        from aiohttp import web

        if fault == "slow_loris":
            await self._clock.sleep(self._settings.faults.stall_s)
        if request.transport is not None:
            request.transport.close()
        return response or web.Response()

    def _fault(self, digest: str) -> str | None:
        attempt = self._attempts.get(digest, 0)
        self._attempts[digest] = attempt + 1
        fault = self._settings.faults.draw(digest, attempt)
        if fault:
            self.stats.faults[fault] = self.stats.faults.get(fault, 0) + 1
        return fault

    def _refusal(self, status: int, words: str, retry_after_s: float | None = None) -> StreamResponse:
        if retry_after_s is None and status == 429:
            retry_after_s = self._settings.faults.retry_after_s * self._settings.time_scale
        headers = {} if retry_after_s is None else {"Retry-After": f"{retry_after_s:g}"}
        return _json({"error": {"message": words, "type": "mock", "code": None}}, status, headers)


@contextmanager
def mock_process(policy: Policy, settings: MockSettings = MockSettings()) -> Iterator[str]:
    """Run an endpoint in a process of its own while the context lasts; gives its base URL.

    Args:
        policy: answers; a function of a module, as the process is a fresh one.
        settings: how it behaves.

    Raises:
        EngineError: it does not start.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(policy, settings, there), daemon=True)
    process.start()
    there.close()
    try:
        try:
            url = here.recv() if here.poll(60) else None
        except EOFError:
            url = None
        if url is None:
            raise EngineError("the mock endpoint's process did not start")
        yield url
    finally:
        here.close()  # which it takes as the end
        process.join(5)
        if process.is_alive():
            process.terminate()
            process.join()
        process.close()


def _serve(policy: Policy, settings: MockSettings, link: Connection) -> None:
    # Ctrl-C reaches every process of the terminal; what this one serves may still have to end in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve_until_closed(policy, settings, link))


async def _serve_until_closed(policy: Policy, settings: MockSettings, link: Connection) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def watch() -> None:
        try:
            link.recv()
        except (EOFError, OSError):
            loop.call_soon_threadsafe(ended.set)

    async with MockEndpoint(policy, settings) as url:
        link.send(url)
        threading.Thread(target=watch, daemon=True).start()
        await ended.wait()


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> StreamResponse:
    from aiohttp import web

    return web.json_response(value, status=status, headers=headers)


def _usage(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _body(reply: Reply) -> dict[str, Any]:
    choice = {"index": 0, "message": reply.message.to_dict(), "finish_reason": reply.finish_reason}
    return {
        "id": "mock",
        "object": "chat.completion",
        "model": reply.model,
        "choices": [choice],
        "usage": _usage(reply),
    }


def _chunks(reply: Reply, pieces: int) -> Iterator[dict[str, Any]]:
    """Give the chunks of a stream, as OpenAI's endpoint forms them."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning_content": part} for part in _parts(reply.message.reasoning or "", pieces)]
    deltas += [{"content": part} for part in _parts(reply.message.content, pieces)]
    for index, call in enumerate(reply.message.tool_calls):
        head = {"index": index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        tails = [{"index": index, "function": {"arguments": part}} for part in _parts(call.arguments, pieces)]
        deltas += [{"tool_calls": [one]} for one in (head, *tails)]
    common = {"id": "mock", "object": "chat.completion.chunk", "model": reply.model}
    for delta in deltas:
        yield {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**common, "choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish_reason}]}
    yield {**common, "choices": [], "usage": _usage(reply)}


def _parts(text: str, pieces: int) -> Iterator[str]:
    size = max(4, -(-len(text) // pieces))
    return (text[start : start + size] for start in range(0, len(text), size))
