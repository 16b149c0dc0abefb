"""Kimi K2's tool calls: ids that carry the tool's name, and calls taken out of raw text.

The chat template shows a call's id and nothing else of it beside a result, so an id must read `functions.NAME:IDX`,
where IDX counts all calls of the conversation from 0. With other ids in its history the model comes to write ids that
no parser accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from perilune.agents.client.dialects.kimi_k2_parser import (
    ARGUMENTS,
    CALL,
    END_CALL,
    END_SECTION,
    SECTION,
    RawCall,
    parse,
)
from perilune.agents.messages import ChatRequest, Message, ToolCall

_NAME_AND_COUNT = re.compile(r"(?:functions\.)?(?P<name>.+?)\s*:\s*\d+", re.DOTALL)
_CALL_ID = re.compile(r"(?:call|chatcmpl-tool|toolu)[_-]\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiK2:
    """The dialect, for a client of a server that has no parser of tool calls.

    The server must leave the markers in its text: vLLM does with {"skip_special_tokens": False} in `extra_body`.
    """

    starts_in_think: bool = False
    """Whether the chat template ends the prompt with `<think>`."""

    def outgoing(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return a history whose ids are `functions.NAME:IDX`."""
        return with_kimi_ids(messages)[0]

    def incoming(self, message: Message, request: ChatRequest) -> Message:
        """Return an answer with the tool calls and thoughts that its text holds taken out of it."""
        if message.tool_calls:
            return message
        if SECTION in (message.reasoning or "") or CALL in (message.reasoning or ""):
            # A server that splits off thoughts takes a section before `</think>` for one.
            text, starts_in_think = f"{message.reasoning}{message.content}", True
        else:
            text, starts_in_think = message.content, self.starts_in_think and message.reasoning is None
        found = parse(text, starts_in_think=starts_in_think)
        return replace(
            message,
            content=found.content,
            reasoning=message.reasoning if found.reasoning is None else found.reasoning,
            tool_calls=tuple(resolve(call, request.tools) for call in found.calls),
        )


def with_kimi_ids(messages: Sequence[Message]) -> tuple[tuple[Message, ...], dict[str, str]]:
    """Return a history with ids counted over all of it, and the map from them to those they stand for.

    A result belongs to the latest call of its id, as servers use an id again in later turns. One without a call keeps
    its id.
    """
    written: list[Message] = []
    originals: dict[str, str] = {}
    latest: dict[str, str] = {}
    for message in messages:
        if message.tool_calls:
            calls: list[ToolCall] = []
            for call in message.tool_calls:
                latest[call.id] = kimi_id = f"functions.{call.name}:{len(originals)}"
                originals[kimi_id] = call.id
                calls.append(replace(call, id=kimi_id))
            message = replace(message, tool_calls=tuple(calls))
        elif message.tool_call_id in latest:
            message = replace(message, tool_call_id=latest[message.tool_call_id])
        written.append(message)
    return tuple(written), originals


def render_calls(calls: Iterable[ToolCall]) -> str:
    """Return tool calls as the model writes them; their ids are written as they are."""
    inner = "".join(f"{CALL}{call.id}{ARGUMENTS}{call.arguments}{END_CALL}" for call in calls)
    return f"{SECTION}{inner}{END_SECTION}" if inner else ""


def resolve(call: RawCall, tools: Sequence[Mapping[str, Any]] = ()) -> ToolCall:
    """Return a call with the name of its tool.

    It stands in the id; with an id that is a bare count, the tool is the one whose parameters fit the arguments best;
    with an id of another maker it stands in the arguments. If there is no telling, the name is the id, which no tool
    has: the model is told so.

    Args:
        call: as it was written.
        tools: of the request.
    """
    known = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    found = _NAME_AND_COUNT.fullmatch(call.id)
    if found:
        return ToolCall(id=call.id, name=found["name"], arguments=call.arguments)
    if call.id.isdecimal():
        name = _best_match(_object(call.arguments), known)
        return ToolCall(id=call.id, name=name or call.id, arguments=call.arguments)
    name = call.id.removeprefix("functions.")
    if name not in known and (_CALL_ID.fullmatch(call.id) or known):
        inner = _named_within(call, known)
        if inner is not None:
            return inner
    return ToolCall(id=call.id, name=name, arguments=call.arguments)


def _named_within(call: RawCall, known: Mapping[str, Any]) -> ToolCall | None:
    """Read `{"name": ..., "arguments": {...}}`, or a name among the arguments themselves."""
    outer = _object(call.arguments)
    name = outer.pop("name", None)
    if not isinstance(name, str) or (known and name not in known):
        return None
    inner: object = outer
    for key in ("arguments", "parameters"):
        if key in outer and len(outer) == 1:
            inner = outer[key]
    text = inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)
    return ToolCall(id=call.id, name=name, arguments=text)


def _best_match(arguments: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the tool with the most of these keys and the fewest misfits, unless two are as good or none fits."""
    scores: dict[str, int] = {}
    for name, schema in known.items():
        keys, wanted = set(arguments), set(cast("Mapping[str, Any]", schema.get("properties") or {}))
        missing = set(schema.get("required") or ()) - keys
        if keys & wanted or not (keys or missing):
            scores[name] = len(keys & wanted) - len(keys - wanted) - len(missing)
    best = max(scores.values(), default=0)
    names = [name for name, score in scores.items() if score == best]
    return names[0] if len(names) == 1 and best >= 0 else None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
