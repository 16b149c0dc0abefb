"""Which MCP server is meant, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from perilune.agents.tools.base import Effect, ToolError


@dataclass(frozen=True, slots=True, kw_only=True)
class McpServer:
    """A server, and what is wanted of it."""

    name: str
    """Of this run's own choosing; its tools are named `name__tool`."""
    command: tuple[str, ...] = ()
    """Program and arguments, for stdio."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Given to the program besides PATH, HOME and a few more; nothing else of this program's environment is."""
    cwd: str | None = None
    url: str | None = None
    """For streamable HTTP."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with each request, for keys."""
    tools: tuple[str, ...] = ("*",)
    """Patterns of the tools that are wanted, by the server's names."""
    isolate: bool = False
    """Whether each agent has a server of its own, for one that remembers what it was told; it ends with the agent."""
    effects: Mapping[str, Effect] = field(default_factory=dict)
    """By the server's names; what is not named has side effects."""
    timeout_s: float = 60.0
    """For a call."""
    start_timeout_s: float = 30.0
    max_restarts: int = 3
    """In a run."""
    backoff_s: float = 0.5
    """Before the first restart; doubled for each."""

    def __post_init__(self) -> None:
        if bool(self.command) == (self.url is not None):
            raise ToolError(f"MCP server {self.name!r} needs either command or url")
