from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from perilune.agents.client import Divergence, EndpointError
from perilune.agents.config import AgentLimits, BudgetConfig, ContextConfig, ContextPolicy, GroupConfig, SwarmConfig
from perilune.agents.journal import JournalError, find_run, list_runs, load_events, verify_chain
from perilune.agents.journal import events as journal_events
from perilune.agents.messages import ChatRequest, Message, Sampling
from perilune.agents.replaying import config_of, fork_run, replay_run, resume_fork
from perilune.agents.state import RunState
from perilune.agents.swarm import RunResult, Swarm, SwarmRun
from perilune.agents.timeline import Timeline
from perilune.agents.tools.function import tool
from perilune.agents.views.transcript import transcript
from tests.agents.swarm_cases import Ledger, call, calls, endpoint, look_up, results, run_swarm, says, survey


def test_a_run_is_replayed_from_its_journal_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    recorded = run_swarm(survey, tmp_path / "a.db", ledger.tools())
    replay = asyncio.run(replay_run(tmp_path / "a.db", None, tmp_path / "copy.db"))
    assert (replay.turns, replay.tool_results) == (15, 13)
    assert replay.result.answer == recorded.answer
    assert len(ledger.lines) == 4
    kinds = [
        [e.type for e in load_events(path) if e.agent == "root/3"] for path in (tmp_path / "a.db", tmp_path / "copy.db")
    ]
    assert kinds[0] == kinds[1]


def test_a_request_that_is_not_the_recorded_one_is_shown(tmp_path: Path) -> None:
    run_swarm(survey, tmp_path / "a.db", Ledger(tmp_path / "ledger").tools())
    import sqlite3

    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute(
            "UPDATE events SET payload = replace(payload, 'north has 5', 'north has 9') WHERE type = 'tool_finished'"
        )
    connection.close()
    with pytest.raises(Divergence, match="root/1"):
        asyncio.run(replay_run(tmp_path / "a.db", None, tmp_path / "copy.db"))


def test_what_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    async def steer(run) -> None:
        await run.steer("faster")

    run_swarm(lambda request: says("ok"), tmp_path / "a.db", during=steer)
    with pytest.raises(JournalError, match=r"the run was steered \(event \d+\); it cannot be replayed"):
        asyncio.run(replay_run(tmp_path / "a.db", None, tmp_path / "copy.db"))


def test_a_fork_goes_on_differently_from_its_event(tmp_path: Path) -> None:
    path, ledger = tmp_path / "a.db", Ledger(tmp_path / "ledger")
    run_swarm(survey, path, ledger.tools())
    events = load_events(path)
    at = next(event.seq for event in events if event.type == "turn_finished" and event.agent == "root/2")
    fork_run(path, "r", at, "fork")

    def other(request) -> Message:
        said = survey(request)
        return said if said.tool_calls else says(f"other {said.content}")

    async def go_on() -> str:
        run = await Swarm(endpoint=endpoint(other), tools=ledger.tools()).resume(path, run_id="fork")
        return (await run.result()).answer

    answer = asyncio.run(go_on())
    assert answer.startswith("other root/1: ")
    assert answer.count("other") >= 4
    assert verify_chain(path, "fork") > at
    assert load_events(path, "r") == events
    for seq, message in ((0, "no 0"), (10_000, "no 10000"), (len(events), "is the end of run r")):
        with pytest.raises(JournalError, match=message):
            fork_run(path, "r", seq, "again")
    with pytest.raises(JournalError, match="there is a run fork already"):
        fork_run(path, "r", at, "fork")


def test_a_fork_keeps_times_and_tells_its_model(tmp_path: Path) -> None:
    path, tools = tmp_path / "a.db", Ledger(tmp_path / "ledger").tools()
    run_swarm(survey, path, tools)
    events = load_events(path)

    async def go_on() -> SwarmRun:
        swarm = Swarm(endpoint=replace(endpoint(survey), model="other"), tools=tools)
        run = await resume_fork(swarm, path, "r", 9, "fork")
        assert find_run(path, "fork").status == "running"
        await run.result()
        return run

    run = asyncio.run(go_on())
    copied = load_events(path, "fork")
    assert copied[:9] == events[:9]
    assert find_run(path, "fork").model == run.state.model == "other"
    assert Timeline.of("fork", copied).model == "other"
    assert find_run(path, "r").model == "scripted"
    before = RunState.fold("r", events[:9]).elapsed_s
    assert before <= run.state.elapsed_s < before + 30
    with pytest.raises(JournalError, match=r"the run went on with other in place of scripted \(event 10\)"):
        asyncio.run(replay_run(path, "fork", tmp_path / "copy.db"))


