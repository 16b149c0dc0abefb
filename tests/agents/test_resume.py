from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from perilune.agents.journal import Event, Journal, JournalError, load_events, verify_chain
from perilune.agents.swarm import RunResult, Swarm
from perilune.agents.tools.human import Rule
from tests.agents.swarm_cases import SURVEYED, TASKS, Ledger, endpoint, look_up, run_swarm, says, survey

LINES = sorted(f"{place} has {len(place)} letters" for place in TASKS)


def cut(path: Path, events: Sequence[Event]) -> None:
    """A journal with these events alone, as a crash would leave it."""
    journal = Journal(path, "r")
    journal.register("survey", "scripted")
    for event in events:
        journal.append(event.type, event.agent, event.payload, event.cause)
    journal.close()


def resume(path: Path, ledger: Ledger) -> RunResult:
    async def act() -> RunResult:
        swarm = Swarm(endpoint=endpoint(survey), tools=ledger.tools())
        run = await swarm.resume(path)
        result = await run.result()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(act())


def test_every_prefix_of_a_journal_resumes_to_the_same_answer_and_no_side_effect_happens_twice(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "first")
    whole = run_swarm(survey, tmp_path / "whole.db", first.tools())
    events = load_events(tmp_path / "whole.db")
    for count in range(len(events) + 1):
        started = [e for e in events[:count] if e.type == "tool_started" and e.payload["name"] == "post"]
        finished = {e.payload["call"] for e in events[:count] if e.type == "tool_finished"}
        # What was begun may have taken effect or not.
        for took_effect in (True, False) if any(e.payload["call"] not in finished for e in started) else (True,):
            name = f"{count}{took_effect}"
            cut(tmp_path / f"{name}.db", events[:count])
            ledger = Ledger(tmp_path / f"{name}.ledger")
            for event in started:
                if took_effect or event.payload["call"] in finished:
                    line = json.loads(event.payload["arguments"])["text"]
                    with ledger.path.open("a") as file:
                        file.write(f"{event.payload['call']} {line}\n")
            result = resume(tmp_path / f"{name}.db", ledger)
            assert (result.status, result.answer) == ("completed", SURVEYED), name
            assert sorted(line.split(" ", 1)[1] for line in ledger.lines) == LINES, name
            assert result.subagents == 4, name
            assert result.tool_calls >= whole.tool_calls, name
            verify_chain(tmp_path / f"{name}.db")


def test_a_finished_run_gives_its_result_again_and_does_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    whole = run_swarm(survey, tmp_path / "a.db", ledger.tools())
    before = load_events(tmp_path / "a.db")
    assert resume(tmp_path / "a.db", ledger) == whole
    assert load_events(tmp_path / "a.db") == before


def test_a_stopped_run_leaves_nothing_running_and_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")

    async def stop(run) -> None:
        while run.state.subagents < 2:
            await asyncio.sleep(0)
        await run.stop()

    stopped = run_swarm(survey, tmp_path / "a.db", ledger.tools(), during=stop)
    assert stopped.status == "stopped"
    assert resume(tmp_path / "a.db", ledger).answer == SURVEYED
    assert sorted(line.split(" ", 1)[1] for line in ledger.lines) == LINES


def test_a_run_that_is_driven_elsewhere_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    run_swarm(lambda request: says("done"), path)
    holder = Journal(path, "r")
    with pytest.raises(JournalError, match="is driven by process"):
        resume(path, Ledger(tmp_path / "ledger"))
    holder.close()
    with pytest.raises(JournalError, match="has no runs"):
        cut_none(tmp_path / "none.db")


def cut_none(path: Path) -> None:
    Journal(path, "r").close()
    resume(path, Ledger(path.with_suffix(".ledger")))


KILLS = int(os.environ.get("PERILUNE_KILLS", "12"))
"""How often a run is killed; 200 for a thorough look."""

