"""The whole server: routes, keys, limits, numbers, and an orderly end."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perilune.errors import EngineError, missing_extra
from perilune.serve.app import ASGI, MAX_BODY_BYTES, Message, Receive, Send, create_app
from perilune.serve.drain import Drain
from perilune.serve.openai.chat import chat_router
from perilune.serve.openai.completions import completions_router
from perilune.serve.openai.errors import ApiError, answer_api_errors, openai_error
from perilune.serve.openai.keys import RequireKey
from perilune.serve.openai.metrics import CountRequests, Metrics, metrics_router
from perilune.serve.openai.models import models_router
from perilune.serve.openai.service import ServedModel
from perilune.serve.openai.streaming import answer_nobody

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Limits of a server."""

    keys: Sequence[str] = ()
    """API keys; without any all may ask."""
    timeout_s: float = 600.0
    """Longest time for an answer."""
    max_requests: int = 512
    """Requests that are read, wait or are answered at a time; the engine's own limit of waiting ones comes first."""
    max_body_bytes: int = 4 * MAX_BODY_BYTES
    """Larger bodies are refused."""


def openai_app(
    served: ServedModel, *, settings: ServerSettings, drain: Drain, routers: "Sequence[APIRouter]" = ()
) -> "FastAPI":
    """Return an application that serves a model as the OpenAI API does.

    Args:
        served: the model.
        settings: limits and keys.
        drain: refuses new requests once it has begun; give it to `run_app` too.
        routers: further ones, such as the chat page's.

    Raises:
        EngineError: a package that serving needs is not installed.
    """
    try:
        metrics = Metrics(served.service.stats)
        routes = [
            chat_router(served, metrics, timeout_s=settings.timeout_s),
            completions_router(served, metrics, timeout_s=settings.timeout_s),
            models_router(served),
            metrics_router(metrics),
            *routers,
        ]
    except ImportError as error:
        raise missing_extra(EngineError, "serving needs", error.name, "serve") from error

    @asynccontextmanager
    async def running(app: "FastAPI") -> AsyncGenerator[None]:
        del app
        async with served.service:
            yield

    app = create_app(
        routes,
        title=f"perilune: {served.name}",
        max_body_bytes=settings.max_body_bytes,
        max_requests=settings.max_requests,
        error_body=openai_error,
        lifespan=running,
        problem=lambda: served.service.stats().error,
    )
    answer_api_errors(app)
    answer_nobody(app)
    if settings.keys:
        app.add_middleware(RequireKey, keys=settings.keys)
    app.add_middleware(_Draining, drain=drain)
    app.add_middleware(CountRequests, metrics=metrics)
    return app


class _Draining:
    """Refuses what comes after the end has begun."""

    def __init__(self, app: ASGI, drain: Drain) -> None:
        self._app = drain.around(app, _refuse)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self._app(scope, receive, send)


async def _refuse(scope: Message, receive: Receive, send: Send) -> None:
    error = ApiError(503, "the server is about to end; ask another, or come back", code="draining", retry_after_s=5)
    response = error.response()
    response.headers["connection"] = "close"
    await response(scope, receive, send)
