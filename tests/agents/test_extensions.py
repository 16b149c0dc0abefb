"""The extensions of the swarm's tools: what each does, and that a run with it survives a crash and is replayed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.config import AgentLimits, BudgetConfig, ContextConfig, Extensions, GroupConfig, SwarmConfig
from perilune.agents.endpoint import Endpoint, Price
from perilune.agents.journal import JournalError, load_events, verify_chain
from perilune.agents.messages import ChatRequest, Message
from perilune.agents.replaying import replay_run, resume_fork
from perilune.agents.scale import RemoteAgents
from perilune.agents.state import RunState
from perilune.agents.swarm import Swarm
from perilune.agents.swarm_tools import swarm_schemas
from perilune.agents.tracing import SpanFold
from perilune.agents.views.model import RunData
from perilune.agents.views.text import tree
from perilune.agents.views.transcript import transcript
from tests.agents.extension_cases import ALL, CASES, CONFIG, CREATE, run_case, swarm_of, turn_of
from tests.agents.swarm_cases import call, calls, endpoint, look_up, results, run_swarm, says, wait
from tests.agents.test_resume import cut


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each extension, the journal of a run with it."""
    found: dict[str, Path] = {}
    for name, (_, answer) in CASES.items():
        found[name] = tmp_path_factory.mktemp(name) / "a.db"
        result = run_case(name, found[name])
        assert (result.status, result.answer) == ("completed", answer)
    return found


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, recorded: dict[str, Path]) -> tuple[str, Path]:
    """An extension, and the journal of a run with it."""
    return request.param, recorded[request.param]


def state_of(path: Path) -> RunState:
    return RunState.fold("r", load_events(path))


def test_every_prefix_of_a_run_with_an_extension_resumes_to_the_same_answer(
    case: tuple[str, Path], tmp_path: Path
) -> None:
    name, whole = case
    events = load_events(whole)

    async def go_on(path: Path) -> None:
        run = await swarm_of(name).resume(path)
        result = await run.result()
        assert (result.status, result.answer) == ("completed", CASES[name][1]), path.name
        assert result.subagents == state_of(whole).subagents, path.name
        assert asyncio.all_tasks() == {asyncio.current_task()}

    for count in range(len(events) + 1):
        path = tmp_path / f"{count}.db"
        cut(path, events[:count])
        asyncio.run(go_on(path))
        verify_chain(path)


def test_a_run_with_an_extension_is_replayed(case: tuple[str, Path], tmp_path: Path) -> None:
    name, path = case
    found = asyncio.run(replay_run(path, None, tmp_path / "copy.db"))
    assert found.result.answer == CASES[name][1]
    assert state_of(tmp_path / "copy.db").critical_steps() == state_of(path).critical_steps()


