"""The application that every router joins: what goes wrong is one JSON object, whoever it went wrong in.

`{"error": {"type": ..., "message": ...}}`, and with bodies that do not fit `"details": [{"field", "message"}]`, unless
the application was made with another `error_body`. Neither stack traces nor what the client sent are ever in it.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from perilune import __version__
from perilune.errors import DataError, EngineError, PeriluneError, RecipeError, UnknownIdError, missing_extra

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI
    from fastapi.responses import JSONResponse

    from perilune.serve.drain import Drain

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
"""Larger bodies are refused before anything reads them."""
READ_TIMEOUT_S = 30.0
"""Bodies that are not there by then are not waited for."""
MAX_REQUESTS = 64
"""Requests that are answered or wait at a time; who comes beside them is asked to come back."""
MAX_CONNECTIONS = 512
"""Connections at a time; uvicorn answers those beside them with 503."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGI = Callable[[Message, Receive, Send], Awaitable[None]]

ErrorBody = Callable[[int, str, str, Sequence[Mapping[str, str]]], Mapping[str, object]]
"""From status, kind, message, and fields with what is wrong with each, to the JSON that is answered."""

_STATUS: dict[type[PeriluneError], int] = {UnknownIdError: 404, DataError: 400, RecipeError: 400, EngineError: 400}
"""By the nearest class; all other kinds are the server's own fault."""
_UNLIMITED = ("/health", "/metrics")
"""Answered at once, however many requests wait: those who watch over the service ask here."""


def plain_error(status: int, kind: str, message: str, details: Sequence[Mapping[str, str]] = ()) -> dict[str, object]:
    """Return this module's form of an error."""
    del status
    more: dict[str, object] = {"details": list(details)} if details else {}
    return {"error": {"type": kind, "message": message, **more}}


