"""Sub-agents: registered, started, continued, waited for, and what their parents are told.

Source: Kimi K2.5 (2602.02276), section 3 and appendix E.8.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from perilune.agents.assigning import AssignRules
from perilune.agents.background import Background
from perilune.agents.loop import AgentWork, drive
from perilune.agents.runtime import HeldPlace, Runtime
from perilune.agents.state import AgentState, CallState
from perilune.agents.swarm_tools import CREATE_SUBAGENT, SWARM_MAP, swarm_schemas
from perilune.agents.tools.base import ToolError, ToolOutput
from perilune.agents.tools.shorten import whole_characters

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_PROMPT_CHARS = 16_000

CONTRACT = (
    "You work alone on the task below and cannot ask anybody back. Your final message is all that the caller sees: put "
    "the whole result there.{limit}"
)
FORK = (
    "[You are {agent} from here on, a sub-agent that begins with a copy of its caller's history. Tools that are not "
    "offered any more were the caller's.]\n\n{system}\n\n{contract}\n\n{prompt}"
)


def offers_subagents(runtime: Runtime, agent: AgentState) -> bool:
    """Whether an agent may start others."""
    return agent.depth < runtime.config.max_depth


def tools_of(runtime: Runtime, agent: AgentState) -> tuple[dict[str, Any], ...]:
    """Return what an agent's model is offered."""
    found = tuple(tool.to_dict() for tool in runtime.registry.tools.values())
    if not offers_subagents(runtime, agent):
        return found
    return (*swarm_schemas(runtime.config.extensions, tuple(runtime.models)), *found)


class Subagents:
    """Starts sub-agents, waits for them, and tells their parents."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._rules = AssignRules(runtime)
        self.background = Background(runtime, self._run, self._report)
        self.work: AgentWork | None = None
        """Has the calls of agents run; set by who knits the parts together."""

    async def call(self, agent: AgentState, call: CallState, arguments: dict[str, Any]) -> ToolOutput:
        """Answer one of the swarm's tools."""
        if call.call.name == CREATE_SUBAGENT:
            return self._create(agent, arguments)
        if call.call.name == SWARM_MAP:
            return await self._map(agent, call, arguments)
        return await self._assign(agent, call, arguments)

    @asynccontextmanager
    async def group(self, agent: AgentState, calls: Sequence[CallState]) -> AsyncIterator[None]:
        """Watch over the sub-agents that a turn starts: cancel those that are late, by the group's policy.

        An agent that waits for others gives its own place to them. Those in the background are nobody's group.
        """
        keys = frozenset(call.key for call in calls if self._rules.is_awaited(call))
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
        if policy.kind != "quorum":
            return
        group = [stint for stint in agent.given if stint.turn == turn and not stint.is_background]
        if sum(stint.end is not None for stint in group) >= policy.quorum:
            self._cut(agent, frozenset(stint.call for stint in group), f"{policy.quorum} of the group are done")

    def _cut(self, agent: AgentState, calls: frozenset[str], why: str) -> None:
        for name in agent.children:
            stint = self._runtime.state.agents[name].stint
            if stint is not None and stint.call in calls and not stint.is_background:
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

    async def _assign(self, agent: AgentState, call: CallState, arguments: dict[str, Any]) -> ToolOutput:
        found = self._children_of(agent, call)
        if found:
            child = found[0]
        else:
            refusal = self._rules.refusal(agent, call, arguments)
            if refusal is not None:
                return _error(refusal)
            child = self._go_on(call, arguments) if "resume" in arguments else self._spawn(agent, call, arguments)
        if child.stint is not None and child.stint.is_background:
            self._runtime.budget_of(child)  # its share is one of those that its turn starts
            self.background.begin(child)
            report = {"agent_id": child.id, "agent": child.profile, "status": "running"}
            return ToolOutput(text=json.dumps(report))
        await self._await(agent, child)
        return ToolOutput(text=self._report(child), is_error=child.status == "error")

    async def _map(self, agent: AgentState, call: CallState, arguments: dict[str, Any]) -> ToolOutput:
        """Give a task to many; after a crash, to those that had none yet."""
        children = {child.stint.item: child for child in self._children_of(agent, call) if child.stint is not None}
        prompts = self._rules.prompts(agent, arguments, is_begun=bool(children))
        if isinstance(prompts, str):
            return _error(prompts)
        for item, prompt in enumerate(prompts):
            if item not in children:
                one = {"agent": arguments["agent"], "prompt": prompt}
                children[item] = self._spawn(agent, call, one, item=item)
        async with asyncio.TaskGroup() as group:
            for child in children.values():
                group.create_task(self._await(agent, child), name=child.id)
        reports = [self._report(children[item]) for item in range(len(prompts))]
        return ToolOutput(text=f"[{', '.join(reports)}]")

    async def _await(self, agent: AgentState, child: AgentState) -> None:
        await self._run(child)
        self._arrived(agent, agent.turns - 1)

    def _children_of(self, agent: AgentState, call: CallState) -> list[AgentState]:
        """The sub-agents that a call set to work before the run was broken off."""
        children = (self._runtime.state.agents[name] for name in agent.children)
        return [child for child in children if child.call == call.key]

    def _spawn(
        self, agent: AgentState, call: CallState, arguments: dict[str, Any], item: int | None = None
    ) -> AgentState:
        runtime = self._runtime
        child_id = f"{agent.id}/{len(agent.children) + 1}"
        most = runtime.config.subagent.max_tool_calls
        contract = CONTRACT.format(limit="" if most is None else f" You have {most} tool calls.")
        system, prompt = runtime.state.profiles[arguments["agent"]], arguments["prompt"]
        payload: dict[str, Any] = {
            "parent": agent.id,
            "profile": arguments["agent"],
            "call": call.key,
            "depth": agent.depth + 1,
            "messages": [
                {"role": "system", "content": f"{system}\n\n{contract}"},
                {"role": "user", "content": prompt},
            ],
        }
        if "fork" in arguments:
            text = FORK.format(agent=child_id, system=system, contract=contract, prompt=prompt)
            payload["messages"] = [{"role": "user", "content": text}]
            payload["fork"] = len(agent.messages) - 1  # all but the turn whose calls are open
        if item is not None:
            payload["item"] = item
        payload |= {key: arguments[key] for key in ("background", "model") if key in arguments}
        runtime.emit("agent_spawned", child_id, payload, cause=call.started)
        return runtime.state.agents[child_id]

    def _go_on(self, call: CallState, arguments: dict[str, Any]) -> AgentState:
        """Give another task to a sub-agent that has ended."""
        child = self._runtime.state.agents[arguments["resume"]]
        payload: dict[str, Any] = {"call": call.key, "text": arguments["prompt"]}
        if "background" in arguments:
            payload["background"] = True
        self._runtime.emit("agent_resumed", child.id, payload, cause=call.started)
        return child

    async def _run(self, child: AgentState) -> None:
        """Run a sub-agent to its end, in the task that is canceled if it is."""
        runtime, task = self._runtime, asyncio.current_task()
        assert task is not None
        assert self.work is not None
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
                    await drive(runtime, child, self.work)
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


def _error(text: str) -> ToolOutput:
    return ToolOutput(text=text, is_error=True)
