from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from perilune.agents.journal import load_events
from perilune.agents.swarm import SwarmRun
from perilune.agents.tools.human import Rule, ask_human_tool
from perilune.agents.views import tui
from perilune.agents.views.watch import watch_terminal
from perilune.report import make_progress
from tests.agents.swarm_cases import call, calls, look_up, results, run_swarm, says


def test_nobody_is_waited_for_once_the_view_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LeftAtOnce:
        """A view that is left as soon as something waits for a person."""

        def __init__(self, run: SwarmRun) -> None:
            self.run = run

        async def run_async(self) -> None:
            while not (self.run.state.approvals and self.run.state.questions):
                await asyncio.sleep(0)

    monkeypatch.setattr(tui, "swarm_app", lambda run, limiter=None: LeftAtOnce(run))

    def policy(request):
        turn = sum(message.role == "assistant" for message in request.messages)
        if turn == 0:
            return calls(call("look_up", "a", place="Lima"), call("ask_human", "b", question="Which?"))
        if turn == 1:
            assert "nobody answered in time" in results(request)[0]
            assert "Nobody is here" in results(request)[1]
            return calls(call("look_up", "a", place="Quito"), call("ask_human", "b", question="Which?"))
        return says("; ".join(results(request)))

    async def watch(run: SwarmRun) -> None:
        await watch_terminal(run, make_progress(quiet=True))

    began = time.monotonic()
    tools, rules = [look_up, ask_human_tool()], [Rule(mode="ask", tool="look_up")]
    found = run_swarm(policy, tmp_path / "a.db", tools, rules=rules, is_interactive=True, during=watch)
    assert "nobody is here to give it; ask_human failed: nobody is here to be asked" in found.answer
    assert time.monotonic() - began < 30
    denied = [e.payload for e in load_events(tmp_path / "a.db") if e.type == "approval_resolved"]
    assert [(entry["allowed"], entry["by"]) for entry in denied] == [(False, "timeout")]