def test_nothing_is_left_of_a_fork_that_cannot_go_on(tmp_path: Path) -> None:
    path, blocked = tmp_path / "a.db", tmp_path / "a.artifacts"
    run_swarm(lambda request: says("ok"), path)
    blocked.rmdir()
    blocked.write_text("in the way")
    swarm = Swarm(endpoint=endpoint(lambda request: says("more")))
    with pytest.raises(OSError, match="artifacts"):
        asyncio.run(resume_fork(swarm, path, "r", 3, "fork"))
    assert [run.run_id for run in list_runs(path)] == ["r"]
    blocked.unlink()

    async def go_on() -> str:
        return (await (await resume_fork(swarm, path, "r", 3, "fork")).result()).answer

    assert asyncio.run(go_on()) == "more"
    assert verify_chain(path) > 3


def test_settings_come_back_from_a_journal(tmp_path: Path) -> None:
    config = SwarmConfig(
        subagent=AgentLimits(max_steps=7, context=ContextConfig(policy="discard_all", max_tokens=9000)),
        sampling=Sampling(temperature=0.5, stop=("END",), extra_body={"thinking": {"type": "disabled"}}),
        max_critical_steps=9,
    )
    run_swarm(lambda request: says("ok"), tmp_path / "a.db", config=config)
    assert config_of(RunState.fold("r", load_events(tmp_path / "a.db")).config) == config


def _documented() -> dict[str, set[str]]:
    """By type of event, the keys in the table of `journal/events.py`."""
    table: dict[str, set[str]] = {}
    kinds: list[str] = []
    for line in (journal_events.__doc__ or "").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "type":
            keys = {key.strip() for key in cells[1].split(":")[0].split(",")} - {""}
            kinds = [kind.strip() for kind in cells[0].split(",")] if cells[0] else kinds  # a row goes on
            for kind in kinds:
                table[kind] = table.get(kind, set()) | keys
    return table


def test_events_say_what_their_table_says(tmp_path: Path) -> None:
    limits = AgentLimits(max_steps=2)
    run_swarm(survey, tmp_path / "a.db", Ledger(tmp_path / "ledger").tools(), SwarmConfig(subagent=limits))
    fork_run(tmp_path / "a.db", "r", 12, "fork")

    async def go_on() -> None:
        swarm = Swarm(endpoint=endpoint(survey), tools=Ledger(tmp_path / "ledger").tools())
        await (await swarm.resume(tmp_path / "a.db", run_id="fork")).result()

    asyncio.run(go_on())
    table, seen = _documented(), set[str]()
    for run in ("r", "fork"):
        for event in load_events(tmp_path / "a.db", run):
            wanted, keys = table[event.type], set(event.payload)
            seen.add(event.type)
            assert {key for key in wanted if not key.endswith("?")} <= keys <= {key.rstrip("?") for key in wanted}, (
                event
            )
    assert {"run_resumed", "last_words", "tool_finished", "profile_created"} <= seen


def _again(path: Path) -> RunResult:
    return asyncio.run(replay_run(path, None, path.with_name(f"{path.stem}-copy.db"))).result


def test_notes_beside_results_are_repeated_once(tmp_path: Path) -> None:
    def stubborn(request: ChatRequest) -> Message:
        return calls(call("look_up", place="x")) if len(request.messages) < 12 else says("ok")

    path = tmp_path / "a.db"
    recorded = run_swarm(stubborn, path, [look_up])
    returned = [event.payload for event in load_events(path) if event.type == "tool_finished"]
    notes = [payload.get("note", "") for payload in returned]
    assert [note.split()[5] for note in notes if note] == ["three", "five"]
    assert {payload["text"] for payload in returned} == {"x has 1 letters"}
    said = RunState.fold("r", load_events(path)).root.messages
    assert any(m.content.startswith("x has 1 letters\n\n[the same was called in three turns") for m in said)
    assert "turns in a row]" in " ".join(entry.text for entry in transcript("root", load_events(path)))
    assert _again(path).answer == recorded.answer == "ok"


