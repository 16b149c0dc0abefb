from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.agents.client.replay import Divergence, RecordedTurn, ReplayClient, RequestHasher, request_hash
from perilune.agents.messages import Message, Sampling
from tests.agents.client.helpers import SEARCH, WEATHER, call, failure, reply, request

messages = st.builds(
    Message,
    role=st.sampled_from(["user", "assistant", "tool"]),
    content=st.text(max_size=8),
    reasoning=st.none() | st.text(max_size=4),
    tool_calls=st.lists(st.builds(call, arguments=st.text(max_size=4)), max_size=2).map(tuple),
)


def test_the_hash_is_that_of_canonical_json():
    asked = request(
        messages=(
            Message(role="user", content="é\ud800"),
            Message(role="assistant", reasoning="", tool_calls=(call(),)),
        ),
        tools=(WEATHER,),
        tool_choice="auto",
        sampling=Sampling(temperature=0.5, stop=("x",), extra_body={"b": 1, "a": 2}),
    )
    value = {
        "model": asked.model,
        "messages": [message.to_dict() for message in asked.messages],
        "tools": list(asked.tools),
        "tool_choice": "auto",
        "sampling": {
            "temperature": 0.5,
            "top_p": None,
            "max_tokens": None,
            "seed": None,
            "stop": ["x"],
            "extra_body": {"a": 2, "b": 1},
        },
    }
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert request_hash(asked) == sha256(text.encode()).hexdigest()


@given(history=st.lists(messages, max_size=6), data=st.data())
def test_a_hasher_gives_the_same_whatever_it_saw(history, data):
    hasher = RequestHasher()
    for _ in range(4):
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(history))] * 2)))
        tools = data.draw(st.sampled_from([(), (WEATHER,), (WEATHER, SEARCH)]))
        asked = request(messages=tuple(history[start:end]), tools=tools, agent_id=data.draw(st.sampled_from("ab")))
        assert hasher.hash(asked) == request_hash(asked)
    hasher.forget("a")
    assert hasher.hash(request(agent_id="a")) == request_hash(request())


def test_a_history_that_was_changed_in_place_is_hashed_anew():
    hasher, history, tools = RequestHasher(), [Message(role="user", content="a")], [WEATHER]
    hasher.hash(request(messages=history, tools=tools))
    history[0], tools[0] = Message(role="user", content="b"), SEARCH
    assert hasher.hash(request(messages=history, tools=tools)) == request_hash(request("b", tools=(SEARCH,)))


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"messages": (Message(role="user", content="b"),)},
        {"messages": ()},
        {"tools": (WEATHER,)},
        {"tool_choice": "none"},
        {"sampling": Sampling(seed=1)},
    ],
)
def test_everything_that_is_sent_counts(other):
    assert request_hash(replace(request("a"), **other)) != request_hash(request("a"))


def test_who_asks_and_how_does_not_count():
    assert request_hash(request("a", agent_id="root/1", turn=4, stream=False)) == request_hash(request("a"))


def test_a_long_history_is_hashed_for_the_price_of_what_is_new():
    history, hasher = [], RequestHasher()
    start = time.process_time()
    for turn in range(400):
        history.append(Message(role="user", content=f"{turn}" + "x" * 5000))
        hasher.hash(request(messages=tuple(history)))
    # 2 MB once take 0.02 s here; from the start each time they would be 400 MB, some seconds.
    assert time.process_time() - start < 1.0


def recorded(asked, **more):
    return RecordedTurn(request_hash=request_hash(asked), reply=reply(f"answer {asked.turn}"), **more)


def ask(client, asked):
    return asyncio.run(client.chat(asked))


def test_turns_are_answered_by_agent_and_turn():
    first, second = request("a"), request("a", "b", turn=1)
    client = ReplayClient({("root", 0): [recorded(first)], ("root", 1): [recorded(second)]})
    assert ask(client, second).message.content == "answer 1"
    assert ask(client, first).message.content == "answer 0"


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"model": "n"}, "model was m, now n"),
        ({"sampling": Sampling(seed=1)}, "sampling was"),
        ({"tools": (WEATHER,)}, "other tools"),
        ({"tool_choice": "none"}, "tool_choice was None, now none"),
        ({"messages": request("a", "c").messages}, r"message 1 \(user\) differs"),
        ({"messages": request("a").messages}, "1 messages where 2 were recorded"),
    ],
)
def test_a_divergence_names_both_requests_and_where_they_part(now, words):
    before = request("a", "b")
    client = ReplayClient({("root", 0): [recorded(before, request=before)]})
    with pytest.raises(Divergence, match=f"agent root, turn 0: {words}") as caught:
        ask(client, replace(before, **now))
    assert caught.value.recorded == before
    assert caught.value.request == replace(before, **now)


def test_a_turn_that_was_not_recorded_diverges():
    with pytest.raises(Divergence, match="agent root/1, turn 2: the recording has no such turn"):
        ask(ReplayClient({}), request(agent_id="root/1", turn=2))
    with pytest.raises(Divergence, match="another request"):
        ask(ReplayClient({("root", 0): [recorded(request("a"))]}), request("b"))


def test_what_failed_fails_again_and_what_came_after_is_answered():
    asked = request("a")
    failed = RecordedTurn(request_hash=request_hash(asked), fault="context_overflow", error="too long")
    client = ReplayClient({("root", 0): [failed, recorded(request("b"))]})
    error = failure(client.chat(asked))
    assert (error.fault, str(error)) == ("context_overflow", "too long")
    assert ask(client, request("b")).message.content == "answer 0"
    with pytest.raises(Divergence, match="no such turn"):
        ask(client, request("b"))


def test_a_shortened_answer_is_the_recorded_request():
    shortened = request("a", sampling=Sampling(max_tokens=7))
    client = ReplayClient({("root", 0): [recorded(shortened, max_tokens=7)]})
    assert ask(client, request("a", sampling=Sampling(max_tokens=90))).message.content == "answer 0"
