"""How well a server passes on a model's tool calls: the two numbers that Moonshot's guide to K2 asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perilune.agents.messages import ToolCall
from perilune.errors import EngineError, missing_extra


def tool_call_f1(called: Sequence[bool], reference: Sequence[bool]) -> float | None:
    """Return the F1 of calling a tool where a reference does, in [0, 1]; 0.80 and more is held acceptable.

    Args:
        called: for each prompt, whether the answer holds a tool call.
        reference: for the same prompts, whether the reference's answer does.

    Returns:
        None where neither ever calls one.

    Raises:
        ValueError: they differ in length.
    """
    both = sum(a and b for a, b in zip(called, reference, strict=True))
    total = sum(called) + sum(reference)
    return 2 * both / total if total else None


def schema_accuracy(calls: Iterable[ToolCall], tools: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of calls whose tool exists and whose arguments satisfy its JSON schema, in [0, 1].

    Args:
        calls: of all answers.
        tools: JSON of `tools`, as in a request.

    Returns:
        None where there are no calls.

    Raises:
        EngineError: jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise missing_extra(EngineError, "agents need", error.name, "agents") from error
    known = {tool["function"]["name"]: Draft202012Validator(tool["function"].get("parameters") or {}) for tool in tools}
    verdicts = [call.name in known and _satisfies(known[call.name], call.arguments) for call in calls]
    return sum(verdicts) / len(verdicts) if verdicts else None


def _satisfies(validator: Any, arguments: str) -> bool:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and validator.is_valid(value)
