import json
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.data import train_tokenizer
from perilune.engine import Engine, GrammarCompiler, Request, SamplingParams
from perilune.errors import EngineError
from tests.engine.grammar_helpers import KIMI_FILE, KimiFile, Toy, allowed, takes, walk

TOY = Toy()
END = TOY.special_ids["<|im_end|>"]
LIKED = frozenset(b'"0}ab')
"""Bytes that a random walk prefers, so that it comes to an end."""
THINK = (TOY.special_ids["<think>"], TOY.special_ids["</think>"])
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "blue", None]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(TOY, [END], thinking_ids=THINK)


@settings(max_examples=40, deadline=None)
@given(options=st.lists(st.text(alphabet='yes"\\é\n1', min_size=1, max_size=4), min_size=1, max_size=4), data=st.data())
def test_a_mask_is_exactly_the_tokens_that_go_on_in_the_grammar(compiler, options, data):
    state, written = compiler.choice(options).start(), b""
    whole = [option.encode() for option in options]
    while True:
        expected = [
            token
            for token in range(TOY.vocab_size)
            if TOY.tokens[token]
            and token not in TOY.special_ids.values()
            and any(option.startswith(written + TOY.tokens[token]) for option in whole)
        ] + [END] * (written in whole)
        assert allowed(state) == sorted(expected)
        token = data.draw(st.sampled_from(expected))
        if token == END:
            return
        state.accept(token)
        written += TOY.tokens[token]


@pytest.mark.parametrize("seed", range(12))
def test_random_walks_write_json_that_the_schema_accepts(compiler, seed):
    ids = walk(compiler.json_schema(SCHEMA), seed, LIKED)
    assert ids is None or jsonschema.validate(json.loads(TOY.decode_bytes(ids)), SCHEMA) is None


def test_some_random_walks_come_to_an_end(compiler):
    grammar = compiler.json_schema(SCHEMA)
    assert sum(walk(grammar, seed, LIKED) is not None for seed in range(12)) >= 6


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("value", [{"name": "Ada", "age": 36}, {"name": "é🌙", "age": 150, "tags": ["red", None]}])
def test_json_that_the_schema_accepts_may_be_written_in_any_tokens(compiler, value, indent):
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    for seed in range(4):
        ids = TOY.spell(text, random.Random(seed))
        assert takes(compiler.json_schema(SCHEMA), ids) == (len(ids), True)


@pytest.mark.parametrize("ending", ['", "age": 151', '", "x', "!!", '", "age": 1}}', '",  '])
def test_other_text_is_stopped_at_its_first_wrong_token(compiler, ending):
    ids = list(('{"name": "Ada' + ending).encode())
    assert takes(compiler.json_schema(json.dumps(SCHEMA)), ids)[0] == len(ids) - 1


def test_a_json_object_is_any_object_and_nothing_else(compiler):
    grammar = compiler.json_object()
    assert takes(grammar, list(b'{"a": [1, {"b": null}]}')) == (23, True)
    assert takes(grammar, list(b"[1]"))[0] == 0
    assert takes(compiler.json_schema(True), list(b"[1]")) == (3, True)


def test_regex_and_lark_grammars(compiler):
    assert takes(compiler.regex(r'[0-9]{3}/"é?'), list('123/"é'.encode())) == (7, True)
    assert takes(compiler.regex("[0-9]{3}"), list(b"12x")) == (2, False)
    nested = compiler.lark('start: "(" start? ")" start?')
    assert takes(nested, list(b"(()())")) == (6, True)
    assert takes(nested, list(b"())")) == (2, False)


def test_reasoning_is_free_and_the_grammar_holds_behind_it(compiler):
    grammar = compiler.choice(["yes"], after_thinking=True)
    for text in ("<think>why { not</think>yes", "why not</think>\n\nyes", "</think>yes"):
        ids = TOY.spell(text, random.Random(0))
        assert takes(grammar, ids) == (len(ids), True)
    state = grammar.start()
    state.accept(THINK[0])
    assert END not in allowed(state)
    with pytest.raises(EngineError, match="after_thinking needs thinking_ids"):
        GrammarCompiler(TOY, [END]).choice(["yes"], after_thinking=True)


def test_a_token_that_was_not_allowed_leaves_none(compiler):
    state = compiler.choice(["yes"]).start()
    state.accept(ord("n"))
    assert allowed(state) == []
    assert "n" in state.error


def branching(count):
    """A schema whose rows of items are beyond llguidance's limit only behind the first `[`."""
    return {"anyOf": [{"type": "array", "items": {"type": "array", "items": {"enum": [i]}}} for i in range(count)]}


