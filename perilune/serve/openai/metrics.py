"""What a monitoring system reads at `/metrics`, in Prometheus's text form."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from perilune.errors import EngineError, missing_extra
from perilune.serve.app import ASGI, Message, Receive, Send

if TYPE_CHECKING:
    from fastapi import APIRouter
    from prometheus_client.metrics_core import Metric

    from perilune.engine import ServiceStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_PATHS = ("/", "/health", "/metrics", "/v1/chat/completions", "/v1/completions", "/v1/models")


class Metrics:
    """Counters and histograms of one application; the engine's own numbers are read when somebody asks."""

    def __init__(self, stats: "Callable[[], ServiceStats]") -> None:
        """Begin at zero.

        Args:
            stats: gives the engine's numbers.

        Raises:
            EngineError: prometheus-client is not installed.
        """
        try:
            from prometheus_client import CollectorRegistry, Counter, Histogram
        except ImportError as error:
            raise missing_extra(EngineError, "serving needs", error.name, "serve") from error
        self.registry = registry = CollectorRegistry()
        self._http = Counter("perilune_http_requests", "Answers", ["method", "path", "status"], registry=registry)
        self._http_seconds = Histogram(
            "perilune_http_request_seconds", "To the end of an answer", ["path"], buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "perilune_time_to_first_token_seconds", "From a request to its first token", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._per_token = Histogram(
            "perilune_time_per_output_token_seconds", "Between tokens of an answer, on average",
            buckets=_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        self._prompt = Counter("perilune_prompt_tokens", "Tokens of prompts", registry=registry)
        self._cached = Counter("perilune_prompt_tokens_cached", "Those that were in the cache", registry=registry)
        self._generated = Counter("perilune_generation_tokens", "Tokens of answers", registry=registry)
        self._finished = Counter(
            "perilune_answers_finished", "Answers by how they ended", ["reason"], registry=registry
        )
        registry.register(_EngineNumbers(stats))

    def first_token(self, seconds: float) -> None:
        """Note the time from a request to its first token."""
        self._first.observe(seconds)

    def finished(self, reason: str, tokens: int, seconds: float) -> None:
        """Note an answer: how it ended, its tokens, and the time from its first to its last."""
        self._finished.labels(reason).inc()
        self._generated.inc(tokens)
        if tokens > 1:
            self._per_token.observe(seconds / (tokens - 1))

    def prompt(self, tokens: int, cached: int) -> None:
        """Note a prompt: its tokens, and how many of them were in the cache."""
        self._prompt.inc(tokens)
        self._cached.inc(cached)

    def http(self, method: str, path: str, status: int, seconds: float) -> None:
        """Note an answer, whatever it was."""
        path = path if path in _PATHS else "other"
        method = method if method in ("GET", "POST") else "other"
        self._http.labels(method, path, str(status)).inc()
        self._http_seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Return all numbers in the text form."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class _EngineNumbers:
    """The engine's numbers, as a collector of the client library."""

    def __init__(self, stats: "Callable[[], ServiceStats]") -> None:
        self._stats = stats

    def collect(self) -> "Iterator[Metric]":
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self._stats().engine
        for name, text, value in (
            ("requests_running", "Answers that are being generated", stats.running),
            ("requests_waiting", "Requests that wait for their turn", stats.waiting),
            ("cache_pages_used", "Pages of the cache that hold something", stats.pages_used),
            ("cache_pages_kept", "Those that are kept for prompts that begin alike", stats.pages_cached),
            ("cache_pages_total", "Pages of the cache", stats.pages_total),
            ("cache_bytes", "Memory of the cache", stats.cache_bytes),
        ):
            yield GaugeMetricFamily(f"perilune_{name}", text, value=value)
        yield CounterMetricFamily("perilune_preemptions", "Answers that gave way and went on", value=stats.preemptions)

    def describe(self) -> "Iterator[Metric]":
        yield from ()


class CountRequests:
    """Notes every answer; an ASGI application around another."""

    def __init__(self, app: ASGI, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = 499, time.monotonic()  # 499: the client went away before it was answered

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.http(scope["method"], scope["path"], status, time.monotonic() - begun)


def metrics_router(metrics: Metrics) -> "APIRouter":
    """Return the route `/metrics`."""
    from fastapi import APIRouter, Response

    router = APIRouter(tags=["service"])

    @router.get("/metrics", summary="Numbers for Prometheus", response_class=Response)
    def read() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")

    return router
