"""Scripted models for the tests of swarms."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perilune.agents.client import ScriptedClient
from perilune.agents.config import SwarmConfig
from perilune.agents.endpoint import Endpoint, Price
from perilune.agents.messages import ChatRequest, Message, ToolCall
from perilune.agents.swarm import RunResult, Swarm, SwarmRun
from perilune.agents.tools.base import Tool, ToolContext
from perilune.agents.tools.function import tool

Reaction = Callable[[ChatRequest], Any]
TASKS = ("north", "south", "east", "west")


def call(tool: str, id_: str = "c0", /, **arguments: Any) -> ToolCall:
    return ToolCall(id=id_, name=tool, arguments=json.dumps(arguments))


def calls(*wanted: ToolCall, text: str = "") -> Message:
    return Message(role="assistant", content=text, tool_calls=tuple(wanted))


def says(text: str) -> Message:
    return Message(role="assistant", content=text)


def results(request: ChatRequest) -> list[str]:
    """The results of the last round of calls."""
    last = max((place for place, m in enumerate(request.messages) if m.role == "assistant"), default=0)
    return [message.content for message in request.messages[last:] if message.role == "tool"]


def endpoint(policy: Reaction, **settings: Any) -> Endpoint:
    return Endpoint(
        client=ScriptedClient(policy), model="scripted", price=Price(prompt=1.0, completion=2.0), **settings
    )


@tool(effect="pure")
def look_up(place: str) -> str:
    """Look a place up.

    Args:
        place: its name.
    """
    return f"{place} has {len(place)} letters"


class Ledger:
    """A side effect that can be counted: a file that each call adds a line to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def tool(self) -> Tool:
        @tool(effect="side_effect")
        async def post(text: str, context: ToolContext) -> str:
            """Write a line down, once.

            Args:
                text: the line.
                context: of the call.
            """
            with self.path.open("a") as file:
                file.write(f"{context.call_id} {text}\n")
            return f"posted {text}"

        return post

    def reader(self) -> Tool:
        @tool(effect="pure")
        def was_posted(text: str) -> str:
            """Tell whether a line was written down.

            Args:
                text: the line.
            """
            return "yes" if any(line.split(" ", 1)[1] == text for line in self.lines) else "no"

        return was_posted

    def tools(self) -> list[Tool]:
        return [look_up, self.tool(), self.reader()]


def survey(request: ChatRequest) -> Message:
    """An orchestrator that gives four places to sub-agents, and sub-agents that look theirs up, post it and report."""
    first = request.messages[1].content
    turn = sum(message.role == "assistant" for message in request.messages)
    if first.startswith("survey"):
        if turn == 0:
            return calls(call("create_subagent", "p", name="scout", system_prompt="You look places up."))
        if turn == 1:
            return calls(*(call("assign_task", f"t{n}", agent="scout", prompt=place) for n, place in enumerate(TASKS)))
        reports = [json.loads(text) for text in results(request)]
        return says("; ".join(f"{report['agent_id']}: {report['result']}" for report in reports))
    said = results(request)
    line = f"{first} has {len(first)} letters"
    if turn == 0:
        return calls(call("look_up", place=first))
    if said[0].startswith("The outcome of this call is unknown"):
        return calls(call("was_posted", text=line))
    if turn == 1 or said[0] == "no":
        return calls(call("post", text=said[0] if turn == 1 else line))
    return says(f"posted {line}")


SURVEYED = "; ".join(f"root/{n}: posted {place} has {len(place)} letters" for n, place in enumerate(TASKS, 1))


def run_swarm(
    policy: Reaction,
    journal: Path,
    tools: Sequence[Tool] = (),
    config: SwarmConfig | None = None,
    *,
    task: str = "survey",
    during: Callable[[SwarmRun], Any] | None = None,
    **settings: Any,
) -> RunResult:
    """Run a task to its end; nothing may be left running."""

    async def act() -> RunResult:
        settings.setdefault("endpoint", endpoint(policy))
        swarm = Swarm(config=config or SwarmConfig(), tools=tools, **settings)
        run = await swarm.start(task, journal, run_id="r")
        if during is not None:
            await during(run)
        result = await run.result()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(act())


def restless(request: ChatRequest) -> Message:
    """Calls for as long as it may; every call another."""
    if not request.tools:
        return says("so far, so good")
    return calls(call("look_up", place=f"place {len(request.messages)}"))


def team(size: int, work: Any) -> Any:
    """An orchestrator that starts `size` sub-agents at once and tells their reports; `work` answers for them."""

    def policy(request: ChatRequest) -> Any:
        if request.agent_id != "root":
            return work(request)
        match len(request.messages):
            case 2:
                return calls(call("create_subagent", name="w", system_prompt="work"))
            case 4:
                return calls(*(call("assign_task", f"t{n}", agent="w", prompt=f"part {n}") for n in range(size)))
            case _:
                return says(json.dumps([json.loads(text) for text in results(request)]))

    return policy


def reports(answer: str) -> list[dict[str, Any]]:
    return json.loads(answer)


@tool(effect="pure", timeout_s=60)
async def wait(seconds: float) -> str:
    """Wait.

    Args:
        seconds: how long.
    """
    await asyncio.sleep(seconds)
    return "waited"


def waiting(seconds: float) -> Any:
    def work(request: ChatRequest) -> Message:
        if len(request.messages) > 2:
            return says("done")
        return calls(call("wait", seconds=seconds if request.agent_id.endswith("/1") else 0.0))

    return work
