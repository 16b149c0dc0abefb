"""Timeouts, groups, cancellation, endpoints that fail: each leaves a result, and nothing running."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.client import EndpointError, RetryPolicy
from perilune.agents.config import AgentLimits, BudgetConfig, GroupConfig, SwarmConfig
from perilune.agents.journal import load_events
from perilune.agents.messages import ChatRequest, Message
from perilune.agents.state import RunState
from perilune.agents.swarm import Swarm
from perilune.agents.tools.function import tool
from tests.agents.swarm_cases import (
    call,
    calls,
    endpoint,
    look_up,
    reports,
    results,
    run_swarm,
    says,
    team,
    wait,
    waiting,
)


def test_a_sub_agent_that_takes_too_long_reports_that_and_the_others_are_not_disturbed(tmp_path: Path) -> None:
    config = SwarmConfig(subagent=AgentLimits(timeout_s=0.2), grace_s=0.2)
    found = reports(run_swarm(team(3, waiting(30)), tmp_path / "a.db", [wait], config).answer)
    assert [report["status"] for report in found] == ["timeout", "completed", "completed"]
    assert "took more than 0.2 s" in found[0]["error"]


@pytest.mark.parametrize("group", [GroupConfig(kind="quorum", quorum=2), GroupConfig(kind="deadline", deadline_s=0.2)])
def test_who_is_late_is_cancelled_by_the_groups_policy(tmp_path: Path, group: GroupConfig) -> None:
    found = reports(run_swarm(team(3, waiting(30)), tmp_path / "a.db", [wait], SwarmConfig(group=group)).answer)
    assert [report["status"] for report in found] == ["cancelled", "completed", "completed"]


def test_one_sub_agent_is_cancelled_and_its_parent_goes_on(tmp_path: Path) -> None:
    async def cancel(run) -> None:
        while run.state.subagents < 3 or not run.state.agents["root/1"].calls:
            await asyncio.sleep(0.001)
        assert await run.cancel("not needed", "root/1")
        assert not await run.cancel("not needed", "root/1")
        assert not await run.cancel("nobody", "root/9")

    result = run_swarm(team(3, waiting(30)), tmp_path / "a.db", [wait], during=cancel)
    found = reports(result.answer)
    assert [report["status"] for report in found] == ["cancelled", "completed", "completed"]
    assert found[0]["error"] == "not needed"


def test_a_run_is_cancelled_with_what_it_had_said(tmp_path: Path) -> None:
    def talker(request: ChatRequest) -> Message:
        return calls(call("wait", seconds=30.0), text="I am at it")

    async def cancel(run) -> None:
        while not run.state.root.calls:
            await asyncio.sleep(0.001)
        await run.cancel("enough")

    result = run_swarm(talker, tmp_path / "a.db", [wait], during=cancel)
    assert (result.status, result.answer, result.error) == ("cancelled", "I am at it", "enough")


@pytest.mark.parametrize("steps", range(1, 40))
def test_cancelling_anywhere_leaves_nothing_running_and_a_whole_journal(tmp_path: Path, steps: int) -> None:
    async def cancel(run) -> None:
        for _ in range(steps * 3):
            await asyncio.sleep(0)
        await run.cancel("stop")

    result = run_swarm(team(3, waiting(0.01)), tmp_path / "a.db", [wait], during=cancel)
    state = RunState.fold("r", load_events(tmp_path / "a.db"))
    assert state.status == result.status
    assert all(agent.status is not None for agent in state.agents.values())


def test_a_tool_that_ignores_its_cancellation_is_given_up(tmp_path: Path) -> None:
    @tool(effect="pure", timeout_s=0.05)
    async def deaf() -> str:
        """Hear nothing."""
        for _ in range(20):
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
        return "late"

    def policy(request: ChatRequest) -> Message:
        return says(results(request)[0]) if len(request.messages) > 2 else calls(call("deaf"))

    async def act() -> None:
        swarm = Swarm(endpoint=endpoint(policy), tools=[deaf], config=SwarmConfig(grace_s=0.05))
        result = await (await swarm.start("go", tmp_path / "a.db")).result()
        assert "was abandoned" in result.answer
        assert result.leaked == ("deaf of root",)
        await asyncio.sleep(1.2)

    asyncio.run(act())


def test_the_wall_clock_of_a_run(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        return calls(call("wait", seconds=30.0), text="working")

    config = SwarmConfig(budget=BudgetConfig(wall_s=0.2), grace_s=0.1)
    result = run_swarm(policy, tmp_path / "a.db", [wait], config)
    assert (result.status, result.answer) == ("timeout", "working")


def test_sub_agents_wait_for_a_place_and_a_nested_swarm_does_not_lock_itself(tmp_path: Path) -> None:
    running = peak = 0

    @tool(effect="pure")
    async def busy() -> str:
        """Be busy."""
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.002)
        running -= 1
        return "ok"

    def work(request: ChatRequest) -> Message:
        return says("done") if len(request.messages) > 2 else calls(call("busy"))

    config = SwarmConfig(max_agents_running=3)
    found = reports(run_swarm(team(12, work), tmp_path / "a.db", [busy], config).answer)
    assert [report["status"] for report in found] == ["completed"] * 12
    assert peak == 3

    def nested(request: ChatRequest) -> Message:
        if request.agent_id.count("/") == 2:
            return says("leaf")
        if len(request.messages) == 2:
            return calls(
                call("assign_task", "a", agent="w", prompt="x"), call("assign_task", "b", agent="w", prompt="y")
            )
        return says("+".join(json.loads(text)["result"] for text in results(request)))

    config = SwarmConfig(max_agents_running=1, max_depth=2)
    found = reports(run_swarm(team(2, nested), tmp_path / "b.db", [], config).answer)
    assert [report["result"] for report in found] == ["leaf+leaf"] * 2


def test_an_endpoint_that_refuses_ends_the_agent_and_not_the_others(tmp_path: Path) -> None:
    def work(request: ChatRequest) -> Any:
        if request.agent_id == "root/2":
            return EndpointError("401: the key is not valid", fault="refused", status=401)
        return says("fine")

    found = reports(run_swarm(team(3, work), tmp_path / "a.db").answer)
    assert [report["status"] for report in found] == ["completed", "error", "completed"]
    assert "401" in found[1]["error"]


def test_an_endpoint_that_is_down_stops_the_run_and_it_goes_on_when_it_is_back(tmp_path: Path) -> None:
    is_down = True

    def policy(request: ChatRequest) -> Any:
        if is_down and len(request.messages) > 2:
            return EndpointError("no connection", fault="connection")
        return says("done") if len(request.messages) > 2 else calls(call("look_up", place="x"))

    async def act() -> None:
        nonlocal is_down
        swarm = Swarm(endpoint=endpoint(policy, retry=RetryPolicy(attempts=1)), tools=[look_up])
        result = await (await swarm.start("go", tmp_path / "a.db")).result()
        assert (result.status, result.error) == ("stopped", "no connection")
        is_down = False
        assert (await (await swarm.resume(tmp_path / "a.db")).result()).answer == "done"

    asyncio.run(act())


def test_a_run_that_is_stopped_before_its_first_step_has_taken_none(tmp_path: Path) -> None:
    async def stop(run) -> None:
        await run.stop()

    result = run_swarm(lambda request: says("done"), tmp_path / "a.db", during=stop)
    assert (result.status, result.steps) == ("stopped", 0)


def test_a_cancelled_nested_swarm_gives_its_place_back_at_once(tmp_path: Path) -> None:
    def nested(request: ChatRequest) -> Message:
        if request.agent_id.count("/") == 2:
            return calls(call("wait", seconds=30.0))
        if len(request.messages) == 2:
            return calls(call("assign_task", agent="w", prompt="x"))
        return says("done")

    async def cancel(run) -> None:
        while run.state.subagents < 4:
            await asyncio.sleep(0.001)
        await run.cancel("enough", "root/1")
        while run.state.agents["root/1"].status is None:
            await asyncio.sleep(0.001)
        assert run._runtime.slots._value <= 2
        await run.cancel("all")

    config = SwarmConfig(max_depth=2, max_agents_running=2, grace_s=0.1)
    result = run_swarm(team(2, nested), tmp_path / "a.db", [wait], config, during=cancel)
    assert result.status == "cancelled"
