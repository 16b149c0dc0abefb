"""What stops agents: limits, budgets, timeouts, cancellation, errors; each leaves a result, and nothing running."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.client import EndpointError, RetryPolicy
from perilune.agents.config import AgentLimits, BudgetConfig, ContextConfig, GroupConfig, SwarmConfig
from perilune.agents.context import HIDDEN
from perilune.agents.endpoint import Endpoint
from perilune.agents.journal import load_events
from perilune.agents.messages import ChatRequest, Message, Sampling, Usage
from perilune.agents.state import RunState
from perilune.agents.swarm import Swarm
from perilune.agents.tools.function import tool
from perilune.agents.tools.human import Rule
from tests.agents.swarm_cases import call, calls, endpoint, look_up, results, run_swarm, says


def restless(request: ChatRequest) -> Message:
    """Calls for as long as it may; every call another."""
    if not request.tools:
        return says("so far, so good")
    return calls(call("look_up", place=f"place {len(request.messages)}"))


@pytest.mark.parametrize(
    ("limits", "status", "steps"),
    [
        (AgentLimits(max_steps=3), "max_steps", 4),
        (AgentLimits(max_tool_calls=5), "max_tool_calls", 6),
    ],
)
def test_at_a_limit_an_agent_answers_from_what_it_has(
    tmp_path: Path, limits: AgentLimits, status: str, steps: int
) -> None:
    result = run_swarm(restless, tmp_path / "a.db", [look_up], SwarmConfig(orchestrator=limits))
    assert (result.status, result.answer, result.steps) == (status, "so far, so good", steps)


def test_calls_beyond_a_limit_within_a_turn_are_refused(tmp_path: Path) -> None:
    def eager(request: ChatRequest) -> Message:
        if len(request.messages) > 2:
            return says(json.dumps(results(request)))
        return calls(*(call("look_up", f"c{n}", place=str(n)) for n in range(6)))

    config = SwarmConfig(orchestrator=AgentLimits(max_tool_calls=4), max_calls_per_turn=5)
    found = json.loads(run_swarm(eager, tmp_path / "a.db", [look_up], config).answer)
    assert ["letters" in text for text in found] == [True] * 4 + [False] * 2
    assert "limit of 4 tool calls" in found[4]
    assert "only 5 calls of a turn are run" in found[5]


def test_a_call_that_is_made_again_and_again_is_remarked_on_and_then_stopped(tmp_path: Path) -> None:
    seen: list[str] = []

    def stubborn(request: ChatRequest) -> Message:
        seen.extend(results(request))
        return calls(call("look_up", place="x")) if request.tools else says("I give up")

    result = run_swarm(stubborn, tmp_path / "a.db", [look_up])
    assert (result.status, result.answer, result.steps) == ("stuck", "I give up", 13)
    assert [n for n, text in enumerate(seen, 1) if "in a row" in text] == [3, 5, 8]


def spender(request: ChatRequest) -> Any:
    said = restless(request)
    from perilune.agents.client.scripted import answer

    reply = answer(lambda _: said, request)
    return replace(reply, usage=Usage(prompt_tokens=100, completion_tokens=50))


@pytest.mark.parametrize(
    ("budget", "most"),
    [
        (BudgetConfig(tokens_out=1000), 20),
        (BudgetConfig(usd=0.002), 10),
        (BudgetConfig(llm_calls=7), 7),
    ],
)
def test_a_budget_is_not_overspent(tmp_path: Path, budget: BudgetConfig, most: int) -> None:
    config = SwarmConfig(budget=budget, sampling=Sampling(max_tokens=60))
    result = run_swarm(spender, tmp_path / "a.db", [look_up], config)
    assert result.status == "budget"
    assert 2 <= result.steps <= most
    if budget.usd:
        assert result.cost_usd is not None
        assert result.cost_usd <= budget.usd
    assert result.usage.completion_tokens <= (budget.tokens_out or 10**9)
    warnings = [e for e in load_events(tmp_path / "a.db") if e.type == "budget_warning"]
    assert len(warnings) == 1


def test_a_budget_of_tool_calls_is_the_runs(tmp_path: Path) -> None:
    config = SwarmConfig(budget=BudgetConfig(tool_calls=3), orchestrator=AgentLimits(max_steps=6))
    seen: list[str] = []

    def policy(request: ChatRequest) -> Message:
        seen.extend(results(request))
        return restless(request)

    run_swarm(policy, tmp_path / "a.db", [look_up], config)
    assert ["letters" in text for text in seen] == [True] * 3 + [False] * 3
    assert "the budget of tool calls is used up" in seen[3]


def test_a_budget_of_money_needs_a_price() -> None:
    unknown = Endpoint(client=endpoint(restless).client, model="nobody/knows")
    config = SwarmConfig(budget=BudgetConfig(usd=1.0))
    with pytest.raises(ValueError, match="the price of nobody/knows is not known"):
        Swarm(endpoint=unknown, config=config)
    Swarm(endpoint=unknown, config=replace(config, allow_unknown_cost=True))


def team(size: int, work: Any) -> Any:
    """An orchestrator that starts `size` sub-agents at once and tells their reports; `work` answers for them."""

    def policy(request: ChatRequest) -> Any:
        if request.agent_id != "root":
            return work(request)
        match len(request.messages):
            case 2:
                return calls(call("create_subagent", name="w", system_prompt="work"))
            case 4:
                return calls(*(call("assign_task", f"t{n}", agent="w", prompt=f"part {n}") for n in range(size)))
            case _:
                return says(json.dumps([json.loads(text) for text in results(request)]))

    return policy


def reports(answer: str) -> list[dict[str, Any]]:
    return json.loads(answer)


@tool(effect="pure", timeout_s=60)
async def wait(seconds: float) -> str:
    """Wait.

    Args:
        seconds: how long.
    """
    await asyncio.sleep(seconds)
    return "waited"


def waiting(seconds: float) -> Any:
    def work(request: ChatRequest) -> Message:
        if len(request.messages) > 2:
            return says("done")
        return calls(call("wait", seconds=seconds if request.agent_id.endswith("/1") else 0.0))

    return work


def test_a_sub_agent_that_takes_too_long_reports_that_and_the_others_are_not_disturbed(tmp_path: Path) -> None:
    config = SwarmConfig(subagent=AgentLimits(timeout_s=0.2), grace_s=0.2)
    found = reports(run_swarm(team(3, waiting(30)), tmp_path / "a.db", [wait], config).answer)
    assert [report["status"] for report in found] == ["timeout", "completed", "completed"]
    assert "took more than 0.2 s" in found[0]["error"]


@pytest.mark.parametrize("group", [GroupConfig(kind="quorum", quorum=2), GroupConfig(kind="deadline", deadline_s=0.2)])
def test_who_is_late_is_cancelled_by_the_groups_policy(tmp_path: Path, group: GroupConfig) -> None:
    found = reports(run_swarm(team(3, waiting(30)), tmp_path / "a.db", [wait], SwarmConfig(group=group)).answer)
    assert [report["status"] for report in found] == ["cancelled", "completed", "completed"]


def test_one_sub_agent_is_cancelled_and_its_parent_goes_on(tmp_path: Path) -> None:
    async def cancel(run) -> None:
        while run.state.subagents < 3 or not run.state.agents["root/1"].calls:
            await asyncio.sleep(0.001)
        assert await run.cancel("not needed", "root/1")
        assert not await run.cancel("not needed", "root/1")
        assert not await run.cancel("nobody", "root/9")

    result = run_swarm(team(3, waiting(30)), tmp_path / "a.db", [wait], during=cancel)
    found = reports(result.answer)
    assert [report["status"] for report in found] == ["cancelled", "completed", "completed"]
    assert found[0]["error"] == "not needed"


def test_a_run_is_cancelled_with_what_it_had_said(tmp_path: Path) -> None:
    def talker(request: ChatRequest) -> Message:
        return calls(call("wait", seconds=30.0), text="I am at it")

    async def cancel(run) -> None:
        while not run.state.root.calls:
            await asyncio.sleep(0.001)
        await run.cancel("enough")

    result = run_swarm(talker, tmp_path / "a.db", [wait], during=cancel)
    assert (result.status, result.answer, result.error) == ("cancelled", "I am at it", "enough")


@pytest.mark.parametrize("steps", range(1, 40))
def test_cancelling_anywhere_leaves_nothing_running_and_a_whole_journal(tmp_path: Path, steps: int) -> None:
    async def cancel(run) -> None:
        for _ in range(steps * 3):
            await asyncio.sleep(0)
        await run.cancel("stop")

    result = run_swarm(team(3, waiting(0.01)), tmp_path / "a.db", [wait], during=cancel)
    state = RunState.fold("r", load_events(tmp_path / "a.db"))
    assert state.status == result.status
    assert all(agent.status is not None for agent in state.agents.values())


def test_a_tool_that_ignores_its_cancellation_is_given_up(tmp_path: Path) -> None:
    @tool(effect="pure", timeout_s=0.05)
    async def deaf() -> str:
        """Hear nothing."""
        for _ in range(20):
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
        return "late"

    def policy(request: ChatRequest) -> Message:
        return says(results(request)[0]) if len(request.messages) > 2 else calls(call("deaf"))

    async def act() -> None:
        swarm = Swarm(endpoint=endpoint(policy), tools=[deaf], config=SwarmConfig(grace_s=0.05))
        result = await (await swarm.start("go", tmp_path / "a.db")).result()
        assert "was abandoned" in result.answer
        assert result.leaked == ("deaf of root",)
        await asyncio.sleep(1.2)

    asyncio.run(act())


def test_the_wall_clock_of_a_run(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        return calls(call("wait", seconds=30.0), text="working")

    config = SwarmConfig(budget=BudgetConfig(wall_s=0.2), grace_s=0.1)
    result = run_swarm(policy, tmp_path / "a.db", [wait], config)
    assert (result.status, result.answer) == ("timeout", "working")


def test_sub_agents_wait_for_a_place_and_a_nested_swarm_does_not_lock_itself(tmp_path: Path) -> None:
    running = peak = 0

    @tool(effect="pure")
    async def busy() -> str:
        """Be busy."""
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.002)
        running -= 1
        return "ok"

    def work(request: ChatRequest) -> Message:
        return says("done") if len(request.messages) > 2 else calls(call("busy"))

    config = SwarmConfig(max_agents_running=3)
    found = reports(run_swarm(team(12, work), tmp_path / "a.db", [busy], config).answer)
    assert [report["status"] for report in found] == ["completed"] * 12
    assert peak == 3

    def nested(request: ChatRequest) -> Message:
        if request.agent_id.count("/") == 2:
            return says("leaf")
        if len(request.messages) == 2:
            return calls(
                call("assign_task", "a", agent="w", prompt="x"), call("assign_task", "b", agent="w", prompt="y")
            )
        return says("+".join(json.loads(text)["result"] for text in results(request)))

    config = SwarmConfig(max_agents_running=1, max_depth=2)
    found = reports(run_swarm(team(2, nested), tmp_path / "b.db", [], config).answer)
    assert [report["result"] for report in found] == ["leaf+leaf"] * 2


def test_wrong_uses_of_the_two_tools_are_answered(tmp_path: Path) -> None:
    wrong = [
        call("assign_task", "0", agent="w", prompt="before it exists"),
        call("create_subagent", "1", name="w", system_prompt="one"),
        call("create_subagent", "2", name="w", system_prompt="one"),
        call("create_subagent", "3", name="w", system_prompt="another"),
        call("create_subagent", "4", name="no spaces", system_prompt="x"),
        call("create_subagent", "5", name="e", system_prompt=""),
        call("assign_task", "6", agent="nobody", prompt="x"),
        call("assign_task", "7", agent="w", prompt=" "),
        call("assign_task", "8", agent="w", prompt="same"),
        call("assign_task", "9", agent="w", prompt="same"),
        call("assign_task", "10", agent="w"),
        call("assign_task", "11", agent="w", prompt=3),
        call("assign_task", "12", agent="w", prompt="x", model="big"),
        call("look_up", "13", where="x"),
        call("fly", "14"),
    ]

    def policy(request: ChatRequest) -> Message:
        if request.agent_id != "root":
            return says("hm")
        return says(json.dumps(results(request))) if len(request.messages) > 2 else calls(*wrong)

    found = json.loads(run_swarm(policy, tmp_path / "a.db", [look_up]).answer)
    wanted = [
        '"status": "completed"',
        "is ready",
        "is ready",
        "another system prompt",
        "1 to 64 letters",
        "1 to 16000 characters",
        "there is no sub-agent 'nobody'",
        "prompt is empty",
        '"status": "completed"',
        "duplicate",
        "takes agent and prompt",
        "prompt must be a string",
        "takes agent and prompt",
        "look_up",
        "there is no tool 'fly'",
    ]
    assert len(found) == len(wanted)
    for text, part in zip(found, wanted, strict=True):
        assert part in text, text


def test_five_hundred_tasks_in_one_turn(tmp_path: Path) -> None:
    found = run_swarm(
        lambda request: (
            says("ok")
            if request.agent_id != "root"
            else calls(
                call("create_subagent", "p", name="w", system_prompt="w"),
                *(call("assign_task", f"t{n}", agent="w", prompt=str(n)) for n in range(499)),
            )
            if len(request.messages) == 2
            else says(json.dumps(results(request)))
        ),
        tmp_path / "a.db",
    )
    texts = json.loads(found.answer)
    assert sum('"completed"' in text for text in texts) == 63
    assert sum("only 64 calls of a turn are run" in text for text in texts) == 436


def test_an_endpoint_that_refuses_ends_the_agent_and_not_the_others(tmp_path: Path) -> None:
    def work(request: ChatRequest) -> Any:
        if request.agent_id == "root/2":
            return EndpointError("401: the key is not valid", fault="refused", status=401)
        return says("fine")

    found = reports(run_swarm(team(3, work), tmp_path / "a.db").answer)
    assert [report["status"] for report in found] == ["completed", "error", "completed"]
    assert "401" in found[1]["error"]


def test_attempts_are_repeated_counted_and_paid(tmp_path: Path) -> None:
    attempts: dict[str, int] = {}

    def flaky(request: ChatRequest) -> Any:
        attempts[request.agent_id] = attempts.get(request.agent_id, 0) + 1
        if attempts[request.agent_id] < 4:
            used = Usage(prompt_tokens=10, completion_tokens=1)
            return EndpointError("503: busy", fault="overload", status=503, usage=used)
        return says("at last")

    async def act() -> None:
        point = endpoint(flaky, retry=RetryPolicy(base_s=0.001, cap_s=0.002))
        run = await Swarm(endpoint=point).start("go", tmp_path / "a.db")
        result = await run.result()
        assert (result.status, result.answer, result.steps) == ("completed", "at last", 1)
        assert run.state.llm_calls == 4
        assert result.usage.prompt_tokens >= 30
        assert point.limiter.window < 8

    asyncio.run(act())
    assert [e.payload["attempt"] for e in load_events(tmp_path / "a.db") if e.type == "turn_retry"] == [1, 2, 3]


@pytest.mark.parametrize("policy", ["hide_tool_results", "discard_all", "summarise"])
def test_a_history_that_grows_too_long_is_compacted(tmp_path: Path, policy: Any) -> None:
    seen: list[list[Message]] = []

    def reader(request: ChatRequest) -> Message:
        seen.append(list(request.messages))
        if "Write down all that is needed" in request.messages[-1].content:
            return says("so far: three pages read")
        if len(seen) > 9:
            return says("read")
        return calls(call("page", number=len(seen)))

    @tool(effect="pure")
    def page(number: int) -> str:
        """Read a page.

        Args:
            number: which.
        """
        return f"page {number} " + "x" * 2000

    context = ContextConfig(policy=policy, max_tokens=4000, threshold=0.5)
    config = SwarmConfig(orchestrator=AgentLimits(context=context))
    result = run_swarm(reader, tmp_path / "a.db", [page], config)
    assert result.status == "completed"
    for messages in seen:
        open_calls: set[str] = set()
        for message in messages:
            open_calls |= {c.id for c in message.tool_calls}
            assert message.role != "tool" or message.tool_call_id in open_calls
    last = seen[-1]
    assert sum(len(message.content) for message in last) < 10_000
    texts = "".join(message.content for message in last)
    marks = {"hide_tool_results": HIDDEN, "discard_all": "was discarded", "summarise": "so far: three pages read"}
    assert marks[policy] in texts
    state = RunState.fold("r", load_events(tmp_path / "a.db"))
    assert state.root.compactions >= 1


def test_a_prompt_that_is_too_long_fails_without_a_policy(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Any:
        return EndpointError("400: too long", fault="context_overflow", status=400)

    assert run_swarm(policy, tmp_path / "a.db").status == "context_overflow"


def test_people_steer_are_asked_and_consent(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        match len(request.messages):
            case 2:
                return calls(call("look_up", "a", place="here"), call("look_up", "b", place="there"))
            case _:
                return says(json.dumps([m.content for m in request.messages[3:]]))

    async def help_out(run) -> None:
        while len(run.state.approvals) < 2:
            await asyncio.sleep(0.001)
        await run.steer("hurry")
        first, second = run.state.approvals
        assert await run.approve(first, True)
        assert await run.approve(second, False)
        assert not await run.approve(second, True)

    rules = (Rule(mode="ask", tool="look_up"),)
    result = run_swarm(policy, tmp_path / "a.db", [look_up], during=help_out, rules=rules, is_interactive=True)
    assert json.loads(result.answer) == ["here has 4 letters", "look_up was not run: a person refused it", "hurry"]
    kinds = [event.type for event in load_events(tmp_path / "a.db")]
    assert kinds.count("approval_requested") == kinds.count("approval_resolved") == 2

    denied = run_swarm(policy, tmp_path / "b.db", [look_up], rules=rules)
    assert "needs a person's consent, and nobody is here" in denied.answer


def test_impossible_settings_are_refused_with_the_fields_name() -> None:
    for build, message in (
        (lambda: SwarmConfig(max_agents_running=400), "max_agents_running must be <= max_agents_total"),
        (lambda: SwarmConfig(max_depth=-1), "max_depth must be >= 0"),
        (lambda: AgentLimits(max_steps=0), "max_steps must be >= 1"),
        (lambda: BudgetConfig(usd=-1.0), "usd must be > 0"),
        (lambda: ContextConfig(threshold=0.0), "threshold must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_an_empty_task_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task must not be empty"):
        run_swarm(restless, tmp_path / "a.db", task=" ")
    assert not (tmp_path / "a.db").exists()


def test_every_sub_agent_of_a_group_has_the_same_share(tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def work(request: ChatRequest) -> Message:
        assert request.sampling.max_tokens is not None
        seen[request.agent_id] = request.sampling.max_tokens
        return says("ok")

    config = SwarmConfig(budget=BudgetConfig(tokens_out=10_000), sampling=Sampling(max_tokens=9_000))
    run_swarm(team(5, work), tmp_path / "a.db", config=config)
    assert len(set(seen.values())) == 1
    assert min(seen.values()) > 1_500


def test_attempts_are_counted_against_a_budget_of_calls_to_the_model(tmp_path: Path) -> None:
    def down(request: ChatRequest) -> Any:
        return EndpointError("503: busy", fault="overload", status=503)

    async def act() -> None:
        point = endpoint(down, retry=RetryPolicy(base_s=0.001, cap_s=0.002))
        config = SwarmConfig(budget=BudgetConfig(llm_calls=2))
        run = await Swarm(endpoint=point, config=config).start("go", tmp_path / "a.db")
        assert (await run.result()).status == "budget"
        assert run.state.llm_calls <= 3

    asyncio.run(act())


def test_an_endpoint_that_is_down_stops_the_run_and_it_goes_on_when_it_is_back(tmp_path: Path) -> None:
    is_down = True

    def policy(request: ChatRequest) -> Any:
        if is_down and len(request.messages) > 2:
            return EndpointError("no connection", fault="connection")
        return says("done") if len(request.messages) > 2 else calls(call("look_up", place="x"))

    async def act() -> None:
        nonlocal is_down
        swarm = Swarm(endpoint=endpoint(policy, retry=RetryPolicy(attempts=1)), tools=[look_up])
        result = await (await swarm.start("go", tmp_path / "a.db")).result()
        assert (result.status, result.error) == ("stopped", "no connection")
        is_down = False
        assert (await (await swarm.resume(tmp_path / "a.db")).result()).answer == "done"

    asyncio.run(act())


def test_a_run_that_is_stopped_before_its_first_step_has_taken_none(tmp_path: Path) -> None:
    async def stop(run) -> None:
        await run.stop()

    result = run_swarm(lambda request: says("done"), tmp_path / "a.db", during=stop)
    assert (result.status, result.steps) == ("stopped", 0)


def test_what_people_say_during_the_last_turn_is_read(tmp_path: Path) -> None:
    heard: list[str] = []

    async def steer(run) -> None:
        while not run.state.root.open_turn:
            await asyncio.sleep(0)
        await run.steer("and in French")

    def policy(request: ChatRequest) -> Message:
        heard.append(request.messages[-1].content)
        return says(f"answer {len(heard)}")

    async def slow() -> None:
        from perilune.agents.client import Latency, ScriptedClient

        client = ScriptedClient(policy, latency=Latency(first_s=0.02, sigma=0.0))
        swarm = Swarm(endpoint=Endpoint(client=client, model="m"))
        run = await swarm.start("go", tmp_path / "a.db")
        await steer(run)
        assert (await run.result()).answer == "answer 2"

    asyncio.run(slow())
    assert heard == ["go", "and in French"]


def test_last_words_and_steers_survive_a_history_that_is_discarded() -> None:
    from perilune.agents.context import discard_all, summarised

    history = [
        Message(role="system", content="s"),
        Message(role="user", content="task"),
        calls(call("look_up", place="x")),
        Message(role="tool", content="r", tool_call_id="c0"),
        Message(role="user", content="hurry"),
    ]
    for kept in (discard_all(history, 1), summarised(history, "notes")):
        assert [message.role for message in kept].count("tool") == 0
        assert kept[-1].content == "hurry"
    assert discard_all(history[:2], 1)[0].content == "s"


@pytest.mark.parametrize("most", [3, 5, 7])
def test_a_summary_that_the_budget_does_not_allow_ends_the_agent_as_a_budget_does(tmp_path: Path, most: int) -> None:
    @tool(effect="pure")
    def page(number: int) -> str:
        """Read a page.

        Args:
            number: which.
        """
        return f"page {number} " + "x" * 2000

    def reader(request: ChatRequest) -> Message:
        return says("so far") if not request.tools else calls(call("page", number=len(request.messages)))

    context = ContextConfig(policy="summarise", max_tokens=2000, threshold=0.5)
    config = SwarmConfig(orchestrator=AgentLimits(context=context), budget=BudgetConfig(llm_calls=most))
    assert run_swarm(reader, tmp_path / "a.db", [page], config).status == "budget"


def test_an_overflow_is_mended_without_a_summary_that_would_overflow_too(tmp_path: Path) -> None:
    @tool(effect="pure")
    def page(number: int) -> str:
        """Read a page.

        Args:
            number: which.
        """
        return f"page {number} " + "x" * 2000

    def reader(request: ChatRequest) -> Any:
        if sum(len(message.content) for message in request.messages) > 9000:
            return EndpointError("400: too long", fault="context_overflow", status=400)
        if sum(message.role == "assistant" for message in request.messages) > 6:
            return says("read")
        return calls(call("page", number=len(request.messages)))

    config = SwarmConfig(orchestrator=AgentLimits(context=ContextConfig(policy="summarise")))
    assert run_swarm(reader, tmp_path / "a.db", [page], config).status == "completed"


def test_a_cancelled_nested_swarm_gives_its_place_back_at_once(tmp_path: Path) -> None:
    def nested(request: ChatRequest) -> Message:
        if request.agent_id.count("/") == 2:
            return calls(call("wait", seconds=30.0))
        if len(request.messages) == 2:
            return calls(call("assign_task", agent="w", prompt="x"))
        return says("done")

    async def cancel(run) -> None:
        while run.state.subagents < 4:
            await asyncio.sleep(0.001)
        await run.cancel("enough", "root/1")
        while run.state.agents["root/1"].status is None:
            await asyncio.sleep(0.001)
        assert run._runtime.slots._value <= 2
        await run.cancel("all")

    config = SwarmConfig(max_depth=2, max_agents_running=2, grace_s=0.1)
    result = run_swarm(team(2, nested), tmp_path / "a.db", [wait], config, during=cancel)
    assert result.status == "cancelled"


def test_rules_hold_for_the_two_tools_of_the_swarm_and_their_names_are_taken(tmp_path: Path) -> None:
    def policy(request: ChatRequest) -> Message:
        if len(request.messages) > 2:
            return says(json.dumps(results(request)))
        return calls(
            call("create_subagent", "a", name="w", system_prompt="w"), call("assign_task", "b", agent="w", prompt="x")
        )

    rules = (Rule(mode="deny", tool="assign_task"),)
    made, assigned = json.loads(run_swarm(policy, tmp_path / "a.db", rules=rules).answer)
    assert "is ready" in made
    assert "not permitted" in assigned

    @tool(effect="pure")
    def assign_task(agent: str) -> str:
        """Be in the way.

        Args:
            agent: whose.
        """
        return agent

    with pytest.raises(ValueError, match="the name assign_task is that of a tool of every swarm"):
        Swarm(endpoint=endpoint(policy), tools=[assign_task])


def test_an_answer_that_was_cut_off_says_so(tmp_path: Path) -> None:
    from perilune.agents.client.scripted import answer

    def policy(request: ChatRequest) -> Any:
        return replace(answer(lambda _: says("half an ans"), request), finish_reason="length")

    result = run_swarm(policy, tmp_path / "a.db")
    assert result.error is not None
    assert "cut off at its limit of tokens" in result.error
