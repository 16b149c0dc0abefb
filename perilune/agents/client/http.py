"""The client for any OpenAI-compatible endpoint, over aiohttp and orjson.

One timer guards a call: it is set anew whenever bytes come, so an answer may take long but may not stall. Leaving the
response, for whatever reason, before its last byte closes the connection; otherwise the next call takes it over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from perilune.agents.client.base import EndpointError
from perilune.agents.client.body import to_body
from perilune.agents.client.dialects.base import Dialect
from perilune.agents.client.faults import error_of_response, without_secrets
from perilune.agents.client.limits import RateLimits, rate_limits
from perilune.agents.client.pictures import ToolImages
from perilune.agents.client.proxy import proxy_of
from perilune.agents.client.stream import AnswerReader
from perilune.agents.client.timing import CallTimer, Timeouts
from perilune.agents.messages import ChatRequest, Reply, Usage
from perilune.errors import EngineError, missing_extra

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

_MAX_ERROR_BYTES = 1 << 16


class HttpClient:
    """Asks an endpoint; connections are kept for later calls.

    HTTPS_PROXY, HTTP_PROXY and NO_PROXY are honored, but for this machine's own addresses.

    It belongs to the event loop of its first call until it is closed.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeouts: Timeouts | None = None,
        stream: bool = True,
        dialect: Dialect | None = None,
        tool_images: ToolImages = "tool",
        on_limits: Callable[[RateLimits], None] | None = None,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            base_url: up to and with `/v1`.
            api_key: sent as a bearer token; it appears nowhere else.
            timeouts: of every call; None: those of `Timeouts()`.
            stream: whether to ask for answers in pieces.
            dialect: of a model whose server has no parser of tool calls.
            tool_images: whose messages hold the pictures that tools return; `user` for servers that take text alone
                from tools.
            on_limits: told of the limits that responses state.

        Raises:
            EngineError: `base_url` is no address of a server, or a package is missing.
        """
        check_base_url(base_url)
        try:
            import orjson
        except ImportError as error:
            raise missing_extra(EngineError, "agents need", error.name, "agents") from error
        self._dumps, self._loads = orjson.dumps, orjson.loads
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._proxy = proxy_of(base_url)
        self._secrets = tuple(found for found in (api_key, self._proxy and urlsplit(self._proxy).password) if found)
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._stream, self._dialect, self._on_limits = stream, dialect, on_limits
        self._tool_images: ToolImages = tool_images
        self._timeouts = timeouts or Timeouts()
        self._session: ClientSession | None = None
        self._sends_done = False

    async def chat(self, request: ChatRequest) -> Reply:
        """Return the whole answer.

        Raises:
            EndpointError: there is none.
            EngineError: aiohttp is not installed.
        """
        session = self._session or self._open()
        from aiohttp import ClientError, ClientPayloadError

        use_stream, reader = self._stream and request.stream, AnswerReader(self._loads, secrets=self._secrets)
        start, body = time.perf_counter(), self._encode(request, use_stream)
        timer = CallTimer(self._timeouts, use_stream)
        broke = False
        try:
            async with timer.limit, self._post(session, body) as response:
                if response.status != 200 or self._on_limits:
                    await self._check(response)
                await self._read(response, reader, timer)
        except ClientPayloadError:
            broke = True
        except (ClientError, ConnectionError) as error:
            if not reader.is_done:
                raise self._lost(error, reader.spent(request) if reader.has_output else None) from error
        except TimeoutError as error:
            if not reader.is_done:
                raise timer.error(reader.spent(request) if reader.has_output else None) from error
        except EndpointError as error:
            if error.usage is None and reader.has_output:
                error.usage = reader.spent(request)
            raise
        self._sends_done |= use_stream and reader.is_done
        end = time.perf_counter()
        return reader.finish(
            request,
            first_token_s=(timer.first or end) - start,
            total_s=end - start,
            needs_done=broke or (timer.is_stream and self._sends_done),
            dialect=self._dialect,
        )

    async def close(self) -> None:
        """Give back connections; a later call opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> ClientSession:
        try:
            from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector
        except ImportError as error:
            raise missing_extra(EngineError, "agents need", error.name, "agents") from error
        # How many calls are under way is for the limiter to say.
        self._session = ClientSession(
            connector=TCPConnector(limit=0, keepalive_timeout=30.0),
            timeout=ClientTimeout(total=None, sock_connect=self._timeouts.connect_s),
            cookie_jar=DummyCookieJar(),
        )
        return self._session

    def _post(self, session: ClientSession, body: bytes) -> AbstractAsyncContextManager[ClientResponse]:
        # A session's own headers would go to the proxy too, the key among them.
        return session.post(self._url, data=body, headers=self._headers, proxy=self._proxy, allow_redirects=False)

    def _encode(self, request: ChatRequest, use_stream: bool) -> bytes:
        messages = request.messages if self._dialect is None else self._dialect.outgoing(request.messages)
        body = to_body(request, messages=messages, tool_images=self._tool_images)
        if use_stream:
            body.setdefault("stream_options", {"include_usage": True})
        body["stream"] = use_stream
        try:
            return self._dumps(body)
        except TypeError:  # half of a surrogate pair, from the name of a file for instance
            return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")

    def _lost(self, error: Exception, usage: Usage | None) -> EndpointError:
        words = without_secrets(str(error), self._secrets) or type(error).__name__
        return EndpointError(f"no connection to the endpoint: {words}", fault="connection", usage=usage)

    async def _check(self, response: ClientResponse) -> None:
        """Tell of limits; raise what a status other than 200 means."""
        limits = rate_limits(response.headers) if self._on_limits else None
        if self._on_limits and limits:
            self._on_limits(limits)
        if response.status != 200:
            head = await response.content.read(_MAX_ERROR_BYTES)
            raise error_of_response(response.status, response.headers, head, secrets=self._secrets)

    async def _read(self, response: ClientResponse, reader: AnswerReader, timer: CallTimer) -> None:
        """Read to the end, a stream piece by piece; a body is read whole whatever was asked for."""
        kind = response.content_type
        timer.is_stream = kind == "text/event-stream" or (timer.is_stream and not kind.endswith("json"))
        if not timer.is_stream:
            reader.add(_parse(self._loads, await response.read()))
            return
        async for data in response.content.iter_any():
            reader.feed(data)
            timer.more(has_output=reader.has_output, is_done=reader.is_done)


def check_base_url(base_url: str) -> None:
    """Refuse what is no address of a server, and what would put a secret into logs.

    Raises:
        EngineError: says which.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EngineError(
            "base_url must look like https://host/v1: it must start with http:// or https:// and name a host"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise EngineError("base_url must hold neither a user nor a query: a key belongs in api_key")


def _parse(loads: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return loads(data)
    except (ValueError, RecursionError) as error:
        raise EndpointError("the answer is no JSON", fault="malformed") from error
