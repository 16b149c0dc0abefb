"""Kimi K2's tool calls: as they are written, and which tool an id means.

The chat template shows a call's id and nothing else of it beside a result, so an id must read `functions.NAME:IDX`,
where IDX counts all calls of the conversation from 0.

Source: Kimi K2, appendix B; the published guide to its tool calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from perilune.tool_calls.call import ToolCall, json_object
from perilune.tool_calls.kimi_k2_parser import ARGUMENTS, CALL, END_CALL, END_SECTION, SECTION, RawCall

_NAME_AND_COUNT = re.compile(r"\s*(?:functions\.)?(?P<name>.+?)\s*:\s*\d+\s*", re.DOTALL)
_CALL_ID = re.compile(r"(?:call|chatcmpl-tool|toolu)[_-]\w+")


def render_calls(calls: Iterable[ToolCall]) -> str:
    """Return tool calls as the model writes them; their ids are written as they are."""
    inner = "".join(f"{CALL}{call.id}{ARGUMENTS}{call.arguments}{END_CALL}" for call in calls)
    return f"{SECTION}{inner}{END_SECTION}" if inner else ""


def name_in_id(call_id: str) -> str | None:
    """Return the tool's name in an id like `functions.NAME:IDX`, with or without the prefix; None in another id."""
    found = _NAME_AND_COUNT.fullmatch(call_id)
    return found["name"] if found else None


def resolve(call: RawCall, tools: Sequence[Mapping[str, Any]] = ()) -> ToolCall | None:
    """Return a call with the name of its tool; None if there is no telling which it is.

    The name stands in the id. With an id of another maker it may stand in the arguments; else, as with an id that is a
    bare count, the tool is the one whose parameters fit the arguments best. Arguments that are empty are `{}`.

    Args:
        call: as it was written.
        tools: of the request.
    """
    arguments = call.arguments or "{}"
    name = name_in_id(call.id)
    if name is not None:
        return ToolCall(id=call.id, name=name, arguments=arguments)
    known = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    name = call.id.removeprefix("functions.")
    is_opaque = bool(_CALL_ID.fullmatch(call.id)) or not name
    if not call.id.isdecimal() and name not in known and (is_opaque or known):
        inner = _named_within(call, known)
        if inner is not None:
            return inner
    if call.id.isdecimal() or (is_opaque and name not in known):
        best = _best_match(json_object(arguments) or {}, known)
        return None if best is None else ToolCall(id=call.id, name=best, arguments=arguments)
    return ToolCall(id=call.id, name=name, arguments=arguments)


def _named_within(call: RawCall, known: Mapping[str, Any]) -> ToolCall | None:
    """Read `{"name": ..., "arguments": {...}}`, or a name among the arguments themselves."""
    outer = json_object(call.arguments) or {}
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
