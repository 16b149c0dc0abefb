from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from perilune.agents.critical import critical_path, totals
from perilune.agents.state import RunState, agent_of_call
from perilune.agents.timeline import Timeline
from perilune.agents.views import text
from perilune.agents.views.model import RunData, agent_rows, lean, printable
from perilune.agents.views.transcript import transcript
from tests.agents.events_cases import INJECTED, Shape, swarm_events, with_question


def shown(view: text.TextView) -> str:
    json.dumps(view.data, allow_nan=False)
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system=None)
    console.print(view.renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def run() -> RunData:
    return RunData.of("run-1", swarm_events())


def test_the_tree_has_every_agent_with_what_it_used(run: RunData) -> None:
    view = text.tree(run)
    agents = view.data["agents"]
    assert [one["agent"] for one in agents] == ["root", *(f"root/{n}" for n in range(1, 9))]
    assert sum(one["steps"] for one in agents) == view.data["totals"]["steps"] == 48
    assert {one["activity"] for one in agents} == {"done", "failed", "cancelled"}
    printed = shown(view)
    assert "root/3 researcher  failed 500 internal <b>error</b>" in printed
    assert "48 steps, 13 on the critical path (parallelism 3.7)" in printed


def test_a_run_under_way_says_what_each_is_about() -> None:
    run = RunData.of("r", swarm_events(Shape(groups=(20,), slots=6), until=9.0))
    found = {row.agent: row.activity for row in agent_rows(run)}
    assert found["root"] == "sub-agents"
    assert list(found.values()).count("queued") == 14
    assert {"thinking", "tool"} <= set(found.values())
    waiting = RunData.of("r", swarm_events(until=28.4))
    assert next((row.activity, row.detail) for row in agent_rows(waiting)) == ("approval", "publish")
    events, call = with_question(swarm_events(until=9.0), "Which year?")
    asking = {row.agent: (row.activity, row.detail) for row in agent_rows(RunData.of("r", events))}
    assert asking[agent_of_call(call)] == ("question", "Which year?")


@pytest.mark.parametrize("end", ["question_answered", "tool_finished", "agent_finished"])
def test_a_question_is_over_when_nobody_waits_for_its_answer(end: str) -> None:
    events, call = with_question(swarm_events(until=9.0), "Which year?")
    state, agent, last = RunState.fold("r", events), agent_of_call(call), events[-1]
    assert state.questions == {call: "Which year?"}
    payloads = {
        "question_answered": {"id": call, "text": "1998"},
        "tool_finished": {"call": call, "name": "ask_human", "text": "late", "is_error": True, "elapsed_s": 1.0},
        "agent_finished": {"status": "cancelled", "result": "", "error": None},
    }
    owner = "" if end == "question_answered" else agent
    state.apply(replace(last, seq=last.seq + 1, type=end, agent=owner, payload=payloads[end]))
    assert state.questions == {}


def test_a_request_for_consent_of_an_agent_that_ended_waits_for_nobody() -> None:
    events = swarm_events(until=28.4)
    state, last = RunState.fold("r", events), events[-1]
    assert list(state.approvals) == ["root:3:0"]
    ended = {"status": "cancelled", "result": "", "error": None}
    state.apply(replace(last, seq=last.seq + 1, type="agent_finished", agent="root", payload=ended))
    assert state.approvals == {}


def test_a_refused_attempt_shows_as_rate_limited() -> None:
    events = swarm_events()
    retry = next(event for event in events if event.type == "turn_retry")
    rows = agent_rows(RunData.of("r", events[: retry.seq]))
    assert next(row.activity for row in rows if row.agent == retry.agent) == "rate limited"


def test_the_critical_path_comes_with_the_totals_and_never_alone(run: RunData) -> None:
    view = text.critical_path_view(run)
    assert view.data["total"] == pytest.approx(sum(s["weight"] for s in view.data["segments"]))
    assert sum(turn.lost_prompt_tokens for agent in run.timeline.agents.values() for turn in agent.turns) > 0
    assert view.data["totals"]["cost_usd"] == pytest.approx(run.state.cost_usd)
    assert view.data["totals"]["prompt_tokens"] == run.state.usage.prompt_tokens
    printed = shown(view)
    assert "unlimited: 3.69x" in printed
    assert "118,514 tokens in, 7,954 out; $0.3007" in printed
    assert text.critical_path_view(run, "steps").data["total"] == 13


def test_costs_add_up_by_profile_and_by_agent(run: RunData) -> None:
    data = text.cost(run).data
    for name in ("prompt_tokens", "completion_tokens", "tool_calls", "cost_usd"):
        for kind in ("profiles", "agents"):
            assert sum(line[name] for line in data[kind]) == pytest.approx(data["totals"][name])
    unknown = RunData.of("r", swarm_events(Shape(price=None)))
    assert text.cost(unknown).data["totals"]["cost_usd"] is None
    assert "unknown" in shown(text.cost(unknown))


def test_a_run_does_not_differ_from_itself_and_does_from_another(run: RunData) -> None:
    same = text.diff(run, run)
    assert same.data["same_steps"]
    assert "Every agent took the same steps." in shown(same)
    other = RunData.of("run-2", swarm_events(Shape(seed=1, groups=(9,))))
    found = text.diff(run, other).data
    by_agent = {line["agent"]: line for line in found["agents"]}
    assert by_agent["root/9"]["what"] == "only in one"
    assert by_agent["root/1"]["step"] == 0
    change = next(line for line in found["usage"] if line["what"] == "critical_steps")
    assert change["change"] == change["b"] - change["a"]
    shown(text.diff(run, other))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_that_has_hardly_begun_can_be_looked_at(count: int) -> None:
    run = RunData.of("r", swarm_events()[:count])
    for view in (text.tree(run), text.critical_path_view(run), text.cost(run), text.diff(run, run)):
        assert shown(view)


def test_what_models_wrote_neither_steers_the_terminal_nor_is_markup() -> None:
    events = swarm_events()
    broken = next(event for event in events if event.type == "agent_finished" and event.payload["error"])
    assert isinstance(broken.payload, dict)
    broken.payload["error"] = "\x1b[2J [bold]x[/] \u202e" + "y"
    printed = shown(text.tree(RunData.of("r", events)))
    assert "\ufffd[2J [bold]x[/] \ufffdy" in printed
    assert "\x1b" not in printed
    assert "\x1b" not in printable(INJECTED)


def test_events_without_their_texts_fold_into_the_same_timeline() -> None:
    from perilune.agents.journal import Event

    events = swarm_events(Shape(resumed=True))
    small = [Event(**lean(event)) for event in events]
    full, less = Timeline.of("r", events), Timeline.of("r", small)
    assert less.agents == full.agents
    assert (critical_path(less), totals(less)) == (critical_path(full), totals(full))
    assert len(json.dumps([lean(e) for e in events])) < 0.6 * len(json.dumps([e.to_dict() for e in events]))
    assert INJECTED[:30] not in json.dumps([lean(e) for e in events])


def test_a_transcript_has_all_that_an_agent_was_told_and_did(run: RunData) -> None:
    entries = transcript("root/1", run.events)
    kinds = [entry.kind for entry in entries]
    agent = run.state.agents["root/1"]
    assert kinds[:2] == ["system", "user"]
    assert kinds.count("assistant") == agent.turns
    assert kinds.count("call") == kinds.count("result") == agent.tool_calls
    assert {e.key for e in entries if e.kind == "call"} == {e.key for e in entries if e.kind == "result"}
    assert any(entry.text == INJECTED for entry in entries)
    asked = [entry.title for entry in transcript("root", run.events) if entry.kind == "note"]
    assert asked == ["asks to run publish", "allowed", "ended: completed"]
    short = transcript("root/1", run.events, most=20)
    assert all(len(entry.text) < 80 for entry in short)
    assert "more characters are in the journal" in next(e.text for e in short if e.kind == "result")
