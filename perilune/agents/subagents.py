"""`create_subagent` and `assign_task`: the orchestrator's two tools, and the sub-agents that they start.

Source: Kimi K2.5 (2602.02276), section 3 and appendix E.8.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from perilune.agents.loop import drive
from perilune.agents.runtime import HeldPlace, Runtime
from perilune.agents.state import AgentState, CallState
from perilune.agents.tools.base import Tool, ToolContext, ToolError, ToolOutput
from perilune.agents.tools.shorten import whole_characters
from perilune.agents.tools.validation import read_json

CREATE_SUBAGENT = "create_subagent"
ASSIGN_TASK = "assign_task"

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_PROMPT_CHARS = 16_000

SCHEMAS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": CREATE_SUBAGENT,
            "description": (
                "Register a kind of sub-agent under a name of its own, to be given tasks with assign_task. The system "
                "prompt says who it is and how it works. Nothing runs yet."
            ),
            "parameters": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "description": "Unique name, of letters, digits, '_', '.' and '-'."},
                    "system_prompt": {"type": "string", "description": "Who it is and how it works."},
                },
                "required": ["name", "system_prompt"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": ASSIGN_TASK,
            "description": (
                "Have a registered sub-agent work on a task. It begins afresh, knows nothing but its system prompt and "
                "this prompt, and returns one message when it is done. Several may be started in one turn: they work "
                "at the same time, which is much faster."
            ),
            "parameters": {
                "type": "object",
                "properties": {
                    "agent": {"type": "string", "description": "Name that was given to create_subagent."},
                    "prompt": {"type": "string", "description": "The whole task, with all that is needed for it."},
                },
                "required": ["agent", "prompt"],
                "additionalProperties": False,
            },
        },
    },
)


async def _never(arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
    raise AssertionError(f"{context.agent_id}: not run by a registry: {arguments}")


SWARM_TOOLS: Mapping[str, Tool] = {
    schema["function"]["name"]: Tool(**schema["function"], run=_never, effect="idempotent") for schema in SCHEMAS
}
"""The two as tools, for rules of consent; `Subagents` runs them."""

CONTRACT = (
    "You work alone on the task below and cannot ask anybody back. Your final message is all that the caller sees: put "
    "the whole result there.{limit}"
)


def offers_subagents(runtime: Runtime, agent: AgentState) -> bool:
    """Whether an agent may start others."""
    return agent.depth < runtime.config.max_depth


def tools_of(runtime: Runtime, agent: AgentState) -> list[dict[str, Any]]:
    """Return what an agent's model is offered."""
    found = [tool.to_dict() for tool in runtime.registry.tools.values()]
    return [*SCHEMAS, *found] if offers_subagents(runtime, agent) else found


