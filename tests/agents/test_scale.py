"""Sub-agents as tasks of a Ray cluster: the same runs, whatever becomes of the processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.client import ScriptedClient
from perilune.agents.config import AgentLimits, BudgetConfig, LimiterConfig, SwarmConfig
from perilune.agents.demo import DemoConfig, run_demo
from perilune.agents.endpoint import Endpoint
from perilune.agents.journal import load_events, verify_chain
from perilune.agents.limiter import Limiter
from perilune.agents.messages import ChatRequest, Message
from perilune.agents.replaying import replay_run
from perilune.agents.scale import RemoteAgents, driver, local_cluster
from perilune.agents.state import RunState
from perilune.agents.swarm import RunResult, Swarm, SwarmRun
from perilune.agents.tools.artifacts import DirectoryArtifacts, artifact_tool
from perilune.agents.tools.base import Tool, ToolContext
from perilune.agents.tools.function import tool
from perilune.agents.tools.human import Rule
from perilune.errors import PeriluneError
from tests.agents.extension_cases import CONFIG, EVERYTHING, everything
from tests.agents.swarm_cases import SURVEYED, Ledger, call, calls, endpoint, results, says, survey

pytest.importorskip("ray", reason="ray is not installed")

Policy = Callable[[ChatRequest], Any]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster(3, processes=3):
        yield


def tools(folder: Path) -> list[Tool]:
    """A ledger, and tools that show where a call runs and that can be waited for."""

    def note(context: ToolContext) -> None:
        with (folder / f"pids {context.agent_id.replace('/', '-')}").open("a") as file:
            file.write(f"{os.getpid()}\n")

    @tool(effect="pure")
    async def hang(context: ToolContext) -> str:
        """Write down which process this is, and wait until there is a file `go`.

        Args:
            context: of the call.
        """
        note(context)
        while not (folder / "go").exists():
            await asyncio.sleep(0.01)
        return "went"

    @tool(effect="side_effect")
    async def strike(context: ToolContext) -> str:
        """As `hang`, with an effect; tells whether the journal knew of it beforehand.

        Args:
            context: of the call.
        """
        known = [e.payload["call"] for e in load_events(folder / "a.db") if e.type == "tool_started"]
        assert context.call_id in known
        return await hang.run({}, context)

    @tool(effect="pure")
    async def block(context: ToolContext) -> str:
        """Stop the process's event loop for good.

        Args:
            context: of the call.
        """
        note(context)
        time.sleep(100)
        return "late"

    @tool(effect="pure", max_result_chars=1000)
    async def recite() -> str:
        """Say much."""
        return "begin" + "x" * 5000 + "end"

    return [*Ledger(folder / "ledger").tools(), hang, strike, block, recite, artifact_tool()]


def pids(folder: Path, agent: str) -> list[int]:
    path = folder / f"pids {agent.replace('/', '-')}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


async def pid(folder: Path, agent: str, count: int = 1) -> int:
    """The process in which an agent hangs, for the `count`-th time."""
    while len(pids(folder, agent)) < count:
        await asyncio.sleep(0.01)
    return pids(folder, agent)[-1]


def run_remotely(
    policy: Policy,
    folder: Path,
    config: SwarmConfig | None = None,
    *,
    during: Callable[[SwarmRun], Any] | None = None,
    resume: bool = False,
    limiter: Limiter | None = None,
    make: Callable[[], list[Tool]] | None = None,
    late_s: float = 5.0,
    **settings: Any,
) -> RunResult:
    """Run a task to its end, its sub-agents on the cluster; nothing may be left running here."""

    async def act() -> RunResult:
        swarm = Swarm(
            endpoint=endpoint(policy, limiter=limiter or Limiter()),
            config=config or SwarmConfig(grace_s=0.2),
            tools=tools(folder),
            remote=RemoteAgents(
                client=partial(ScriptedClient, policy), tools=make or partial(tools, folder), late_s=late_s
            ),
            **settings,
        )
        path = folder / "a.db"
        run = await (swarm.resume(path) if resume else swarm.start("survey", path, run_id="r"))
        if during is not None:
            async with asyncio.timeout(30):
                await during(run)
        result = await run.result()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(act())


def lead(request: ChatRequest, tasks: tuple[str, ...]) -> Message:
    """An orchestrator that gives out tasks and tells the reports."""
    match len(request.messages):
        case 2:
            return calls(call("create_subagent", name="w", system_prompt="work"))
        case 4:
            return calls(*(call("assign_task", f"t{n}", agent="w", prompt=task) for n, task in enumerate(tasks)))
        case _:
            return says(json.dumps([json.loads(text) for text in results(request)]))


def obedient(request: ChatRequest, tasks: tuple[str, ...] = ()) -> Message:
    """Sub-agents whose task is a tool's name: they call it, and tell what it said."""
    if request.agent_id == "root":
        return lead(request, tasks)
    said = results(request)
    _, name, argument = request.messages[1].content.split(" ", 2)
    return says(" | ".join(said)) if said else calls(call(name, **json.loads(argument)))


