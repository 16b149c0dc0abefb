"""Requests of a conformance test: one chat body a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from perilune.agents.messages import ChatRequest, Sampling
from perilune.agents.tools.validation import read_json
from perilune.errors import DataError

_ASKED = ("messages", "tools", "tool_choice")
_INPUT_ROLE = "_input"
"""A role in the vendor's files that stands for `system`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRequest:
    """A request that a server is tested with."""

    line: int
    """Of the file, from 1."""
    body: Mapping[str, Any]
    """Sent as it stands, with the keys that ask for a stream as the client needs them."""

    @property
    def digest(self) -> str:
        """Name of the whole body: what must be the same for an earlier answer to count."""
        return digest(self.body)

    @property
    def question(self) -> str:
        """Name of what is asked, whoever is asked and however it samples: what a reference is matched by."""
        return question(self.body)

    def as_chat(self) -> ChatRequest:
        """Return what a client sends: every key of the body, unread."""
        body = {key: value for key, value in self.body.items() if key not in ("stream", "stream_options")}
        return ChatRequest(
            model=body["model"],
            messages=(),
            sampling=Sampling(extra_body=body),
            agent_id=self.digest,
            stream=bool(self.body.get("stream")),
        )


def digest(body: Mapping[str, Any]) -> str:
    """Return a name for a JSON object that does not depend on the order of its keys."""
    return sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def question(body: Mapping[str, Any]) -> str:
    """Return a name for what a body asks."""
    return digest({key: body[key] for key in _ASKED if body.get(key)})


def read_requests(path: Path, *, model: str, extra: Mapping[str, Any] | None = None) -> list[ToolRequest]:
    """Read a file of requests.

    Args:
        path: JSONL; empty lines are passed over.
        model: takes the place of the one in each body.
        extra: further keys of every body, in place of its own.

    Raises:
        DataError: it cannot be read, has no requests, or a line is no chat body; the message names the line.
    """
    found: list[ToolRequest] = []
    for line, value in read_lines(path):
        _check(value, f"{path}: line {line}")
        messages = [
            {**message, "role": "system"} if message["role"] == _INPUT_ROLE else message
            for message in value["messages"]
        ]
        found.append(ToolRequest(line=line, body={**value, "messages": messages, **(extra or {}), "model": model}))
    if not found:
        raise DataError(f"{path}: has no requests; each line must be the JSON body of a chat request")
    return found


def read_lines(path: Path, *, is_growing: bool = False) -> list[tuple[int, dict[str, Any]]]:
    """Read a JSON object a line, with the line's number from 1.

    Args:
        path: the file.
        is_growing: whether a last line without its end may be one that was broken off, to be dropped.

    Raises:
        DataError: it cannot be read, or a line is no JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if is_growing:
        lines.pop()
    found: list[tuple[int, dict[str, Any]]] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            value = read_json(text.decode())
        except ValueError as error:
            raise DataError(f"{path}: line {number} is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}: line {number} must be a JSON object, got {type(value).__name__}")
        found.append((number, value))
    return found


def _check(body: Mapping[str, Any], where: str) -> None:
    messages, tools = body.get("messages"), body.get("tools")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list that is not empty")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: messages[{place}] must be an object with a role")
    if not isinstance(tools, list | None):
        raise DataError(f"{where}: tools must be a list")
    for place, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tools[{place}] must be an object with a function that has a name")
        if not isinstance(function.get("parameters"), dict | None):
            raise DataError(f"{where}: tools[{place}]: parameters must be an object, a JSON Schema")
