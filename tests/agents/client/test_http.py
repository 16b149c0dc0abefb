from __future__ import annotations

import asyncio
import json
import sys
import traceback

import pytest

from perilune.agents.client.base import EndpointError
from perilune.agents.client.dialects.kimi_k2 import KimiK2
from perilune.agents.client.http import HttpClient
from perilune.agents.client.timing import Timeouts
from perilune.agents.messages import Message, Sampling, ToolCall
from perilune.errors import EngineError
from tests.agents.client.helpers import WEATHER, RawServer, call, call_delta, delta, failure, http, request, sse

KEY = "sk-very-secret"
FINE = sse(delta(content="Fi"), delta(content="ne."), delta("stop"))
SHORT = Timeouts(first_s=0.1, idle_s=0.1, total_s=5)


async def ask(server, *requests, **options):
    async with server as url:
        client = HttpClient(url, KEY, **options)
        try:
            return [await client.chat(one) for one in requests or (request(),)]
        finally:
            await client.close()


def body_of(server):
    return json.loads(server.requests[-1][1])


@pytest.mark.parametrize("wrong", ['{"city": "Lis', "", "[1]", '"Lisbon"', '{"day": NaN}', "[" * 100_000])
def test_arguments_that_are_no_object_are_sent_as_a_text_in_one(wrong):
    """Servers that read the arguments of past calls refuse a history for good that holds one which they cannot read."""
    server = RawServer(http(FINE))
    right = '{"city":  "Lisbon"}'
    said = Message(role="assistant", tool_calls=(call(arguments=right), call(arguments=wrong, call_id="call_2")))
    asyncio.run(ask(server, request(messages=(Message(role="user", content="?"), said))))
    sent = [one["function"]["arguments"] for one in body_of(server)["messages"][1]["tool_calls"]]
    assert sent[0] == right
    assert json.loads(sent[1]) == {"invalid_arguments": wrong}
    assert said.tool_calls[1].arguments == wrong


def test_a_stream_is_read_and_the_request_is_what_the_api_wants():
    server = RawServer(http(FINE))
    asked = request(
        tools=(WEATHER,),
        tool_choice="auto",
        sampling=Sampling(temperature=0.5, max_tokens=9, stop=("x",), extra_body={"thinking": {"type": "disabled"}}),
    )
    (found,) = asyncio.run(ask(server, asked))
    assert found.message.content == "Fine."
    assert 0 < found.first_token_s <= found.total_s
    assert body_of(server) == {
        "model": "m",
        "messages": [{"role": "user", "content": "What is the weather in Lisbon?"}],
        "tools": [WEATHER],
        "tool_choice": "auto",
        "temperature": 0.5,
        "max_tokens": 9,
        "stop": ["x"],
        "thinking": {"type": "disabled"},
        "stream_options": {"include_usage": True},
        "stream": True,
    }
    assert f"authorization: bearer {KEY}".encode() in server.requests[0][0].lower()


def test_a_whole_answer_is_read_whether_it_was_asked_for_or_not():
    body = json.dumps({"choices": [{"message": {"content": "Fine."}, "finish_reason": "stop"}]}).encode()
    for options, asked in (({"stream": False}, request()), ({}, request(stream=False)), ({}, request())):
        server = RawServer(http(body, kind="application/json"))
        (found,) = asyncio.run(ask(server, asked, **options))
        assert found.message.content == "Fine."
    server = RawServer(http(FINE))
    assert asyncio.run(ask(server, stream=False))[0].message.content == "Fine."
    assert "stream_options" not in body_of(server)


def test_a_connection_serves_one_call_after_another():
    server = RawServer(http(FINE), after="stay")
    assert len(asyncio.run(ask(server, *(request() for _ in range(5))))) == 5
    assert server.connections == 1


def test_a_closed_client_opens_anew():
    async def twice():
        async with RawServer(http(FINE)) as url:
            client = HttpClient(url)
            for _ in range(2):
                await client.chat(request())
                await client.close()
            await client.close()

    asyncio.run(twice())


