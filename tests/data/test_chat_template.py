import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.data import (
    SPECIAL_TOKENS,
    ChatTemplate,
    HFTokenizer,
    Message,
    encode_chat,
    encode_conversation,
    encode_prompt,
    normalize_messages,
)
from perilune.data.template_sandbox import compile_template, render
from perilune.errors import DataError
from tests.data.small_tokenizers import byte_level, kimi

SYSTEM = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
ASSISTANT = "<|im_assistant|>assistant<|im_middle|>"
KIMI = kimi()
K2 = ChatTemplate.kimi_k2()
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}\
{{ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def call(name="get_weather", arguments='{"city": "Beijing"}', call_id="call_x"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def shown(messages, **options):
    return KIMI.decode(encode_chat(KIMI, K2, messages, **options))


def test_kimi_k2_golden_strings():
    assert shown([{"role": "user", "content": "Hi"}]) == (
        f"{SYSTEM}<|im_user|>user<|im_middle|>Hi<|im_end|>{ASSISTANT}"
    )
    assert shown([{"role": "system", "content": "Be kind."}], add_generation_prompt=False) == (
        "<|im_system|>system<|im_middle|>Be kind.<|im_end|>"
    )
    assert "<|im_user|>alice<|im_middle|>" in shown([{"role": "user", "name": "alice", "content": "Hi"}])
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    assert shown([{"role": "system", "content": "S"}], tools=[tool], add_generation_prompt=False) == (
        "<|im_system|>tool_declare<|im_middle|>\n  # Tools\n"
        '  [{"function": {"name": "f", "parameters": {"properties": {}, "type": "object"}}, "type": "function"}]'
        "<|im_end|>"
        "<|im_system|>system<|im_middle|>S<|im_end|>"
    )
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call(), call(call_id="functions_get_weather_0")]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "call_x", "content": "Sun\ny"},
        {"role": "tool", "tool_call_id": "functions_get_weather_0", "content": [{"type": "text", "text": "Rain"}]},
        {"role": "assistant", "content": "One more.", "tool_calls": [call("search", "", call_id="call_x")]},
        {"role": "tool", "tool_call_id": "call_x", "content": []},
    ]

    def made(number, name="get_weather", arguments='{"city": "Beijing"}'):
        return f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"

    begin, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    assert shown(turns) == (
        f"{SYSTEM}<|im_user|>user<|im_middle|>Hi<|im_end|>{ASSISTANT}{begin}{made(0)}{made(1)}{end}<|im_end|>"
        "<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n    Sun\ny<|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.get_weather:1\n    Rain<|im_end|>"
        f"{ASSISTANT}One more.{begin}{made(2, 'search', '{}')}{end}<|im_end|>"
        f"<|im_system|>tool<|im_middle|>## Return of functions.search:2\n    <|im_end|>{ASSISTANT}"
    )


hostile = st.lists(
    st.sampled_from(
        [*SPECIAL_TOKENS, "<|tool_call_begin|>", "<|im_", "end|>", "im_end|>", "<", "|im_end", "\ue000", " "]
    )
    | st.text(max_size=3)
).map("".join)
conversations = st.lists(
    st.fixed_dictionaries({"role": st.just("user"), "content": hostile}, optional={"name": hostile})
    | st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": hostile},
        optional={
            "tool_calls": st.lists(
                st.builds(call, hostile.filter(bool), hostile.filter(bool), hostile.filter(bool)), max_size=2
            )
        },
    ),
    min_size=1,
    max_size=3,
)


def specials(tokens):
    return [token for token in tokens if token in set(KIMI.special_ids.values())]


def emptied(value):
    """The same conversation with contents that are surely no special tokens."""
    if isinstance(value, dict):
        known = ("function", "text", "system", "user", "assistant", "tool")
        return {key: item if item in known else emptied(item) for key, item in value.items()}
    return [emptied(item) for item in value] if isinstance(value, list) else value and "x"


@given(conversations, hostile)
def test_nothing_that_is_said_becomes_a_special_token(messages, description):
    inner = {"name": description, description: description, "type": description, "role": [{"type": description}]}
    tools = [{"type": "function", "function": inner}]
    tokens = encode_chat(KIMI, K2, messages, tools=tools)
    assert specials(tokens) == specials(encode_chat(KIMI, K2, emptied(messages), tools=emptied(tools)))
    # and nothing else is changed
    from perilune.data.chat_messages import sort_keys

    rendered = K2.render(
        normalize_messages(messages, kimi_ids=True), tools=sort_keys(tools), add_generation_prompt=True
    )
    assert KIMI.decode(tokens) == rendered


TRAPS = [
    "<|im_{{ m.content }}|>",
    "<{{ m.content | trim }}>",
    "<|{{ m.content }}{{ m.content }}",
    "{{ m.content }}{{ m.name }}",
]


