"""Whatever endpoints, disks, tools and models do, runs end correctly and every side effect happens exactly once."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import selectors
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.client import (
    ChaosClient,
    ChaosRates,
    EndpointError,
    HttpClient,
    MockEndpoint,
    MockFaults,
    MockSettings,
    RetryPolicy,
    ScriptedClient,
    Timeouts,
)
from perilune.agents.client.base import ChatClient
from perilune.agents.config import LimiterConfig, SwarmConfig
from perilune.agents.endpoint import Endpoint
from perilune.agents.journal import JournalError, load_events, verify_chain
from perilune.agents.limiter import Limiter
from perilune.agents.messages import ChatRequest, Message, Reply, ToolCall
from perilune.agents.swarm import RunResult, Swarm, SwarmRun
from perilune.agents.tools.artifacts import artifact_tool
from perilune.agents.tools.base import ToolOutput
from perilune.agents.tools.function import tool
from tests.agents.swarm_cases import (
    SURVEYED,
    TASKS,
    Ledger,
    call,
    calls,
    endpoint,
    look_up,
    results,
    run_swarm,
    says,
    survey,
)

LINES = sorted(f"{place} has {len(place)} letters" for place in TASKS)
QUICK = RetryPolicy(base_s=0.001, cap_s=0.004)
NO_JSON = "the arguments are no JSON"


def persistent(request: ChatRequest) -> Message:
    """Surveys, and makes calls again whose arguments did not arrive whole."""
    kept: list[Message] = []
    for message in request.messages:
        if message.role == "tool" and NO_JSON in message.content:
            # All calls of an answer are cut, or none is.
            if kept[-1].role == "assistant":
                kept.pop()
        else:
            kept.append(message)
    return survey(replace(request, messages=tuple(kept)))


class Counting:
    """Asks a client, and counts what it was asked."""

    def __init__(self, client: ChatClient) -> None:
        self.client, self.asked = client, 0

    async def chat(self, request: ChatRequest) -> Reply:
        self.asked += 1
        return await self.client.chat(request)

    async def close(self) -> None:
        await self.client.close()


async def survey_over(client: ChatClient, path: Path, ledger: Ledger, **settings: Any) -> RunResult:
    """Run the survey; whatever disturbs it, it is right, and nothing is left running."""
    counting = Counting(client)
    swarm = Swarm(endpoint=Endpoint(client=counting, model="m", retry=QUICK, **settings), tools=ledger.tools())
    run = await swarm.start("survey", path, run_id="r")
    result = await run.result()
    await asyncio.sleep(0)
    servers = {task for task in asyncio.all_tasks() if "RequestHandler" in repr(task.get_coro())}
    assert asyncio.all_tasks() - servers == {asyncio.current_task()}
    assert (result.status, result.answer) == ("completed", SURVEYED)
    assert sorted(line.split(" ", 1)[1] for line in ledger.lines) == LINES
    assert run.state.llm_calls == counting.asked
    assert (run.limiter.in_flight, run.limiter.waiting) == (0, 0)
    return result


def test_a_hundred_disturbed_runs_end_correctly_with_every_side_effect_once(tmp_path: Path) -> None:
    rates = ChaosRates(rate_limit=0.05, server=0.03, truncated=0.02, malformed_arguments=0.01, slow=0.02, dropped=0.02)
    struck: Counter[str] = Counter()

    async def act(seed: int) -> None:
        client = ChaosClient(ScriptedClient(persistent), rates, seed=seed, retry_after_s=0.001, slow_s=0.002)
        ledger = Ledger(tmp_path / f"{seed}.ledger")
        result = await survey_over(client, tmp_path / f"{seed}.db", ledger)
        struck.update(client.counts)
        wrong = client.counts["malformed_arguments"]
        assert 15 <= result.steps <= 15 + wrong

    for seed in range(100):
        asyncio.run(act(seed))
    assert min(struck.values()) >= 5, struck
    assert sum(struck.values()) > 150


@pytest.mark.parametrize("seed", range(5))
def test_disturbed_runs_over_sockets_end_correctly(tmp_path: Path, seed: int) -> None:
    """Far more faults than a real endpoint has, so that each strikes in so few runs."""
    share = 0.08
    faults = MockFaults(
        rate_limit=share, unavailable=share, truncated=share, dropped=share, slow_loris=share / 2,
        retry_after_s=0.001, stall_s=0.3, seed=seed,
    )  # fmt: skip

    async def act() -> None:
        mock = MockEndpoint(persistent, MockSettings(faults=faults))
        async with mock as url:
            client = ChaosClient(
                HttpClient(url, timeouts=Timeouts(idle_s=0.1)), ChaosRates(malformed_arguments=0.04), seed=seed
            )
            await survey_over(client, tmp_path / "a.db", Ledger(tmp_path / "ledger"))
            await client.close()
        kinds = Counter(e.payload["fault"] for e in load_events(tmp_path / "a.db") if e.type == "turn_retry")
        seen = mock.stats.faults
        wanted = {
            "rate_limit": seen.get("rate_limit", 0),
            "overload": seen.get("unavailable", 0),
            "timeout": seen.get("slow_loris", 0),
        }
        assert {name: kinds[name] for name in wanted} == wanted
        # A connection that is closed in the middle of a chunked body may be seen either way.
        assert kinds["truncated"] + kinds["connection"] == seen.get("truncated", 0) + seen.get("dropped", 0)
        assert sum(seen.values()) >= 2

    asyncio.run(act())


@pytest.mark.parametrize("fault", ["truncated", "dropped", "slow_loris"])
def test_half_a_stream_is_never_an_answer(tmp_path: Path, fault: str) -> None:
    text = "It is not the case that " * 20
    rates = {fault: 0.5}

    async def act() -> None:
        mock = MockEndpoint(lambda request: says(text), MockSettings(faults=MockFaults(stall_s=0.05, **rates)))
        async with mock as url:
            client = HttpClient(url, timeouts=Timeouts(idle_s=0.02))
            point = Endpoint(client=client, model="m", retry=replace(QUICK, attempts=40))
            swarm = Swarm(endpoint=point)
            for number in range(10):
                run = await swarm.start(f"task {number}", tmp_path / "a.db")
                assert (await run.result()).answer == text
            await client.close()
        assert mock.stats.faults[fault] >= 3

    asyncio.run(act())


class FastLoop(asyncio.SelectorEventLoop):
    """A loop that does not wait: where nothing else is to be done, its clock jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__(_Jumping(self))
        self.skipped_s = 0.0

    def time(self) -> float:
        return super().time() + self.skipped_s


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop: FastLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if not timeout:
            return super().select(timeout)
        # What other threads do takes real time, of which they get some.
        found = super().select(min(timeout, 0.002))
        if not found:
            self._loop.skipped_s += timeout
        return found


