"""What the tests of tools share."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from perilune.agents.tools.artifacts import MemoryArtifacts
from perilune.agents.tools.base import Tool, ToolContext, ToolOutput
from perilune.agents.tools.registry import ToolRegistry


def context(agent_id="root", call_id="c1", ask=None, artifacts=None, traceparent=None, progress=None) -> ToolContext:
    """Return who calls."""
    return ToolContext(
        run_id="run",
        agent_id=agent_id,
        call_id=call_id,
        artifacts=artifacts if artifacts is not None else MemoryArtifacts(),
        ask=ask,
        traceparent=traceparent,
        progress=progress,
    )


def run(what: Awaitable[Any]) -> Any:
    """Run to the end in a loop of its own; nothing may be left running."""

    async def whole():
        result = await what
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        return result

    return asyncio.run(whole())


async def call(tool: Tool, /, caller: ToolContext | None = None, **arguments: Any) -> ToolOutput:
    """Run a tool through a registry."""
    return await ToolRegistry([tool]).run(tool.name, arguments, caller or context())


def by_name(tools) -> dict[str, Tool]:
    """Return tools by their names."""
    return {tool.name: tool for tool in tools}
