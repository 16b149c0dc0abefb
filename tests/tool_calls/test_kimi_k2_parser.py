from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perilune.tool_calls.kimi_k2_parser import (
    ARGUMENTS,
    CALL,
    END_CALL,
    END_SECTION,
    END_THINK,
    SECTION,
    THINK,
    Delta,
    KimiK2Parser,
    RawCall,
    parse,
)

MARKERS = (THINK, END_THINK, SECTION, END_SECTION, CALL, ARGUMENTS, END_CALL, "<|tool_call_section_begin|>")


def written(call_id, arguments):
    return f"{CALL}{call_id}{ARGUMENTS}{arguments}{END_CALL}"


def feed(pieces, **options):
    """Return the events with neighboring deltas joined, and the result."""
    parser, events = KimiK2Parser(**options), []
    for piece in pieces:
        events += parser.feed(piece)
    last, parsed = parser.finish()
    joined = []
    for event in [*events, *last]:
        before = joined[-1] if joined else None
        if isinstance(event, Delta) and isinstance(before, Delta) and before.kind == event.kind:
            joined[-1] = Delta(event.kind, before.text + event.text)
        else:
            joined.append(event)
    return joined, parsed


def calls(text, **options):
    return [(call.id, call.arguments) for call in parse(text, **options).calls]


# Whole answers, broken ones, and whatever the markers' own characters can make.
arguments = st.one_of(
    st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers(), max_size=3).map(json.dumps),
    st.sampled_from(MARKERS).map(lambda marker: json.dumps({"a": f'x{marker}"\\y'})),
    st.sampled_from(['{"a": "b', "{", "", '"', "\\", '{"a": "\\', '{"a": <|}', " {}\n"]),
)
ids = st.sampled_from(["functions.a:0", "b.c-d_e:12", " \nfunctions.a:1 ", "3", "call_ab12", "", "<"])
pieces_of_answers = st.one_of(
    st.sampled_from(MARKERS),
    st.builds(written, ids, arguments),
    st.text(alphabet='<|>_"\\ abeginthkosl/', max_size=12),
    st.sampled_from(["<b>1 < 2</b>", "<|tool", "<|im_end|>", '"', "\n"]),
    arguments,
)
answers = st.lists(pieces_of_answers, max_size=10).map("".join)


@given(text=answers, starts_in_think=st.booleans(), data=st.data())
@example(
    text=SECTION + written("functions.a:0", '{"a": "' + END_CALL) + written("b:1", "{}"),
    starts_in_think=False,
    data=None,
)
def test_calls_and_content_do_not_depend_on_the_cuts(text, starts_in_think, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=15))) if data else range(len(text))
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    whole = feed([text], starts_in_think=starts_in_think)
    assert feed(pieces, starts_in_think=starts_in_think) == whole
    assert feed(text, starts_in_think=starts_in_think) == whole
    assert parse(text, starts_in_think=starts_in_think) == whole[1]


@given(text=answers)
def test_events_hold_what_the_result_holds(text):
    events, parsed = feed(text)
    for kind, whole in (("content", parsed.content), ("reasoning", parsed.reasoning or "")):
        assert "".join(event.text for event in events if isinstance(event, Delta) and event.kind == kind) == whole
    assert tuple(event for event in events if isinstance(event, RawCall)) == parsed.calls


@given(
    thought=st.none() | st.text(alphabet="ab<|/ ", max_size=9),
    content=st.text(alphabet="ab<|> \n", max_size=9),
    given_calls=st.lists(
        st.dictionaries(st.text(max_size=4), st.sampled_from(MARKERS) | st.text(max_size=9)), max_size=3
    ),
)
def test_what_a_model_writes_well_is_read_back(thought, content, given_calls):
    expected = [(f"functions.f:{place}", json.dumps(one)) for place, one in enumerate(given_calls)]
    section = SECTION + "".join(written(*one) for one in expected) + END_SECTION if expected else ""
    parsed = parse(("" if thought is None else f"{THINK}{thought}{END_THINK}") + content + section)
    assert (parsed.reasoning, parsed.content, parsed.orphans, parsed.trailing) == (thought, content, (), "")
    assert [(call.id, call.arguments) for call in parsed.calls] == expected


@given(text=st.lists(st.sampled_from(MARKERS) | st.text(alphabet="<|/tool", max_size=5), max_size=5).map("".join))
def test_nothing_is_held_back_but_what_may_become_a_marker(text):
    parser, given_on = KimiK2Parser(), ""
    for count in range(1, len(text) + 1):
        given_on += "".join(event.text for event in parser.feed(text[count - 1]) if isinstance(event, Delta))
        held = text[len(given_on) : count]
        if held in MARKERS:
            return
        assert not held or any(marker.startswith(held) for marker in MARKERS)