@pytest.mark.parametrize("cut", range(0, len(FINE) - len(b"data: [DONE]\n\n"), 7))
def test_a_cut_stream_is_never_an_answer(cut):
    for length in (True, None, len(FINE)):  # ended in order, by closing, and against its own promise
        assert failure(ask(RawServer(http(FINE[:cut], length=length)))).fault == "truncated"


def test_a_server_that_sends_done_has_to():
    async def both():
        without = sse(delta("stop", content="Fine."), done=False)
        async with RawServer(http(without), http(FINE), http(without), after="stay") as url:
            client = HttpClient(url)
            assert (await client.chat(request())).message.content == "Fine."
            await client.chat(request())
            try:
                await client.chat(request())
            finally:
                await client.close()

    assert failure(both()).fault == "truncated"


def test_an_answer_stands_though_the_connection_fails_behind_it():
    for after, length in (("close", len(FINE) + 100), ("stall", len(FINE) + 100)):
        found = asyncio.run(ask(RawServer(http(FINE, length=length), after=after), timeouts=Timeouts(grace_s=0.05)))
        assert found[0].message.content == "Fine."


@pytest.mark.parametrize(
    ("response", "fault", "words"),
    [
        (http(b"{}", "429 No", "application/json", "Retry-After: 7"), "rate_limit", "429"),
        (http(b'{"error": {"message": "busy"}}', "503 No", "application/json"), "overload", "busy"),
        (http(b"x", "500 No", "text/plain"), "server", "500"),
        (http(b"{}", "401 No", "application/json"), "refused", "401"),
        (http(b"{}", "307 Go", "application/json", "Location: http://127.0.0.1:1/"), "refused", "307"),
        (http(b'{"message": "prompt is too long"}', "400 No", "application/json"), "context_overflow", "too long"),
        (http(b"{nonsense", kind="application/json"), "malformed", "no JSON"),
        (http(sse(delta(content="F")) + b"data: {\n\n"), "truncated", "complete"),
        (http(b"data: {\n\n"), "malformed", "no JSON"),
        (http(sse(delta("tool_calls"))), "empty", "tool call"),
        (b"SMTP ready\r\n\r\n", "connection", "connection"),
        (b"", "connection", "connection"),
    ],
)
def test_what_goes_wrong_is_named_without_the_key(response, fault, words):
    error = failure(ask(RawServer(response)))
    assert error.fault == fault
    assert words in str(error)
    assert KEY not in "".join(traceback.format_exception(error))
    assert error.retry_after_s == (7.0 if fault == "rate_limit" else None)


def test_no_server_is_a_connection_error():
    async def ask_nobody():
        client = HttpClient("http://127.0.0.1:1/v1", KEY)
        try:
            await client.chat(request())
        finally:
            await client.close()

    error = failure(ask_nobody())
    assert error.fault == "connection"
    assert error.is_retryable


def test_nobody_sees_the_key():
    assert KEY not in repr(HttpClient("http://localhost/v1", KEY))
    error = failure(ask(RawServer(http(json.dumps({"message": f"bad key {KEY}"}).encode(), "401 No"))))
    assert KEY not in str(error)


@pytest.mark.parametrize(
    "response",
    [
        http(sse({"error": {"message": f"Incorrect API key: {KEY}", "code": 401}})),
        http(sse(delta(content="Fi"), {"object": "error", "message": f"Incorrect API key: {KEY}"})),
        http(json.dumps({"error": f"Incorrect API key: {KEY}"}).encode(), kind="application/json"),
        f"{KEY} is no key\r\n\r\n".encode(),
    ],
)
def test_a_key_that_comes_back_inside_an_answer_is_not_passed_on(response):
    error = failure(ask(RawServer(response)))
    assert KEY not in str(error)
    assert "***" in str(error)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://u:p@host/v1", "http://h/?key=1"]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(EngineError, match="base_url must") as caught:
        HttpClient(url)
    assert "u:p" not in str(caught.value)


