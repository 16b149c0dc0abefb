from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import EngineError
from perilune.serve.drain import Drain
from perilune.serve.openai import ServerSettings, openai_app
from tests.serve.openai.doubles import FakeService, say, served_by

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from fastapi.testclient import TestClient

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in (("get_weather", {"city": {"type": "string"}}), ("add", {"a": {}, "b": {}}))
]
SECTION = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
CALL = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{}<|tool_call_end|>"


def client_of(service: FakeService, *, keys: tuple[str, ...] = (), timeout_s: float = 60, **changes: Any) -> TestClient:
    settings = ServerSettings(keys=keys, timeout_s=timeout_s)
    return TestClient(openai_app(served_by(service, **changes), settings=settings, drain=Drain()))


@pytest.fixture(scope="module")
def service() -> FakeService:
    return FakeService()


@pytest.fixture(scope="module")
def shared(service: FakeService) -> TestClient:
    return client_of(service)


@pytest.fixture
def client(service: FakeService, shared: TestClient) -> Iterator[TestClient]:
    yield shared
    assert not service.open
    service.__init__()


def ask(client: TestClient, **fields: Any) -> tuple[int, Any]:
    response = client.post(PATH, json={"model": "fake", "messages": HELLO, **fields})
    return response.status_code, response.json()


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def streamed(client: TestClient, **fields: Any) -> list[Any]:
    response = client.post(PATH, json={"model": "fake", "messages": HELLO, "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_of(response.text)


def added_up(events: list[Any]) -> dict[int, Any]:
    """What the official client makes of a stream."""
    found: dict[int, Any] = {}
    for event in events:
        for choice in event["choices"]:
            one = found.setdefault(choice["index"], {"message": {"content": ""}, "finish_reason": None, "logprobs": []})
            delta, message = choice["delta"], one["message"]
            assert one["finish_reason"] is None
            for key in ("role", "content", "reasoning_content"):
                if key in delta:
                    message[key] = message.get(key, "") + delta[key]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            one["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            one["finish_reason"] = choice["finish_reason"]
    return found


def test_an_answer(client: TestClient, service: FakeService) -> None:
    service.cached = 3
    status, found = ask(client)
    assert status == 200
    assert found["object"] == "chat.completion"
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello, wörld!"}
    assert choice["finish_reason"] == "stop"
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(service.seen[0].prompt_ids) == len("user:Hello\n")
    assert usage["completion_tokens"] == len("Hello, wörld!".encode()) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}


def test_a_stream(client: TestClient) -> None:
    events = streamed(client, stream_options={"include_usage": True})
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 15
    assert added_up(events)[0]["message"] == {"role": "assistant", "content": "Hello, wörld!"}
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert "usage" not in streamed(client)[-1]


def test_several_answers_and_the_longest(client: TestClient, service: FakeService) -> None:
    status, found = ask(client, n=3, max_tokens=5)
    assert status == 200
    assert [choice["message"]["content"] for choice in found["choices"]] == ["Hello"] * 3
    assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
    assert found["usage"]["completion_tokens"] == 15
    both = added_up(streamed(client, n=2, max_completion_tokens=6))
    assert [both[i]["message"]["content"] for i in range(2)] == ["Hello,"] * 2


def test_sampling_fields_reach_the_engine(client: TestClient, service: FakeService) -> None:
    ask(client, temperature=0, top_p=0.5, top_k=7, seed=-3, max_tokens=9)
    ask(client)
    ask(client)
    named, first, second = (request.params for request in service.seen)
    assert (named.temperature, named.top_p, named.top_k, named.seed, named.max_new_tokens) == (0, 0.5, 7, -3, 9)
    assert first.temperature == 1.0
    assert first.seed != second.seed
    assert first.max_new_tokens == 2000 - len("user:Hello\n")


@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize(
    ("stop", "text"), [("wör", "Hello, "), (["!", "o, w"], "Hell"), ("ld!?", "Hello, wörld!"), ("Hello", "")]
)
def test_stop_strings(client: TestClient, service: FakeService, size: int, stop: Any, text: str) -> None:
    service.size = size
    _, found = ask(client, stop=stop, logprobs=True)
    choice = found["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert b"".join(bytes(one["bytes"]) for one in choice["logprobs"]["content"]).decode() == text
    assert added_up(streamed(client, stop=stop))[0]["message"]["content"] == text


def test_what_met_a_stop_string_is_not_computed_on(client: TestClient, service: FakeService) -> None:
    service.canceled.clear()
    _, found = ask(client, n=2, stop="wör")
    assert [choice["message"]["content"] for choice in found["choices"]] == ["Hello, "] * 2
    assert service.canceled == [0, 1]
    service.canceled.clear()
    ask(client, n=2, stop="never said")
    assert service.canceled == []


def test_log_probabilities(client: TestClient, service: FakeService) -> None:
    _, found = ask(client, logprobs=True, top_logprobs=2)
    content = found["choices"][0]["logprobs"]["content"]
    assert len(content) == len("Hello, wörld!".encode())
    assert content[0]["token"] == "H"
    assert content[0]["bytes"] == [72]
    assert content[0]["logprob"] == -0.5
    assert [one["token"] for one in content[0]["top_logprobs"]] == ["H", "\x00"]
    assert added_up(streamed(client, logprobs=True, top_logprobs=2))[0]["logprobs"] == content


def test_thoughts(client: TestClient, service: FakeService) -> None:
    for text, fields in (
        ("<think>I see.</think>Hi.", {}),
        ("I see.</think>Hi.", {"chat_template_kwargs": {"think": True}}),
    ):
        service.answer = say(text)
        _, found = ask(client, **fields)
        message = found["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Hi.", "reasoning_content": "I see."}
        assert 6 <= found["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 8
        assert added_up(streamed(client, **fields))[0]["message"] == message


def test_tool_calls(client: TestClient, service: FakeService) -> None:
    calls = CALL.format("functions.get_weather:7", '{"city": "Kös<|x|>ln"}') + CALL.format("add:8", "")
    service.answer = say("Let me see." + SECTION.format(calls) + "behind")
    history = [
        *HELLO,
        {
            "role": "assistant",
            "tool_calls": [{"id": "call_a", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_a", "content": "3"},
    ]
    _, found = ask(client, tools=TOOLS, messages=history)
    choice = found["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    assert choice["message"]["tool_calls"] == [
        {
            "id": "functions.get_weather:1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Kös<|x|>ln"}'},
        },
        {"id": "functions.add:2", "type": "function", "function": {"name": "add", "arguments": "{}"}},
    ]
    assert added_up(streamed(client, tools=TOOLS, messages=history))[0]["message"] == choice["message"]
    _, one = ask(client, tools=TOOLS, parallel_tool_calls=False)
    assert len(one["choices"][0]["message"]["tool_calls"]) == 1
    assert one["choices"][0]["message"]["tool_calls"][0]["id"] == "functions.get_weather:0"


def test_calls_that_tell_no_tool_are_none(client: TestClient, service: FakeService) -> None:
    service.answer = say(SECTION.format(CALL.format("3", '{"city": "x"}')))
    _, found = ask(client, tools=TOOLS)
    assert found["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    service.answer = say("well" + SECTION.format(CALL.format("3", '{"zip": "x"}')))
    _, found = ask(client, tools=TOOLS)
    assert found["choices"][0]["message"] == {"role": "assistant", "content": "well"}
    assert found["choices"][0]["finish_reason"] == "stop"


CALLS = [
    CALL.format(name, arguments)
    for name in ("functions.add:0", "add", "1")
    for arguments in ("{}", '{"a": "<|tool_call_end|>"}', "x")
]
WORDS = ["<think>", "</think>", "a", "ö", "\n", " {", '"', "<", "<|tool", CALL, "STOP", "ST", SECTION, "<|im_user|>"]
PARTS = st.sampled_from([*WORDS, *CALLS])


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(PARTS, max_size=8), size=st.integers(1, 12), think=st.booleans(), one=st.booleans())
def test_streams_add_up_to_whole_answers(
    shared: TestClient, service: FakeService, parts: list[str], size: int, think: bool, one: bool
) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "stop": ["STOP"], "logprobs": True, "parallel_tool_calls": not one}
    fields["chat_template_kwargs"] = {"think": think}
    service.__init__(answer=say("".join(parts)), size=10_000)
    _, found = ask(shared, **fields)
    service.size = size
    events = added_up(streamed(shared, **fields))[0]
    whole = found["choices"][0]
    events["message"]["content"] = events["message"]["content"] or whole["message"]["content"]
    assert events["message"] == whole["message"]
    assert events["finish_reason"] == whole["finish_reason"]
    assert events["logprobs"] == whole["logprobs"]["content"]
    service.__init__()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages.0", "needs content"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "text only"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages.0.content", "part 0"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "tool_call_id"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages", "the last message"),
        ({"n": 0}, "n", "greater"),
        ({"n": "2"}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"temperature": 3}, "temperature", "less"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"seed": 2**63}, "seed", "less"),
        ({"stop": [""]}, None, "empty"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less"),
        ({"top_logprobs": 2}, None, "logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less"),
        ({"stream_options": {"include_usage": True}}, None, "stream"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, None, "two functions"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
         "tools.0.function", "object"),
        ({"tool_choice": "required"}, None, "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, None, "no function no"),
        ({"functions": []}, "functions", "None"),
    ],
)  # fmt: skip
def test_bad_requests(client: TestClient, fields: Any, param: str | None, message: str) -> None:
    body = json.dumps({"model": "fake", "messages": HELLO, **fields})
    response = client.post(PATH, content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]


def test_other_errors_have_the_same_form(client: TestClient) -> None:
    status, found = ask(client, model="gpt")
    assert (status, found["error"]["code"], found["error"]["param"]) == (404, "model_not_found", "model")
    for keys in ({"tools": []}, {"messages": 1, "think": True}):
        status, found = ask(client, chat_template_kwargs=keys)
        assert (status, found["error"]["param"]) == (400, "chat_template_kwargs")
    status, found = ask(client, messages=[{"role": "user", "content": "x" * 3000}])
    assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
    assert "3006 tokens" in found["error"]["message"]
    for response, status in (
        (client.get("/v1/nothing"), 404),
        (client.get(PATH), 405),
        (client.post(PATH, content=b"x" * 5_000_000), 413),
        (client.post(PATH, content=b'{"a', headers={"content-type": "application/json"}), 400),
        (client.post(PATH, content=b'{"a": "\xff"}', headers={"content-type": "application/json"}), 400),
        (client.post(PATH, content=b"[" * 100_000, headers={"content-type": "application/json"}), 400),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_fields_and_lists_of_text(client: TestClient, service: FakeService) -> None:
    parts = [{"type": "text", "text": "Hel", "cache_control": 1}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts, "weight": 1}]
    assert ask(client, messages=messages, metadata={"a": 1}, store=False)[0] == 200
    assert bytes(service.seen[0].prompt_ids) == b"system:Be brief\nuser:Hello\n"
    assert ask(client, messages=[{"role": "user", "content": []}])[0] == 200


def test_tools_are_not_shown_to_the_model_with_choice_none(client: TestClient, service: FakeService) -> None:
    ask(client, tools=TOOLS, tool_choice="none")
    ask(client, tools=TOOLS, tool_choice="auto")
    first, second = (bytes(request.prompt_ids) for request in service.seen)
    assert b"get_weather" not in first
    assert b"get_weather" in second


def failing(error: Exception) -> Callable[[Any], Exception]:
    return lambda request: error


def test_a_failing_engine(client: TestClient, service: FakeService) -> None:
    service.answer = failing(EngineError("the model gave non-finite logits"))
    status, found = ask(client)
    assert (status, found["error"]["type"], found["error"]["code"]) == (500, "server_error", "engine_error")
    text = client.post(PATH, json={"model": "fake", "messages": HELLO, "stream": True}).text
    assert "[DONE]" not in text
    assert json.loads(text.strip().split("data: ")[-1])["error"]["type"] == "server_error"
