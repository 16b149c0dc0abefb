from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.tool_calls import (
    MARKERS,
    CallDelta,
    Delta,
    KimiK2Parser,
    KimiK2Stream,
    RawCall,
    ToolCall,
    name_in_id,
    parse,
    render_calls,
    resolve,
)
from tests.agents.client.helpers import SEARCH, WEATHER, call
from tests.tool_calls.test_kimi_k2_parser import ARGUMENTS, CALL, END_CALL, END_SECTION, SECTION, answers, written

TOOLS = (WEATHER, SEARCH)


def test_rendered_calls_are_read_back():
    calls = (
        call(call_id="functions.weather:0"),
        call("web.search-all", '{"queries": []}', "functions.web.search-all:1"),
    )
    assert tuple(resolve(one, TOOLS) for one in parse(render_calls(calls)).calls) == calls
    assert render_calls([]) == ""


@pytest.mark.parametrize(
    ("call_id", "arguments", "expected"),
    [
        ("functions.weather:0", "{}", ("weather", "{}")),
        ("functions.weather:0", "", ("weather", "{}")),
        ("weather:12", "{}", ("weather", "{}")),
        ("functions.web.search-all:3", "{}", ("web.search-all", "{}")),
        ("functions.a:1:2", "{", ("a:1", "{")),
        ("functions.weather : 0", "{}", ("weather", "{}")),
        ("functions.weather", "{}", ("weather", "{}")),
        ("weather", "{}", ("weather", "{}")),
        ("functions.nothing:0", "{}", ("nothing", "{}")),
        ("3", '{"city": "Rome"}', ("weather", '{"city": "Rome"}')),
        ("3", '{"queries": [], "city": 1}', None),
        ("3", '{"other": 1}', None),
        ("3", "{broken", None),
        ("call_ab12", '{"name": "weather", "arguments": {"city": "Rome"}}', ("weather", '{"city": "Rome"}')),
        ("call_ab12", '{"name": "weather", "parameters": "{}"}', ("weather", "{}")),
        ("call_ab12", '{"name": "weather", "city": "Rome"}', ("weather", '{"city": "Rome"}')),
        ("call_ab12", '{"name": "nothing"}', None),
        ("call_ab12", '{"city": "Rome"}', ("weather", '{"city": "Rome"}')),
        ("", '{"city": "Rome"}', ("weather", '{"city": "Rome"}')),
        ("", "{}", None),
    ],
)
def test_the_tool_of_a_call_is_found_or_the_call_rejected(call_id, arguments, expected):
    found = resolve(RawCall(call_id, arguments), TOOLS)
    assert found == (expected and ToolCall(id=call_id, name=expected[0], arguments=expected[1]))


def test_a_bare_count_finds_a_tool_without_parameters():
    ping = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}
    assert resolve(RawCall("0", "{}"), (*TOOLS, ping)).name == "ping"
    assert resolve(RawCall("0", "{}")) is None


def test_names_in_ids():
    assert name_in_id("functions.a-b.c:0") == "a-b.c"
    assert [name_in_id(one) for one in ("a", "3", ":3", "", "call_1")] == [None] * 5


def cut_up(text):
    """Text and markers apart, as tokens come."""
    import re

    return [piece for piece in re.split("(" + "|".join(map(re.escape, MARKERS)) + ")", text) if piece]


def by_token(text, sizes=(10**6,), **options):
    """The pieces of an answer whose markers are tokens, and the whole of it."""
    stream, deltas = KimiK2Stream(TOOLS, by_token=True, **options), []
    for piece in cut_up(text):
        if piece in MARKERS:
            deltas += stream.feed_marker(piece)
            continue
        start, turn = 0, 0
        while start < len(piece):
            deltas += stream.feed(piece[start : start + sizes[turn % len(sizes)]])
            start, turn = start + sizes[turn % len(sizes)], turn + 1
    last, answer = stream.finish()
    return deltas + last, answer


