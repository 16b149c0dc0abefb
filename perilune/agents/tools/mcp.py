"""Tools of MCP servers, over stdio and streamable HTTP, with the official `mcp` package.

What a server says is data. The tools there are at the start are all there ever are; what they do after a crash
(`McpServer.effects`) is said by the host and not by the server's hints; a description that changes later reaches no
model unless the host passes it on. Servers cannot sample from a model, and their questions to a person are marked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from perilune.agents.tools.base import Tool, ToolContext, ToolError, ToolOutput
from perilune.agents.tools.mcp_connection import Connection
from perilune.agents.tools.mcp_server import McpServer
from perilune.errors import missing_extra

__all__ = ["McpServer", "McpTools"]

logger = logging.getLogger(__name__)


class McpTools:
    """Servers of a run, started, and their tools."""

    def __init__(self, connections: Sequence[Connection], warnings: Sequence[str]) -> None:
        """Use `connect`."""
        self._connections = tuple(connections)
        self.warnings = tuple(warnings)
        """What is missing and why; a server that did not start is no error."""
        self.tools = tuple(tool for connection in connections for tool in connection.tools)

    @classmethod
    async def connect(
        cls,
        servers: Sequence[McpServer],
        *,
        on_changed: Callable[[Tool], None] | None = None,
    ) -> McpTools:
        """Start all servers at once.

        Args:
            servers: with different names.
            on_changed: gets a tool whose server now describes it otherwise, such as `Swarm.describe`; if None, tools
                stay what they were at the start, as those of isolated servers always do. New tools never come.

        Raises:
            ToolError: two servers have one name, or `mcp` is not installed.
        """
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise missing_extra(ToolError, "this tool needs", error.name, "mcp") from error
        names = [server.name for server in servers]
        if len(set(names)) != len(names):
            raise ToolError(f"two MCP servers have one name: {', '.join(sorted(names))}")
        connections = [_PerAgent(server) if server.isolate else Connection(server, on_changed) for server in servers]
        failures = await asyncio.gather(*(connection.start() for connection in connections))
        warnings = [failure for failure in failures if failure is not None]
        warnings += [warning for connection in connections for warning in connection.warnings]
        for warning in warnings:
            logger.warning("%s", warning)
        return cls(connections, warnings)

    async def close(self) -> None:
        """Stop all servers; closing a registry of their tools does the same."""
        await asyncio.gather(*(connection.close() for connection in self._connections))


class _PerAgent(Connection):
    """A server whose first process only lists its tools; each agent's calls go to one of the agent's own."""

    def __init__(self, server: McpServer) -> None:
        super().__init__(server)
        self.call_of = self._call_for_agent
        self._own: dict[tuple[str, str], Connection] = {}
        self._left: set[tuple[str, str]] = set()

    async def start(self) -> str | None:
        """Take the tools; see `Connection.start`."""
        failure = await super().start()
        await super().close()
        self.tools = tuple(replace(tool, leave=self._leave) for tool in self.tools)
        return failure

    async def close(self) -> None:
        """Stop the servers of all agents."""
        own, self._own = list(self._own.values()), {}
        await asyncio.gather(*(connection.close() for connection in own))

    async def _call_for_agent(self, name: str, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        who = (context.run_id, context.agent_id)
        connection = self._own.get(who)
        if connection is None:
            connection = self._own[who] = Connection(self.server)
        output = await connection.call(name, arguments, context)
        if who in self._left:
            self._left.discard(who)
            output = replace(output, text=f"{_STARTED_ANEW}\n{output.text}")
        return output

    async def _leave(self, run_id: str, agent_id: str) -> None:
        connection = self._own.pop((run_id, agent_id), None)
        if connection is not None:
            self._left.add((run_id, agent_id))
            await connection.close()


_STARTED_ANEW = "[this server was started anew for you; what it had in memory from your earlier task is gone]"
