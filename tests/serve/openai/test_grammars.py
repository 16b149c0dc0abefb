"""What a request says about the form of its answer reaches the engine as a grammar."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from perilune.engine.requests import TokenGrammar
from perilune.serve.drain import Drain
from perilune.serve.openai import ServerSettings, openai_app
from tests.serve.openai import small
from tests.serve.openai.doubles import END, SPECIALS, TOKENIZER, FakeService, say
from tests.serve.openai.test_chat import CALL, HELLO, PATH, SECTION, added_up, ask, client_of, streamed

pytest.importorskip("llguidance")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
STRICT = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}]


@pytest.fixture(scope="module")
def service() -> FakeService:
    return FakeService()


@pytest.fixture(scope="module")
def client(service: FakeService) -> Any:
    return client_of(service)


def accepts(grammar: TokenGrammar, text: str) -> bool:
    """Whether an answer may be this and end."""
    state = grammar.start()
    for token in [*TOKENIZER.encode(text, parse_specials=True), END]:
        if not state.allowed()[token // 8] >> token % 8 & 1:
            return False
        state.accept(token)
    return True


def grammar_of(client: Any, service: FakeService, **fields: Any) -> TokenGrammar:
    status, found = ask(client, **fields)
    assert status == 200, found
    grammar = service.seen[-1].params.grammar
    assert grammar is not None
    return grammar


TOO_WIDE = {"anyOf": [{"type": "array", "items": {"type": "array", "items": {"enum": [i]}}} for i in range(500)]}


def test_a_schema_that_is_too_complex_midway_is_the_request_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "CACHE_BYTES", 64 << 20)  # the template writes the tools' schemas into the prompt
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": TOO_WIDE}}
    body = {"model": "small", "messages": HELLO, "max_tokens": 20, "seed": 1}
    with TestClient(
        openai_app(small.small_model(context_limit=30_000), settings=ServerSettings(), drain=Drain())
    ) as client:
        with ThreadPoolExecutor() as pool:
            good = pool.submit(client.post, PATH, json={**body, "n": 2})
            bad = client.post(PATH, json={**body, "response_format": form, "n": 2})
            assert good.result().status_code == 200
        error = bad.json()["error"]
        assert (bad.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "grammar_failed")
        assert error["param"] == "response_format"
        assert re.match(r"response_format: no token could be drawn after 1 tokens: the grammar failed: .* max is 2000",
                        error["message"])  # fmt: skip
        text = client.post(PATH, json={**body, "response_format": form, "stream": True}).text
        assert "[DONE]" not in text
        assert json.loads(text.strip().split("data: ")[-1])["error"] == error
        tools = [{"type": "function", "function": {"name": "f", "strict": True,
                  "parameters": {"type": "object", "properties": {"a": TOO_WIDE}, "required": ["a"]}}}]  # fmt: skip
        found = client.post(PATH, json={**body, "max_tokens": 100, "tools": tools, "tool_choice": "required"}).json()
        assert (found["error"]["param"], found["error"]["code"]) == ("tools", "grammar_failed")
        assert client.post(PATH, json=body).status_code == 200
        assert client.get("/health").status_code == 200


def test_json(client: Any, service: FakeService) -> None:
    grammar = grammar_of(client, service, response_format={"type": "json_object"})
    assert accepts(grammar, '{"x": [1, "ö"]}')
    assert not accepts(grammar, "Here you are: {}")
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    grammar = grammar_of(client, service, response_format=form)
    assert accepts(grammar, '{"a": 12}')
    assert not accepts(grammar, '{"a": "12"}')
    grammar = grammar_of(client, service, response_format=form, chat_template_kwargs={"think": True})
    assert accepts(grammar, 'hm</think>{"a": 12}')
    assert not accepts(grammar, '{"a": 12}')


def call(arguments: str, number: int = 0) -> str:
    return SECTION.format(CALL.format(f"functions.f:{number}", arguments))


def test_tools(client: Any, service: FakeService) -> None:
    grammar = grammar_of(client, service, tools=STRICT)
    assert accepts(grammar, "free text")
    assert accepts(grammar, "then " + call('{"a": 1}'))
    assert not accepts(grammar, call('{"b": 1}'))
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        grammar = grammar_of(client, service, tools=STRICT, tool_choice=choice)
        assert accepts(grammar, call('{"a": 1}'))
        assert not accepts(grammar, "free text")
    loose = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    assert accepts(grammar_of(client, service, tools=loose), call('{"b": 1}'))
    assert not accepts(grammar_of(client, service, tools=loose), call("[1]"))


def test_json_or_tools(client: Any, service: FakeService) -> None:
    other = {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"], "additionalProperties": False}
    fields = {
        "tools": STRICT,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": other}},
    }
    grammar = grammar_of(client, service, **fields)
    good = ('{"b": null}', call('{"a": 1}'))
    for text in good:
        assert accepts(grammar, text)
    for text in ('{"a": 1}', call('{"b": null}'), "text", "text" + good[1], good[0] + good[1], good[0] * 2, ""):
        assert not accepts(grammar, text)
    grammar = grammar_of(client, service, **fields, chat_template_kwargs={"think": True})
    for text in good:
        assert accepts(grammar, "hm</think>" + text)
        assert not accepts(grammar, "hm</think>so: " + text)
        assert not accepts(grammar, text)
    grammar = grammar_of(client, service, **fields, tool_choice="required")
    assert [accepts(grammar, text) for text in good] == [False, True]
    grammar = grammar_of(client, service, **fields, tool_choice="none")
    assert [accepts(grammar, text) for text in good] == [True, False]


def test_ids_go_on_counting(client: Any, service: FakeService) -> None:
    asked = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "x", "content": "1"},
    ]
    grammar = grammar_of(client, service, tools=STRICT, messages=history)
    assert accepts(grammar, call('{"a": 1}', 1))
    assert not accepts(grammar, call('{"a": 1}', 0))
    status, found = ask(client, tools=STRICT, messages=[*history[:2], {**history[2], "tool_call_id": "y"}])
    assert (status, found["error"]["param"]) == (400, "messages")


def test_answers_without_tools_cannot_call_any(client: Any, service: FakeService) -> None:
    for fields in ({}, {"tools": STRICT, "tool_choice": "none"}):
        ask(client, **fields)
        params = service.seen[-1].params
        assert SPECIALS["<|tool_calls_section_begin|>"] in params.blocked_ids
        assert params.grammar is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
            "type": "object", "properties": {"a": {"type": "nothing"}}}}}]}, "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}}},
         "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}},
          "tools": STRICT}, "response_format"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_the_clients_error(client: Any, fields: Any, param: str | None) -> None:
    status, found = ask(client, **fields)
    assert status == 400, found
    assert found["error"]["param"] == param


def test_what_shapes_the_distribution(client: Any, service: FakeService) -> None:
    ask(
        client, min_p=0.1, presence_penalty=-1, frequency_penalty=0.5, repetition_penalty=1.2, min_tokens=3,
        logit_bias={"65": -100, "66": 2.5}, ignore_eos=True, logprobs=True, top_logprobs=4, top_k=-1,
    )  # fmt: skip
    found = service.seen[-1].params
    assert (found.min_p, found.presence_penalty, found.frequency_penalty) == (0.1, -1, 0.5)
    assert (found.repetition_penalty, found.min_tokens, found.ignore_eos) == (1.2, 3, True)
    assert found.logit_bias == ((65, -100), (66, 2.5))
    assert (found.top_logprobs, found.top_k) == (4, 0)


def test_a_call_that_is_cut_short_is_told_from_a_whole_one(client: Any, service: FakeService) -> None:
    service.answer = say(call('{"a": 12345}'))
    for most, reason, arguments in ((8, "length", None), (20, "length", '{"a"'), (100, "tool_calls", '{"a": 12345}')):
        _, found = ask(client, tools=STRICT, max_tokens=most)
        choice = found["choices"][0]
        assert choice["finish_reason"] == reason
        calls = choice["message"].get("tool_calls")
        assert arguments is None or calls[0]["function"]["arguments"] == arguments
        assert added_up(streamed(client, tools=STRICT, max_tokens=most))[0]["message"].get("tool_calls") == calls
    service.answer = say("Hello, wörld!")


def test_arguments_are_streamed_while_they_are_written(client: Any, service: FakeService) -> None:
    arguments = json.dumps({"a": "<|tool_call_end|>" * 3})
    text = call(arguments).replace(arguments, "{}")
    service.answer = say(text)
    events = streamed(client, tools=STRICT)
    deltas = [d for event in events for d in event["choices"][0]["delta"].get("tool_calls", ())]
    assert deltas[0]["id"] == "functions.f:0"
    assert [d["function"]["arguments"] for d in deltas[1:]] == ["{", "}"]
    service.answer = say("Hello, wörld!")
