from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from perilune.agents.client.replay import RequestHasher
from perilune.agents.config import SwarmConfig
from perilune.agents.journal import Event, find_run, list_runs, load_events, verify_chain
from perilune.agents.messages import ChatRequest, Message
from perilune.agents.replaying import replay_run
from perilune.agents.state import RunState
from perilune.agents.swarm import SwarmRun
from perilune.agents.tools.function import tool
from tests.agents.swarm_cases import SURVEYED, Ledger, call, calls, run_swarm, says, survey


def test_a_swarm_solves_its_task(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    result = run_swarm(survey, tmp_path / "a.db", ledger.tools())
    assert (result.status, result.answer) == ("completed", SURVEYED)
    assert (result.steps, result.critical_steps, result.tool_calls, result.subagents) == (15, 6, 13, 4)
    assert len(ledger.lines) == 4
    assert result.cost_usd is not None
    assert result.cost_usd > 0
    events = load_events(tmp_path / "a.db")
    assert verify_chain(tmp_path / "a.db") == len(events)
    state = RunState.fold("r", events)
    assert (state.status, state.answer, state.critical_steps()) == ("completed", SURVEYED, 6)
    assert state.usage == result.usage


def test_text_without_a_call_is_the_answer(tmp_path: Path) -> None:
    result = run_swarm(lambda request: says("42"), tmp_path / "a.db", task="what is it")
    assert (result.status, result.answer, result.steps) == ("completed", "42", 1)


def test_what_is_to_be_redacted_is_nowhere_in_a_run(tmp_path: Path) -> None:
    @tool(effect="pure")
    def show(text: str) -> str:
        """Show a text.

        Args:
            text: any.
        """
        return f"{text} sk-tool7777 " + "x" * 9000

    asked: list[str] = []

    def policy(request: ChatRequest) -> Message:
        asked.extend(message.content for message in request.messages)
        return calls(call("show", "sk-id1111", text="sk-argument")) if len(request.messages) == 2 else says("sk-answer")

    config = SwarmConfig(redact=(r"sk-\w+",))
    path = tmp_path / "a.db"
    result = run_swarm(policy, path, [show], config, task="use sk-task0000")
    assert result.answer == "***"
    assert "use ***" in asked
    assert any("*** *** xxx" in text for text in asked)
    written = path.read_bytes().replace(b"sk-id1111", b"")  # a name, which pairs a call with its result
    assert b"sk-" not in written.replace(rb"sk-\\w+", b"")
    assert find_run(path).task == "use ***"
    replay = asyncio.run(replay_run(path, None, tmp_path / "copy.db"))
    assert replay.result.answer == "***"


@pytest.mark.parametrize(
    ("pattern", "message"), [("(", r"'\(' is no regular expression"), ("x*", "empty text, got 'x")]
)
def test_patterns_that_cannot_be_meant_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwarmConfig(redact=(pattern,))


def test_who_looks_on_cannot_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    async def watch(run: SwarmRun) -> None:
        def broken(event: Event) -> None:
            raise RuntimeError(f"a view's bug at {event.type}")

        run.listen(broken)
        run.listen(lambda event: told.append(event.type))

    result = run_swarm(lambda request: says("ok"), tmp_path / "a.db", during=watch)
    assert (result.status, result.answer) == ("completed", "ok")
    assert "run_finished" in told
    assert "a view's bug at turn_finished" in caplog.text


def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    (tmp_path / "a.artifacts").write_text("in the way")
    with pytest.raises(OSError, match="artifacts"):
        run_swarm(lambda request: says("ok"), path)
    assert not [thread for thread in threading.enumerate() if thread.name == "journal a.db"]
    (tmp_path / "a.artifacts").unlink()
    assert list_runs(path) == []
    assert run_swarm(lambda request: says("ok"), path).status == "completed"


def test_what_finished_agents_asked_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(RequestHasher, "forget", lambda self, agent: forgotten.append(agent))
    run_swarm(survey, tmp_path / "a.db", Ledger(tmp_path / "ledger").tools())
    assert sorted(forgotten) == ["root", "root/1", "root/2", "root/3", "root/4"]