@pytest.mark.parametrize("form", TRAPS)
@given(st.sampled_from(["end", " think ", "im_end|>", "<|im_", "|im_end|>", "think"]), st.sampled_from(["end|>", ">"]))
def test_a_template_cannot_be_made_to_complete_a_name(form, content, name):
    template = ChatTemplate("{% for m in messages %}" + form + "{% endfor %}", title="trap")
    tokens = encode_chat(KIMI, template, [{"role": "user", "content": content, "name": name}])
    assert specials(tokens) == []


@given(contents=st.lists(hostile, min_size=1, max_size=4), has_system=st.booleans(), thinking=st.none() | hostile)
def test_this_projects_template_is_this_projects_encoding(contents, has_system, thinking, tokenizer):
    roles = [*(["system"] if has_system else []), *["user", "assistant"] * len(contents)]
    turns = [Message(role=role, content=content) for role, content in zip(roles, contents, strict=False)]
    template, plain = ChatTemplate.perilune(), [{"role": turn.role, "content": turn.content} for turn in turns]
    if turns[-1].role == "user":
        assert encode_chat(tokenizer, template, plain) == encode_prompt(tokenizer, turns)
    if turns[-1].role == "assistant":
        turns[-1] = Message(role="assistant", content=contents[-1], thinking=thinking)
        plain[-1]["reasoning_content"] = thinking
        tokens = encode_chat(tokenizer, template, plain, add_generation_prompt=False)
        assert tokens == list(encode_conversation(tokenizer, turns).tokens)


def test_this_projects_models_use_no_tools(tokenizer):
    template = ChatTemplate.perilune()
    with pytest.raises(DataError, match="perilune: chat template 'default': this model was not trained to use tools"):
        encode_chat(tokenizer, template, [{"role": "user", "content": "Hi"}], tools=[{"type": "function"}])
    turns = [{"role": "assistant", "tool_calls": [call()]}, {"role": "tool", "tool_call_id": "call_x"}]
    with pytest.raises(DataError, match="message 1: this model knows no role tool"):
        encode_chat(tokenizer, template, turns)


def test_other_models_get_arguments_as_objects_and_ids_as_they_are():
    template = ChatTemplate("{% for m in messages %}{{ m.tool_calls | tojson }}{% endfor %}", title="x")
    tokenizer = HFTokenizer(byte_level())
    turns = [{"role": "assistant", "tool_calls": [call(), call(arguments="{broken")]}]
    text = tokenizer.decode(encode_chat(tokenizer, template, turns))
    first, second = json.loads(text)
    assert first["function"]["arguments"] == {"city": "Beijing"}
    assert second["function"]["arguments"] == "{broken"
    assert first["id"] == "call_x"


def test_transformers_renders_the_same_and_encodes_the_same():
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(byte_level()))
    ours = HFTokenizer(byte_level())
    turns = [{"role": "user", "content": "Hello 12  "}, {"role": "assistant", "content": "the cat\n\n"}]
    for source in (
        CHATML,
        "  {% generation %}a{% endgeneration %}\n  {% for m in messages %}\n{{ m | tojson }}\n  {% endfor %}",
    ):
        expected = theirs.apply_chat_template(turns, chat_template=source, add_generation_prompt=True)["input_ids"]
        assert encode_chat(ours, ChatTemplate(source, title="x"), turns) == expected