def create_app(
    routers: "Sequence[APIRouter]" = (),
    *,
    title: str = "perilune",
    max_body_bytes: int = MAX_BODY_BYTES,
    read_timeout_s: float = READ_TIMEOUT_S,
    max_requests: int = MAX_REQUESTS,
    error_body: ErrorBody = plain_error,
    lifespan: "Callable[[FastAPI], AbstractAsyncContextManager[None]] | None" = None,
    problem: Callable[[], str | None] = lambda: None,
) -> "FastAPI":
    """Return an application with `/health`, the page `/docs` and the routers.

    Args:
        routers: made by the functions of this package.
        title: shown at `/docs`.
        max_body_bytes: a larger body is answered with 413.
        read_timeout_s: a body that has not arrived by then is answered with 408.
        max_requests: of requests that are answered or wait; one more is answered with 429.
        error_body: how errors are written, where clients expect another form.
        lifespan: entered before the first request is answered, left after the last.
        problem: why the service cannot do its work, if so; `/health` then is 503.

    Raises:
        EngineError: FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, Response
    except ImportError as error:
        raise missing_extra(EngineError, "serving needs", error.name, "serve") from error

    app = FastAPI(title=title, version=__version__, lifespan=lifespan)

    @app.get("/health", tags=["service"], summary="Whether the service answers")
    async def health(response: Response) -> dict[str, str]:
        found = problem()
        response.status_code = 200 if found is None else 503
        return {"status": found or "ok", "version": __version__}

    for router in routers:
        app.include_router(router)
    errors = _Errors(error_body)
    app.add_middleware(_RequestLimit, most=max_requests, errors=errors)
    app.add_middleware(_BodyLimit, max_bytes=max_body_bytes, timeout_s=read_timeout_s, errors=errors)  # the outer one
    errors.handle(app)
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


def run_app(
    app: "FastAPI",
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None] | None = None,
    drain: "Drain | None" = None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; those under way are finished first.

    Args:
        app: from `create_app`.
        listener: from `listen`.
        on_ready: called with the address, like "http://127.0.0.1:8000", when requests are taken.
        drain: of the application, if it is around it: until all are answered connections are still taken, so that who
            comes is told to go elsewhere. Without it they are refused.

    Raises:
        EngineError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise missing_extra(EngineError, "serving needs", error.name, "serve") from error
    # httptools would be faster, but takes headers of any size
    settings = uvicorn.Config(app, log_level="warning", limit_concurrency=MAX_CONNECTIONS, http="h11")
    listener.listen(settings.backlog)
    if on_ready is not None:
        host, port = listener.getsockname()[:2]
        on_ready(f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}")
    if drain is None:
        server = uvicorn.Server(settings)
    else:
        from perilune.serve.drain import draining_server

        server = draining_server(settings, drain)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


class _Errors:
    """What is answered to each kind of error."""

    def __init__(self, body: ErrorBody) -> None:
        self._body = body

    def handle(self, app: "FastAPI") -> None:
        """Let an application answer its errors so."""
        from fastapi.exceptions import RequestValidationError
        from starlette.exceptions import HTTPException

        app.add_exception_handler(PeriluneError, self._perilune_error)
        app.add_exception_handler(RequestValidationError, self._unfit_body)
        app.add_exception_handler(HTTPException, self._http_error)
        app.add_exception_handler(Exception, self._unexpected)

    def answer(self, status: int, kind: str, message: str, details: Sequence[Mapping[str, str]] = ()) -> "JSONResponse":
        from fastapi.responses import JSONResponse

        return JSONResponse(self._body(status, kind, message, details), status)

    async def _perilune_error(self, request: object, error: Exception) -> "JSONResponse":
        del request
        status = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)
        if status == 500:
            logger.error("%s: %s", type(error).__name__, error)
        return self.answer(status, type(error).__name__, str(error))

    async def _unfit_body(self, request: object, error: Exception) -> "JSONResponse":
        from fastapi.exceptions import RequestValidationError

        del request
        assert isinstance(error, RequestValidationError)
        # Neither `input` nor all of `ctx`: they hold what the client sent, which JSON need not be able to carry.
        details = [_detail(one) for one in error.errors()]
        first = details[0]
        message = f"{first['field']}: {first['message']}" if first["field"] else first["message"]
        return self.answer(400, "InvalidRequest", message, details[:20])

    async def _http_error(self, request: object, error: Exception) -> "JSONResponse":
        from starlette.exceptions import HTTPException

        del request
        assert isinstance(error, HTTPException)
        response = self.answer(error.status_code, "HTTPError", str(error.detail))
        response.headers.update(error.headers or {})
        return response

    async def _unexpected(self, request: object, error: Exception) -> "JSONResponse":
        del request
        logger.error("unexpected error", exc_info=error)
        return self.answer(500, "InternalError", "the server failed; its log says how")


def _detail(error: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with which field of a body."""
    place, message = error["loc"][1:], error["msg"]
    if error["type"] == "json_invalid":
        place, message = (), f"the body is not JSON: {error['ctx']['error']}, at character {error['loc'][-1]}"
    return {"field": _printable(".".join(map(str, place))), "message": _printable(message)}


def _printable(text: str) -> str:
    """Text that UTF-8 can carry, and no more than is of use: field names come from the client."""
    return text.encode("utf-8", "backslashreplace").decode()[:200]


class _BodyLimit:
    """Reads a body up to a limit before the application does, and refuses what is longer, or does not arrive."""

    def __init__(self, app: ASGI, max_bytes: int, timeout_s: float, errors: _Errors) -> None:
        self.app, self.max_bytes, self.timeout_s, self.errors = app, max_bytes, timeout_s, errors

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        is_too_long = any(value.isdigit() and (len(value) > 18 or int(value) > self.max_bytes) for value in lengths)
        try:
            waiting = None if is_too_long else await asyncio.wait_for(self._read(receive), self.timeout_s)
        except TimeoutError:
            late = self.errors.answer(408, "BodyTooSlow", f"the body did not arrive within {self.timeout_s:g} s")
            late.headers["connection"] = "close"
            await late(scope, receive, send)
            return
        if waiting is None:
            message = f"the body is larger than {self.max_bytes} bytes"
            await self.errors.answer(413, "BodyTooLarge", message)(scope, receive, send)
            return

        async def replay() -> Message:
            return waiting.pop(0) if waiting else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> list[Message] | None:
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

    def __init__(self, app: ASGI, most: int, errors: _Errors) -> None:
        self.app, self.most, self.errors, self.count = app, most, errors, 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _UNLIMITED:
            await self.app(scope, receive, send)
            return
        if self.count >= self.most:
            busy = self.errors.answer(429, "Busy", f"{self.most} requests are being answered; come back in a second")
            busy.headers["retry-after"] = "1"
            await busy(scope, receive, send)
            return
        self.count += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.count -= 1