def does(*tasks: str) -> Policy:
    numbered = (f"{n} {task}" if " " in task else f"{n} {task} {{}}" for n, task in enumerate(tasks))
    return partial(obedient, tasks=tuple(numbered))


def reports(result: RunResult) -> list[dict[str, Any]]:
    return json.loads(result.answer)


def test_a_swarm_on_a_cluster_is_the_same_run(tmp_path: Path) -> None:
    limiter = Limiter(LimiterConfig(start=2, most=2))
    result = run_remotely(survey, tmp_path, limiter=limiter)
    assert (result.status, result.answer) == ("completed", SURVEYED)
    assert (result.steps, result.critical_steps, result.tool_calls, result.subagents) == (15, 6, 13, 4)
    assert limiter.in_flight == 0
    assert 1 <= limiter.peak <= 2
    lines = Ledger(tmp_path / "ledger").lines
    assert sorted(line.split(" ", 1)[0] for line in lines) == [f"root/{n}:1:0" for n in range(1, 5)]
    events = load_events(tmp_path / "a.db")
    assert verify_chain(tmp_path / "a.db") == len(events)
    state = RunState.fold("r", events)
    assert (state.status, state.answer, state.usage) == ("completed", SURVEYED, result.usage)
    of = {event.seq: event.agent for event in events}
    for event in events:
        if event.agent.startswith("root/") and event.type != "agent_spawned":
            assert of[event.cause] == event.agent
    # Here no process but this one takes part, so all requests and results must be what they would have been.
    replay = asyncio.run(replay_run(tmp_path / "a.db", None, tmp_path / "replay.db"))
    assert replay.result.answer == SURVEYED


def test_what_is_used_elsewhere_is_counted_once_and_limited(tmp_path: Path) -> None:
    used = []

    async def watch(run: SwarmRun) -> None:
        budget = run._runtime.budget
        await run.wait()
        used.append(dict(budget.used))

    config = SwarmConfig(budget=BudgetConfig(tokens_out=100_000, llm_calls=100))
    result = run_remotely(survey, tmp_path, config, during=watch)
    assert result.answer == SURVEYED
    assert used[0]["llm_calls"] == result.steps == 15
    assert used[0]["tool_calls"] == result.tool_calls == 13
    assert used[0]["tokens_in"] == result.usage.prompt_tokens
    assert used[0]["tokens_out"] == result.usage.completion_tokens
    assert used[0]["usd"] == pytest.approx(result.cost_usd)

    (tmp_path / "less").mkdir()
    config = SwarmConfig(budget=BudgetConfig(tool_calls=8))
    result = run_remotely(survey, tmp_path / "less", config)
    assert sum(e.type == "tool_started" for e in load_events(tmp_path / "less" / "a.db")) <= 8
    assert len(Ledger(tmp_path / "less" / "ledger").lines) < 4


def test_a_process_that_dies_is_replaced_once_and_no_effect_happens_twice(tmp_path: Path) -> None:
    async def kill(run: SwarmRun) -> None:
        os.kill(await pid(tmp_path, "root/1"), signal.SIGKILL)
        os.kill(await pid(tmp_path, "root/2"), signal.SIGKILL)
        os.kill(await pid(tmp_path, "root/2", 2), signal.SIGKILL)
        os.kill(await pid(tmp_path, "root/3"), signal.SIGKILL)
        await pid(tmp_path, "root/1", 2)
        (tmp_path / "go").touch()

    found = reports(run_remotely(does("hang", "hang", "strike"), tmp_path, during=kill))
    assert [report["status"] for report in found] == ["completed", "error", "completed"]
    assert found[0]["result"] == "went"
    assert "its process was lost" in found[1]["error"]
    assert "outcome of this call is unknown" in found[2]["result"]
    assert [len(pids(tmp_path, f"root/{n}")) for n in (1, 2, 3)] == [2, 2, 1]
    verify_chain(tmp_path / "a.db")


