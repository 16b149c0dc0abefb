"""Work that ends with its client: answers as server-sent events or whole, canceled when nobody listens any more."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from perilune.errors import PeriluneError
from perilune.serve.app import Message, Receive, Send
from perilune.serve.openai.errors import ApiError, openai_error

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.responses import Response

logger = logging.getLogger(__name__)

KEEPALIVE_S = 15.0
"""After so long without anything to say a stream says that it is alive: proxies close what says nothing."""

EVENTS: Mapping[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "required": ["data"],
            "properties": {"data": {"type": "string", "description": "JSON of a chunk, or [DONE]"}},
        }
    }
}
"""What `/docs` says of streams: the form of one event."""
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_ANSWER = TypeVar("_ANSWER")


class ClientGone(Exception):
    """Nobody waits for the answer."""


def answer_nobody(app: FastAPI) -> None:
    """Let an application end requests without a client quietly, as 499 in its numbers."""

    async def answer(request: object, error: Exception) -> Response:
        from starlette.responses import Response

        del request, error
        return Response(status_code=499)

    app.add_exception_handler(ClientGone, answer)


class EventStream:
    """An answer of server-sent events, ended by `[DONE]`; an ASGI application.

    What goes wrong after it began is an event `{"error": ...}`, and then there is no `[DONE]`.
    """

    def __init__(
        self, events: AsyncGenerator[Mapping[str, Any], None], *, timeout_s: float, release: Callable[[], None]
    ) -> None:
        """Prepare; nothing is computed before the answer is sent.

        Args:
            events: JSON of each; closed when the client goes away or is too slow.
            timeout_s: for the whole answer.
            release: called at the end, whatever came of it; a generator that never began cannot free what it holds.
        """
        self._events, self._timeout_s, self._release = events, timeout_s, release
        self._said_at = 0.0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Send the answer."""
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            last = await self._send_events(gone, send)
            if last is not None:
                # Whoever does not read is not waited for.
                async with asyncio.timeout(KEEPALIVE_S):
                    await send({"type": "http.response.body", "body": last})
        except (ClientGone, OSError, TimeoutError):
            logger.debug("a client went away before its answer ended")
        finally:
            gone.cancel()
            await self._events.aclose()
            self._release()

    async def _send_events(self, gone: asyncio.Future[None], send: Send) -> bytes | None:
        """Send all events; return what ends the stream."""
        self._said_at = asyncio.get_running_loop().time()
        pulse = asyncio.ensure_future(self._keep_alive(send))
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                gone.add_done_callback(lambda _: _expire(limit))
                async for event in self._events:
                    await send({"type": "http.response.body", "body": _line(event), "more_body": True})
                    self._said_at = asyncio.get_running_loop().time()
                return b"data: [DONE]\n\n"
        except TimeoutError:
            if gone.done():
                raise ClientGone from None
            return _line(too_slow(self._timeout_s).body())
        except ApiError as error:
            return _line(error.body())
        except PeriluneError as error:
            logger.warning("%s: %s", type(error).__name__, error)
            return _line(openai_error(500, type(error).__name__, str(error)))
        except OSError:
            raise
        except Exception:
            logger.exception("unexpected error")
            return _line(openai_error(500, "InternalError", "the server failed; its log says how"))
        finally:
            pulse.cancel()

    async def _keep_alive(self, send: Send) -> None:
        """Say that the stream is alive whenever it has said nothing for long."""
        with suppress(OSError):  # the next event meets it too
            while True:
                silence = asyncio.get_running_loop().time() - self._said_at
                await asyncio.sleep(KEEPALIVE_S - silence)
                if asyncio.get_running_loop().time() - self._said_at >= KEEPALIVE_S:
                    await send({"type": "http.response.body", "body": b": still there\n\n", "more_body": True})
                    self._said_at = asyncio.get_running_loop().time()

    def as_response(self) -> Response:
        """Return this as what a route may return."""
        from starlette.responses import Response

        stream = self

        class Streamed(Response):
            async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
                await stream(scope, receive, send)

        return Streamed()


async def answer_while_there(work: Coroutine[Any, Any, _ANSWER], receive: Receive, *, timeout_s: float) -> _ANSWER:
    """Return what comes of `work`; it is canceled when the client goes away, or when it takes too long.

    Raises:
        ClientGone: nobody waits for it.
        ApiError: 408, it took too long.
    """
    gone = asyncio.ensure_future(_until_gone(receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        raise too_slow(timeout_s)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def too_slow(timeout_s: float) -> ApiError:
    """Return the error of an answer that was not there in time."""
    return ApiError(408, f"the answer took more than {timeout_s:g} s; ask for fewer tokens", code="request_timeout")


def _expire(limit: asyncio.Timeout) -> None:
    with suppress(RuntimeError):  # it is over already
        limit.reschedule(0)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _line(event: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
