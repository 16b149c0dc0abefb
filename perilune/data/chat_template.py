"""Chat templates: how a conversation becomes the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from perilune.data.template_sandbox import compile_template, render
from perilune.data.tokenizer_files import TOKENIZER_CONFIG, named_tokens, read_json
from perilune.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE_FILE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
_MAX_FILE_BYTES = 4 * 2**20

PERILUNE_TEMPLATE = """\
{{- '[BOS]' }}
{%- if tools %}{{ raise_exception('this model was not trained to use tools') }}{% endif %}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('message ' ~ loop.index0 ~ ': this model knows no role ' ~ message.role) }}
    {%- endif %}
    {{- '<|im_' ~ message.role ~ '|>' }}
    {%- if message.role == 'assistant' and message.reasoning_content is string %}
        {{- '<think>' ~ message.reasoning_content ~ '</think>' }}
    {%- endif %}
    {{- message.content ~ '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>' }}{% endif %}
"""
"""What `perilune.data.chat` writes, for other programs that load a model of this project."""

KIMI_K2_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_system|>tool_declare<|im_middle|>\\n  # Tools\\n  ' ~ tools | tojson ~ '<|im_end|>' }}
{%- endif %}
{%- if not messages or messages[0].role != 'system' %}
    {{- '<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set tag = {'user': 'user', 'assistant': 'assistant'}.get(message.role, 'system') %}
    {{- '<|im_' ~ tag ~ '|>' ~ (message.name or message.role) ~ '<|im_middle|>' }}
    {%- if message.role == 'tool' %}{{ '## Return of ' ~ message.tool_call_id ~ '\\n    ' }}{% endif %}
    {{- message.content or '' }}
    {%- if message.tool_calls %}
        {{- '<|tool_calls_section_begin|>' }}
        {%- for call in message.tool_calls %}
            {{- '<|tool_call_begin|>' ~ call.id ~ '<|tool_call_argument_begin|>' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '<|tool_call_end|>' }}
        {%- endfor %}
        {{- '<|tool_calls_section_end|>' }}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}
"""
"""The form of July 2025. Later checkpoints bring their own, which then is the one to use."""


class ChatTemplate:
    """A model's template, or several by name, of which `tool_use` is taken for requests with tools."""

    def __init__(
        self, templates: str | Mapping[str, str], *, special_tokens: Mapping[str, str] | None = None, title: str
    ) -> None:
        """Compile templates.

        Args:
            templates: Jinja text, or texts by name with one called `default`.
            special_tokens: texts of `bos_token` and its kind, which templates may read.
            title: where they are from, for errors.

        Raises:
            DataError: one is no Jinja template, or none is the default.
        """
        sources = {"default": templates} if isinstance(templates, str) else dict(templates)
        if "default" not in sources:
            raise DataError(f"{title}: no template is called 'default', only {', '.join(sources) or 'none at all'}")
        self.title = title
        self.special_tokens = dict(special_tokens or {})
        self.sources = sources
        self._compiled: dict[str, Template] = {
            name: compile_template(source, where=f"{title}: chat template {name!r}") for name, source in sources.items()
        }

    @classmethod
    def perilune(cls) -> Self:
        """Return the template of this project's own models."""
        return cls(PERILUNE_TEMPLATE, special_tokens={"bos_token": "[BOS]", "eos_token": "[EOS]"}, title="perilune")

    @classmethod
    def kimi_k2(cls) -> Self:
        """Return Kimi K2's template of July 2025."""
        special_tokens = {"bos_token": "[BOS]", "eos_token": "[EOS]"}
        return cls(KIMI_K2_TEMPLATE, special_tokens=special_tokens, title="kimi-k2-2025-07")

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """Read the template of a checkpoint; None if it has none.

        Looked for in `chat_template.jinja` and `additional_chat_templates/`, then in `chat_template.json`, then in
        `tokenizer_config.json`, where it is a text or a list of named ones.

        Raises:
            DataError: a file cannot be read, or is no template.
        """
        config = read_json(directory / TOKENIZER_CONFIG)
        sources = _template_files(directory)
        if not sources:
            found = read_json(directory / "chat_template.json").get("chat_template") or config.get("chat_template")
            sources = _named_templates(found, directory / TOKENIZER_CONFIG)
        if not sources:
            return None
        return cls(sources, special_tokens=named_tokens(config), title=str(directory))

    @property
    def source(self) -> str:
        """Text of the default template, as `chat_template.jinja` holds it."""
        return self.sources["default"]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Return a conversation as text. `encode_chat` is what to use for messages from others.

        Args:
            messages: in the shape of the OpenAI API, `content` a string.
            tools: likewise.
            add_generation_prompt: whether to end with where the assistant begins to speak.
            variables: what else the template reads, such as `enable_thinking`.

        Raises:
            DataError: the template refuses the conversation, or errs.
        """
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        given = {
            **self.special_tokens,
            "documents": None,
            **variables,
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        return render(self._compiled[name], given, where=f"{self.title}: chat template {name!r}")


def _template_files(directory: Path) -> dict[str, str]:
    paths = {"default": directory / TEMPLATE_FILE}
    paths |= {path.stem: path for path in sorted((directory / _MORE_TEMPLATES).glob("*.jinja"))}
    return {name: _read(path) for name, path in paths.items() if path.is_file()}


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes, expected at most {_MAX_FILE_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _named_templates(found: object, path: Path) -> dict[str, str]:
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        named = {one.get("name"): one.get("template") for one in found}
        if all(isinstance(name, str) and isinstance(text, str) for name, text in named.items()):
            return named
    raise DataError(f"{path}: chat_template is neither a text nor a list of texts with names")