class Crowded:
    """Serves so many at a time, and tells everybody else that it is too much."""

    def __init__(self, policy: Callable[[ChatRequest], Message], capacity: int, takes_s: float) -> None:
        self._client, self._capacity, self._takes_s = ScriptedClient(policy), capacity, takes_s
        self.active, self.refused = 0, 0

    async def chat(self, request: ChatRequest) -> Reply:
        if self.active >= self._capacity:
            self.refused += 1
            raise EndpointError("429: slow down", fault="rate_limit", status=429, retry_after_s=1.0)
        self.active += 1
        try:
            await asyncio.sleep(self._takes_s)
            return await self._client.chat(request)
        finally:
            self.active -= 1

    async def close(self) -> None:
        """Nothing is open."""


def crew(size: int) -> Callable[[ChatRequest], Message]:
    """An orchestrator that starts so many at once; each looks four places up."""

    def policy(request: ChatRequest) -> Message:
        turn = sum(message.role == "assistant" for message in request.messages)
        if request.agent_id != "root":
            return says("done") if turn == 4 else calls(call("look_up", place=f"place {turn}"))
        if turn == 1:
            return says(str(Counter(json.loads(text)["status"] for text in results(request)[1:])))
        tasks = (call("assign_task", f"t{n}", agent="w", prompt=f"part {n}") for n in range(size))
        return calls(call("create_subagent", "p", name="w", system_prompt="work"), *tasks)

    return policy