DRIVER = """
import asyncio, sys, time
from pathlib import Path
from perilune.agents.journal import JournalError
from perilune.agents.swarm import Swarm
from tests.agents.swarm_cases import Ledger, endpoint, survey

def told(event):
    print(event.seq, flush=True)
    time.sleep(0.001)  # or the kill would come many events later

async def main(path, ledger):
    swarm = Swarm(endpoint=endpoint(survey), tools=Ledger(Path(ledger)).tools())
    path = Path(path)
    try:
        run = await swarm.resume(path)
    except JournalError:  # it was killed before there was a run
        run = await swarm.start("survey", path, run_id="r")
    run.listen(told)
    result = await run.result()
    print("answer", result.answer, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def drive_and_kill(program: Path, path: Path, ledger: Ledger, after: int, delay_s: float) -> str | None:
    """Drive a run in a child until so many events were written, and a moment longer, and kill it.

    Returns:
        The answer, if the run was quicker.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, str(program), str(path), str(ledger.path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    lines: list[str] = []
    while len(lines) < after and (line := child.stdout.readline()):
        lines.append(line)
    time.sleep(delay_s)
    child.send_signal(signal.SIGKILL)
    lines += child.stdout.readlines()
    child.stdout.close()
    assert child.wait() in (0, -signal.SIGKILL)
    return next((line.removeprefix("answer ").strip() for line in lines if line.startswith("answer")), None)


def whole_events(path: Path) -> int:
    """How many events a kill left, all of which must be whole."""
    try:
        return verify_chain(path)
    except JournalError as error:
        if not str(error).endswith(("no such journal", "has no runs")):
            raise
        return 0


@pytest.mark.slow
@pytest.mark.timeout(60 + 5 * KILLS)
def test_kill_9_anywhere_and_resume_loses_nothing(tmp_path: Path) -> None:
    """Runs are killed at random events and moments, resumed, and killed again, until they come to their end."""
    generator = random.Random(0)
    program = tmp_path / "driver.py"
    program.write_text(DRIVER)
    kills, runs, places = 0, 0, set[int]()
    while kills < KILLS:
        path, ledger = tmp_path / f"{runs}.db", Ledger(tmp_path / f"{runs}.ledger")
        runs, answer, written = runs + 1, None, 0
        while answer is None:
            # Anywhere in what is left of about 90 events; now and then before the run has begun, or while it opens.
            after = generator.randint(1, max(5, 90 - written)) if generator.random() < 0.9 else 0
            after, moment = (after, 0.003) if kills < KILLS else (1000, 0.0)
            answer = drive_and_kill(program, path, ledger, after, generator.random() * (moment if after else 0.5))
            if answer is None:
                kills += 1
                written = whole_events(path)
                places.add(written)
        assert answer == SURVEYED
        assert sorted(line.split(" ", 1)[1] for line in ledger.lines) == LINES
        verify_chain(path)
        assert resume(path, ledger).answer == SURVEYED
    assert kills >= KILLS
    print(f"{kills} kills of {runs} runs, at {len(places)} different events")


def test_open_calls_are_counted_once_when_a_run_is_resumed(tmp_path: Path) -> None:
    from perilune.agents.config import BudgetConfig, SwarmConfig
    from tests.agents.swarm_cases import call, calls, look_up, results

    def policy(request):
        return says(results(request)[0]) if len(request.messages) > 2 else calls(call("look_up", place="x"))

    config = SwarmConfig(budget=BudgetConfig(tool_calls=1))
    whole = run_swarm(policy, tmp_path / "a.db", [look_up], config)
    events = load_events(tmp_path / "a.db")
    at = next(place for place, event in enumerate(events, 1) if event.type == "turn_finished")
    cut(tmp_path / "b.db", events[:at])

    async def act() -> str:
        run = await Swarm(endpoint=endpoint(policy), tools=[look_up], config=config).resume(tmp_path / "b.db")
        return (await run.result()).answer

    assert asyncio.run(act()) == whole.answer
    assert whole.answer.startswith("x has 1 letters")


def test_who_was_told_to_end_before_a_crash_ends_after_it(tmp_path: Path) -> None:
    run_swarm(survey, tmp_path / "a.db", Ledger(tmp_path / "first").tools())
    events = load_events(tmp_path / "a.db")
    at = next(n for n, event in enumerate(events, 1) if (event.type, event.agent) == ("agent_started", "root/2"))
    asked = Event(seq=0, type="cancel_requested", agent="root/2", cause=0, wall=0, at=0, payload={"reason": "enough"})
    cut(tmp_path / "b.db", [*events[:at], asked])

    async def act() -> str | None:
        swarm = Swarm(endpoint=endpoint(survey), tools=Ledger(tmp_path / "second").tools())
        run = await swarm.resume(tmp_path / "b.db")
        await run.result()
        return run.state.agents["root/2"].status

    assert asyncio.run(act()) == "cancelled"


def resumed(path: Path, **settings: object) -> RunResult:
    async def act() -> RunResult:
        allow = bool(settings.pop("allow_changes", False))
        run = await Swarm(endpoint=endpoint(survey), **settings).resume(path, allow_changes=allow)  # type: ignore[arg-type]
        return await run.result()

    return asyncio.run(act())


def test_a_run_does_not_lose_a_tool_or_a_rule_without_a_word(tmp_path: Path) -> None:
    ledger, rules = Ledger(tmp_path / "ledger"), [Rule(mode="deny", tool="drop_*")]

    async def stop(run) -> None:
        await run.stop()

    run_swarm(survey, tmp_path / "a.db", ledger.tools(), rules=rules, during=stop)
    with pytest.raises(JournalError, match=r"lacks the tool post.*has the rules \[\] instead of .*drop_"):
        resumed(tmp_path / "a.db", tools=[look_up])
    with pytest.raises(JournalError, match=r"has the rules"):
        resumed(tmp_path / "a.db", tools=ledger.tools(), rules=[*rules, Rule(mode="auto")])
    recipe = {"endpoint": {"model": "m"}}
    found = resumed(tmp_path / "a.db", tools=ledger.tools(), rules=[], recipe=recipe, allow_changes=True)
    assert found.answer == SURVEYED
    event = next(event for event in load_events(tmp_path / "a.db") if event.type == "run_resumed")
    assert (event.payload["rules"], event.payload["recipe"]) == ([], recipe)
    assert event.payload["config"]["max_depth"] == 1


def test_consent_does_not_outlive_the_rules_that_it_was_given_under(tmp_path: Path) -> None:
    """Consent for the whole run names a rule by its place; another rule may stand there after a resumption."""
    ledger, rules = Ledger(tmp_path / "ledger"), [Rule(mode="ask", tool="post")]

    async def allow(run) -> None:
        while not run.state.approvals:
            await asyncio.sleep(0)
        await run.approve(next(iter(run.state.approvals)), True, for_run=True)
        await run.stop()

    run_swarm(survey, tmp_path / "a.db", ledger.tools(), rules=rules, is_interactive=True, during=allow)
    fewer = len(ledger.lines)
    other = [Rule(mode="ask", tool="po*")]
    resumed(tmp_path / "a.db", tools=ledger.tools(), rules=other, allow_changes=True)
    assert len(ledger.lines) == fewer
