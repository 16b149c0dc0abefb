"""The client over the `openai` package, for those who have it already; a call costs several times the CPU.

The package lets a stream that breaks off in order end without a word, so completeness is judged here, by what reads
streams for the other client too. It does not show `[DONE]`; a finish_reason and an orderly end have to do.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from typing import Any

from perilune.agents.client.base import EndpointError
from perilune.agents.client.body import to_body
from perilune.agents.client.dialects.base import Dialect
from perilune.agents.client.faults import error_in_stream, error_of_response
from perilune.agents.client.http import check_base_url
from perilune.agents.client.limits import RateLimits, rate_limits
from perilune.agents.client.pictures import ToolImages
from perilune.agents.client.stream import AnswerReader
from perilune.agents.client.timing import CallTimer, Timeouts
from perilune.agents.messages import ChatRequest, Reply
from perilune.errors import EngineError, missing_extra


class OpenAiSdkClient:
    """Asks an endpoint through `openai.AsyncOpenAI`, without its retries."""

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
        """Prepare; the arguments are those of `HttpClient`.

        Raises:
            EngineError: `base_url` is no address of a server, or the package is missing.
        """
        check_base_url(base_url)
        try:
            self._openai: Any = importlib.import_module("openai")
        except ImportError as error:
            raise missing_extra(EngineError, "agents need", error.name, "openai") from error
        self._timeouts = timeouts or Timeouts()
        self._client: Any = self._openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or "none",  # with None it would send a key from the environment
            max_retries=0,
            timeout=self._openai.Timeout(self._timeouts.total_s, connect=self._timeouts.connect_s),
        )
        self._secrets = (api_key,) if api_key else ()
        self._stream, self._dialect, self._on_limits = stream, dialect, on_limits
        self._tool_images: ToolImages = tool_images

    async def chat(self, request: ChatRequest) -> Reply:
        """Return the whole answer.

        Raises:
            EndpointError: there is none.
        """
        use_stream, reader = self._stream and request.stream, AnswerReader(secrets=self._secrets)
        start, timer = time.perf_counter(), CallTimer(self._timeouts, use_stream)
        broke = False
        try:
            async with timer.limit:
                await self._read(request, use_stream, reader, timer)
        except TimeoutError as error:
            raise timer.error(reader.spent(request) if reader.has_output else None) from error
        except self._openai.APIConnectionError as error:
            if not reader.has_output:
                raise EndpointError(f"no connection to the endpoint: {error}", fault="connection") from error
            broke = True
        except EndpointError as error:
            if error.usage is None and reader.has_output:
                error.usage = reader.spent(request)
            raise
        end = time.perf_counter()
        return reader.finish(
            request,
            first_token_s=(timer.first or end) - start,
            total_s=end - start,
            needs_done=broke,
            dialect=self._dialect,
        )

    async def close(self) -> None:
        """Give back connections; no call may follow."""
        await self._client.close()

    async def _read(self, request: ChatRequest, use_stream: bool, reader: AnswerReader, timer: CallTimer) -> None:
        try:
            answer = await self._ask(request, use_stream)
            if not use_stream:
                reader.add(answer.model_dump(exclude_unset=True, warnings=False))
                return
            async with answer:
                async for chunk in answer:
                    reader.add(chunk.model_dump(exclude_unset=True, warnings=False))
                    timer.more(has_output=reader.has_output, is_done=False)
        except self._openai.APIConnectionError:
            raise
        except self._openai.APIStatusError as error:
            self._tell(error.response.headers)
            body = json.dumps(error.body).encode()
            raise error_of_response(
                error.status_code, error.response.headers, body, secrets=self._secrets
            ) from None  # whose request holds the key
        except self._openai.APIError as error:
            raise error_in_stream(error.body or error.message, secrets=self._secrets) from None
        except ValueError as error:
            raise EndpointError("a piece of the answer is no JSON", fault="malformed") from error

    async def _ask(self, request: ChatRequest, use_stream: bool) -> Any:
        messages = request.messages if self._dialect is None else self._dialect.outgoing(request.messages)
        body = to_body(request, messages=messages, tool_images=self._tool_images)
        if use_stream:
            body.setdefault("stream_options", {"include_usage": True})
        model, messages = body.pop("model"), body.pop("messages")
        raw = await self._client.chat.completions.with_raw_response.create(
            model=model, messages=messages, stream=use_stream, extra_body=body
        )
        self._tell(raw.headers)
        return raw.parse()

    def _tell(self, headers: Any) -> None:
        limits = rate_limits(headers) if self._on_limits else None
        if self._on_limits and limits:
            self._on_limits(limits)