def test_when_the_desk_dies_its_agents_go_on_with_another(tmp_path: Path) -> None:
    import ray

    async def kill(run: SwarmRun) -> None:
        for agent in ("root/1", "root/2"):
            await pid(tmp_path, agent)
        elsewhere = run._runtime.elsewhere
        assert isinstance(elsewhere, driver.RayAgents)
        ray.kill(elsewhere._desk)
        for agent in ("root/1", "root/2"):
            await pid(tmp_path, agent, 2)
        (tmp_path / "go").touch()

    found = reports(run_remotely(does("hang", "hang"), tmp_path, during=kill))
    assert [(report["status"], report["result"]) for report in found] == [("completed", "went")] * 2


def test_what_is_cancelled_or_late_ends_there_too(tmp_path: Path) -> None:
    async def cancel(run: SwarmRun) -> None:
        await pid(tmp_path, "root/1")
        assert await run.cancel("not needed", "root/1")

    config = SwarmConfig(grace_s=0.2, subagent=AgentLimits(timeout_s=2.0))
    found = reports(run_remotely(does("hang", "hang", 'look_up {"place": "x"}'), tmp_path, config, during=cancel))
    assert [report["status"] for report in found] == ["cancelled", "timeout", "completed"]
    assert found[0]["error"] == "not needed"
    assert "took more than 2 s" in found[1]["error"]

    (tmp_path / "run").mkdir()

    async def cancel_all(run: SwarmRun) -> None:
        for agent in ("root/1", "root/2"):
            await pid(tmp_path / "run", agent)
        await run.cancel("enough")

    result = run_remotely(does("hang", "hang"), tmp_path / "run", during=cancel_all)
    assert (result.status, result.error) == ("cancelled", "enough")
    state = RunState.fold("r", load_events(tmp_path / "run" / "a.db"))
    assert {agent.status for agent in state.agents.values()} == {"cancelled"}


def test_a_process_that_does_not_answer_is_killed(tmp_path: Path) -> None:
    async def cancel(run: SwarmRun) -> None:
        await pid(tmp_path, "root/1")
        await run.cancel("not needed", "root/1")

    config = SwarmConfig(grace_s=0.1, subagent=AgentLimits(timeout_s=1.0))
    found = reports(run_remotely(does("block", "block"), tmp_path, config, during=cancel, late_s=0.5))
    assert [report["status"] for report in found] == ["cancelled", "timeout"]
    for agent in ("root/1", "root/2"):
        process = pids(tmp_path, agent)[0]
        deadline = time.monotonic() + 10
        while _is_running(process):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    async def stop(run: SwarmRun) -> None:
        await pid(tmp_path, "root/1")
        await pid(tmp_path, "root/2")
        await run.stop()

    policy = does("hang", "strike")
    assert run_remotely(policy, tmp_path, during=stop).status == "stopped"
    (tmp_path / "go").touch()
    found = reports(run_remotely(policy, tmp_path, resume=True))
    assert [report["status"] for report in found] == ["completed"] * 2
    assert found[0]["result"] == "went"
    assert "outcome of this call is unknown" in found[1]["result"]
    assert len(pids(tmp_path, "root/2")) == 1


def attentive(request: ChatRequest) -> Message:
    """A sub-agent that posts, waits, and then tells what it was told meanwhile."""
    if request.agent_id == "root":
        return lead(request, ("x",))
    turn = sum(message.role == "assistant" for message in request.messages)
    if turn == 0:
        return calls(call("post", text="a"), call("recite", "c1"))
    if turn == 1:
        found = re.search(r"[0-9a-f]{32}", results(request)[1])
        assert found is not None
        identifier = found[0]
        return calls(call("hang"), call("read_artifact", "c1", id=identifier, offset=5000))
    return says(f"{request.messages[-1].content} {results(request)[1][-3:]}")