def test_a_silent_server_and_a_stalled_stream_time_out():
    error = failure(ask(RawServer([], after="stall"), timeouts=SHORT))
    assert (error.fault, str(error)) == ("timeout", "nothing came within 0.1 s")
    error = failure(ask(RawServer(http(FINE[:150], length=500), after="stall"), timeouts=SHORT))
    assert (error.fault, str(error)) == ("timeout", "the stream stalled for 0.1 s")
    assert error.usage is not None
    drops = [http(b"", length=10**6), *([b": still here\n\n"] * 200)]
    error = failure(ask(RawServer(drops), timeouts=Timeouts(total_s=0.1)))
    assert (error.fault, str(error)) == ("timeout", "the answer took longer than 0.1 s")


def test_cancelling_closes_the_connection():
    async def cancel():
        server = RawServer(http(FINE[:50], length=500), after="stall")
        async with server as url:
            client = HttpClient(url)
            task = asyncio.create_task(client.chat(request()))
            while not server.requests:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(server.closed.wait(), 5)
            await client.close()

    asyncio.run(cancel())


def test_half_of_a_surrogate_pair_is_sent_as_a_question_mark():
    server = RawServer(http(FINE))
    asyncio.run(ask(server, request("file \udcff.txt")))
    assert body_of(server)["messages"][0]["content"] == "file ?.txt"


def test_limits_are_told_of_answers_and_errors():
    told = []
    head = "x-ratelimit-remaining-requests: "
    server = RawServer(
        http(FINE, "200 OK", "text/event-stream", head + "3"),
        http(b"{}", "429 No", "application/json", head + "0"),
        after="stay",
    )
    assert failure(ask(server, request(), request(), on_limits=told.append)).fault == "rate_limit"
    assert [limits.requests_left for limits in told] == [3, 0]


def test_a_kimi_model_behind_a_server_without_a_parser():
    raw = (
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:1<|tool_call_argument_begin|>{"city": "Rome"}'
    )
    raw += "<|tool_call_end|><|tool_calls_section_end|>"
    server = RawServer(http(sse(delta(content=raw[:30]), delta(content=raw[30:]), delta("stop"))))
    earlier = ToolCall(id="call_x", name="weather", arguments="{}")
    history = (
        Message(role="user", content="Go."),
        Message(role="assistant", tool_calls=(earlier,)),
        Message(role="tool", content="21", tool_call_id="call_x"),
    )
    (found,) = asyncio.run(ask(server, request(messages=history, tools=(WEATHER,)), dialect=KimiK2()))
    assert body_of(server)["messages"][1]["tool_calls"][0]["id"] == "functions.weather:0"
    assert body_of(server)["messages"][2]["tool_call_id"] == "functions.weather:0"
    assert found.finish_reason == "tool_calls"
    assert found.message.content == ""
    assert [(one.name, one.arguments) for one in found.message.tool_calls] == [("weather", '{"city": "Rome"}')]
    thoughts = RawServer(http(sse(delta("stop", reasoning=raw))))
    (found,) = asyncio.run(ask(thoughts, request(tools=(WEATHER,)), dialect=KimiK2()))
    assert found.message.tool_calls[0].name == "weather"
    orphan = RawServer(http(sse(delta("stop", content=raw[:80]))))
    assert failure(ask(orphan, request(), dialect=KimiK2())).fault == "empty"


def test_calls_of_a_stream_over_the_wire():
    calls = [delta(tool_calls=[call_delta(0, "a", "weather", "")]), delta(tool_calls=[call_delta(0, arguments="{}")])]
    (found,) = asyncio.run(ask(RawServer(http(sse(*calls, delta("tool_calls"))))))
    assert found.message.tool_calls == (ToolCall(id="a", name="weather", arguments="{}"),)


@pytest.mark.parametrize("package", ["orjson", "aiohttp"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=rf"{package}; install it with: pip install 'perilune\[agents\]'"):
        asyncio.run(HttpClient("http://localhost/v1").chat(request()))


def test_an_error_says_what_the_attempt_took():
    error = failure(ask(RawServer(http(sse(delta(content="x" * 400), done=False) + b"data: {\n\n"))))
    assert isinstance(error, EndpointError)
    assert error.usage is not None
    assert error.usage.completion_tokens == 100
