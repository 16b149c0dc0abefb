"""Pictures of results, for servers that take text alone from tools."""

from __future__ import annotations

import asyncio
import json

import pytest

from perilune.agents.client import HttpClient, OpenAiSdkClient
from perilune.agents.client.body import to_body
from perilune.agents.client.pictures import pictures_from_user
from perilune.agents.messages import Message
from tests.agents.client.helpers import RawServer, call, delta, http, request, sse

RED, GREEN, BLUE = (f"data:image/png;base64,{name}" for name in ("cmVk", "Z3JlZW4=", "Ymx1ZQ=="))
HISTORY = (
    Message(role="user", content="look"),
    Message(role="assistant", tool_calls=(call(call_id="a"), call(call_id="b"), call(call_id="c"))),
    Message(role="tool", content="two", tool_call_id="a", images=(RED, GREEN)),
    Message(role="tool", content="none", tool_call_id="b"),
    Message(role="tool", tool_call_id="c", images=(BLUE,)),
    Message(role="user", content="hurry"),
    Message(role="assistant", tool_calls=(call(call_id="d"),)),
    Message(role="tool", content="one", tool_call_id="d", images=(RED,)),
)


def test_pictures_follow_the_results_of_their_turn_in_a_persons_message() -> None:
    found = list(pictures_from_user(HISTORY))
    assert [m.role for m in found] == ["user", "assistant", *["tool"] * 3, "user", "user", "assistant", "tool", "user"]
    assert [m.images for m in found if m.images] == [(RED, GREEN, BLUE), (RED,)]
    assert found[5].content == "[Pictures of the results above, in order: 2 of a, 1 of c]"
    assert [m.content for m in found if m.role == "tool"] == ["two", "none", "[pictures]", "one"]
    assert list(pictures_from_user(HISTORY[:2])) == list(HISTORY[:2])


def test_they_stay_with_their_results_unless_that_is_said() -> None:
    sent = to_body(request(messages=HISTORY))["messages"]
    assert len(sent) == len(HISTORY)
    assert [part["type"] for part in sent[2]["content"]] == ["text", "image_url", "image_url"]


@pytest.mark.parametrize("kind", [HttpClient, OpenAiSdkClient])
def test_both_clients_send_what_their_server_takes(kind: type[HttpClient | OpenAiSdkClient]) -> None:
    if kind is OpenAiSdkClient:
        pytest.importorskip("openai")
    server = RawServer(http(sse(delta(content="fine"), delta("stop"))))

    async def act() -> None:
        async with server as url:
            client = kind(url, tool_images="user")
            try:
                await client.chat(request(messages=HISTORY))
            finally:
                await client.close()

    asyncio.run(act())
    sent = json.loads(server.requests[0][1])["messages"]
    assert all(isinstance(message["content"], str) for message in sent if message["role"] == "tool")
    assert sent[-1]["content"][1]["image_url"]["url"] == RED
