"""What tools say while a run goes on: how far a call is, and that they are described anew."""

from __future__ import annotations

import asyncio
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from perilune.agents.client import ScriptedClient
from perilune.agents.journal import JournalError, load_events
from perilune.agents.messages import ChatRequest, Message
from perilune.agents.replaying import replay_run
from perilune.agents.swarm import Swarm, SwarmRun
from perilune.agents.tools.base import ToolContext, ToolError
from perilune.agents.tools.function import tool
from perilune.agents.views.model import activity_of
from perilune.run import load_swarm, open_swarm
from tests.agents.swarm_cases import call, calls, endpoint, look_up, results, run_swarm, says

FAULTY = Path(__file__).parent / "tools" / "faulty_mcp_server.py"


@pytest.mark.parametrize(("total", "word"), [(4, "slow 37 %"), (None, "slow 1"), (0, "slow 1")])
def test_how_far_a_call_is_stands_beside_its_name(tmp_path: Path, total: int | None, word: str) -> None:
    go_on = asyncio.Event()

    @tool(effect="pure")
    async def slow(context: ToolContext) -> str:
        """Take long.

        Args:
            context: of the call.
        """
        assert context.progress is not None
        context.progress(math.nan, total)
        for done in (1.5, 2, 3):  # the first of a second is written down
            await asyncio.to_thread(context.progress, done, total)
        await go_on.wait()
        return "done"

    shown: list[tuple[str, str]] = []

    async def look(run: SwarmRun) -> None:
        while not any(call.progress for call in run.state.root.calls.values()):
            await asyncio.sleep(0.001)
        shown.append(activity_of(run.state.root, run.state))
        go_on.set()

    def policy(request: ChatRequest) -> Message:
        return says("ok") if results(request) else calls(call("slow"))

    assert run_swarm(policy, tmp_path / "a.db", [slow], during=look).answer == "ok"
    assert shown == [("tool", word)]
    events = load_events(tmp_path / "a.db")
    (told,) = [event for event in events if event.type == "tool_progress"]
    assert told.payload == {"call": "root:0:0", "done": 1.5, "total": total or None}
    assert next(event.cause for event in events if event.type == "turn_started" and event.cause > 3) != told.seq
    assert asyncio.run(replay_run(tmp_path / "a.db", None, tmp_path / "b.db")).result.answer == "ok"


def test_a_tool_that_is_described_anew_is_offered_so_from_the_next_turn_on(tmp_path: Path) -> None:
    offered: list[str] = []
    parameters = {**look_up.parameters, "properties": {"town": {"type": "string"}}, "required": ["town"]}
    other = replace(look_up, description="Look a town up.", parameters=parameters)

    def policy(request: ChatRequest) -> Message:
        offered.append(next(t["function"]["description"] for t in request.tools if "look" in t["function"]["name"]))
        return calls(call("look_up", place="x")) if len(offered) == 1 else says(str(results(request)))

    async def act() -> str:
        swarm = Swarm(endpoint=endpoint(policy), tools=[look_up])
        run = await swarm.start("go", tmp_path / "a.db")
        run.listen(lambda event: swarm.describe(other) if event.type == "turn_finished" and len(offered) == 1 else None)
        answer = (await run.result()).answer
        swarm.describe(look_up)  # no run is under way
        await (await swarm.start("go", tmp_path / "b.db")).result()
        with pytest.raises(ToolError, match="'look_up' is no tool of this swarm, or has another effect"):
            swarm.describe(replace(look_up, effect="side_effect"))
        return answer

    assert "town" in asyncio.run(act())
    assert offered == ["Look a place up.", "Look a town up.", "Look a place up."]
    (changed,) = [event for event in load_events(tmp_path / "a.db") if event.type == "tool_changed"]
    assert changed.payload["tool"]["function"]["parameters"] == parameters
    with pytest.raises(JournalError, match="a tool was described anew"):
        asyncio.run(replay_run(tmp_path / "a.db", None, tmp_path / "c.db"))


def test_the_servers_of_a_recipe_serve_all_runs_and_what_they_describe_anew_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mcp", reason="mcp is not installed")
    offered: list[str] = []

    def policy(request: ChatRequest) -> Message:
        tools = {t["function"]["name"]: t["function"]["description"] for t in request.tools}
        offered.append(tools["f__echo"])
        if len(request.messages) == 2:
            return calls(call("f__change" if len(offered) == 1 else "f__work"))
        if offered[-1] == "Changed.":
            return says(results(request)[-1])
        return calls(call("f__echo", text=f"not yet {len(offered)}"))

    async def act() -> list[str]:
        wanted = f"tools.mcp.f={{command = {[sys.executable, str(FAULTY), str(tmp_path)]}}}"
        recipe = load_swarm(None, [wanted], {"endpoint": {"base_url": "http://x/v1", "model": "m"}})
        async with open_swarm(recipe) as swarm:
            return [(await (await swarm.start("go", tmp_path / "a.db")).result()).answer for _ in range(2)]

    monkeypatch.setattr("perilune.run.swarming._client", lambda *settings: ScriptedClient(policy))
    answers = asyncio.run(act())
    assert (answers[1], offered[0], set(offered[1:])) == ("worked", "About echo.", {*offered[1:-1], "Changed."})
    assert [name for name in offered if name not in ("About echo.", "Changed.")] == []
