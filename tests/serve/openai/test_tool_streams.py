"""What is streamed of tool calls adds up to what is answered whole: a real engine, Kimi K2's tokens and template.

The model is random; grammars make it call, so that every kind of call is written by the engine itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
import jsonschema
from starlette.testclient import TestClient

from perilune.data import ChatTemplate
from perilune.engine import Engine, EngineService
from perilune.models import PRESETS, build_model
from perilune.serve.drain import Drain
from perilune.serve.openai import Grammars, ServerSettings, openai_app
from tests.data.small_tokenizers import kimi
from tests.serve.openai.doubles import served_by
from tests.serve.openai.test_chat import added_up, ask, streamed

TOKENIZER = kimi()
SECTION = TOKENIZER.special_ids["<|tool_calls_section_begin|>"]
PARAMETERS = {
    "type": "object",
    "properties": {"way": {"enum": ["left", "right"]}, "far": {"type": "boolean"}},
    "required": ["way"],
    "additionalProperties": False,
}


def tool(name: str, *, strict: bool) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS, "strict": strict}}


STRICT = [tool("turn", strict=True), tool("look.at-it", strict=True)]
LOOSE = [tool("turn", strict=False)]
NAMED = {"type": "function", "function": {"name": "look.at-it"}}
FORM = {"type": "json_schema", "json_schema": {"name": "way", "schema": PARAMETERS, "strict": True}}
HISTORY = [
    {"role": "user", "content": "Go."},
    {"role": "assistant", "tool_calls": [{"id": "call_x", "type": "function", "function": {
        "name": "turn", "arguments": '{"way": "left"}'}}]},
    {"role": "tool", "tool_call_id": "call_x", "content": "done"},
]  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    config = replace(PRESETS["smoke"], vocab_size=TOKENIZER.vocab_size)
    # Without known prefixes both ways of asking are computed in the same shapes, and so draw the same tokens.
    engine = Engine(build_model(config, seed=0).eval(), context_limit=1000, cache_bytes=8 << 20, prefix_cache=False)
    served = served_by(
        EngineService(engine),
        tokenizer=TOKENIZER,
        template=ChatTemplate.kimi_k2(),
        grammars=Grammars(TOKENIZER),
        context_limit=1000,
        max_answer_tokens=90,
    )
    with TestClient(openai_app(served, settings=ServerSettings(), drain=Drain())) as found:
        yield found


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        pytest.param({"tools": STRICT, "tool_choice": "required", "parallel_tool_calls": False, "n": 2},
                     {"tool_calls"}, id="one call, n"),
        pytest.param({"tools": STRICT, "tool_choice": "required", "n": 2, "max_tokens": 120},
                     {"tool_calls", "length"}, id="parallel calls, n"),
        pytest.param({"tools": STRICT, "tool_choice": NAMED, "n": 2}, {"tool_calls"}, id="named, n"),
        pytest.param({"tools": LOOSE, "tool_choice": "required", "n": 2}, {"tool_calls", "length"}, id="loose, n"),
        pytest.param({"tools": STRICT, "tool_choice": "required", "max_tokens": 30}, {"length"}, id="cut short"),
        pytest.param({"tools": STRICT, "n": 2, "max_tokens": 20}, {"length"}, id="auto"),
        pytest.param({"tools": STRICT, "logit_bias": {str(SECTION): 100.0}, "parallel_tool_calls": False},
                     {"tool_calls"}, id="auto, calling"),
        pytest.param({"tools": STRICT, "response_format": FORM, "logit_bias": {str(SECTION): 100.0},
                      "parallel_tool_calls": False}, {"tool_calls"}, id="JSON or tools: tools"),
        pytest.param({"tools": STRICT, "response_format": FORM, "logit_bias": {str(SECTION): -100.0}, "n": 2},
                     {"stop"}, id="JSON or tools: JSON"),
        pytest.param({"tools": STRICT, "tool_choice": NAMED, "messages": HISTORY, "logprobs": True,
                      "top_logprobs": 1}, {"tool_calls"}, id="named, after another call, logprobs"),
        pytest.param({"tools": STRICT, "tool_choice": "none", "max_tokens": 10}, {"length"}, id="none"),
    ],
)  # fmt: skip
def test_a_stream_adds_up(client: TestClient, fields: dict[str, Any], reasons: set[str]) -> None:
    fields = {**fields, "seed": 1}
    status, whole = ask(client, **fields)
    assert status == 200, whole
    events = streamed(client, **fields, stream_options={"include_usage": True})
    parts = added_up(events)
    assert len(whole["choices"]) == len(parts) == fields.get("n", 1)
    for choice in whole["choices"]:
        part = parts[choice["index"]]
        message = {**part["message"], "content": part["message"]["content"] or choice["message"]["content"]}
        assert message == choice["message"]
        assert part["finish_reason"] == choice["finish_reason"]
        assert choice["finish_reason"] in reasons
        assert part["logprobs"] == (choice["logprobs"] or {"content": []})["content"]
        check(choice, fields)
    assert events[-1]["choices"] == []
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["usage"] == whole["usage"]


def check(choice: dict[str, Any], fields: dict[str, Any]) -> None:
    """Compare a choice with what was asked."""
    content, calls = choice["message"]["content"], choice["message"].get("tool_calls", [])
    is_whole = choice["finish_reason"] != "length"
    if "response_format" in fields and not calls:
        jsonschema.validate(json.loads(content), PARAMETERS)
    elif fields.get("tool_choice", "auto") not in ("auto", "none") or "response_format" in fields:
        assert content is None
        assert calls
    if fields.get("tool_choice") == "none":
        assert not calls
    first = sum(len(message.get("tool_calls", ())) for message in fields.get("messages", ()))
    for place, call in enumerate(calls):
        name = call["function"]["name"]
        assert call["id"] == f"functions.{name}:{first + place}"
        assert name in [tool["function"]["name"] for tool in fields["tools"]]
        assert fields.get("tool_choice") != NAMED or name == "look.at-it"
        if is_whole or place + 1 < len(calls):
            arguments = json.loads(call["function"]["arguments"])
            assert isinstance(arguments, dict)
            if fields["tools"] is STRICT:
                jsonschema.validate(arguments, PARAMETERS)
    if fields.get("parallel_tool_calls") is False:
        assert len(calls) <= 1