def test_a_run_with_an_extension_is_forked_in_the_middle(case: tuple[str, Path], tmp_path: Path) -> None:
    name, whole = case
    events = load_events(whole)
    path = tmp_path / "a.db"
    cut(path, events)

    async def act() -> str:
        run = await resume_fork(swarm_of(name), path, "r", 2 * len(events) // 3, "other")
        return (await run.result()).answer

    assert asyncio.run(act()) == CASES[name][1]


def test_what_is_off_is_neither_shown_nor_done(tmp_path: Path) -> None:
    """A page may tell a model of a parameter; that does not switch it on."""
    shown: list[Any] = []

    def policy(request: ChatRequest) -> Message:
        if request.agent_id != "root":
            return says("done")
        shown.append(request.tools)
        if turn_of(request):
            return says(json.dumps(results(request)))
        task = {"agent": "w", "prompt": "x"}
        wanted = ({"resume": "root/1"}, {"fork": True}, {"background": True}, {"model": "fast"})
        more = {"agent": "w", "description": "d", "prompt_template": "{{item}}", "items": ["a", "b"]}
        tries = [call("assign_task", f"o{n}", **task, **option) for n, option in enumerate(wanted)]
        return calls(CREATE, *tries, call("swarm_map", "m", **more))

    answer = json.loads(run_swarm(policy, tmp_path / "a.db").answer)
    assert [text.split(", got")[0] for text in answer[1:5]] == ["assign_task takes agent and prompt"] * 4
    assert "swarm_map" in answer[5]
    assert "unknown" in answer[5] or "no tool" in answer[5]
    assert state_of(tmp_path / "a.db").subagents == 0
    text = json.dumps(shown)
    assert not any(word in text for word in ("swarm_map", "resume", "fork", "background", "model"))


@pytest.mark.parametrize("name", ["resume", "swarm_map", "fork", "background"])
def test_each_switch_shows_its_own_and_nothing_else(name: str) -> None:
    before, after = json.dumps(swarm_schemas(Extensions())), json.dumps(swarm_schemas(Extensions(**{name: True})))
    assert f'"{name}"' in after
    others = {"resume", "swarm_map", "fork", "background", "model"} - {name}
    assert not any(f'"{other}"' in after for other in others)
    assert f'"{name}"' not in before


def tried(path: Path, *tries: Any, config: SwarmConfig = CONFIG, **settings: Any) -> list[str]:
    """The results of calls that are made in one turn, after three sub-agents were started; root/3 was canceled."""

    def policy(request: ChatRequest) -> Any:
        if request.agent_id == "root/3" and turn_of(request) == 0:
            return calls(call("wait", seconds=30.0))
        if request.agent_id != "root":
            return says(f"done {turn_of(request)}")
        match turn_of(request):
            case 0:
                other = call("create_subagent", "q", name="v", system_prompt="other work")
                tasks = [call("assign_task", f"t{n}", agent=a, prompt=f"{n}") for n, a in enumerate("wvw")]
                return calls(CREATE, other, *tasks)
            case 1:
                return calls(*tries)
            case _:
                return says(json.dumps(results(request)))

    async def cut_off(run: Any) -> None:
        while "root/3" not in run.state.agents or not run.state.agents["root/3"].calls:
            await asyncio.sleep(0)
        await run.cancel("enough", "root/3")

    return json.loads(run_swarm(policy, path, [wait], config, during=cut_off, **settings).answer)


def test_who_cannot_go_on_is_refused(tmp_path: Path) -> None:
    def resume(id_: str, name: str, agent: str = "w", **more: Any) -> Any:
        return call("assign_task", id_, agent=agent, prompt=id_, resume=name, **more)

    found = tried(
        tmp_path / "a.db",
        resume("0", "root/1"),
        resume("1", "root/1"),
        resume("2", "root/9"),
        resume("3", "root"),
        resume("4", "root/2"),
        resume("5", "root/3"),
        resume("6", "root/2", agent="v", fork=True),
        resume("7", "root/2", agent="v"),
        call("assign_task", "8", agent="w", prompt="x", resume=1),
    )
    expected = (
        '"status": "completed", "steps": 2',
        "root/1 was given another task in this turn",
        "'root/9' is no sub-agent of yours. There are: root/1, root/2, root/3",
        "'root' is no sub-agent of yours",
        "root/2 is a 'v', not a 'w'",
        "root/3 was canceled",
        "fork does not go with resume",
        '"status": "completed", "steps": 2',
        "assign_task: resume must be a string, got int",
    )
    for text, part in zip(found, expected, strict=True):
        assert part in text


def test_another_agents_sub_agent_is_not_ones_own(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        if request.agent_id == "root/1/1":
            return says("deep")
        prompt = request.messages[1].content
        if turn_of(request) == 0 and prompt != "other":
            return calls(CREATE, call("assign_task", "a", agent="w", prompt="deeper"))
        if request.agent_id == "root" and turn_of(request) == 1:
            return calls(call("assign_task", "b", agent="w", prompt="other", resume="root/1/1"))
        return says(results(request)[-1])

    config = SwarmConfig(extensions=ALL, max_depth=2)
    assert "'root/1/1' is no sub-agent of yours" in run_swarm(policy, tmp_path / "a.db", config=config).answer


def test_limits_of_an_agent_that_goes_on_count_what_it_did_before(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        if request.agent_id != "root":
            asked = turn_of(request) < 5 and bool(request.tools)
            return calls(call("look_up", place=f"{turn_of(request)}")) if asked else says("stopped")
        match turn_of(request):
            case 0:
                return calls(CREATE, call("assign_task", "a", agent="w", prompt="north"))
            case 1:
                return calls(call("assign_task", "b", agent="w", prompt="south", resume="root/1"))
            case _:
                return says(results(request)[0])

    config = SwarmConfig(extensions=ALL, subagent=AgentLimits(max_tool_calls=3))
    report = json.loads(run_swarm(policy, tmp_path / "a.db", [look_up], config).answer)
    assert (report["status"], report["steps"], report["tool_calls"]) == ("max_tool_calls", 5, 3)


def test_an_agents_time_goes_on_counting(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        if request.agent_id != "root":
            is_first = len([m for m in request.messages if m.role == "user"]) == 1
            if request.messages[-1].role == "user":
                return calls(call("wait", seconds=0.15 if is_first else 5.0))
            return says("done")
        match turn_of(request):
            case 0:
                return calls(CREATE, call("assign_task", "a", agent="w", prompt="north"))
            case 1:
                return calls(call("assign_task", "b", agent="w", prompt="south", resume="root/1"))
            case _:
                return says(results(request)[0])

    config = SwarmConfig(extensions=ALL, subagent=AgentLimits(timeout_s=0.3))
    assert json.loads(run_swarm(policy, tmp_path / "a.db", [wait], config).answer)["status"] == "timeout"
    first, second = (e.payload for e in load_events(tmp_path / "a.db") if e.type == "agent_finished" and "/" in e.agent)
    assert first["active_s"] >= 0.15
    assert second["active_s"] < 0.25


def map_call(id_: str = "m", **changed: Any) -> Any:
    wanted = {"agent": "w", "description": "d", "prompt_template": "do {{item}}", "items": ["a", "b"]}
    return call("swarm_map", id_, **{**wanted, **changed})


@pytest.mark.parametrize(
    ("tries", "expected"),
    [
        ([map_call(items=["a"])], "items must have 2 to 300 entries, got 1"),
        ([map_call(items=[str(n) for n in range(301)])], "items must have 2 to 300 entries, got 301"),
        ([map_call(items=["a", "b", "a"])], "items 0 and 2 give the same prompt"),
        ([map_call(items=["a", 3])], "items must be a list of strings"),
        ([map_call(prompt_template="do it")], "prompt_template must hold {{item}}"),
        ([map_call(prompt_template="{{item}}", items=["a", " "])], "the prompt of item 1 is empty"),
        ([map_call(agent="nobody")], "there is no sub-agent 'nobody'"),
        ([map_call(), call("look_up", "l", place="x")], "swarm_map must be the only call of its turn"),
        ([map_call(items=["a", "b", "c"])], "the limit of 5 sub-agents is reached; 2 of these 3 could be started"),
    ],
)
def test_a_map_that_is_wrong_starts_nobody(tmp_path: Path, tries: Sequence[Any], expected: str) -> None:
    config = SwarmConfig(extensions=ALL, max_agents_total=5, max_agents_running=5)
    assert expected in tried(tmp_path / "a.db", *tries, config=config)[0]
    assert state_of(tmp_path / "a.db").subagents == 3


def test_a_map_that_is_cut_off_tells_of_all(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Any:
        if request.agent_id != "root":
            is_slow = request.messages[1].content == "do b" and not turn_of(request)
            return calls(call("wait", seconds=30.0)) if is_slow else says(request.messages[1].content)
        return (calls(CREATE), calls(map_call(items=["a", "b", "c"])), says(str(results(request))))[turn_of(request)]

    config = SwarmConfig(extensions=ALL, group=GroupConfig(kind="quorum", quorum=2))
    answer = run_swarm(policy, tmp_path / "a.db", [wait], config).answer
    reports = json.loads(answer[2:-2].replace("\\'", "'"))
    assert [(r["status"], r["result"]) for r in reports] == [
        ("completed", "do a"), ("cancelled", ""), ("completed", "do c")
    ]  # fmt: skip


def test_a_fork_begins_with_whole_rounds_of_its_callers_history(tmp_path: Path) -> None:
    seen: dict[str, ChatRequest] = {}

    def policy(request: ChatRequest) -> Message:
        seen.setdefault(request.agent_id, request)
        return CASES["fork"][0](request)

    run_swarm(policy, tmp_path / "a.db", [look_up], CONFIG)
    found = seen["root/1"].messages
    assert [m.role for m in found] == ["system", "user", "assistant", "tool", "tool", "user"]
    assert found[0] == seen["root"].messages[0]
    called = {c.id for m in found for c in m.tool_calls}
    assert called == {m.tool_call_id for m in found if m.role == "tool"}
    assert not any(tool["function"]["name"] == "assign_task" for tool in seen["root/1"].tools)
    assert "work" in found[-1].content
    assert found[-1].content.endswith("first")


@pytest.mark.parametrize("policy", ["discard_all", "summarise"])
def test_a_later_task_survives_a_history_that_is_dropped(tmp_path: Path, policy: Any) -> None:
    seen: list[ChatRequest] = []

    def react(request: ChatRequest) -> Message:
        if request.agent_id != "root":
            seen.append(request)
            return calls(call("look_up", place="x" * 400)) if len(seen) < 4 and request.tools else says("done")
        match turn_of(request):
            case 0:
                return calls(CREATE, call("assign_task", "a", agent="w", prompt="north", fork=True))
            case _:
                return says(results(request)[-1])

    context = ContextConfig(policy=policy, max_tokens=400, threshold=0.5)
    config = SwarmConfig(extensions=ALL, subagent=AgentLimits(context=context))
    run_swarm(react, tmp_path / "a.db", [look_up], config)
    assert any(event.type == "context_compacted" for event in load_events(tmp_path / "a.db"))
    for request in seen:
        assert sum("You are root/1 from here on" in m.content for m in request.messages) == 1


def test_a_model_of_the_pool_is_asked_and_paid(recorded: dict[str, Path]) -> None:
    path = recorded["model"]
    state = state_of(path)
    assert [state.agents[f"root/{n}"].model for n in (1, 2, 3)] == ["fast", "wise", None]
    fast, wise = (state.agents[f"root/{n}"] for n in (1, 2))
    assert fast.cost_usd == pytest.approx(fast.usage.total_tokens * 10.0 / 1e6)
    assert wise.cost_usd == pytest.approx(wise.usage.total_tokens * 100.0 / 1e6)

    async def without() -> None:
        policy = CASES["model"][0]
        cut(path.with_name("cut.db"), load_events(path)[:-1])
        await Swarm(endpoint=endpoint(policy), tools=[look_up]).resume(path.with_name("cut.db"))

    with pytest.raises(JournalError, match="lacks the model fast, lacks the model wise"):
        asyncio.run(without())


def test_a_pool_that_cannot_be_is_refused(tmp_path: Path) -> None:
    point = endpoint(lambda request: says("x"))
    unknown = Endpoint(client=point.client, model="m", price=None)
    with pytest.raises(ValueError, match=r"models: a name must be .* got 'a b'"):
        Swarm(endpoint=point, models={"a b": point})
    with pytest.raises(ValueError, match="the price of m is not known"):
        Swarm(endpoint=point, models={"a": unknown}, config=SwarmConfig(budget=BudgetConfig(usd=1.0)))
    remote = RemoteAgents(client=lambda: point.client)
    with pytest.raises(ValueError, match=r"models cannot be chosen .* Ray cluster"):
        Swarm(endpoint=point, models={"a": point}, remote=remote)
    wrong = tried(
        tmp_path / "a.db", call("assign_task", "x", agent="w", prompt="p", model="big"),
        models={"a": Endpoint(client=point.client, model="m", price=Price(prompt=1, completion=1))},
    )  # fmt: skip
    assert "model must be one of a, got 'big'" in wrong[0]


def test_views_say_what_was_special_of_a_sub_agent(recorded: dict[str, Path]) -> None:
    wanted = {
        "resume": {"root/1": ("resumed",)},
        "swarm_map": {f"root/{n + 1}": (f"item {n}",) for n in range(3)},
        "fork": {"root/1": ("fork",), "root/2": ("fork",)},
        "background": {"root/1": ("background",), "root/2": ("background",)},
        "model": {"root/1": ("model fast",), "root/2": ("model wise",), "root/3": ()},
    }
    for name, agents in wanted.items():
        run = RunData.load(recorded[name])
        rows = tree(run).data["agents"]
        assert {row["agent"]: row["traits"] for row in rows if row["parent"]} == agents
    root = transcript("root", load_events(recorded["background"]))
    assert [e.title for e in root if e.title.startswith("result of")] == ["result of root/1", "result of root/2"]
    fork = transcript("root/1", load_events(recorded["fork"]))
    assert fork[0].title == "a copy of the 5 messages of root stands before this"
    again = transcript("root/1", load_events(recorded["resume"]))
    assert [e.text for e in again if e.title == "another task"] == ["south"]
    spans: list[str] = []
    for event in load_events(recorded["resume"]):
        spans += [event.type] if event.agent == "root/1" and event.type.startswith("agent_") else []
    assert spans == ["agent_spawned", "agent_started", "agent_finished", "agent_resumed", "agent_started",
                     "agent_finished"]  # fmt: skip


class Spans:
    """Keeps spans."""

    def __init__(self) -> None:
        self.open: dict[str, str] = {}
        self.ended: list[tuple[str, str | None]] = []
        self.steps = 0

    def start(self, key: str, parent: str | None, name: str, at: float, attributes: Any) -> None:
        assert key not in self.open
        assert parent is None or parent in self.open
        self.open[key] = name

    def note(self, key: str, name: str, at: float, attributes: Any) -> None:
        assert key in self.open

    def end(self, key: str, at: float, attributes: Any, error: str | None) -> None:
        self.ended.append((self.open.pop(key), error))
        self.steps = attributes.get("perilune.critical_steps", self.steps)


def test_spans_of_all_of_them_end_and_count_the_critical_steps(case: tuple[str, Path]) -> None:
    name, path = case
    sink = Spans()
    fold = SpanFold(sink, "r")
    for event in load_events(path):
        fold.on_event(event)
    state = state_of(path)
    assert (sink.open, sink.steps) == ({}, state.critical_steps())
    assert not any(error for _, error in sink.ended)
    stints = sum(len(agent.given) for agent in state.agents.values())
    assert sum(one == "invoke_agent w" for one, _ in sink.ended) == stints == state.subagents + (name == "resume")