def test_people_are_asked_and_heard_and_long_results_are_kept_by_the_run(tmp_path: Path) -> None:
    async def attend(run: SwarmRun) -> None:
        while not run.state.approvals:
            await asyncio.sleep(0.01)
        assert await run.approve(next(iter(run.state.approvals)), True)
        await pid(tmp_path, "root/1")
        await run.steer("hurry", "root/1")
        while not run.state.agents["root/1"].steers:
            await asyncio.sleep(0.01)
        (tmp_path / "go").touch()

    rules = [Rule(mode="ask", tool="post")]
    result = run_remotely(attentive, tmp_path, during=attend, rules=rules, is_interactive=True)
    assert reports(result)[0]["result"] == "hurry end"
    assert len(Ledger(tmp_path / "ledger").lines) == 1
    assert any(path.stat().st_size > 5000 for path in (tmp_path / "a.artifacts").glob("??/*"))

    (tmp_path / "alone").mkdir()
    kept = DirectoryArtifacts(tmp_path / "alone" / "a.artifacts").put(b"what the run has")
    policy = does('post {"text": "a"}', f'read_artifact {{"id": "{kept}"}}', f'read_artifact {{"id": "{"0" * 32}"}}')
    found = reports(run_remotely(policy, tmp_path / "alone", rules=rules))
    assert "nobody is here to give it" in found[0]["result"]
    assert "what the run has" in found[1]["result"]
    assert "there is no artifact" in found[2]["result"]


def nested(request: ChatRequest) -> Message:
    if request.agent_id == "root":
        return lead(request, ("x", "y"))
    if request.agent_id.count("/") == 2:
        return says(request.messages[1].content)
    if len(request.messages) == 2:
        task = request.messages[1].content
        return calls(*(call("assign_task", f"{n}", agent="w", prompt=f"{task}{n}") for n in range(2)))
    return says("+".join(json.loads(text)["result"] for text in results(request)))


def test_sub_agents_of_a_sub_agent_run_where_it_does(tmp_path: Path) -> None:
    found = reports(run_remotely(nested, tmp_path, SwarmConfig(max_depth=2, max_agents_running=1)))
    assert [report["result"] for report in found] == ["x0+x1", "y0+y1"]
    state = RunState.fold("r", load_events(tmp_path / "a.db"))
    assert sorted(state.agents) == ["root", "root/1", "root/1/1", "root/1/2", "root/2", "root/2/1", "root/2/2"]
    assert state.agents["root/1"].groups == {0: ["root/1/1", "root/1/2"]}


def fewer_tools() -> list[Tool]:
    return []


def no_tools() -> list[Tool]:
    raise RuntimeError("the tools are out")


class Locked:
    """What cannot be sent to another process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self) -> list[Tool]:
        return []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (fewer_tools, "RemoteAgents.tools makes other tools than the swarm has: none instead of look_up (pure)"),
        (no_tools, "RuntimeError: the tools are out"),
        (Locked(), "cannot pickle '_thread.lock' object"),
    ],
)
def test_what_cannot_run_is_an_error_of_the_sub_agent(tmp_path: Path, make: Callable[[], list[Tool]], why: str) -> None:
    found = reports(run_remotely(does("hang"), tmp_path, make=make))
    assert found[0]["status"] == "error"
    assert why in found[0]["error"]


def test_the_demonstration(tmp_path: Path) -> None:
    config = DemoConfig(rows=8, speed=1000.0, ray=True)
    found = asyncio.run(run_demo(config, tmp_path / "demo.db"))
    assert (found.single.item_f1, found.swarm.item_f1) == (1.0, 1.0)
    assert found.swarm.totals.subagents == 2


def test_without_ray_or_a_cluster_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    swarm = Swarm(
        endpoint=Endpoint(client=ScriptedClient(survey), model="x"),
        remote=RemoteAgents(client=partial(ScriptedClient, survey)),
    )
    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        with pytest.raises(PeriluneError, match="need a cluster"):
            asyncio.run(swarm.start("x", Path("never.db")))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PeriluneError, match=r"pip install 'perilune\[scale\]'"):
        asyncio.run(swarm.start("x", Path("never.db")))
    assert not Path("never.db").exists()


@pytest.mark.parametrize("settings", [{"workers": 0}, {"cpus": -1.0}, {"late_s": -1.0}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RemoteAgents(client=partial(ScriptedClient, survey), **settings)


def test_sub_agents_on_the_cluster_are_resumed_forked_mapped_and_left_in_the_background(tmp_path: Path) -> None:
    result = run_remotely(everything, tmp_path, CONFIG)
    assert (result.status, result.answer) == ("completed", EVERYTHING)
    state = RunState.fold("r", load_events(tmp_path / "a.db"))
    assert state.agents["root/4"].result.startswith("root/4: south, 2 before")
    assert [state.agents[f"root/{n}"].turns for n in (1, 2, 3, 4)] == [2, 1, 1, 1]
    assert asyncio.run(replay_run(tmp_path / "a.db", None, tmp_path / "copy.db")).result.answer == result.answer
