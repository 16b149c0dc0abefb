from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.agents.client.base import EndpointError
from perilune.agents.client.stream import AnswerReader
from perilune.agents.messages import Message, estimate_tokens
from tests.agents.client.helpers import call_delta, delta, outcome, request, sse

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 9,
    "completion_tokens_details": {"reasoning_tokens": 4},
    "prompt_tokens_details": {"cached_tokens": 3},
}


def finish(reader, **more):
    return reader.finish(request(), first_token_s=0.1, total_s=0.2, **more)


def read(*pieces, **more):
    reader = AnswerReader()
    for piece in pieces:
        reader.feed(piece)
    return finish(reader, **more)


def read_body(message, finish_reason="stop", **more):
    reader = AnswerReader()
    reader.add({"model": "m-1", "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], **more})
    return finish(reader)


def fault_of(ask):
    with pytest.raises(EndpointError) as caught:
        ask()
    return caught.value.fault


STREAMS = {
    "text": sse(
        delta(role="assistant", content=""),
        delta(reasoning_content="Hm"),
        delta(reasoning_content=", ünd?"),
        delta(content="Lis"),
        delta(content="bon 🌤."),
        delta("stop"),
        {"choices": [], "usage": USAGE},
    ),
    "calls": sse(
        delta(content="Let me see. "),
        delta(tool_calls=[call_delta(0, "a", "weather", "")]),
        delta(tool_calls=[call_delta(0, arguments='{"city": ')]),
        delta(tool_calls=[call_delta(1, "b", "weather", '{"city":')]),
        delta(tool_calls=[call_delta(0, arguments='"Lisbon"}'), call_delta(1, arguments=' "Rome"}')]),
        delta("tool_calls"),
        newline="\r\n",
    ),
    "no [DONE]": sse(delta(content="Fine."), delta("stop"), done=False),
    "comments": b": hello\n\nevent: message\nid: 1\n" + sse(delta("stop", content="Fine.")),
    "two data lines": b'data: {"choices": [{"delta": {"content": "Fine."},\ndata:  "finish_reason": "stop"}]}\n\n',
    "broken": sse(delta(content="Fi"), done=False) + b"data: {nonsense\n\n" + sse(delta("stop")),
    "error": sse(delta(content="Fi"), {"error": {"message": "engine died", "code": 500}}),
    "cut": sse(delta(content="Fi"), delta(content="ne."), done=False),
    "empty": sse(delta("tool_calls")),
}


def test_text_thoughts_and_usage_of_a_stream_are_put_together():
    found = read(STREAMS["text"])
    assert found.message == Message(role="assistant", content="Lisbon 🌤.", reasoning="Hm, ünd?")
    assert (found.finish_reason, found.model) == ("stop", "m-1")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (7, 9)
    assert (found.usage.reasoning_tokens, found.usage.cached_tokens, found.usage.is_estimated) == (4, 3, False)


def test_calls_are_put_together_by_index():
    found = read(STREAMS["calls"])
    assert [(one.id, one.name, one.arguments) for one in found.message.tool_calls] == [
        ("a", "weather", '{"city": "Lisbon"}'),
        ("b", "weather", '{"city": "Rome"}'),
    ]
    assert found.message.content == "Let me see. "
    assert found.usage.is_estimated
    assert found.usage.completion_tokens > 0


@pytest.mark.parametrize("name", STREAMS)
@given(data=st.data())
def test_the_outcome_is_the_same_however_the_bytes_are_cut(name, data):
    stream = STREAMS[name]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=12)))
    pieces = [stream[start:end] for start, end in pairwise([0, *cuts, len(stream)])]
    assert outcome(lambda: read(*pieces)) == outcome(lambda: read(stream))


@pytest.mark.parametrize("name", STREAMS)
def test_the_outcome_is_the_same_byte_by_byte(name):
    stream = STREAMS[name]
    assert outcome(lambda: read(*(stream[at : at + 1] for at in range(len(stream))))) == outcome(lambda: read(stream))


@pytest.mark.parametrize("name", ["text", "calls", "no [DONE]"])
def test_a_stream_cut_before_its_finish_is_never_an_answer(name):
    stream = STREAMS[name]
    whole = read(stream)
    end = stream.index(b"}", stream.index(whole.finish_reason.encode(), stream.index(b'reason": "'))) + 3
    assert json.loads(stream[:end].splitlines()[-1].removeprefix(b"data: "))["choices"][0]["finish_reason"]
    for cut in range(end):
        assert fault_of(lambda cut=cut: read(stream[:cut])) == "truncated", cut
    for cut in range(end, len(stream)):
        assert read(stream[:cut]).message == whole.message
    done = stream.find(b"[DONE]") + len(b"[DONE]")
    for cut in range(end, done if done > end else len(stream)):
        assert fault_of(lambda cut=cut: read(stream[:cut], needs_done=True)) == "truncated", cut


def test_nothing_after_done_counts():
    assert read(STREAMS["text"] + sse(delta(content=" More."))).message.content == "Lisbon 🌤."


