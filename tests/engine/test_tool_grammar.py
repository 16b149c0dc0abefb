import json
import random
import re

import jsonschema
import pytest

from perilune.engine import GrammarCompiler, ToolShape, ToolTokens, compile_tool_calls
from perilune.errors import EngineError
from tests.engine.grammar_helpers import KIMI_FILE, KimiFile, Toy, allowed, takes, walk

TOY = Toy()
END = TOY.special_ids["<|im_end|>"]
THINK = (TOY.special_ids["<think>"], TOY.special_ids["</think>"])
TOKENS = ToolTokens.find(TOY.special_ids)
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    ToolShape(name="weather", parameters=WEATHER),
    ToolShape(name="weather-2.now", parameters={"properties": {}, "additionalProperties": False}),
    ToolShape(name="search"),
]
SECTION = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
CALL = "<|tool_call_begin|>functions.{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
OSLO = CALL.format("weather:0", '{"city": "Oslo"}')


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(TOY, [END], thinking_ids=THINK)


def accepts(grammar, text):
    ids = TOY.spell(text, random.Random(len(text)))
    return takes(grammar, ids) == (len(ids), True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no tools, {just} text: functions.weather:0",
        "<think>the weather...</think>It rains.",
        "<think>hm</think>Let me see." + SECTION.format(OSLO),
        SECTION.format(OSLO + CALL.format("weather-2.now:1", "{}") + CALL.format("search:2", '{"any": ["thing", {}]}')),
        SECTION.format("".join(CALL.format(f"search:{index}", "{}") for index in range(32))),
    ],
)
def test_auto_takes_text_and_calls_of_the_template(compiler, text):
    assert accepts(compile_tool_calls(compiler, TOKENS, TOOLS), text)


@pytest.mark.parametrize(
    "text",
    [
        SECTION.format(""),
        SECTION.format(OSLO) + "x",
        SECTION.format(OSLO) + SECTION.format(OSLO),
        SECTION.format(CALL.format("weather:1", '{"city": "Oslo"}')),
        SECTION.format(OSLO + OSLO),
        SECTION.format(CALL.format("weather:0", '{"city": "Paris"}')),
        SECTION.format(CALL.format("weather:0", '{"city": "Oslo", "hours": 1}')),
        SECTION.format(CALL.format("weather:0", "{}")),
        SECTION.format(CALL.format("lookup:0", "{}")),
        SECTION.format(CALL.format("search:0", "[]")),
        SECTION.format("".join(CALL.format(f"search:{index}", "{}") for index in range(33))),
        "half a section <|tool_calls_section_begin|>" + OSLO,
        OSLO,
    ],
)
def test_nothing_else_is_taken(compiler, text):
    assert not accepts(compile_tool_calls(compiler, TOKENS, TOOLS), text)


@pytest.mark.parametrize("seed", range(8))
def test_random_walks_call_declared_tools_with_valid_arguments(compiler, seed):
    grammar = compile_tool_calls(compiler, TOKENS, TOOLS[:2], choice="required", first_index=5)
    ids = walk(grammar, seed, prefer={*b'"}{,:', *range(256, TOY.vocab_size)}, limit=600)
    assert ids is not None
    text = TOY.decode_bytes(ids).decode()
    calls = re.findall(
        r"<\|tool_call_begin\|>functions\.([\w.-]+):(\d+)<\|tool_call_argument_begin\|>(.*?)<\|", text, re.S
    )
    assert [int(index) for _, index, _ in calls] == list(range(5, 5 + len(calls)))
    assert text == SECTION.format("".join(CALL.format(f"{name}:{index}", rest) for name, index, rest in calls))
    for name, _, arguments in calls:
        jsonschema.validate(json.loads(arguments), WEATHER if name == "weather" else {"type": "object"})


