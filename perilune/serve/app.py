"""The application that every router joins: what goes wrong is one JSON object, whoever it went wrong in.

`{"error": {"type": ..., "message": ...}}`, and with bodies that do not fit `"details": [{"field", "message"}]`. Neither
stack traces nor what the client sent are ever in it.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from perilune import __version__
from perilune.errors import DataError, EngineError, PeriluneError, RecipeError, UnknownIdError, missing_extra

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI
    from fastapi.responses import JSONResponse

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
"""Larger bodies are refused before anything reads them."""
READ_TIMEOUT_S = 30.0
"""Bodies that are not there by then are not waited for."""
MAX_REQUESTS = 64
"""Requests that are answered or wait at a time; who comes beside them is asked to come back."""
MAX_CONNECTIONS = 512
"""Connections at a time; uvicorn answers those beside them with 503."""

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_ASGI = Callable[[_Message, _Receive, _Send], Awaitable[None]]

_STATUS: dict[type[PeriluneError], int] = {UnknownIdError: 404, DataError: 400, RecipeError: 400, EngineError: 400}
"""By the nearest class; all other kinds are the server's own fault."""


def create_app(
    routers: "Sequence[APIRouter]" = (),
    *,
    title: str = "perilune",
    max_body_bytes: int = MAX_BODY_BYTES,
    read_timeout_s: float = READ_TIMEOUT_S,
    max_requests: int = MAX_REQUESTS,
) -> "FastAPI":
    """Return an application with `/health`, the page `/docs` and the routers.

    Args:
        routers: made by the functions of this package.
        title: shown at `/docs`.
        max_body_bytes: a larger body is answered with 413.
        read_timeout_s: a body that has not arrived by then is answered with 408.
        max_requests: of requests that are answered or wait; one more is answered with 429.

    Raises:
        EngineError: FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI
        from fastapi.exceptions import RequestValidationError
        from starlette.exceptions import HTTPException
    except ImportError as error:
        raise missing_extra(EngineError, "serving needs", error.name, "serve") from error

    app = FastAPI(title=title, version=__version__)

    @app.get("/health", tags=["service"], summary="Whether the service answers")
    async def health() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    for router in routers:
        app.include_router(router)
    app.add_middleware(_RequestLimit, most=max_requests)
    app.add_middleware(_BodyLimit, max_bytes=max_body_bytes, timeout_s=read_timeout_s)  # the outer one
    app.add_exception_handler(PeriluneError, _perilune_error)
    app.add_exception_handler(RequestValidationError, _unfit_body)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Take an address before what is served there is loaded; requests wait until `run_app` answers them.

    Args:
        host: address to listen on.
        port: port to listen on; 0 for any that is free.

    Raises:
        EngineError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise EngineError(f"cannot listen on {host}: {error.strerror}; name another --host") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            reason = error.strerror or "not to be had"
            raise EngineError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from error
        yield listener


def run_app(app: "FastAPI", listener: socket.socket, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Answer requests until SIGTERM or Ctrl-C; those under way are finished first.

    Args:
        app: from `create_app`.
        listener: from `listen`.
        on_ready: called with the address, like "http://127.0.0.1:8000", when requests are taken.

    Raises:
        EngineError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise missing_extra(EngineError, "serving needs", error.name, "serve") from error
    settings = uvicorn.Config(app, log_level="warning", limit_concurrency=MAX_CONNECTIONS)
    listener.listen(settings.backlog)
    if on_ready is not None:
        host, port = listener.getsockname()[:2]
        on_ready(f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}")
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listener])


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
    # Neither `input` nor all of `ctx`: they hold what the client sent, which JSON need not be able to carry.
    details = [_detail(one) for one in error.errors()]
    first = details[0]
    message = f"{first['field']}: {first['message']}" if first["field"] else first["message"]
    return _answer(400, "InvalidRequest", message, details=details[:20])


def _detail(error: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with which field of a body."""
    place, message = error["loc"][1:], error["msg"]
    if error["type"] == "json_invalid":
        place, message = (), f"the body is not JSON: {error['ctx']['error']}, at character {error['loc'][-1]}"
    return {"field": _printable(".".join(map(str, place))), "message": _printable(message)}


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
    """Reads a body up to a limit before the application does, and refuses what is longer, or does not arrive."""

    def __init__(self, app: _ASGI, max_bytes: int, timeout_s: float) -> None:
        self.app, self.max_bytes, self.timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        is_too_long = any(value.isdigit() and (len(value) > 18 or int(value) > self.max_bytes) for value in lengths)
        try:
            waiting = None if is_too_long else await asyncio.wait_for(self._read(receive), self.timeout_s)
        except TimeoutError:
            late = _answer(408, "BodyTooSlow", f"the body did not arrive within {self.timeout_s:g} s")
            late.headers["connection"] = "close"
            await late(scope, receive, send)
            return
        if waiting is None:
            message = f"the body is larger than {self.max_bytes} bytes"
            await _answer(413, "BodyTooLarge", message)(scope, receive, send)
            return

        async def replay() -> _Message:
            return waiting.pop(0) if waiting else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: _Receive) -> list[_Message] | None:
        """All messages of a body; None if it is too long."""
        found, size = [], 0
        while True:
            message = await receive()
            found.append(message)
            size += len(message.get("body", b""))
            if size > self.max_bytes:
                return None
            if message["type"] != "http.request" or not message.get("more_body"):
                return found


class _RequestLimit:
    """Answers at once that there are too many requests, where waiting would only make all of them late."""

    def __init__(self, app: _ASGI, most: int) -> None:
        self.app, self.most, self.count = app, most, 0

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        if self.count >= self.most:
            busy = _answer(429, "Busy", f"{self.most} requests are being answered; come back in a second")
            busy.headers["retry-after"] = "1"
            await busy(scope, receive, send)
            return
        self.count += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.count -= 1
