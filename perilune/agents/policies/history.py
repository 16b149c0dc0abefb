"""What a scripted policy can know: the calls in its messages, and what came back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from perilune.agents.messages import ChatRequest, Message, ToolCall

_HIT = re.compile(r"^[ \t]*\d+[.)][ \t]+", re.MULTILINE)
_JSON_HIT = re.compile(r'"doc": ?"([^"\\]+)", ?"title": ?("(?:[^"\\]|\\.)*")')
_LABELS = re.compile(r"^(?:[\s\[\](){}<>|:*#\"'`.,\u2013\u2014-]|(?:doc|id|title)\b)+")
_DOCUMENT = re.compile(r"\bp[0-9a-f]{12}\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A call that a policy wants to make."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PastCall:
    """A call that was made."""

    tool: str
    turn: int
    """Which of the agent's turns made it, counted from 0."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Empty if they are no JSON object."""
    result: str = ""
    """Empty while there is none."""


def past_calls(messages: Sequence[Message]) -> list[PastCall]:
    """Return all calls in order; results belong to the last turn that made a call of their id."""
    results: dict[tuple[int, str], str] = {}
    made: list[tuple[int, ToolCall]] = []
    turn = -1
    for message in messages:
        if message.role == "assistant":
            turn += 1
            made += [(turn, call) for call in message.tool_calls]
        elif message.role == "tool":
            results[turn, message.tool_call_id or ""] = message.content
    return [
        PastCall(tool=call.name, turn=at, arguments=json_object(call.arguments), result=results.get((at, call.id), ""))
        for at, call in made
    ]


def call_message(request: ChatRequest, wishes: Sequence[Wish], text: str = "") -> Message:
    """Return an assistant's turn that makes calls, with ids that no other turn of the agent has."""
    turn = sum(message.role == "assistant" for message in request.messages)
    calls = tuple(
        ToolCall(id=f"call_{turn}_{place}", name=wish.tool, arguments=json.dumps(wish.arguments, ensure_ascii=False))
        for place, wish in enumerate(wishes)
    )
    return Message(role="assistant", content=text, tool_calls=calls)


def prompt_of(messages: Sequence[Message]) -> str:
    """Return the first thing that the user said."""
    return next((message.content for message in messages if message.role == "user"), "")


def tool_names(request: ChatRequest) -> frozenset[str]:
    """Return the names of the tools that may be called now."""
    if request.tool_choice == "none":
        return frozenset()
    return frozenset(str(tool.get("function", {}).get("name")) for tool in request.tools)


def find_document(result: str, title: str) -> str | None:
    """Return the id of the hit of a search that has exactly this title."""
    wanted = _bare(title)
    for document, line in hit_titles(result):
        if line.startswith(wanted) and not line[len(wanted) : len(wanted) + 1].isalnum():
            return document
    return None


@lru_cache(maxsize=4096)  # a turn reads the whole history again
def hit_titles(result: str) -> tuple[tuple[str, str], ...]:
    """Return ids of a search's hits, each with a line that begins with the title.

    Hits are JSON objects with `doc` and `title`, of which some may be cut out, or numbered text: there it does not
    matter whether a hit's first line has the id before the title, behind it or alone.
    """
    if objects := _JSON_HIT.findall(result):
        return tuple((document, _bare(_unquoted(title))) for document, title in objects)
    found: list[tuple[str, str]] = []
    for block in _HIT.split(result)[1:]:
        document = _DOCUMENT.search(block)
        lines = (_bare(_DOCUMENT.sub("", line)) for line in block.splitlines())
        line = next((line for line in lines if line), None)
        if document is not None and line is not None:
            found.append((document[0], line))
    return tuple(found)


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _bare(line: str) -> str:
    return _LABELS.sub("", line).strip()


@lru_cache(maxsize=4096)
def json_object(text: str) -> Mapping[str, Any]:
    """Return a JSON object, empty if the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
