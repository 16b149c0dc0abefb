"""The calls of a turn: profiles first, then everything else at once, results in the order of the calls.

What a tool says is data. It becomes a message to the model that asked; it is never read for anything else, so it cannot
register tools, raise budgets or approve calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

from perilune.agents.background import Background
from perilune.agents.journal import JournalError
from perilune.agents.runtime import Runtime
from perilune.agents.state import ROOT, AgentState, CallState
from perilune.agents.subagents import Subagents, offers_subagents, tools_of
from perilune.agents.swarm_tools import CREATE_SUBAGENT, SWARM_TOOLS, is_swarm_tool, swarm_arguments
from perilune.agents.tools.base import ToolContext, ToolOutput

UNKNOWN = (
    "The outcome of this call is unknown: the program that ran it crashed. It may have taken effect; verify before you "
    "repeat it."
)
_PROGRESS_S = 1.0
_REMINDERS = {
    3: "[the same was called in three turns in a row]",
    5: "[the same was called in five turns in a row; its result will not change; do something else]",
    8: "[the same was called in eight turns in a row; if you go on, you will be stopped]",
}


class _Progress:
    """Writes down how far a call is, now and then: a journal is no place for a thousand reports."""

    def __init__(self, runtime: Runtime, agent: AgentState, call: CallState) -> None:
        self._runtime, self._agent, self._call = runtime, agent, call
        self._loop, self._told = asyncio.get_running_loop(), -math.inf

    def tell(self, done: float, total: float | None) -> None:
        """See `ToolContext.progress`."""
        with contextlib.suppress(RuntimeError):  # the loop is closed; a tool that was abandoned still runs
            self._loop.call_soon_threadsafe(self._write, done, total)

    def _write(self, done: float, total: float | None) -> None:
        runtime, now = self._runtime, self._runtime.now()
        if now - self._told < _PROGRESS_S or not math.isfinite(done):
            return
        if self._call.result is not None or self._call.key not in self._agent.calls:
            return
        self._told = now
        known = total if total is not None and math.isfinite(total) and total > 0 else None
        payload = {"call": self._call.key, "done": done, "total": known}
        with contextlib.suppress(JournalError):  # whoever drives the agent is told
            runtime.emit("tool_progress", self._agent.id, payload, cause=self._call.started)


class Calls:
    """Has the open calls of agents run."""

    def __init__(self, runtime: Runtime, subagents: Subagents) -> None:
        self._runtime, self._subagents = runtime, subagents
        self._offered: dict[tuple[bool, int], tuple[dict[str, Any], ...]] = {}

    @property
    def background(self) -> Background:
        """See `AgentWork`."""
        return self._subagents.background

    def tools(self, agent: AgentState) -> tuple[dict[str, Any], ...]:
        """See `AgentWork`; the same object as long as nothing changes, which is what makes hashing it cheap."""
        key = (offers_subagents(self._runtime, agent), self._runtime.registry.version)
        if key not in self._offered:
            self._offered[key] = tools_of(self._runtime, agent)
        return self._offered[key]

    async def run(self, agent: AgentState) -> None:
        """Run the calls of an agent's last turn that have no result yet."""
        waiting = [call for call in agent.calls.values() if call.result is None]
        for call in [call for call in waiting if call.call.name == CREATE_SUBAGENT]:
            await self._run_one(agent, call)
        others = [call for call in waiting if call.call.name != CREATE_SUBAGENT]
        async with self._subagents.group(agent, others):
            if len(others) == 1:
                await self._run_one(agent, others[0])
                return
            async with asyncio.TaskGroup() as group:
                for call in others:
                    group.create_task(self._run_one(agent, call), name=call.key)

    async def _run_one(self, agent: AgentState, call: CallState) -> None:
        refusal = self._refusal(agent, call)
        if refusal is not None:
            self._finish(agent, call, ToolOutput(text=refusal, is_error=True), 0.0)
            return
        began = time.monotonic()
        is_swarm = is_swarm_tool(call.call.name, self._runtime.config.extensions)
        if is_swarm and offers_subagents(self._runtime, agent):
            output = await self._call_swarm(agent, call)
        else:
            output = await self._call_tool(agent, call)
        self._finish(agent, call, output, time.monotonic() - began)

    def _refusal(self, agent: AgentState, call: CallState) -> str | None:
        """Why a call is not even tried."""
        if call.index < agent.admitted_calls:
            return None
        config, most = self._runtime.config, self._runtime.limits_of(agent).max_tool_calls
        if call.index >= config.max_calls_per_turn:
            return f"only {config.max_calls_per_turn} calls of a turn are run; make this one again in your next turn"
        if most is not None and call.index >= most - (agent.tool_calls - len(agent.calls)):
            return f"the limit of {most} tool calls is reached; this one was not run"
        return "the budget of tool calls is used up; this call was not run"

    async def _call_swarm(self, agent: AgentState, call: CallState) -> ToolOutput:
        runtime = self._runtime
        arguments = swarm_arguments(call.call, runtime.config.extensions, tuple(runtime.models))
        if isinstance(arguments, str):
            return ToolOutput(text=arguments, is_error=True)
        tool = SWARM_TOOLS[call.call.name]
        if not call.started:  # before a crash it was allowed
            decision = await runtime.approvals.check(tool, arguments, self._context(agent, call))
            if not decision.allowed:
                return ToolOutput(text=decision.reason, is_error=True)
        self._start(agent, call, tool.effect)
        return await self._subagents.call(agent, call, arguments)

    async def _call_tool(self, agent: AgentState, call: CallState) -> ToolOutput:
        runtime, name = self._runtime, call.call.name
        arguments = runtime.registry.validate(name, call.call.arguments)
        if isinstance(arguments, str):
            return ToolOutput(text=arguments, is_error=True)
        effect = runtime.registry.tools[name].effect
        if call.started and effect == "side_effect":
            return ToolOutput(text=UNKNOWN, is_error=True)
        context = self._context(agent, call)
        decision = await runtime.approvals.check(runtime.registry.tools[name], arguments, context)
        if not decision.allowed:
            return ToolOutput(text=decision.reason, is_error=True)
        self._start(agent, call, effect)
        if effect != "pure":
            await runtime.journal.commit()
        context = replace(context, traceparent=runtime.traceparent(call.key))  # whose span began just now
        return await runtime.registry.run(name, arguments, context)

    def _context(self, agent: AgentState, call: CallState) -> ToolContext:
        runtime = self._runtime
        return ToolContext(
            run_id=runtime.state.run_id,
            agent_id=agent.id,
            call_id=call.key,
            artifacts=runtime.artifacts,
            ask=partial(runtime.ask, call.key) if runtime.approvals.is_interactive else None,
            progress=_Progress(runtime, agent, call).tell,
        )

    def _start(self, agent: AgentState, call: CallState, effect: str) -> None:
        if call.started:
            return
        payload = {"call": call.key, "name": call.call.name, "arguments": call.call.arguments, "effect": effect}
        self._runtime.emit("tool_started", agent.id, payload)

    def _finish(self, agent: AgentState, call: CallState, output: ToolOutput, elapsed_s: float) -> None:
        payload: dict[str, Any] = {
            "call": call.key,
            "name": call.call.name,
            "text": output.text,
            "is_error": output.is_error,
            "elapsed_s": elapsed_s,
        }
        note = self._note(agent, call)
        if note:
            payload["note"] = note
        if output.images:
            payload["images"] = list(output.images)
        self._runtime.emit("tool_finished", agent.id, payload, cause=call.started or None)

    def _note(self, agent: AgentState, call: CallState) -> str:
        """What an agent is told beside a result: that it repeats itself, and that the budget runs out."""
        if self._runtime.notes is not None:
            return self._runtime.notes.get(call.key, "")
        notes = [_REMINDERS.get(agent.repeated[1]) if call.index == 0 else None]
        if agent.id == ROOT:
            notes.append(self._runtime.warn_of_budget())
        return "\n\n".join(note for note in notes if note)
