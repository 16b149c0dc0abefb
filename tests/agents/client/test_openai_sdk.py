from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import traceback

import pytest

from perilune.agents.client.dialects.kimi_k2 import KimiK2
from perilune.agents.client.openai_sdk import OpenAiSdkClient
from perilune.agents.client.timing import Timeouts
from perilune.agents.messages import Sampling
from perilune.errors import EngineError
from tests.agents.client.helpers import WEATHER, RawServer, call, call_delta, delta, failure, http, reply, request, sse

KEY = "sk-very-secret"
FINE = sse(delta(role="assistant", content=""), delta(reasoning_content="Hm"), delta(content="Fine."), delta("stop"))
needs_openai = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EngineError, match=r"openai; install it with: pip install 'perilune\[openai\]'"):
        OpenAiSdkClient("http://localhost/v1")


async def ask(server, *requests, **options):
    async with server as url:
        client = OpenAiSdkClient(url, KEY, **options)
        try:
            return [await client.chat(one) for one in requests or (request(),)]
        finally:
            await client.close()


@needs_openai
def test_a_stream_is_read_and_the_request_is_what_the_api_wants():
    server = RawServer(http(FINE))
    asked = request(tools=(WEATHER,), sampling=Sampling(temperature=0.5, extra_body={"top_k": 3}))
    (found,) = asyncio.run(ask(server, asked))
    assert (found.message.content, found.message.reasoning, found.finish_reason) == ("Fine.", "Hm", "stop")
    assert json.loads(server.requests[0][1]) == {
        "model": "m",
        "messages": [{"role": "user", "content": "What is the weather in Lisbon?"}],
        "tools": [WEATHER],
        "temperature": 0.5,
        "top_k": 3,
        "stream_options": {"include_usage": True},
        "stream": True,
    }


@needs_openai
def test_a_whole_answer_is_read():
    message = {**reply("", call()).message.to_dict(), "reasoning_content": "Hm"}
    body = {"id": "x", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    server = RawServer(http(json.dumps(body).encode(), kind="application/json"))
    (found,) = asyncio.run(ask(server, stream=False))
    assert (found.message.tool_calls, found.message.reasoning) == ((call(),), "Hm")


@needs_openai
@pytest.mark.parametrize("cut", range(0, len(FINE) - len(b"data: [DONE]\n\n"), 23))
def test_a_cut_stream_is_never_an_answer(cut):
    for length in (True, len(FINE)):
        assert failure(ask(RawServer(http(FINE[:cut], length=length)))).is_retryable


@needs_openai
@pytest.mark.parametrize(
    ("response", "fault"),
    [
        (http(b"{}", "429 No", "application/json", "Retry-After: 7"), "rate_limit"),
        (http(b'{"error": {"message": "no such key sk-very-secret"}}', "401 No", "application/json"), "refused"),
        (http(b'{"error": {"message": "prompt is too long"}}', "400 No", "application/json"), "context_overflow"),
        (http(b"data: {nonsense\n\n"), "malformed"),
        (http(sse({"error": {"message": "engine died", "code": 500}})), "server"),
        (http(sse(delta("tool_calls"))), "empty"),
        (b"", "connection"),
    ],
)
def test_what_goes_wrong_is_named_without_the_key(response, fault):
    error = failure(ask(RawServer(response)))
    assert error.fault == fault
    assert KEY not in "".join(traceback.format_exception(error))
    assert error.retry_after_s == (7.0 if fault == "rate_limit" else None)


@needs_openai
@pytest.mark.parametrize("told", [{"error": {"message": f"bad {KEY}"}}, {"object": "error", "message": f"bad {KEY}"}])
def test_a_key_that_comes_back_inside_an_answer_is_not_passed_on(told):
    for stream, kind, body in ((True, "text/event-stream", sse(told)), (False, "application/json", json.dumps(told))):
        response = http(body if isinstance(body, bytes) else body.encode(), kind=kind)
        error = failure(ask(RawServer(response), stream=stream))
        assert KEY not in str(error)
        assert "***" in str(error)


@needs_openai
def test_a_stalled_stream_times_out():
    server = RawServer(http(FINE[:-60], length=500), after="stall")
    error = failure(ask(server, timeouts=Timeouts(first_s=5, idle_s=0.1)))
    assert (error.fault, str(error)) == ("timeout", "the stream stalled for 0.1 s")


@needs_openai
def test_limits_and_dialects_work_here_too():
    told, raw = [], "<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    header = "x-ratelimit-remaining-tokens: 5"
    server = RawServer(http(sse(delta("stop", content=raw)), "200 OK", "text/event-stream", header))
    (found,) = asyncio.run(ask(server, dialect=KimiK2(), on_limits=told.append))
    assert found.message.tool_calls[0].name == "weather"
    assert told[0].tokens_left == 5


@needs_openai
def test_calls_of_a_stream():
    calls = [delta(tool_calls=[call_delta(0, "a", "weather", "")]), delta(tool_calls=[call_delta(0, arguments="{}")])]
    (found,) = asyncio.run(ask(RawServer(http(sse(*calls, delta("tool_calls"))))))
    assert found.message.tool_calls == (call(arguments="{}", call_id="a"),)