def test_a_whole_body_reads_like_a_stream():
    arguments = '{"city": "Lisbon"}'
    calls = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
    found = read_body(
        {"content": None, "reasoning": "Hm", "tool_calls": calls}, "tool_calls", usage={**USAGE, "cached_tokens": 2}
    )
    assert found.message.reasoning == "Hm"
    assert found.message.tool_calls[0].arguments == arguments
    assert found.usage.cached_tokens == 3


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        ([[call_delta(None, "a", "f", "{")], [call_delta(None, "a", None, "}")]], [("a", "f", "{}")]),
        ([[call_delta(None, "a", "f", "{")], [call_delta(None, None, None, "}")]], [("a", "f", "{}")]),
        (
            [[call_delta(None, "a", "f", "{}")], [call_delta(None, "b", "g", "{")], [call_delta(None, "b", None, "}")]],
            [("a", "f", "{}"), ("b", "g", "{}")],
        ),
        (
            [
                [call_delta(None, None, "f", "{"), call_delta(None, None, "g", "[")],
                [call_delta(None, None, None, "}"), call_delta(None, None, None, "]")],
            ],
            [("call_0", "f", "{}"), ("call_1", "g", "[]")],
        ),
        ([[call_delta(0, "a", "f", "{}")], [call_delta(0, "b", "g", "{}")]], [("a", "f", "{}"), ("b", "g", "{}")]),
        ([[call_delta(0, "a", "f", "{")], [call_delta(0, "a", "f", "}")]], [("a", "f", "{}")]),
        ([[call_delta(3, "a", "f", {"x": 1})]], [("a", "f", '{"x": 1}')]),
        ([[call_delta(0, "a", "f", "{}"), call_delta(1, "a", "g", "{}")]], [("a", "f", "{}"), ("a_1_1", "g", "{}")]),
    ],
    ids=["by id", "by order", "two by id", "two by order", "all numbered 0", "repeated", "an object", "one id twice"],
)
def test_calls_without_a_proper_index_are_kept_apart(deltas, expected):
    found = read(sse(*(delta(tool_calls=calls) for calls in deltas), delta("tool_calls")))
    assert [(one.id, one.name, one.arguments) for one in found.message.tool_calls] == expected


@pytest.mark.parametrize(
    ("stream", "fault"),
    [
        (STREAMS["broken"], "malformed"),
        (STREAMS["error"], "server"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "malformed"),
        (b"data: 17\n\n", "malformed"),
        (sse({"choices": [17]}), "malformed"),
        (sse({"choices": [{"delta": {"content": [1]}}]}), "malformed"),
        (sse(delta("stop", tool_calls=[call_delta(0, "a", "f"), call_delta(1, "b")])), "malformed"),
        (sse({"error": {"message": "prompt is too long"}}), "context_overflow"),
        (sse({"object": "error", "message": "busy", "code": 429}), "rate_limit"),
        (b"", "truncated"),
        (sse(), "truncated"),
        (sse(delta("tool_calls", content="I shall look.")), "empty"),
        (sse(delta("tool_calls")), "empty"),
        (sse(delta("stop", content=" \n")), "empty"),
        (sse(delta("stop", reasoning="Hm")), "empty"),
        (sse(delta("length", reasoning="Hm")), "empty"),
        (sse(delta("stop", tool_calls=[call_delta(0, "a", None, "{}")])), "empty"),
        (sse(delta("content_filter", content="I")), "refused"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(stream, fault):
    assert fault_of(lambda: read(stream)) == fault


def test_a_missing_call_is_told_from_other_empty_answers():
    with pytest.raises(EndpointError) as caught:
        read(sse(delta("tool_calls")))
    assert caught.value.finish_reason == "tool_calls"
    with pytest.raises(EndpointError) as caught:
        read(sse(delta("stop", reasoning="Hm")))
    assert caught.value.finish_reason == "stop"
    assert caught.value.usage is not None


def test_an_answer_that_broke_off_is_counted():
    with pytest.raises(EndpointError) as caught:
        read(sse(delta(content="x" * 400), done=False))
    assert caught.value.usage is not None
    assert caught.value.usage.completion_tokens == 100


def test_usage_beside_a_choice_counts_and_nonsense_does_not():
    inner = {"choices": [{"delta": {"content": "Fine."}, "finish_reason": "stop", "usage": USAGE}]}
    assert read(sse(inner)).usage.prompt_tokens == 7
    below, endless = {**USAGE, "prompt_tokens": -5}, {**USAGE, "completion_tokens": float("inf")}
    for usage in ({"prompt_tokens": "many", "completion_tokens": 1}, {"total_tokens": 5}, [1], below, endless):
        assert read(sse({**delta("stop", content="Fine."), "usage": usage})).usage.is_estimated
    more = {**USAGE, "prompt_tokens_details": {"cached_tokens": 900}}
    assert read(sse({**delta("stop", content="Fine."), "usage": more})).usage.cached_tokens == 7


def test_a_refusal_is_text():
    assert read_body({"content": None, "refusal": "I had rather not."}).message.content == "I had rather not."


def test_estimates_follow_the_bytes():
    assert [estimate_tokens(text) for text in ("", "abc", "abcde", "月之暗面", "\ud800")] == [0, 1, 2, 3, 1]
