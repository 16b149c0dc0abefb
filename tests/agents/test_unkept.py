"""Runs whose journals hold hashes alone, and runs without a journal."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from perilune.agents.config import SwarmConfig
from perilune.agents.journal import Event, JournalError, find_run, load_events, verify_chain
from perilune.agents.journal.payloads import hashed
from perilune.agents.messages import ChatRequest, Message
from perilune.agents.replaying import fork_run, replay_run
from perilune.agents.result import recorded_result
from perilune.agents.swarm import RunResult, Swarm
from perilune.agents.tools.function import tool
from perilune.agents.tools.human import Rule
from perilune.agents.views.export import export_html
from perilune.agents.views.model import RunData
from perilune.agents.views.text import cost, critical_path_view, tree
from tests.agents.swarm_cases import SURVEYED, TASKS, Ledger, call, calls, endpoint, run_swarm, says, survey


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run without payload."""
    folder = tmp_path_factory.mktemp("hashed")
    rules = [Rule(mode="auto", tool="post", arguments={"text": "* has *"})]
    tools = Ledger(folder / "ledger.txt").tools()
    result = run_swarm(survey, folder / "a.db", tools, rules=rules, keeps_payload=False)
    assert (result.status, result.answer) == ("completed", SURVEYED)
    return folder / "a.db"


def test_nothing_that_was_said_is_in_the_file(journal: Path) -> None:
    written = b"".join(path.read_bytes() for path in journal.parent.glob("a.db*"))
    for text in ("survey", "You look places up", "letters", "Look a place up", "* has *", *TASKS):
        assert text.encode() not in written, text
    assert f"sha256:{hashlib.sha256(SURVEYED.encode()).hexdigest()}".encode() in written
    assert not list(journal.parent.glob("*.artifacts"))
    assert find_run(journal).task == f"sha256:{hashlib.sha256(b'survey').hexdigest()}"
    assert verify_chain(journal) == len(load_events(journal))


def test_what_it_took_and_who_waited_for_whom_is(journal: Path, tmp_path: Path) -> None:
    full = tmp_path / "full.db"
    run_swarm(survey, full, Ledger(tmp_path / "ledger.txt").tools())
    mine, other = RunData.load(journal), RunData.load(full)
    assert [event.type for event in mine.events].count("tool_finished") == 13
    for view in (tree, cost, lambda run: critical_path_view(run, "steps")):
        assert view(mine).data.keys() == view(other).data.keys()
    mine_totals, other_totals = mine.totals, other.totals
    assert mine_totals is not None
    assert other_totals is not None
    assert (mine_totals.steps, mine_totals.critical_steps) == (other_totals.steps, other_totals.critical_steps)
    assert (mine_totals.prompt_tokens, mine_totals.cost_usd) == (other_totals.prompt_tokens, other_totals.cost_usd)
    export_html(journal, None, tmp_path / "run.html")
    assert "letters" not in (tmp_path / "run.html").read_text().split('id="run-data"')[-1]


def test_it_can_be_neither_resumed_nor_replayed_nor_forked(journal: Path, tmp_path: Path) -> None:
    swarm = Swarm(endpoint=endpoint(survey))
    before = journal.read_bytes()
    for attempt in (
        lambda: asyncio.run(swarm.resume(journal)),
        lambda: asyncio.run(replay_run(journal, None, tmp_path / "copy.db")),
        lambda: fork_run(journal, None, 5, "new"),
        lambda: recorded_result(journal),
    ):
        with pytest.raises(JournalError, match=r"without its payload \(--no-payload\).* neither resumed nor replayed"):
            attempt()
    assert journal.read_bytes() == before
    full = tmp_path / "full.db"
    run_swarm(lambda request: says("42"), full)
    with pytest.raises(JournalError, match="a run that goes on needs its payload"):
        asyncio.run(Swarm(endpoint=endpoint(survey), keeps_payload=False).resume(full))


def test_texts_are_hashed_and_names_kinds_and_numbers_stay() -> None:
    message = {"role": "tool", "content": [{"type": "text", "text": "x"}], "tool_call_id": "c"}
    found = hashed({"message": message, "elapsed_s": 1.5, "is_error": False, "note": "", "images": ["data:"]})
    part = found["message"]["content"][0]
    assert (found["message"]["role"], found["message"]["tool_call_id"], part["type"]) == ("tool", "c", "text")
    assert part["text"] == f"sha256:{hashlib.sha256(b'x').hexdigest()}"
    assert found["images"][0].startswith("sha256:")
    assert (found["elapsed_s"], found["is_error"], found["note"]) == (1.5, False, "")
    assert hashed("\ud800").startswith("sha256:")


def test_a_run_without_a_journal_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    @tool(effect="side_effect", max_result_chars=400)
    def show(text: str) -> str:
        """Show a text.

        Args:
            text: any.
        """
        return f"sk-secret {text} " * 100

    def policy(request: ChatRequest) -> Message:
        if len(request.messages) == 2:
            return calls(call("show", text="much"))
        return says(request.messages[-1].content[:30])

    async def act() -> tuple[RunResult, list[Event]]:
        config = SwarmConfig(redact=(r"sk-\w+",))
        run = await Swarm(endpoint=endpoint(policy), tools=[show], config=config).start("go", None)
        events = [event async for event in run.events()]
        return await run.result(), events

    result, events = asyncio.run(act())
    assert (result.status, result.answer) == ("completed", "*** much *** much *** much ***"[:30])
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert events[-1].type == "run_finished"
    assert list(tmp_path.iterdir()) == []