def test_a_limit_that_is_met_midway_is_named_in_a_line(compiler):
    state = compiler.json_schema(branching(500)).start()
    assert allowed(state) == [ord("[")]
    state.accept(ord("["))
    assert allowed(state) == []
    assert re.fullmatch(r"Parser Error: Current row has \d+ items; max is 2000; .*", state.error)
    assert "\n" not in state.error
    assert "state>" not in state.error


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: c.json_schema({"type": "objekt"}), "json_schema: Invalid type: objekt"),
        (lambda c: c.json_schema("{"), "json_schema: not JSON: .* line 1 column 2"),
        (lambda c: c.json_schema("[]"), "json_schema: a schema is an object, got list"),
        (lambda c: c.json_schema(False), "json_schema: the schema false accepts nothing"),
        (lambda c: c.json_schema({"$ref": "#/definitions/x"}), "json_schema: Pointer '/definitions/x' does not exist"),
        (lambda c: c.json_schema({"$ref": "https://example.com/x"}), "json_schema: Resource .*does not fetch"),
        (lambda c: c.json_schema({"type": "string", "pattern": "("}), "json_schema: regex parse error"),
        (lambda c: c.json_schema({"not": {"type": "string"}}), 'json_schema: Unimplemented keys: \\["not"\\]'),
        (lambda c: c.json_schema({"const": float("nan")}), "json_schema: not JSON"),
        (lambda c: c.json_schema({"const": {1}}), "json_schema: not JSON"),
        (lambda c: c.json_schema({"enum": ["x" * 1_000_001]}), "json_schema: too long: 1000"),
        (lambda c: c.regex("(a"), "regex: .*unclosed group"),
        (lambda c: c.regex("(?=a)b"), "regex: .*look-around"),
        (lambda c: c.lark("start: foo"), 'grammar: .*unknown name: "foo"'),
        (lambda c: c.lark("start: start"), "grammar: "),
        (lambda c: c.choice([]), "choice needs at least one option"),
        (lambda c: c.choice(["a", ""]), "choice needs at least one option, and none may be empty"),
    ],
)
def test_a_bad_grammar_is_refused_by_name(compiler, make, message):
    with pytest.raises(EngineError, match=message) as caught:
        make(compiler)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_ids_outside_the_vocabulary_and_no_end_are_refused():
    with pytest.raises(EngineError, match="token 999 is outside the vocabulary"):
        GrammarCompiler(TOY, [999])
    with pytest.raises(EngineError, match="end_ids is empty"):
        GrammarCompiler(TOY, [])


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EngineError, match=r"pip install 'perilune\[grammar\]'"):
        GrammarCompiler(TOY, [END])


def test_grammars_are_compiled_once_and_threads_may_share_them(compiler):
    with ThreadPoolExecutor(4) as pool:
        walks = list(pool.map(lambda seed: walk(compiler.json_schema(SCHEMA), seed % 2, LIKED), range(16)))
    assert compiler.json_schema(SCHEMA) is compiler.json_schema(json.dumps(SCHEMA))
    assert walks == walks[:2] * 8


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(['{"city": "Paris", "n": 12}, yes and no\n' * 50], 282)


@pytest.mark.parametrize("extra", [-20, 0, 13])
def test_the_engine_writes_what_the_grammar_says_with_any_size_of_vocabulary(recurrent_model, trained, extra):
    # A model may have more ids than the tokenizer, or fewer: then the last special tokens are out of reach.
    ends = [trained.end_id, trained.eos_id] if extra >= 0 else [200]
    model = recurrent_model(vocab_size=trained.vocab_size + extra, spread=0.5)
    compiler = GrammarCompiler(trained, ends, vocab_size=trained.vocab_size + extra)
    grammar = compiler.choice(["yes", "no", "Paris"])
    params = SamplingParams(max_new_tokens=12, stop_ids=tuple(ends), grammar=grammar, temperature=1.5)
    plain = Request(prompt_ids=[1], params=SamplingParams(max_new_tokens=5, seed=7))
    completions = Engine(model).generate([Request(prompt_ids=[1, 2], params=params, num_samples=12), plain])
    texts = {trained.decode(c.token_ids[:-1]) for c in completions[:-1]}
    assert {c.finish_reason for c in completions[:-1]} == {"eos"}
    assert len(texts) > 1
    assert texts <= {"yes", "no", "Paris"}
    assert Engine(model).generate([plain])[0].token_ids == completions[-1].token_ids


@pytest.mark.skipif(not KIMI_FILE.exists(), reason="shared/data/kimi_tokenizer is not here")
def test_kimis_vocabulary():
    kimi = KimiFile()
    compiler = GrammarCompiler(kimi, [163586], vocab_size=163840)
    grammar = compiler.json_schema({"type": "object", "properties": {"城市": {"const": "北京"}}, "required": ["城市"]})
    state = grammar.start()
    openings = {kimi.tokens[token] for token in allowed(state)}
    assert {b"{", b'{"'} <= openings
    assert all(opening.decode().rstrip(' \n\t"') == "{" for opening in openings)
    text = '{"城市": "北京"}'
    assert takes(grammar, [kimi.tokens.index(letter.encode()) for letter in text]) == (len(text), True)
