from __future__ import annotations

from perilune.agents.client.dialects.kimi_k2 import KimiK2, with_kimi_ids
from perilune.agents.messages import Message
from perilune.tool_calls import render_calls
from tests.agents.client.helpers import SEARCH, WEATHER, call, request

TOOLS = (WEATHER, SEARCH)


def assistant(*calls, content="", reasoning=None):
    return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=calls)


def result(call_id, content="ok"):
    return Message(role="tool", content=content, tool_call_id=call_id)


def test_ids_are_counted_over_the_whole_conversation():
    history = (
        Message(role="user", content="Go."),
        assistant(call("weather", call_id="call_x"), call("web.search-all", call_id="call_y")),
        result("call_y"),
        result("call_x"),
        assistant(call("weather", call_id="weather:0")),
        result("weather:0"),
    )
    written, originals = with_kimi_ids(history)
    assert [one.id for message in written for one in message.tool_calls] == [
        "functions.weather:0",
        "functions.web.search-all:1",
        "functions.weather:2",
    ]
    assert [message.tool_call_id for message in written if message.role == "tool"] == [
        "functions.web.search-all:1",
        "functions.weather:0",
        "functions.weather:2",
    ]
    assert originals == {
        "functions.weather:0": "call_x",
        "functions.web.search-all:1": "call_y",
        "functions.weather:2": "weather:0",
    }
    assert with_kimi_ids(written)[0] == written
    assert written[0] is history[0]


def test_an_id_used_again_belongs_to_the_latest_call():
    turn = (assistant(call("weather", call_id="call_0")), result("call_0"))
    written, originals = with_kimi_ids(turn * 2)
    assert [message.tool_call_id for message in written] == [None, "functions.weather:0", None, "functions.weather:1"]
    assert set(originals.values()) == {"call_0"}


def test_a_result_without_a_call_keeps_its_id():
    assert with_kimi_ids([result("call_9")])[0][0].tool_call_id == "call_9"


def test_an_answer_in_raw_text_becomes_a_message():
    calls = (call(call_id="functions.weather:0"),)
    text = f"<think>Hm</think>Let me see.{render_calls(calls)}"
    found = KimiK2().incoming(assistant(content=text), request(tools=TOOLS))
    assert found == assistant(*calls, content="Let me see.", reasoning="Hm")
    found = KimiK2(starts_in_think=True).incoming(assistant(content=text[7:]), request(tools=TOOLS))
    assert found == assistant(*calls, content="Let me see.", reasoning="Hm")


def test_calls_that_a_server_took_for_thoughts_are_found():
    calls = (call(call_id="functions.weather:0"),)
    found = KimiK2().incoming(assistant(reasoning="Hm" + render_calls(calls)), request(tools=TOOLS))
    assert found == assistant(*calls, reasoning="Hm")


def test_a_call_of_no_known_tool_is_called_by_its_id():
    found = KimiK2().incoming(assistant(content=render_calls([call(arguments="{", call_id="3")])), request(tools=TOOLS))
    assert found == assistant(call(name="3", arguments="{", call_id="3"))


def test_answers_that_need_no_reading_stay_as_they_are():
    for message in (assistant(call(), content="<think>"), assistant(content="a < b", reasoning="Hm")):
        assert KimiK2(starts_in_think=True).incoming(message, request()) == message