def added_up(deltas):
    """What a client makes of the pieces."""
    texts, calls = {"content": "", "reasoning": ""}, []
    for delta in deltas:
        if isinstance(delta, Delta):
            texts[delta.kind] += delta.text
        elif delta.id is not None:
            assert delta.index == len(calls)
            assert delta.arguments == ""
            calls.append(ToolCall(id=delta.id, name=delta.name, arguments=""))
        else:
            assert (delta.index, delta.name) == (len(calls) - 1, None)
            calls[-1] = ToolCall(id=calls[-1].id, name=calls[-1].name, arguments=calls[-1].arguments + delta.arguments)
    return texts["content"], texts["reasoning"], tuple(calls)


@given(answers, st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_pieces_add_up_to_the_whole_however_they_are_cut(text, sizes, starts_in_think):
    deltas, answer = by_token(text, sizes, starts_in_think=starts_in_think)
    assert added_up(deltas) == (answer.content, answer.reasoning or "", answer.calls)
    assert by_token(text, starts_in_think=starts_in_think)[1] == answer
    assert [one.id for one in answer.calls] == [
        f"functions.{one.name}:{place}" for place, one in enumerate(answer.calls)
    ]


@given(answers, st.data())
def test_markers_in_text_give_the_same_pieces_however_they_are_cut(text, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=9)))
    streams = KimiK2Stream(TOOLS), KimiK2Stream(TOOLS)
    deltas = [delta for start, end in pairwise([0, *cuts, len(text)]) for delta in streams[0].feed(text[start:end])]
    streams[1].feed(text)
    last, answer = streams[0].finish()
    assert added_up(deltas + last) == (answer.content, answer.reasoning or "", answer.calls)
    assert streams[1].finish()[1] == answer
    assert all(answer.is_complete)
    accepted = [one for one in (resolve(one, TOOLS) for one in parse(text).calls) if one]
    assert [(one.name, one.arguments) for one in answer.calls] == [(one.name, one.arguments) for one in accepted]


def test_a_call_is_streamed_while_it_is_written():
    stream = KimiK2Stream(TOOLS, by_token=True, first_call=4)
    for marker in (SECTION, CALL):
        assert stream.feed_marker(marker) == []
    assert stream.feed("functions.weather:0") == []
    assert stream.feed_marker(ARGUMENTS) == [CallDelta(index=0, id="functions.weather:4", name="weather")]
    assert stream.feed(' {"city"') == [CallDelta(index=0, arguments='{"city"')]
    assert stream.feed(": ") == [CallDelta(index=0, arguments=":")]
    assert stream.feed(f'"{END_CALL}"}} \n') == [CallDelta(index=0, arguments=f' "{END_CALL}"}}')]
    assert stream.feed_marker(END_CALL) == []
    for marker in (CALL, ARGUMENTS, END_CALL, CALL, ARGUMENTS):
        stream.feed_marker(marker)
    assert stream.feed('{"queries": []}') == []
    assert stream.feed_marker(END_CALL) == [
        CallDelta(index=1, id="functions.web.search-all:5", name="web.search-all"),
        CallDelta(index=1, arguments='{"queries": []}'),
    ]
    last, answer = stream.finish()
    assert last == []
    assert answer.calls[0].arguments == f'{{"city": "{END_CALL}"}}'
    assert answer.is_complete == (True, True)
    assert answer.rejected == (RawCall("", ""),)


def test_a_call_that_was_cut_short_is_given_as_far_as_it_goes():
    deltas, answer = by_token(SECTION + written("weather:0", "") + f'{CALL}weather:1{ARGUMENTS}{{"city')
    assert [(one.arguments, done) for one, done in zip(answer.calls, answer.is_complete, strict=True)] == [
        ("{}", True),
        ('{"city', False),
    ]
    assert added_up(deltas)[2] == answer.calls
    text = KimiK2Stream(TOOLS)
    assert text.feed(f'{SECTION}{CALL}weather:1{ARGUMENTS}{{"city') == []
    assert text.finish()[1].calls == ()


def test_text_that_looks_like_a_marker_is_text_where_markers_are_tokens():
    stream = KimiK2Stream(by_token=True)
    assert stream.feed(SECTION + END_SECTION) == [Delta("content", SECTION + END_SECTION)]
    with pytest.raises(ValueError, match="markers must be one of"):
        stream.feed_marker("<|im_end|>")
    with pytest.raises(ValueError, match="come by token"):
        KimiK2Parser().feed_marker(CALL)
