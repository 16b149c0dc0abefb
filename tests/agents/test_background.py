"""Sub-agents in the background: who waits for whom, and what they share."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.budget import Budget
from perilune.agents.config import AgentLimits, BudgetConfig, GroupConfig, SwarmConfig
from perilune.agents.journal import Event, load_events
from perilune.agents.messages import ChatRequest, Message
from perilune.agents.replaying import replay_run
from perilune.agents.state import RunState
from tests.agents.extension_cases import ALL, CONFIG, CREATE, delivered, run_case, turn_of
from tests.agents.swarm_cases import call, calls, look_up, run_swarm, says, wait


def state_of(path: Path) -> RunState:
    return RunState.fold("r", load_events(path))


def test_work_in_the_background_goes_on_beside_its_callers_turns(tmp_path: Path) -> None:
    run_case("background", tmp_path / "a.db")
    events = load_events(tmp_path / "a.db")
    started = [e for e in events if e.type == "tool_finished" and e.payload["name"] == "assign_task"]
    assert [json.loads(e.payload["text"]) for e in started] == [
        {"agent_id": f"root/{n}", "agent": "w", "status": "running"} for n in (1, 2)
    ]
    ends = [e.seq for e in events if e.type == "agent_finished" and e.agent != "root"]
    assert max(e.seq for e in started) < min(ends)
    assert [e.payload["child"] for e in events if e.type == "result_delivered"] == ["root/1", "root/2"]


def slow_team(request: ChatRequest) -> Any:
    """Starts one in the background that waits, and calls for as long as it may."""
    if request.agent_id != "root":
        return calls(call("wait", seconds=0.05)) if not turn_of(request) else says("late but there")
    if turn_of(request) == 0:
        return calls(CREATE, call("assign_task", "b", agent="w", prompt="x", background=True))
    if not request.tools:
        return says(str(delivered(request)))
    return calls(call("look_up", place=f"{turn_of(request)}"))


@pytest.mark.parametrize("limit", [{"max_steps": 3}, {"max_tool_calls": 4}])
def test_who_meets_a_limit_waits_for_all_that_it_started(tmp_path: Path, limit: dict[str, int]) -> None:
    config = SwarmConfig(extensions=ALL, orchestrator=AgentLimits(**limit))
    result = run_swarm(slow_team, tmp_path / "a.db", [wait, look_up], config)
    assert result.answer == "{'root/1': 'late but there'}"
    assert result.status == next(iter(limit))


def test_results_come_in_a_replay_when_they_came_then(tmp_path: Path) -> None:
    """In the recorded run the orchestrator was slower than one in the background, and faster than another."""

    def policy(request: ChatRequest) -> Message:
        if request.agent_id != "root":
            is_slow = request.messages[1].content == "slow"
            return says("quick") if turn_of(request) or not is_slow else calls(call("wait", seconds=0.1))
        match turn_of(request):
            case 0:
                tasks = (call("assign_task", p, agent="w", prompt=p, background=True) for p in ("slow", "quick"))
                return calls(CREATE, *tasks)
            case 1:
                return calls(call("wait", "w", seconds=0.03))
            case _:
                return says(f"{len(delivered(request))} came")

    assert run_swarm(policy, tmp_path / "a.db", [wait], CONFIG).answer == "2 came"
    events = load_events(tmp_path / "a.db")
    when = [(e.payload["child"], RunState.fold("r", events[: e.seq]).root.turns) for e in events
            if e.type == "result_delivered"]  # fmt: skip
    assert [child for child, _ in when] == ["root/2", "root/1"]
    assert when[0][1] < when[1][1]
    asyncio.run(replay_run(tmp_path / "a.db", None, tmp_path / "copy.db"))
    again = [e.payload["child"] for e in load_events(tmp_path / "copy.db") if e.type == "result_delivered"]
    assert again == ["root/2", "root/1"]


def test_no_place_is_held_by_those_that_wait_for_the_background(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        depth = request.agent_id.count("/")
        if depth == 2:
            return says("deep")
        if turn_of(request) == 0:
            return calls(CREATE, *(call("assign_task", f"{n}", agent="w", prompt=f"{n}", background=True)
                                   for n in range(2)))  # fmt: skip
        found = delivered(request)
        return says(f"{len(found)} of {' '.join(found.values())}" if len(found) == 2 else "I wait")

    config = SwarmConfig(extensions=ALL, max_depth=2, max_agents_running=1)
    assert run_swarm(policy, tmp_path / "a.db", config=config).answer == "2 of 2 of deep deep 2 of deep deep"


def test_the_background_is_nobodys_group_and_ends_with_its_caller(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Any:
        if request.agent_id == "root/1":
            return calls(call("wait", seconds=30.0))
        if request.agent_id != "root":
            return says("quick")
        if turn_of(request) == 0:
            slow = call("assign_task", "b", agent="w", prompt="slow", background=True)
            return calls(CREATE, slow, call("assign_task", "q", agent="w", prompt="quick"))
        return calls(call("wait", "w", seconds=30.0))

    async def end(run: Any) -> None:
        while run.state.root.turns < 2:
            await asyncio.sleep(0)
        assert run.state.agents["root/2"].status == "completed"
        assert run.state.agents["root/1"].status is None
        await run.cancel("enough")

    config = SwarmConfig(extensions=ALL, group=GroupConfig(kind="quorum", quorum=1))
    assert run_swarm(policy, tmp_path / "a.db", [wait], config, during=end).status == "cancelled"
    assert state_of(tmp_path / "a.db").agents["root/1"].status == "cancelled"


def test_those_of_a_turn_share_its_budget_in_the_background_too(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        if request.agent_id != "root":
            return calls(call("look_up", place=f"{turn_of(request)}")) if request.tools else says("out")
        if turn_of(request) == 0:
            tasks = (call("assign_task", f"{n}", agent="w", prompt=f"{n}", background=True) for n in range(2))
            return calls(CREATE, *tasks)
        return says(str(delivered(request)))

    config = SwarmConfig(extensions=ALL, budget=BudgetConfig(llm_calls=12))
    run_swarm(policy, tmp_path / "a.db", [look_up], config)
    agents = state_of(tmp_path / "a.db").agents
    assert [agents[f"root/{n}"].turns for n in (1, 2)] == [3, 3]  # thirds of 11, one of them the parent's


def test_a_later_group_has_shares_of_what_those_in_the_background_do_not_need() -> None:
    run = Budget("run", {"tool_calls": 100.0})
    early = run.child("early", run.shares(1))
    early.spend({"tool_calls": 10.0})
    assert early.left("tool_calls") == 40
    assert run.shares(1, [early]) == {"tool_calls": 25.0}  # of 90, 40 are promised


def test_what_nobody_answered_before_an_agent_ended_is_not_asked_again_when_it_goes_on() -> None:
    def event(seq: int, type_: str, agent: str = "", /, **payload: Any) -> Event:
        return Event(seq=seq, type=type_, agent=agent, cause=0, wall=0.0, at=0.0, payload=payload)

    spawned = {"profile": "w", "call": None, "messages": []}
    state = RunState.fold(
        "r",
        [
            event(1, "agent_spawned", "root", parent=None, depth=0, **spawned),
            event(2, "agent_spawned", "root/1", parent="root", depth=1, **spawned),
            event(3, "approval_requested", "", id="q", agent="root/1", name="post", arguments="{}", rule=0),
        ],
    )
    assert list(state.approvals) == ["q"]
    state.apply(event(4, "agent_finished", "root/1", status="timeout", result=""))
    state.apply(event(5, "agent_resumed", "root/1", call="root:1:0", text="again"))
    assert state.agents["root/1"].status is None
    assert state.approvals == {}