def test_required_begins_with_the_section_or_with_reasoning(compiler):
    grammar = compile_tool_calls(compiler, TOKENS, TOOLS, choice="required")
    assert allowed(grammar.start()) == [TOKENS.section_begin]
    behind = compile_tool_calls(compiler, TOKENS, TOOLS, choice="required", after_thinking=True)
    assert accepts(behind, "<think>so</think>" + SECTION.format(OSLO))
    assert not accepts(behind, "<think>so</think>so" + SECTION.format(OSLO))


def test_a_named_tool_is_called_once(compiler):
    grammar = compile_tool_calls(compiler, TOKENS, TOOLS, name="search", first_index=3)
    assert accepts(grammar, SECTION.format(CALL.format("search:3", '{"q": 1}')))
    assert not accepts(grammar, SECTION.format(CALL.format("search:3", "{}") + CALL.format("search:4", "{}")))
    assert not accepts(grammar, SECTION.format(CALL.format("weather:3", '{"city": "Oslo"}')))


def test_without_parallel_calls_there_is_one(compiler):
    grammar = compile_tool_calls(compiler, TOKENS, TOOLS, is_parallel=False)
    assert accepts(grammar, SECTION.format(OSLO))
    assert not accepts(grammar, SECTION.format(OSLO + CALL.format("search:1", "{}")))


def test_json_in_place_of_free_text(compiler):
    answer = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    said, called = '{"ok": true}', SECTION.format(OSLO)
    for options, good in (({}, (said, called)), ({"choice": "required"}, (called,)), ({"choice": "none"}, (said,))):
        grammar = compile_tool_calls(compiler, TOKENS, TOOLS, answer=answer, **options)
        thinking = compile_tool_calls(compiler, TOKENS, TOOLS, answer=answer, after_thinking=True, **options)
        for text in (said, called, said + called, "{}", "x" + called, ""):
            assert accepts(grammar, text) == (text in good)
            assert accepts(thinking, "hm</think>" + text) == (text in good)


def test_none_has_text_and_no_calls(compiler):
    grammar = compile_tool_calls(compiler, TOKENS, [], choice="none")
    assert accepts(grammar, "<think>a</think>functions.weather:0 {")
    assert set(allowed(grammar.start())) & set(TOY.special_ids.values()) == {END, *THINK}


@pytest.mark.parametrize(
    ("tools", "options", "message"),
    [
        ([ToolShape(name="a b")], {}, "tools: 'a b' is no name"),
        ([ToolShape(name="")], {}, "tools: '' is no name"),
        ([ToolShape(name="a"), ToolShape(name="a")], {}, "tools: 'a' is declared twice"),
        ([ToolShape(name="a")], {"name": "b"}, "there is no tool 'b' to call; declared: a"),
        ([], {}, "there is no tool"),
        ([ToolShape(name="a", parameters={"type": "array"})], {}, "parameters of 'a' must be of type object"),
        ([ToolShape(name="a", parameters={"properties": {"x": {"type": "no"}}})], {}, "tools: .*Invalid type: no"),
    ],
)  # fmt: skip
def test_bad_tools_are_refused(compiler, tools, options, message):
    with pytest.raises(EngineError, match=message):
        compile_tool_calls(compiler, TOKENS, tools, **options)


def test_a_vocabulary_without_the_tokens_is_refused():
    with pytest.raises(EngineError, match=r"no tokens for tool calls: <\|tool_calls_section_begin\|>, "):
        ToolTokens.find({"<|im_end|>": 3, "<|tool_call_begin|>": 4})


@pytest.mark.skipif(not KIMI_FILE.exists(), reason="shared/data/kimi_tokenizer is not here")
def test_kimis_own_tokens():
    kimi = KimiFile()
    tokens = ToolTokens.find(kimi.special_ids)
    grammar = compile_tool_calls(GrammarCompiler(kimi, [163586], vocab_size=163840), tokens, TOOLS[:1])
    ids = [19180, 163595, 163597, *(kimi.tokens.index(word) for word in (b"functions", b".", b"weather", b":", b"0"))]
    ids += [163598, *(kimi.tokens.index(bytes([byte])) for byte in b'{"city": "Rome"}'), 163599, 163596]
    assert takes(grammar, ids) == (len(ids), True)
