import asyncio
import dataclasses
import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.agents.tools.artifacts import MemoryArtifacts
from perilune.agents.tools.base import Tool, ToolError, ToolOutput
from perilune.agents.tools.registry import ToolRegistry, qualified_name
from perilune.agents.tools.shorten import MAX_IMAGE_CHARS, cut_middle
from tests.agents.tools.helpers import context, run

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}, "s": {"type": "string"}},
    "required": ["n"],
}


def make(run=None, name="t", **more) -> Tool:
    async def nothing(arguments, context):
        return ToolOutput(text="done")

    return Tool(name=name, description=f"About {name}.", parameters=SCHEMA, run=run or nothing, **more)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "ä", "x" * 65, "a\n"])
def test_names_are_checked(name):
    with pytest.raises(ToolError, match="must match"):
        ToolRegistry([make(name=name)])


def test_a_collision_after_sanitising_names_both():
    tools = [make(name=qualified_name("s", name), origin=f"{name!r} of MCP server s") for name in ("a.b", "a b")]
    with pytest.raises(ToolError) as caught:
        ToolRegistry(tools)
    assert str(caught.value) == "two tools are named 's__a_b': 'a.b' of MCP server s and 'a b' of MCP server s"


def test_qualified_names_are_names():
    assert qualified_name("my server", "do/it") == "my_server__do_it"
    assert len(qualified_name("s", "x" * 100)) == 64


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array"}, "a schema of an object"),
        ({"type": "object", "properties": {"a": {"type": "nothing"}}}, "its schema"),
        ({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1/x"}}}, "leads outside"),
        ({"type": "object", "properties": {"a": {"pattern": "("}}}, r"pattern '\(' is none of Python's"),
    ],
)
def test_a_broken_schema_is_refused_at_the_start(schema, said):
    with pytest.raises(ToolError, match=said):
        ToolRegistry([dataclasses.replace(make(), parameters=schema)])


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("", "t: the arguments are no JSON: empty text; write {}"),
        ("{'n': 1}", "t: the arguments are no JSON: Expecting property name"),
        ('{"n": 1', "at character 7"),
        ('{"n": NaN}', "NaN is no JSON"),
        ('{"n": 1, "n": 2}', "the key 'n' stands twice"),
        ('{"n": 1, "s": "\\ud800"}', "half of a surrogate pair"),
        ('{"n": "1"}', "t: arguments at $.n: '1' is not of type 'integer' (schema path properties/n/type)"),
        ('{"n": 0}', "(schema path properties/n/minimum)"),
        ("{}", "t: arguments at $: 'n' is a required property (schema path required)"),
        ("[]", "is not of type 'object'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"n": 1, "s": [' + '"x",' * 1000 + '"x"]}', " ... "),
        ("1" * 11_000_000, "at most 10000000"),
    ],
)
def test_wrong_arguments_are_told_and_not_mended(raw, said):
    complaint = ToolRegistry([make()]).validate("t", raw)
    assert isinstance(complaint, str)
    assert said in complaint
    assert len(complaint) < 1_000


def test_large_numbers_stay_exact():
    assert ToolRegistry([make()]).validate("t", '{"n": 123456789012345678901234567890}') == {
        "n": 123456789012345678901234567890
    }


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_validate_never_raises(raw):
    result = ToolRegistry([make()]).validate("t", raw)
    assert isinstance(result, dict | str)


def test_an_unknown_tool_is_told_what_there_is():
    registry = ToolRegistry([make(name="a"), make(name="b")])
    assert registry.validate("c", "{}") == "there is no tool 'c'; there are a, b"
    assert run(registry.run("c", {}, context())).is_error


class OddError(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such row"), "t failed: ValueError: no such row"),
        (KeyError(), "t failed: KeyError"),
        (ToolError("as it is"), "t failed: as it is"),
        (SystemExit(3), "t failed: SystemExit: 3"),
        (asyncio.CancelledError(), "t failed: it canceled itself"),
        (ExceptionGroup("g", [ValueError("inner")]), "t failed: ValueError: inner"),
        (OddError(), "t failed: OddError"),
        (RecursionError("deep"), "t failed: RecursionError: deep"),
    ],
)
def test_errors_become_results_without_a_trace(error, text):
    async def fail(arguments, context):
        raise error

    output = run(ToolRegistry([make(fail)]).run("t", {}, context()))
    assert output == ToolOutput(text=text, is_error=True)


def test_long_errors_are_cut():
    async def fail(arguments, context):
        raise ValueError("x" * 100_000)

    assert len(run(ToolRegistry([make(fail)]).run("t", {}, context())).text) < 2_100


def test_a_long_result_is_cut_in_the_middle_and_kept():
    text = "a" * 30_000 + "MIDDLE" + "z" * 30_000

    async def talk(arguments, context):
        return ToolOutput(text=text)

    store = MemoryArtifacts()
    output = run(ToolRegistry([make(talk, max_result_chars=1_000)]).run("t", {}, context(artifacts=store)))
    assert len(output.text) <= 1_000
    assert output.text.startswith("aaa")
    assert output.text.endswith("zzz")
    assert "60006 characters" in output.text
    artifact_id = output.text.split('read_artifact("')[1].split('"')[0]
    assert store.get(artifact_id).decode() == text