class Subagents:
    """Starts sub-agents, waits for them, and tells their parents."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.run_calls: Callable[[AgentState], Awaitable[None]] | None = None
        """Has an agent's open calls run; set by who knits the parts together."""

    async def call(self, agent: AgentState, call: CallState, arguments: dict[str, str]) -> ToolOutput:
        """Answer one of the two tools."""
        if call.call.name == CREATE_SUBAGENT:
            return self._create(agent, arguments)
        return await self._assign(agent, call, arguments)

    @asynccontextmanager
    async def group(self, agent: AgentState, calls: Sequence[CallState]) -> AsyncIterator[None]:
        """Watch over the sub-agents that a turn starts: cancel those that are late, by the group's policy.

        An agent that waits for others gives its own place to them.
        """
        keys = frozenset(call.key for call in calls if call.call.name == ASSIGN_TASK)
        if not keys or not offers_subagents(self._runtime, agent):
            yield
            return
        policy, timer = self._runtime.config.group, None
        if policy.kind == "deadline":
            why = f"the group's {policy.deadline_s:g} s are over"
            timer = asyncio.get_running_loop().call_later(policy.deadline_s, self._cut, agent, keys, why)
        self._arrived(agent, agent.turns - 1)  # of a resumed run, enough may be done already
        place = self._runtime.places.get(agent.id)
        if place is not None:
            place.release()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
        if place is not None:
            await place.acquire()

    def _arrived(self, agent: AgentState, turn: int) -> None:
        """Cut a group off when enough of it are done."""
        policy = self._runtime.config.group
        group = [self._runtime.state.agents[name] for name in agent.groups.get(turn, ())]
        if policy.kind == "quorum" and sum(child.status is not None for child in group) >= policy.quorum:
            calls = frozenset(child.call for child in group if child.call)
            self._cut(agent, calls, f"{policy.quorum} of the group are done")

    def _cut(self, agent: AgentState, calls: frozenset[str], why: str) -> None:
        for name in agent.children:
            if self._runtime.state.agents[name].call in calls:
                self._runtime.cancel(name, why)

    def _create(self, agent: AgentState, arguments: dict[str, str]) -> ToolOutput:
        runtime, name, prompt = self._runtime, arguments["name"], arguments["system_prompt"]
        if not _NAME.fullmatch(name):
            return _error(f"name must be 1 to 64 letters, digits, '_', '.' or '-', got {name[:80]!r}")
        if not 1 <= len(prompt) <= _MAX_PROMPT_CHARS:
            return _error(f"system_prompt must have 1 to {_MAX_PROMPT_CHARS} characters, got {len(prompt)}")
        known = runtime.state.profiles.get(name)
        if known is not None and known != prompt:
            return _error(f"there is a sub-agent {name!r} with another system prompt; choose another name")
        if known is None:
            if len(runtime.state.profiles) >= runtime.config.max_profiles:
                return _error(f"the limit of {runtime.config.max_profiles} kinds of sub-agents is reached")
            runtime.emit("profile_created", "", {"name": name, "system_prompt": prompt, "by": agent.id})
        return ToolOutput(text=f"Sub-agent {name} is ready; give it tasks with assign_task.")

    async def _assign(self, agent: AgentState, call: CallState, arguments: dict[str, str]) -> ToolOutput:
        child = self._child_of(agent, call)
        if child is None:
            refusal = self._refusal(agent, call, arguments)
            if refusal is not None:
                return _error(refusal)
            child = self._spawn(agent, call, arguments)
        await self._run(child)
        self._arrived(agent, agent.turns - 1)
        return ToolOutput(text=self._report(child), is_error=child.status == "error")

    def _child_of(self, agent: AgentState, call: CallState) -> AgentState | None:
        """The sub-agent that a call started before the run was broken off."""
        children = (self._runtime.state.agents[name] for name in agent.children)
        return next((child for child in children if child.call == call.key), None)

    def _refusal(self, agent: AgentState, call: CallState, arguments: dict[str, str]) -> str | None:
        runtime, name, prompt = self._runtime, arguments["agent"], arguments["prompt"]
        if name not in runtime.state.profiles:
            known = ", ".join(runtime.state.profiles) or "none yet"
            return f"there is no sub-agent {name[:80]!r}; make it with create_subagent. There are: {known}"
        if not prompt.strip():
            return "prompt is empty"
        for other in agent.calls.values():
            if other.index < call.index and other.call.name == ASSIGN_TASK and swarm_arguments(other) == arguments:
                return "duplicate: the same task was given to the same sub-agent in this turn"
        if runtime.state.subagents >= runtime.config.max_agents_total:
            return f"the limit of {runtime.config.max_agents_total} sub-agents is reached"
        return None

    def _spawn(self, agent: AgentState, call: CallState, arguments: dict[str, str]) -> AgentState:
        runtime = self._runtime
        child_id = f"{agent.id}/{len(agent.children) + 1}"
        most = runtime.config.subagent.max_tool_calls
        limit = "" if most is None else f" You have {most} tool calls."
        system = f"{runtime.state.profiles[arguments['agent']]}\n\n{CONTRACT.format(limit=limit)}"
        payload = {
            "parent": agent.id,
            "profile": arguments["agent"],
            "call": call.key,
            "depth": agent.depth + 1,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": arguments["prompt"]},
            ],
        }
        runtime.emit("agent_spawned", child_id, payload, cause=call.started)
        return runtime.state.agents[child_id]

    async def _run(self, child: AgentState) -> None:
        """Run a sub-agent to its end, in the task that is cancelled if it is."""
        runtime, task = self._runtime, asyncio.current_task()
        assert task is not None
        assert self.run_calls is not None
        runtime.scopes[child.id] = task
        place = runtime.places[child.id] = HeldPlace(runtime.slots)
        try:
            if child.id in runtime.cancelled:
                raise asyncio.CancelledError
            queued = time.monotonic()
            await place.acquire()
            if child.status is None:
                runtime.emit("agent_started", child.id, {"queued_s": time.monotonic() - queued})
                if runtime.elsewhere is not None:
                    await runtime.elsewhere.drive(runtime, child)
                else:
                    await drive(runtime, child, tools_of(runtime, child), self.run_calls)
        except asyncio.CancelledError:
            if child.id not in runtime.cancelled:
                raise
            if task.cancelling() and task.uncancel() > 0:  # its parent is told to end too
                raise
            runtime.finish(child, "cancelled", error=runtime.cancelled[child.id])
        finally:
            place.release()
            runtime.scopes.pop(child.id, None)
            runtime.places.pop(child.id, None)

    def _report(self, child: AgentState) -> str:
        """What the parent is told, whatever happened."""
        most = self._runtime.config.result_chars
        report: dict[str, Any] = {
            "agent_id": child.id,
            "agent": child.profile,
            "status": child.status,
            "steps": child.turns,
            "tool_calls": child.tool_calls,
            "result": whole_characters(child.result),
        }
        if child.error is not None:
            report["error"] = child.error
        if len(child.result) > most:
            report["artifact"] = self._kept(child.id, report["result"])
            report["result"] = report["result"][:most]
        return json.dumps(report, ensure_ascii=False)

    def _kept(self, name: str, text: str) -> str:
        """Keep a text as an artifact; return its id, or why it has none."""
        try:
            return self._runtime.artifacts.put(text.encode(), name=name)
        except (OSError, ToolError) as error:
            return f"the whole could not be kept: {error}"


def swarm_arguments(call: CallState) -> dict[str, str] | str:
    """Return the arguments of one of the two tools, or what is wrong with them."""
    name = call.call.name
    wanted = ("name", "system_prompt") if name == CREATE_SUBAGENT else ("agent", "prompt")
    try:
        found = read_json(call.call.arguments)
    except ValueError as error:
        return f"{name}: the arguments are no JSON: {error}"
    if not isinstance(found, dict) or set(found) != set(wanted):
        there = ", ".join(found) if isinstance(found, dict) else type(found).__name__
        return f"{name} takes {' and '.join(wanted)}, got {there or 'nothing'}"
    for key in wanted:
        if not isinstance(found[key], str):
            return f"{name}: {key} must be a string, got {type(found[key]).__name__}"
    return found


def _error(text: str) -> ToolOutput:
    return ToolOutput(text=text, is_error=True)
