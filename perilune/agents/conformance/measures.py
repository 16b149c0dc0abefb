"""The two measures: whether calls satisfy their schemas, and whether tools are called where a reference calls them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perilune.agents.messages import ToolCall
from perilune.agents.tools.base import ToolError
from perilune.agents.tools.validation import Validator


def call_errors(calls: Iterable[ToolCall], tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the calls of one answer, a line for each call that is wrong.

    Args:
        calls: of the answer.
        tools: JSON of `tools`, as in the request.

    Raises:
        KeyError: a tool has no function, or no name.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    errors = (_error(call, schemas) for call in calls)
    return [error for error in errors if error is not None]


def _error(call: ToolCall, schemas: Mapping[str, Mapping[str, Any]]) -> str | None:
    if call.name not in schemas:
        return f"{call.name[:100]!r} is no tool of the request"
    try:
        value = Validator(call.name, schemas[call.name]).parse(call.arguments)
    except ToolError as error:
        return str(error)
    if isinstance(value, str):
        return value
    return None if isinstance(value, dict) else f"{call.name}: the arguments are no object"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallAgreement:
    """How often two sets of answers to the same requests call tools."""

    both: int
    """Requests where both call."""
    called: int
    """Where the one under test does."""
    reference: int
    """Where the reference does."""

    @property
    def precision(self) -> float | None:
        """Share of the answers with calls where the reference calls too; None without any."""
        return self.both / self.called if self.called else None

    @property
    def recall(self) -> float | None:
        """Share of the reference's answers with calls that are called here too; None without any."""
        return self.both / self.reference if self.reference else None

    @property
    def f1(self) -> float | None:
        """2 both / (called + reference), their harmonic mean; None where neither ever calls."""
        total = self.called + self.reference
        return 2 * self.both / total if total else None


def call_agreement(called: Sequence[bool], reference: Sequence[bool]) -> CallAgreement:
    """Count where tools are called.

    Args:
        called: for each request, whether the answer calls a tool.
        reference: for the same requests, whether the reference's answer does.

    Raises:
        ValueError: they differ in length.
    """
    both = sum(a and b for a, b in zip(called, reference, strict=True))
    return CallAgreement(both=both, called=sum(called), reference=sum(reference))