def test_where_the_store_is_full_the_cut_result_says_so():
    async def talk(arguments, context):
        return ToolOutput(text="x" * 5_000)

    store = MemoryArtifacts(max_total_bytes=10)
    output = run(ToolRegistry([make(talk, max_result_chars=500)]).run("t", {}, context(artifacts=store)))
    assert not output.is_error
    assert "could not be kept: no room for t" in output.text


@given(st.text(min_size=1), st.integers(0, 300))
def test_cutting_keeps_to_the_limit(text, limit):
    text = text * (limit // len(text) + 1)
    assert len(cut_middle(text, limit, "hint")) <= limit


def test_fifty_megabytes_and_no_text_are_survived():
    async def flood(arguments, context):
        return ToolOutput(text=b"\xff\xfe" * 25_000_000)  # type: ignore[arg-type]

    async def halves(arguments, context):
        return ToolOutput(text="a\ud800b\U0001f600")

    async def pictures(arguments, context):
        return ToolOutput(text="t", images=("data:image/png;base64," + "A" * MAX_IMAGE_CHARS,))

    async def nothing(arguments, context):
        return None

    registry = ToolRegistry(
        [make(flood, "flood"), make(halves, "halves"), make(pictures, "pictures"), make(nothing, "nothing")]
    )

    async def all_of_them():
        return [await registry.run(name, {}, context()) for name in registry.tools]

    flooded, halved, shown, none = run(all_of_them())
    assert len(flooded.text) <= 16_000
    assert "\N{REPLACEMENT CHARACTER}" in flooded.text
    assert halved.text == "a\N{REPLACEMENT CHARACTER}b\U0001f600"
    assert shown.images == ()
    assert "1 images left out" in shown.text
    assert none.is_error


def test_a_late_tool_is_ended():
    ended = []

    async def slow(arguments, context):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    registry = ToolRegistry([make(slow, timeout_s=0.02)])
    output = run(registry.run("t", {}, context()))
    assert output.is_error
    assert "longer than its limit of 0.02 s" in output.text
    assert ended == [True]
    assert registry.abandoned == ()


async def deaf(arguments, context):
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue


def test_a_tool_that_ignores_its_end_is_abandoned_and_reported(caplog):
    registry = ToolRegistry([make(deaf, timeout_s=0.02, max_parallel=1)], grace_s=0.02)

    async def twice():
        await registry.run("t", {}, context(call_id="c1"))
        return await registry.run("t", {}, context(call_id="c2"))  # the slot is free again

    with caplog.at_level(logging.WARNING):
        output = run(twice())
    assert "was abandoned" in output.text
    assert [entry.call_id for entry in registry.abandoned] == ["c1", "c2"]
    assert "ignores its cancellation" in caplog.text


def test_cancelling_the_caller_ends_the_tool():
    ended = []

    async def slow(arguments, context):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.02)  # tidies up
            ended.append(True)
            raise

    async def cancelled():
        task = asyncio.ensure_future(ToolRegistry([make(slow)]).run("t", {}, context()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancelled())
    assert ended == [True]


def test_a_second_cancellation_does_not_wait():
    registry = ToolRegistry([make(deaf)], grace_s=60)

    async def cancelled():
        task = asyncio.ensure_future(registry.run("t", {}, context()))
        for _ in range(2):
            await asyncio.sleep(0.01)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started = time.monotonic()
    run(cancelled())
    assert time.monotonic() - started < 5
    assert len(registry.abandoned) == 1


def test_no_more_than_max_parallel_run_at_a_time():
    running, most = 0, 0

    async def count(arguments, context):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return ToolOutput(text="")

    registry = ToolRegistry([make(count, max_parallel=3)])

    async def many():
        await asyncio.gather(*(registry.run("t", {}, context()) for _ in range(20)))

    run(many())
    assert most == 3


def test_waiting_for_a_slot_is_not_counted_as_running():
    async def pause(arguments, context):
        await asyncio.sleep(0.05)
        return ToolOutput(text="ok")

    registry = ToolRegistry([make(pause, max_parallel=1, timeout_s=0.2)])

    async def many():
        return await asyncio.gather(*(registry.run("t", {}, context()) for _ in range(6)))

    assert [output.text for output in run(many())] == ["ok"] * 6


def test_closing_closes_each_source_once_and_survives_failures(caplog):
    closed = []

    async def close():
        closed.append(True)

    async def fail():
        raise OSError("gone")

    registry = ToolRegistry([make(name="a", close=close), make(name="b", close=close), make(name="c", close=fail)])
    with caplog.at_level(logging.WARNING):
        run(registry.close())
    assert closed == [True]
    assert "OSError: gone" in caplog.text


def test_a_registry_gains_no_tool():
    registry = ToolRegistry([make()])
    with pytest.raises(TypeError):
        registry.tools["x"] = make(name="x")  # type: ignore[index]
    with pytest.raises(ToolError, match="replaced, not added"):
        registry.replace(make(name="x"))
    with pytest.raises(ToolError, match="effect and origin must stay"):
        registry.replace(make(effect="pure"))
    registry.replace(dataclasses.replace(make(), description="New.", parameters={"type": "object"}))
    assert registry.tools["t"].description == "New."
    assert registry.validate("t", "{}") == {}
