"""Messages of the OpenAI API, checked and brought to the one form that templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from perilune.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")


def normalize_messages(
    messages: Sequence[Mapping[str, Any]], *, kimi_ids: bool = False, parse_arguments: bool = False
) -> list[dict[str, Any]]:
    """Check messages and return them with `content` a string.

    Null content, an empty list and missing content become the empty string; texts of a content list are joined; the
    role `developer` is `system` by its newer name; thoughts under `reasoning` are found under `reasoning_content`.

    Args:
        messages: in the shape of the OpenAI API.
        kimi_ids: rewrite ids of calls, and of results with them, to `functions.NAME:IDX`, where IDX counts all calls
            from 0.
        parse_arguments: replace arguments that are the text of a JSON object by that object.

    Raises:
        DataError: a message is not as it must be, or a result belongs to no call; the message's number is named.
    """
    if not messages:
        raise DataError("messages must hold at least one message, got none")
    found: list[dict[str, Any]] = []
    latest: dict[str, str] = {}
    count = 0
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        turn = _normalize(message, where)
        if turn["role"] == "tool":
            turn["tool_call_id"] = _call_of(turn, latest, where)
        for index, call in enumerate(turn.get("tool_calls") or ()):
            call["function"] = dict(call["function"])
            new_id = f"functions.{call['function']['name']}:{count}" if kimi_ids else call.get("id")
            if new_id is None:
                raise DataError(f"{where}.tool_calls[{index}].id must be a string, got None")
            latest[call.get("id") or new_id] = call["id"] = new_id
            if parse_arguments:
                call["function"]["arguments"] = _parsed(call["function"]["arguments"])
            count += 1
        found.append(turn)
    return found


def sort_keys(value: Any) -> Any:
    """Return JSON with the keys of every object in order, as Kimi's tools are declared.

    Source: Kimi K2 release, chat template.
    """
    if isinstance(value, Mapping):
        return {key: sort_keys(value[key]) for key in sorted(value)}
    return [sort_keys(item) for item in value] if isinstance(value, list | tuple) else value


def _normalize(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must be an object, got {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}")
    turn = {key: value for key, value in message.items() if value is not None}
    turn["role"] = "system" if role == "developer" else role
    turn["content"] = _text(message.get("content"), where)
    for key in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        if not isinstance(turn.get(key, ""), str):
            raise DataError(f"{where}.{key} must be a string, got {type(turn[key]).__name__}")
    thought = turn.pop("reasoning", None)
    if thought is not None:
        turn.setdefault("reasoning_content", thought)
    if "tool_calls" in turn:
        turn["tool_calls"] = _calls(turn["tool_calls"], role, where)
        if not turn["tool_calls"]:
            del turn["tool_calls"]
    return turn


def _text(content: object, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise DataError(f"{where}.content must be a string or a list of parts, got {type(content).__name__}")
    texts: list[str] = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(
                f'{where}.content[{index}] must be {{"type": "text", "text": ...}}, got one of type {kind!r}'
            )
    return "".join(texts)


def _calls(calls: object, role: object, where: str) -> list[dict[str, Any]]:
    if role != "assistant" and calls:
        raise DataError(f"{where}.tool_calls: only an assistant calls tools, not a message of role {role!r}")
    if not isinstance(calls, list):
        raise DataError(f"{where}.tool_calls must be a list, got {type(calls).__name__}")
    found: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping):
            raise DataError(f"{where}.tool_calls[{index}] must be an object with a function")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{where}.tool_calls[{index}].function.name must be a string that is not empty")
        if not isinstance(function.get("arguments", ""), str | Mapping):
            raise DataError(f"{where}.tool_calls[{index}].function.arguments must be a string of JSON")
        if not isinstance(call.get("id") or "", str):
            raise DataError(f"{where}.tool_calls[{index}].id must be a string, got {type(call['id']).__name__}")
        arguments = function.get("arguments") or "{}"
        found.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    return found


def _call_of(turn: Mapping[str, Any], latest: Mapping[str, str], where: str) -> str:
    """Return the id, as it is now, of the call that a result answers: the latest with that id."""
    wanted = turn.get("tool_call_id")
    if wanted is None or wanted not in latest:
        there = ", ".join(map(repr, latest)) or "none"
        raise DataError(f"{where}.tool_call_id must be the id of an earlier call ({there}), got {wanted!r}")
    return latest[wanted]


def _parsed(arguments: Any) -> Any:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