def test_only_the_beginning_of_a_marker_is_held_back():
    parser = KimiK2Parser()
    assert parser.feed("1 <") == [Delta("content", "1 ")]
    assert parser.feed(" 2 <|tool_") == [Delta("content", "< 2 ")]
    assert parser.feed("box|>") == [Delta("content", "<|tool_box|>")]
    assert parser.feed(SECTION[:-1]) == []
    assert parser.finish() == ([Delta("content", SECTION[:-1])], parse("1 < 2 <|tool_box|>" + SECTION[:-1]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SECTION + written("functions.a:0", "{}"), [("functions.a:0", "{}")]),
        (SECTION + written(" \nfunctions.a:0\n", "\n {} ") + "\n" + END_SECTION, [("functions.a:0", "{}")]),
        (SECTION + f"{CALL}functions.a:0{ARGUMENTS}" + "{" + written("b:1", "{}") + END_SECTION, [("b:1", "{}")]),
        (SECTION + f"{CALL}functions.a:0" + written("b:1", "{}") + END_SECTION, [("b:1", "{}")]),
        (SECTION + f"{CALL}functions.a:0{ARGUMENTS}" + "{}" + END_SECTION, []),
        (SECTION + f"{CALL}functions.a:0{ARGUMENTS}" + "{}", []),
        (SECTION + f"{CALL}functions.a:0{END_CALL}" + END_SECTION, []),
        (written("a:0", "{}"), [("a:0", "{}")]),
        ("<|tool_call_section_begin|>" + written("a:0", "{}") + "<|tool_call_section_end|>", [("a:0", "{}")]),
        (SECTION + written("a:0", '{"x": 1 < 2, <| }'), [("a:0", '{"x": 1 < 2, <| }')]),
        (2 * (SECTION + written("a:0", "{}") + END_SECTION), [("a:0", "{}"), ("a:0", "{}")]),
        (SECTION + written("a:0", '{"x') + written("b:1", '{"y": 2}'), [("a:0", '{"x'), ("b:1", '{"y": 2}')]),
        (SECTION + written("a:0", '{"x') + written("b:1", '{"y": ""}'), [("a:0", '{"x'), ("b:1", '{"y": ""}')]),
    ],
    ids=[
        "no end of the section",
        "white space",
        "orphan",
        "orphan without arguments",
        "not closed by the section's end",
        "not closed at all",
        "no arguments",
        "no section",
        "other spelling",
        "less-than signs",
        "two sections",
        "a string that is never closed",
        "a string that a later call closes",
    ],
)
def test_calls_that_are_out_of_order(text, expected):
    assert calls(text) == expected


def test_text_around_calls_is_told_apart():
    parsed = parse(f"Let me see.{SECTION} so {written('a:0', '{}')}{END_SECTION} done {END_THINK}")
    assert (parsed.content, parsed.trailing, parsed.orphans) == ("Let me see.", f" so  done {END_THINK}", ())
    assert parse(f"{SECTION}{CALL}a:0{ARGUMENTS}{{").orphans == ("a:0{",)


def test_a_thought_ends_with_its_marker_or_with_a_section():
    assert parse(f"{THINK}hm{END_THINK}Yes").reasoning == "hm"
    parsed = parse(f"hm{SECTION}{written('a:0', '{}')}{END_SECTION}", starts_in_think=True)
    assert (parsed.reasoning, parsed.content, len(parsed.calls)) == ("hm", "", 1)
    assert parse(f"Use {THINK} and {END_THINK}").content == f"Use {THINK} and {END_THINK}"
    assert parse(f"{THINK}a{END_THINK}{THINK}b").content == f"{THINK}b"
    assert parse("no thought").reasoning is None


MEGABYTE = 1 << 20
LONG = {
    "one string": '{"a": "' + MEGABYTE * "x" + '"}',
    "quotes and backslashes": json.dumps({"a": '\\"' * (MEGABYTE // 4)}),
    "short strings": json.dumps(["a"] * (MEGABYTE // 5)),
    "less-than signs": MEGABYTE * "<",
    "markers in a string": '{"a": "' + (MEGABYTE // 16) * END_CALL + '"}',
    "strings never closed": (MEGABYTE // 80) * ('{"a' + END_CALL + CALL + "f:0" + ARGUMENTS),
}


def seconds(text, size):
    """Time to read a text in pieces of a size."""
    start = time.process_time()
    parser = KimiK2Parser()
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    parser.finish()
    return time.process_time() - start


@pytest.mark.parametrize("name", LONG)
def test_a_call_of_a_megabyte_takes_linear_time(name):
    text = SECTION + written("functions.a:0", LONG[name]) + END_SECTION
    # Half of it in single characters takes 0.7 s here, the whole at once 1 s at most. Reading anew what was read with
    # every character would take minutes, and adding up strings ten seconds and more.
    assert seconds(text[: len(text) // 2], 1) < 8
    assert seconds(text, len(text)) < 8