def test_templates_are_found_where_checkpoints_have_them(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    config = {
        "bos_token": "<s>",
        "chat_template": [{"name": "default", "template": "a{{ bos_token }}"}, {"name": "tool_use", "template": "b"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(tmp_path)
    assert template.render([]) == "a<s>"
    assert template.render([], tools=[{}]) == "b"
    (tmp_path / "chat_template.jinja").write_text("c{{ eos_token }}{{ enable_thinking }}")
    template = ChatTemplate.load(tmp_path)
    assert template.render([], tools=[{}], enable_thinking=False) == "cFalse"
    assert template.source.startswith("c")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("d")
    assert ChatTemplate.load(tmp_path).render([], tools=[{}]) == "d"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([{"name": "rag", "template": ""}], "no template is called 'default', only rag"),
        ([{"name": "default"}], "neither a text nor a list"),
        (7, "neither a text nor a list"),
        ("{% for %}", "not a Jinja template"),
        ("a" * 2**21, "expected at most 1,048,576"),
        ("{{ (" + "(" * 5000, "not a Jinja template"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, found, message):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    with pytest.raises(DataError, match=message):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "^x: roles must alternate$"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError|UndefinedError"),
        ("{{ cycler.__init__.__globals__.os }}", "SecurityError|UndefinedError"),
        ("{{ namespace(__class__=1) }}", "begins with an underscore"),
        ("{% set n = namespace() %}{% set n.__x = 1 %}", "begins with an underscore"),
        ("{{ dict.fromkeys([1]) }}", "UndefinedError"),
        ("{{ open('/etc/passwd') }}", "UndefinedError"),
        ("{% include 'x' %}", "TypeError|no loader"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes too long"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{{ 'a' * 10 ** 9 }}", "of size 1,000,000,000"),
        ("{{ 2 ** (10 ** 9) }}", "of size"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
            "takes too long",
        ),
        (
            "{% macro g() %}{{ caller() }}{{ caller() }}{% endmacro %}"
            "{% macro f(n) %}{% if n %}{% call g() %}{{ f(n - 1) }}{% endcall %}{% endif %}{% endmacro %}{{ f(40) }}",
            "takes too long",
        ),
        (
            "{% for x in [1] recursive %}{% if loop.depth < 40 %}{{ loop([x]) }}{{ loop([x]) }}{% endif %}{% endfor %}",
            "takes too long",
        ),
        (
            "{% set n = namespace(n=0) %}{% block b %}{% set n.n = n.n + 1 %}{% if n.n < 40 %}"
            "{{ self.b() }}{{ self.b() }}{% endif %}{% set n.n = n.n - 1 %}{% endblock %}",
            "takes too long",
        ),
        (
            "{% set deadline_s = 1e99 %}{% for perilune_deadline in [1e99] %}{% block b scoped %}"
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}{% endblock %}{% endfor %}",
            "takes too long",
        ),
        ("{{ messages.nothing.more }}", "UndefinedError"),
    ],
)
def test_templates_are_confined(source, message):
    with pytest.raises(DataError, match=message):
        render(compile_template(source, where="x"), {"messages": []}, where="x", max_s=0.2)


def test_long_output_is_refused(monkeypatch):
    monkeypatch.setattr("perilune.data.template_sandbox.MAX_OUTPUT_CHARS", 100)
    with pytest.raises(DataError, match="more than 100 characters"):
        render(compile_template("{% for i in range(60) %}ab{% endfor %}", where="x"), {}, where="x")


def test_messages_are_brought_to_one_form():
    turns = normalize_messages(
        [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "reasoning": "Hm", "tool_calls": [], "name": None},
            {"role": "assistant", "reasoning": "old", "reasoning_content": "new"},
            {"role": "user", "content": [{"type": "text", "text": ""}]},
        ]
    )
    assert turns == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm"},
        {"role": "assistant", "content": "", "reasoning_content": "new"},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        (["Hi"], r"messages\[0\] must be an object, got str"),
        ([{"role": "robot"}], r"messages\[0\].role must be one of system, .*, got 'robot'"),
        ([{"role": ["user"]}], r"messages\[0\].role must be one of"),
        ([{"role": "user", "content": 7}], r"content must be a string or a list of parts, got int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] must be .* type 'image_url'"),
        ([{"role": "user", "content": [7]}], r"content\[0\] must be .* type 'int'"),
        ([{"role": "user", "name": 7}], r"messages\[0\].name must be a string"),
        ([{"role": "user", "tool_calls": [call()]}], "only an assistant calls tools"),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls must be a list, got str"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] must be an object with a function"),
        ([{"role": "assistant", "tool_calls": [call(name="")]}], r"tool_calls\[0\].function.name must be"),
        ([{"role": "assistant", "tool_calls": [call(arguments=7)]}], r"arguments must be a string of JSON"),
        ([{"role": "assistant", "tool_calls": [call(call_id=7)]}], r"id must be a string, got int"),
        ([{"role": "assistant", "tool_calls": [call(call_id=None)]}], r"id must be a string, got None"),
        ([{"role": "tool", "tool_call_id": "a"}], r"messages\[0\].tool_call_id .* \(none\), got 'a'"),
        (
            [{"role": "assistant", "tool_calls": [call()]}, {"role": "tool", "tool_call_id": "y"}],
            r"messages\[1\].tool_call_id must be the id of an earlier call \('call_x'\), got 'y'",
        ),
        ([{"role": "assistant", "tool_calls": [call()]}, {"role": "tool", "content": "x"}], r"\('call_x'\), got None"),
    ],
)
def test_messages_that_are_wrong_are_named(messages, message):
    with pytest.raises(DataError, match=message):
        normalize_messages(messages)


def test_a_conversation_with_a_lone_surrogate_is_refused():
    with pytest.raises(DataError, match="cannot be encoded: text holds a lone surrogate"):
        encode_chat(KIMI, K2, [{"role": "user", "content": "\ud800"}])
    with pytest.raises(DataError, match="is no JSON"):
        encode_chat(KIMI, K2, [{"role": "user", "content": "x", "extra": {1j}}])
