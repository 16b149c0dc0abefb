"""A call of a tool, in the shape of the OpenAI API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A model's wish to have a tool run."""

    id: str
    """Pairs the call with its result; unique within a message."""
    name: str
    arguments: str
    """JSON as the model wrote it; it may be wrong."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as an element of `tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ToolCall:
        """Read an element of `tool_calls`."""
        function = value["function"]
        return cls(id=value.get("id") or "", name=function["name"], arguments=function.get("arguments") or "")


def json_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text is; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
