"""What a tool is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from perilune.errors import PeriluneError

Effect = Literal["pure", "idempotent", "side_effect"]
"""What a second run after a crash would do: nothing, the same again, or something that must not happen twice."""


class ToolError(PeriluneError):
    """A tool cannot be set up, or cannot do what it was asked; raised inside a call, its text goes to the model."""


class Artifacts(Protocol):
    """Texts and files that are too large for a conversation."""

    def put(self, content: bytes, *, name: str = "") -> str:
        """Keep content; return the id by which it is read again."""
        ...

    def get(self, artifact_id: str) -> bytes:
        """Return what was kept.

        Raises:
            KeyError: nothing was, under this id.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext:
    """Who calls, and what a call may use."""

    run_id: str
    agent_id: str
    call_id: str
    """Unique in the run; the same again if a crashed run repeats the call."""
    artifacts: Artifacts
    ask: Callable[[str], Awaitable[str]] | None = None
    """Puts a question to a person and waits; None where there is nobody."""
    traceparent: str | None = None
    """W3C trace context of the call's span, for tools that speak to other services."""
    progress: Callable[[float, float | None], None] | None = None
    """Told how far the call is, and what the whole would be if that is known; from any thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOutput:
    """What a model is told."""

    text: str
    is_error: bool = False
    images: tuple[str, ...] = ()
    """`data:` URLs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """Something that a model can have done."""

    name: str
    """`[A-Za-z0-9_-]{1,64}`."""
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object."""
    run: Callable[[dict[str, Any], ToolContext], Awaitable[ToolOutput]]
    """Gets arguments that satisfy the schema. What it raises becomes an error result."""
    effect: Effect = "side_effect"
    timeout_s: float = 60.0
    max_parallel: int | None = None
    """Most calls at a time, over all agents of a run; None: any number."""
    max_result_chars: int = 16_000
    """Longer results are cut in the middle, and kept whole as an artifact."""
    close: Callable[[], Awaitable[None]] | None = field(default=None, compare=False)
    """Called once when the run ends."""
    leave: Callable[[str, str], Awaitable[None]] | None = field(default=None, compare=False)
    """Called with the run's and the agent's id when an agent has ended, for tools that keep something for each."""
    origin: str = field(default="", compare=False)
    """Where it comes from, for people: `perilune.agents.tools.files.read_file`, `git.status of MCP server repo`."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as an element of a request's `tools`."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}