@pytest.mark.parametrize("budget", [BudgetConfig(tokens_out=12_000), BudgetConfig(tool_calls=15)])
def test_a_run_near_its_budget_is_replayed(tmp_path: Path, budget: BudgetConfig) -> None:
    """Who was first, and so whose result came with the warning, is not the same again."""

    def policy(request: ChatRequest) -> Message:
        is_last = request.agent_id == "root" and len(request.messages) > 6
        return says(" ".join(results(request))) if is_last else survey(request)

    path = tmp_path / "a.db"
    recorded = run_swarm(policy, path, Ledger(tmp_path / "ledger").tools(), SwarmConfig(budget=budget))
    events = load_events(path)
    assert any(event.payload.get("note") for event in events) or any(e.payload.get("max_tokens") for e in events)
    assert _again(path).answer == recorded.answer


def test_a_budget_that_several_agents_met_is_not_repeated(tmp_path: Path) -> None:
    config = SwarmConfig(budget=BudgetConfig(llm_calls=11))
    run_swarm(survey, tmp_path / "a.db", Ledger(tmp_path / "ledger").tools(), config)
    with pytest.raises(JournalError, match=r"agent root/\d met a budget that agents share \(event \d+\)"):
        _again(tmp_path / "a.db")


def test_a_run_that_met_its_budget_is_replayed(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        return calls(call("look_up", place=str(len(request.messages)))) if request.tools else says("so far")

    path = tmp_path / "a.db"
    recorded = run_swarm(policy, path, [look_up], SwarmConfig(budget=BudgetConfig(llm_calls=5)))
    assert recorded.status == "budget"
    assert _again(path).steps == recorded.steps


def test_turns_that_failed_fail_again(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        if request.agent_id == "root/2":
            raise EndpointError("401 no such key", fault="refused", status=401)
        return survey(request)

    path = tmp_path / "a.db"
    recorded = run_swarm(policy, path, Ledger(tmp_path / "ledger").tools())
    assert [e.payload["error"] for e in load_events(path) if e.type == "turn_failed"] == ["401 no such key"]
    assert _again(path).answer == recorded.answer


@pytest.mark.parametrize("policy", ["discard_all", "summarise"])
def test_a_turn_that_was_too_long_is_too_long_again(tmp_path: Path, policy: ContextPolicy) -> None:
    answered: list[str] = []

    def model(request: ChatRequest) -> Message:
        if len(request.messages) == 6 and "too long" not in answered:
            answered.append("too long")
            raise EndpointError("too long", fault="context_overflow", status=400)
        if not request.tools or len(answered) > 3:
            return says("a summary" if not request.tools else "ok")
        answered.append("more")
        return calls(call("look_up", place=str(len(answered))))

    limits = AgentLimits(context=ContextConfig(policy=policy))
    path = tmp_path / "a.db"
    recorded = run_swarm(model, path, [look_up], SwarmConfig(orchestrator=limits, max_depth=0))
    kinds = [event.type for event in load_events(path)]
    assert "turn_failed" in kinds
    assert "context_compacted" in kinds
    assert _again(path).answer == recorded.answer == "ok"


def test_a_resumed_run_is_replayed(tmp_path: Path) -> None:
    path, ledger = tmp_path / "a.db", Ledger(tmp_path / "ledger")

    async def go_on() -> RunResult:
        run = await Swarm(endpoint=endpoint(survey), tools=ledger.tools()).start("survey", path, run_id="r")
        while run.state.subagents < 2:
            await asyncio.sleep(0)
        await run.stop()
        again = await Swarm(endpoint=endpoint(survey), tools=ledger.tools()).resume(path)
        return await again.result()

    recorded = asyncio.run(go_on())
    assert "run_resumed" in [event.type for event in load_events(path)]
    assert _again(path).answer == recorded.answer


def test_cancelled_and_late_agents_cannot_be_replayed(tmp_path: Path) -> None:
    @tool(effect="pure", timeout_s=60)
    async def wait(seconds: float) -> str:
        """Wait.

        Args:
            seconds: how long.
        """
        await asyncio.sleep(seconds)
        return "waited"

    def late(request: ChatRequest) -> Message:
        if request.agent_id == "root":
            return survey(request)
        return calls(call("wait", seconds=30)) if request.agent_id == "root/1" else says("here")

    for config, message in (
        (SwarmConfig(group=GroupConfig(kind="quorum", quorum=3)), r"agent root/1 was canceled \(event \d+\)"),
        (SwarmConfig(subagent=AgentLimits(timeout_s=0.2)), r"agent root/1 ran out of time \(event \d+\)"),
    ):
        path = tmp_path / f"{config.group.kind}.db"
        run_swarm(late, path, [wait], config)
        with pytest.raises(JournalError, match=f"{message}; it cannot be replayed"):
            _again(path)
