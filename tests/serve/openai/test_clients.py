"""The official client, and bad ones, against a small model on a real engine behind a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")
import openai

from benchmarks.serve_storm import storm
from tests.serve.openai.small import serving_small

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}}
ASK: list[Any] = [{"role": "user", "content": "How far away is the moon, and how long does it take to get there?"}]


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with serving_small() as found:
        yield found


@pytest.fixture(scope="module")
def client(address: tuple[str, int]) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_a_conversation(client: Any) -> None:
    fields: dict[str, Any] = {"model": "small", "messages": ASK, "seed": 3, "max_tokens": 30, "n": 2}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    assert type(whole).model_validate(whole.model_dump()) == whole
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert whole.usage.completion_tokens == 60
    assert len(whole.choices[0].logprobs.content) == 30
    for token in whole.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert token.logprob <= token.top_logprobs[0].logprob
    texts = ["", ""]
    with client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunk.usage.completion_tokens == 60
    more = [*ASK, {"role": "assistant", "content": "Far."}, {"role": "user", "content": "How far?"}]
    usage = client.chat.completions.create(model="small", messages=more, max_tokens=1).usage
    assert 32 <= usage.prompt_tokens_details.cached_tokens <= whole.usage.prompt_tokens < usage.prompt_tokens


def test_json_and_tools(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    fields: dict[str, Any] = {"model": "small", "messages": ASK, "max_tokens": 200}
    found = client.chat.completions.create(**fields, response_format=form).choices[0]
    assert set(json.loads(found.message.content)) == {"a", "b"}
    assert found.finish_reason == "stop"
    found = client.chat.completions.create(**fields, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    (call,) = found.choices[0].message.tool_calls
    assert (call.id, call.function.name) == ("functions.look:0", "look")
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    assert found.choices[0].finish_reason == "tool_calls"
    named = {"type": "function", "function": {"name": "look"}}
    with client.chat.completions.stream(**fields, tools=[TOOL], tool_choice=named, seed=5) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.name == "look"
    assert set(json.loads(final.message.tool_calls[0].function.arguments)) == {"a", "b"}


def test_completions_and_models(client: Any) -> None:
    found = client.completions.create(model="small", prompt=["a", "b"], max_tokens=5, logprobs=2, seed=1)
    assert [len(choice.logprobs.tokens) for choice in found.choices] == [5, 5]
    assert all(len(top) == 2 for top in found.choices[0].logprobs.top_logprobs)
    parts = list(client.completions.create(model="small", prompt="a", max_tokens=5, seed=1, stream=True))
    assert "".join(part.choices[0].text for part in parts) == found.choices[0].text
    (model,) = client.models.list()
    assert client.models.retrieve("small") == model


def test_errors_are_the_clients_classes(client: Any) -> None:
    fields: dict[str, Any] = {"model": "small", "messages": ASK}
    for more, kind, code in (
        ({"temperature": 9.0}, openai.BadRequestError, "invalid_request"),
        ({"model": "gpt"}, openai.NotFoundError, "model_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 700}]}, openai.BadRequestError, "context_length_exceeded"),
    ):
        with pytest.raises(kind) as found:
            client.chat.completions.create(**{**fields, **more})
        assert found.value.code == code
        assert found.value.type in ("invalid_request_error", "not_found_error")


def test_bad_clients_leave_nothing_behind(address: tuple[str, int]) -> None:
    report = asyncio.run(storm(*address, model="small", count=80, seed=1))
    assert report.problems == []
    assert sum(report.statuses.values()) == 80