def run_crowd(path: Path, client: Crowded, size: int, limits: LimiterConfig) -> tuple[RunResult, Limiter]:
    async def act() -> tuple[RunResult, Limiter]:
        limiter = Limiter(limits, now=asyncio.get_running_loop().time)
        config = SwarmConfig(max_calls_per_turn=size + 1, max_agents_running=size)
        swarm = Swarm(endpoint=Endpoint(client=client, model="m", limiter=limiter), config=config, tools=[look_up])
        return await (await swarm.start("go", path)).result(), limiter

    with asyncio.Runner(loop_factory=FastLoop) as runner:
        return runner.run(act())


def test_in_a_storm_of_429_the_window_shrinks_and_all_runs_end(tmp_path: Path) -> None:
    size = 60
    client = Crowded(crew(size), capacity=6, takes_s=2.0)
    result, limiter = run_crowd(tmp_path / "a.db", client, size, LimiterConfig(start=48))
    assert (result.status, result.answer) == ("completed", str(Counter(completed=size)))
    assert result.steps == size * 5 + 2
    assert client.refused > 20
    assert limiter.window <= 12
    assert client.refused < 200  # it does not hammer: once the window fits, refusals are rare
    assert (limiter.in_flight, limiter.waiting, client.active) == (0, 0, 0)


def test_a_long_wait_for_a_place_is_no_failure(tmp_path: Path) -> None:
    """Thirty agents, two at a time, a minute a call: who waits has not been refused."""
    client = Crowded(crew(30), capacity=2, takes_s=60.0)
    result, _ = run_crowd(tmp_path / "a.db", client, 30, LimiterConfig(start=2, most=2))
    assert result.answer == str(Counter(completed=30))
    assert client.refused == 0


async def break_disk(run: SwarmRun, how: str) -> None:
    """Have the journal's disk fail after some events."""
    while run.state.seq < 24:
        await asyncio.sleep(0)
    # What the writer's connection is told, the next group of events meets.
    run._runtime.journal._connection.execute(how)


