"""Which tasks sub-agents are given: what is refused, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perilune.agents.runtime import Runtime
from perilune.agents.state import AgentState, CallState
from perilune.agents.swarm_tools import ASSIGN_TASK, SWARM_MAP, is_swarm_tool, prompts_of, swarm_arguments


class AssignRules:
    """Reads calls of `assign_task` and `swarm_map`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def read(self, call: CallState) -> dict[str, Any] | str:
        """Return the arguments of a call, or what is wrong with them."""
        return swarm_arguments(call.call, self._runtime.config.extensions, tuple(self._runtime.models))

    def is_awaited(self, call: CallState) -> bool:
        """Whether a call may have its agent wait for sub-agents."""
        name = call.call.name
        if name not in (ASSIGN_TASK, SWARM_MAP) or not is_swarm_tool(name, self._runtime.config.extensions):
            return False
        arguments = self.read(call)
        return isinstance(arguments, str) or "background" not in arguments

    def refusal(self, agent: AgentState, call: CallState, arguments: Mapping[str, Any]) -> str | None:
        """Why a call of `assign_task` starts nobody; None if nothing speaks against it."""
        fault = self._unknown(arguments["agent"])
        if fault is not None:
            return fault
        if not arguments["prompt"].strip():
            return "prompt is empty"
        for other in agent.calls.values():
            if other.index < call.index and other.call.name == ASSIGN_TASK:
                earlier = self.read(other)
                if isinstance(earlier, dict) and _task(earlier) == _task(arguments):
                    return "duplicate: the same task was given to the same sub-agent in this turn"
        if "resume" in arguments:
            return self._cannot_go_on(agent, arguments)
        return self._too_many(1)

    def prompts(self, agent: AgentState, arguments: Mapping[str, Any], *, is_begun: bool) -> list[str] | str:
        """Return the prompts of a call of `swarm_map`, or why it starts nobody.

        Args:
            agent: whose call it is.
            arguments: of the call.
            is_begun: whether some were started already, before a crash: then the limit was kept.
        """
        if len(agent.calls) > 1:
            return "swarm_map must be the only call of its turn; make it alone"
        fault = self._unknown(arguments["agent"])
        if fault is not None:
            return fault
        prompts = prompts_of(arguments)
        if is_begun or isinstance(prompts, str):
            return prompts
        return self._too_many(len(prompts)) or prompts

    def _unknown(self, name: str) -> str | None:
        profiles = self._runtime.state.profiles
        if name in profiles:
            return None
        known = ", ".join(profiles) or "none yet"
        return f"there is no sub-agent {name[:80]!r}; make it with create_subagent. There are: {known}"

    def _too_many(self, more: int) -> str | None:
        most, there = self._runtime.config.max_agents_total, self._runtime.state.subagents
        if there + more <= most:
            return None
        left = f"; {most - there} of these {more} could be started" if there < most else ""
        return f"the limit of {most} sub-agents is reached{left}"

    def _cannot_go_on(self, agent: AgentState, arguments: Mapping[str, Any]) -> str | None:
        """Why a sub-agent cannot be given another task."""
        name = arguments["resume"]
        for option in ("fork", "model"):
            if option in arguments:
                return f"{option} does not go with resume: the sub-agent goes on as it was"
        if name not in agent.children:
            known = ", ".join(agent.children) or "none yet"
            return f"resume: {name[:80]!r} is no sub-agent of yours. There are: {known}"
        child = self._runtime.state.agents[name]
        if child.profile != arguments["agent"]:
            return f"resume: {name} is a {child.profile!r}, not a {arguments['agent']!r}"
        if child.call in agent.calls:
            return f"resume: {name} was given another task in this turn; wait until it is done"
        if child.status is None:
            return f"resume: {name} is still at work"
        if child.stint is not None and child.stint.is_background and child.stint.back is None:
            return f"resume: the result of {name} has not come to you yet"
        return f"resume: {name} was canceled" if child.status == "cancelled" else None


def _task(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two calls the same."""
    return {key: value for key, value in arguments.items() if key != "background"}
