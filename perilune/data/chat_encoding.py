"""Conversations from others to token ids, so that nothing in them becomes a special token.

Before a template runs, a mark, which is a private-use character that occurs nowhere else, is put behind every character
of the contents that a special token's name could begin with, and before contents that could go on with a name that the
template began. So no name can arise from them, whatever the template joins. The text that it makes is cut at the names
of special tokens, all of them the template's own, and the marks are removed from what is between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from perilune.data.chat_messages import normalize_messages, sort_keys
from perilune.data.chat_template import ChatTemplate
from perilune.data.text_tokenizer import TextTokenizer
from perilune.data.token_text import special_pattern, split_specials
from perilune.errors import DataError

_MARKS = (*range(0xE000, 0xF900), *range(0xF0000, 0xF0400))
_KIMI_CALL = "<|tool_call_begin|>"
_UNMARKED: Mapping[str, frozenset[str]] = {
    "role": frozenset({"system", "user", "assistant", "tool"}),
    "type": frozenset({
        "function", "text", "image_url", "object", "string", "number", "integer", "boolean", "array", "null",
    }),
}  # fmt: skip
"""The API's own words, which templates compare; anything else under these keys is what somebody said."""


def encode_chat(
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Encode a conversation as its model knows it.

    Args:
        tokenizer: of the model. Where it has Kimi's tool tokens, ids of calls are rewritten to `functions.NAME:IDX`,
            arguments stay as they were written, and keys of tools are sorted; else arguments that are a JSON object
            are given to the template as that object, as the templates of other models want them.
        template: of the model.
        messages: in the shape of the OpenAI API; see `normalize_messages`.
        tools: likewise.
        add_generation_prompt: whether to end with where the assistant begins to speak.
        variables: what else the template reads.

    Raises:
        DataError: a message is not as it must be, or the template refuses the conversation.
    """
    names = tokenizer.special_ids
    is_kimi = _KIMI_CALL in names
    turns = normalize_messages(messages, kimi_ids=is_kimi, parse_arguments=not is_kimi)
    declared = [sort_keys(tool) if is_kimi else tool for tool in tools or ()]
    guard = _Guard(names, [template.sources, turns, declared, variables])
    text = template.render(
        [guard.marked(turn) for turn in turns],
        tools=[guard.marked(tool) for tool in declared],
        add_generation_prompt=add_generation_prompt,
        **{key: guard.marked(value) for key, value in variables.items()},
    )
    found: list[int] = []
    for piece, is_special in split_specials(text, special_pattern(names)):
        found += [names[piece]] if is_special else _encode_plain(tokenizer, guard.unmarked(piece))
    return found


def _encode_plain(tokenizer: TextTokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise DataError(f"the conversation cannot be encoded: {error}") from error


class _Guard:
    """Marks what is from others."""

    def __init__(self, names: Mapping[str, int], contents: object) -> None:
        try:
            used = frozenset(json.dumps(contents, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"the conversation is no JSON: {error}") from error
        mark = next((chr(code) for code in _MARKS if chr(code) not in used), None)
        if mark is None:
            raise DataError("the conversation holds every private-use character; one must be free")
        self._mark = mark
        self._table = {ord(name[0]): name[0] + mark for name in names}
        # What a name can go on with, and what can stand within it.
        self._endings = {name[start:] for name in names for start in range(1, len(name))}
        self._longest = max(map(len, names), default=0)
        self._inner = "\n".join(names)

    def marked(self, value: Any, key: str = "") -> Any:
        """Return JSON whose strings are marked, keys too."""
        if isinstance(value, str):
            return value if value in _UNMARKED.get(key, ()) else self._mark_text(value)
        if isinstance(value, Mapping):
            return {str(name).translate(self._table): self.marked(item, str(name)) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(item) for item in value]
        return value

    def unmarked(self, text: str) -> str:
        """Return text without marks."""
        return text.replace(self._mark, "")

    def _mark_text(self, text: str) -> str:
        return (self._mark if self._could_go_on(text.strip()) else "") + text.translate(self._table)

    def _could_go_on(self, text: str) -> bool:
        """Whether a name that a template began could go on with this text, once white space around it is removed."""
        if not text:
            return False
        return text in self._inner or any(text[:size] in self._endings for size in range(1, self._longest))