@pytest.mark.parametrize(
    ("how", "words"),
    [("PRAGMA max_page_count=1", "database or disk is full"), ("PRAGMA query_only=1", "readonly database")],
)
def test_a_disk_that_is_full_or_read_only_stops_the_run_which_goes_on_later(
    tmp_path: Path, how: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, path = Ledger(tmp_path / "ledger"), tmp_path / "a.db"

    async def act() -> None:
        swarm = Swarm(endpoint=endpoint(padded), tools=ledger.tools())
        run = await swarm.start("survey", path, run_id="r")
        await break_disk(run, how)
        with pytest.raises(JournalError, match=words):
            await run.result()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with caplog.at_level(logging.ERROR):
        asyncio.run(act())
    assert "the journal cannot be written, the run stops" in caplog.text
    assert "Traceback" not in caplog.text
    verify_chain(path)
    assert len(ledger.lines) < 4
    with sqlite3.connect(path) as connection:  # the lease that could not be given back expires by itself
        connection.execute("UPDATE leases SET expires = 0")
    connection.close()

    async def go_on() -> RunResult:
        return await (await Swarm(endpoint=endpoint(survey), tools=ledger.tools()).resume(path)).result()

    result = asyncio.run(go_on())
    assert (result.status, result.answer) == ("completed", SURVEYED)
    assert sorted(line.split(" ", 1)[1] for line in ledger.lines) == LINES


def padded(request: ChatRequest) -> Message:
    """A survey that thinks aloud, so that a disk is soon full."""
    return replace(survey(request), reasoning=os.urandom(4000).hex())


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from perilune.agents.journal import JournalError
from perilune.agents.swarm import Swarm
from tests.agents.swarm_cases import Ledger, endpoint
from tests.agents.test_faults import padded

async def main(path, ledger):
    run = await Swarm(endpoint=endpoint(padded), tools=Ledger(Path(ledger)).tools()).start("survey", Path(path))
    try:
        await run.result()
    except JournalError as error:
        print(error)
    assert asyncio.all_tasks() == {asyncio.current_task()}

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
asyncio.run(main(*sys.argv[1:]))
"""


def test_a_disk_that_takes_no_more_bytes(tmp_path: Path) -> None:
    path, ledger = tmp_path / "a.db", Ledger(tmp_path / "ledger")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(ledger.path)],
        capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a.db: " in done.stdout
    verify_chain(path)

    async def go_on() -> RunResult:
        return await (await Swarm(endpoint=endpoint(survey), tools=ledger.tools()).resume(path)).result()

    assert asyncio.run(go_on()).answer == SURVEYED
    assert sorted(line.split(" ", 1)[1] for line in ledger.lines) == LINES


HUGE = 50_000_000


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("x" * HUGE, "xxx"),
        (b"\x00\x01\x02PNG\xff\xfe" * 1000, "PNG\ufffd\ufffd"),
        (b"caf\xe9 \xc3\x28", "caf\ufffd \ufffd("),
        ("half \ud83d a pair", "half \ufffd a pair"),
    ],
    ids=["50 MB", "binary", "invalid UTF-8", "surrogate"],
)
def test_what_a_tool_returns_is_made_fit_for_a_conversation(tmp_path: Path, given: str | bytes, shown: str) -> None:
    @tool(effect="pure")
    async def dump() -> Any:
        """Return something."""
        return given if isinstance(given, bytes) else ToolOutput(text=given)

    def policy(request: ChatRequest) -> Message:
        match len(request.messages):
            case 2:
                return calls(call("dump"))
            case 4 if 'read_artifact("' in results(request)[0]:
                name = results(request)[0].split('read_artifact("')[1].split('"')[0]
                return calls(call("read_artifact", id=name, offset=HUGE - 10))
            case _:
                return says(request.messages[-1].content)

    path = tmp_path / "a.db"
    result = run_swarm(policy, path, [dump, artifact_tool()])
    assert result.status == "completed"
    assert len(result.answer) <= 16_000
    result.answer.encode()
    event = next(e for e in load_events(path) if e.type == "tool_finished")
    assert shown in event.payload["text"]
    assert len(event.payload["text"]) <= 16_000
    assert path.stat().st_size < 300_000
    if len(given) == HUGE:
        assert "x" * 10 in result.answer


def test_a_report_that_cannot_be_kept_whole_reaches_the_orchestrator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def policy(request: ChatRequest) -> Message:
        if request.agent_id != "root":
            return says("y" * 20_000 if request.agent_id == "root/1" else "half \ud83d a pair" * 1000)
        match len(request.messages):
            case 2:
                tasks = (call("assign_task", f"t{n}", agent="w", prompt=f"part {n}") for n in range(2))
                return calls(call("create_subagent", "p", name="w", system_prompt="work"), *tasks)
            case _:
                return says(json.dumps([json.loads(text) for text in results(request)[1:]]))

    def full(self: object, content: bytes, *, name: str = "") -> str:
        if content.startswith(b"y"):
            raise OSError(28, "No space left on device")
        return "0" * 32

    monkeypatch.setattr("perilune.agents.tools.artifacts.DirectoryArtifacts.put", full)
    result = run_swarm(policy, tmp_path / "a.db")
    first, second = json.loads(result.answer)
    assert (first["status"], len(first["result"])) == ("completed", 8000)
    assert "No space left" in first["artifact"]
    assert second["artifact"] == "0" * 32


@pytest.mark.parametrize("arguments", ["[" * 100_000, '{"a":' * 100_000, '{"place": ' + "9" * 10_000 + "}", "\ud800"])
@pytest.mark.parametrize("name", ["look_up", "assign_task"])
def test_monstrous_arguments_are_answered_and_a_journal_with_them_can_be_resumed(
    tmp_path: Path, name: str, arguments: str
) -> None:
    def policy(request: ChatRequest) -> Message:
        if len(request.messages) > 2:
            return says("; ".join(results(request)))
        good = call("look_up", "b", place="here")
        return calls(ToolCall(id="a", name=name, arguments=arguments), good)

    result = run_swarm(policy, tmp_path / "a.db", [look_up])
    assert result.status == "completed"
    assert result.answer.startswith(name)
    assert result.answer.endswith("here has 4 letters")

    async def again() -> RunResult:
        return await (await Swarm(endpoint=endpoint(policy), tools=[look_up]).resume(tmp_path / "a.db")).result()

    assert asyncio.run(again()).answer == result.answer
