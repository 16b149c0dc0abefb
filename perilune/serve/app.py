"""The application that every router joins: what goes wrong is one JSON object, whoever it went wrong in.

`{"error": {"type": ..., "message": ...}}`, and with bodies that do not fit `"details": [{"field", "message"}]`. Neither
stack traces nor what the client sent are ever in it.
"""

import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from perilune import __version__
from perilune.errors import DataError, EngineError, PeriluneError, RecipeError, UnknownIdError

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI
    from fastapi.responses import JSONResponse

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
"""Larger bodies are refused before anything reads them."""

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_ASGI = Callable[[_Message, _Receive, _Send], Awaitable[None]]

_STATUS: dict[type[PeriluneError], int] = {UnknownIdError: 404, DataError: 422, RecipeError: 422, EngineError: 422}
"""By the nearest class; all other kinds are the server's own fault."""


def create_app(
    routers: "Sequence[APIRouter]" = (), *, title: str = "perilune", max_body_bytes: int = MAX_BODY_BYTES
) -> "FastAPI":
    """Return an application with `/health`, the page `/docs` and the routers.

    Args:
        routers: made by the functions of this package.
        title: shown at `/docs`.
        max_body_bytes: a larger body is answered with 413.

    Raises:
        EngineError: FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI
        from fastapi.exceptions import RequestValidationError
        from starlette.exceptions import HTTPException
    except ImportError as error:
        raise missing_extra(error) from error

    app = FastAPI(title=title, version=__version__)

    @app.get("/health", tags=["service"], summary="Whether the service answers")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    for router in routers:
        app.include_router(router)
    app.add_middleware(_BodyLimit, max_bytes=max_body_bytes)
    app.add_exception_handler(PeriluneError, _perilune_error)
    app.add_exception_handler(RequestValidationError, _unfit_body)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


def run_app(app: "FastAPI", *, host: str, port: int) -> None:
    """Answer requests until SIGTERM or Ctrl-C; those under way are finished first.

    Args:
        app: from `create_app`.
        host: address to listen on.
        port: port to listen on.

    Raises:
        EngineError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise missing_extra(error) from error
    uvicorn.run(app, host=host, port=port, log_level="warning")


def missing_extra(error: ImportError) -> EngineError:
    """Return what to raise where the web packages are not installed."""
    return EngineError(
        f"serving needs the optional package {error.name}; install it with: pip install 'perilune[serve]'"
    )


def _answer(status: int, kind: str, message: str, **more: object) -> "JSONResponse":
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"type": kind, "message": message, **more}}, status)


async def _perilune_error(request: object, error: Exception) -> "JSONResponse":
    del request
    status = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)
    if status == 500:
        logger.error("%s: %s", type(error).__name__, error)
    return _answer(status, type(error).__name__, str(error))


async def _unfit_body(request: object, error: Exception) -> "JSONResponse":
    from fastapi.exceptions import RequestValidationError

    del request
    assert isinstance(error, RequestValidationError)
    # Neither `input` nor `ctx`: they hold what the client sent, which JSON need not be able to carry.
    details = [
        {"field": _printable(".".join(str(part) for part in one["loc"][1:])), "message": _printable(one["msg"])}
        for one in error.errors()
    ]
    first = details[0]
    message = f"{first['field']}: {first['message']}" if first["field"] else first["message"]
    return _answer(422, "InvalidRequest", message, details=details[:20])


async def _http_error(request: object, error: Exception) -> "JSONResponse":
    from starlette.exceptions import HTTPException

    del request
    assert isinstance(error, HTTPException)
    response = _answer(error.status_code, "HTTPError", str(error.detail))
    response.headers.update(error.headers or {})
    return response


async def _unexpected(request: object, error: Exception) -> "JSONResponse":
    del request
    logger.error("unexpected error", exc_info=error)
    return _answer(500, "InternalError", "the server failed; its log says how")


def _printable(text: str) -> str:
    """Text that UTF-8 can carry, and no more than is of use: field names come from the client."""
    return text.encode("utf-8", "backslashreplace").decode()[:200]


class _BodyLimit:
    """Reads a body up to a limit before the application does, and refuses what is longer."""

    def __init__(self, app: _ASGI, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        waiting, size = [], 0
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        too_long = any(value.isdigit() and (len(value) > 18 or int(value) > self.max_bytes) for value in lengths)
        while not too_long:
            message = await receive()
            waiting.append(message)
            size += len(message.get("body", b""))
            too_long = size > self.max_bytes
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        if too_long:
            message = f"the body is larger than {self.max_bytes} bytes"
            await _answer(413, "BodyTooLarge", message)(scope, receive, send)
            return

        async def replay() -> _Message:
            return waiting.pop(0) if waiting else await receive()

        await self.app(scope, replay, send)
