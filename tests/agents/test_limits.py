"""What stops agents: limits and budgets; at each they answer from what they have."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.client import EndpointError, RetryPolicy
from perilune.agents.config import AgentLimits, BudgetConfig, ContextConfig, SwarmConfig
from perilune.agents.endpoint import Endpoint
from perilune.agents.journal import load_events
from perilune.agents.messages import ChatRequest, Message, Sampling, Usage
from perilune.agents.swarm import Swarm
from perilune.agents.tools.function import tool
from tests.agents.swarm_cases import (
    call,
    calls,
    endpoint,
    look_up,
    reports,
    restless,
    results,
    run_swarm,
    says,
    team,
)


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


def test_a_budget_of_critical_steps_stops_sub_agents_where_they_are(tmp_path: Path) -> None:
    def model(request: ChatRequest) -> Message:
        if request.messages[0].content.startswith("dig"):
            return calls(call("look_up", place=str(len(request.messages)))) if request.tools else says("so deep")
        if len(request.messages) > 3:
            return says(json.dumps([json.loads(text)["status"] for text in results(request)[-2:]]))
        made = call("create_subagent", "c0", name="digger", system_prompt="dig")
        return calls(made, *(call("assign_task", f"c{n}", agent="digger", prompt=f"hole {n}") for n in (1, 2)))

    run = run_swarm(model, tmp_path / "a.db", [look_up], SwarmConfig(max_critical_steps=6))
    assert (run.status, run.answer) == ("max_critical_steps", '["max_critical_steps", "max_critical_steps"]')
    assert (run.critical_steps, run.steps) == (7, 12)  # the last one is the answer that every limit leaves room for


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


def test_what_is_called_often_in_one_turn_is_not_called_again_and_again(tmp_path: Path) -> None:
    def eager(request: ChatRequest) -> Message:
        if any(m.role == "tool" for m in request.messages):
            return says(f"{len(results(request))} results")
        return calls(*(call("look_up", f"c{n}", place="x") for n in range(14)))

    result = run_swarm(eager, tmp_path / "a.db", [look_up])
    assert (result.status, result.answer) == ("completed", "14 results")


def test_two_calls_that_are_made_together_again_and_again_are_noticed(tmp_path: Path) -> None:
    def stubborn(request: ChatRequest) -> Message:
        places = ["x", "y"] if len(request.messages) % 2 else ["y", "x", "y"]
        wanted = (call("look_up", f"c{n}", place=place) for n, place in enumerate(places))
        return calls(*wanted) if request.tools else says("I give up")

    result = run_swarm(stubborn, tmp_path / "a.db", [look_up])
    assert (result.status, result.steps) == ("stuck", 13)
    notes = [e for e in load_events(tmp_path / "a.db") if "in a row" in e.payload.get("note", "")]
    assert [e.payload["call"].rsplit(":", 1)[1] for e in notes] == ["0"] * 3  # with the first of a turn's results


def spender(request: ChatRequest) -> Any:
    said = restless(request)
    from perilune.agents.client.scripted import answer

    reply = answer(lambda _: said, request)
    return replace(reply, usage=Usage(prompt_tokens=100, completion_tokens=50))


@pytest.mark.parametrize(
    ("budget", "most"),
    [
        (BudgetConfig(tokens_out=1000), 20),
        (BudgetConfig(usd=0.01), 50),
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
    assert 1_200 < min(seen.values()) < 10_000 / 6


def test_attempts_are_counted_against_a_budget_of_calls_to_the_model(tmp_path: Path) -> None:
    def down(request: ChatRequest) -> Any:
        return EndpointError("503: busy", fault="overload", status=503)

    async def act() -> None:
        point = endpoint(down, retry=RetryPolicy(base_s=0.001, cap_s=0.002))
        config = SwarmConfig(budget=BudgetConfig(llm_calls=2))
        run = await Swarm(endpoint=point, config=config).start("go", tmp_path / "a.db")
        assert (await run.result()).status == "budget"
        assert run.state.llm_calls == 2

    asyncio.run(act())


def test_a_sub_agent_that_used_up_its_own_budget_does_not_stop_the_others(tmp_path: Path) -> None:
    def work(request: ChatRequest) -> Message:
        return restless(request) if request.agent_id == "root/2" else says("done")

    config = SwarmConfig(subagent=AgentLimits(tokens_in=4_000))
    result = run_swarm(team(3, work), tmp_path / "a.db", [look_up], config)
    found = reports(result.answer)
    assert [one["status"] for one in found] == ["completed", "budget", "completed"]
    assert found[1]["result"] == "so far, so good"
    assert 2_000 < result.usage.prompt_tokens < 9_000


def test_what_an_agent_used_before_a_run_was_stopped_counts_against_its_own_budget(tmp_path: Path) -> None:
    limits = AgentLimits(tokens_in=6_000, max_tool_calls=None)
    swarm = Swarm(endpoint=endpoint(restless), config=SwarmConfig(orchestrator=limits), tools=[look_up])

    async def act() -> None:
        run = await swarm.start("go", tmp_path / "a.db")
        async for event in run.events():
            if event.type == "turn_finished" and run.state.usage.prompt_tokens > 3_000:
                await run.stop()
        assert (await run.result()).status == "stopped"
        result = await (await swarm.resume(tmp_path / "a.db")).result()
        assert result.status == "budget"
        assert 4_000 < result.usage.prompt_tokens <= 6_000

    asyncio.run(act())


def test_money_of_an_agent_needs_a_price(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a budget in usd is set, but the price of scripted is not known"):
        Swarm(endpoint=replace(endpoint(restless), price=None), config=SwarmConfig(subagent=AgentLimits(usd=1.0)))
    with pytest.raises(ValueError, match="usd must be > 0"):
        AgentLimits(usd=0.0)


@tool(effect="pure")
def page(number: int) -> str:
    """Read a page.

    Args:
        number: which.
    """
    return f"page {number} " + "x" * 2_000


@pytest.mark.parametrize(
    "budget", [BudgetConfig(tokens_in=60_000), BudgetConfig(usd=0.2), BudgetConfig(llm_calls=30)], ids=str
)
@pytest.mark.parametrize("size", [1, 3, 10])
def test_agents_with_histories_that_grow_have_enough_left_for_last_words(
    tmp_path: Path, budget: BudgetConfig, size: int
) -> None:
    """Whatever is used up first: the prompt of an agent's last turn is the longest of all its prompts."""

    def work(request: ChatRequest) -> Message:
        return calls(call("page", number=len(request.messages))) if request.tools else says("so far, so good")

    def policy(request: ChatRequest) -> Any:
        if request.agent_id == "root" and len(request.messages) > 4:
            return says("\n".join(results(request)))
        return team(size, work)(request)

    result = run_swarm(policy, tmp_path / "a.db", [page], SwarmConfig(budget=budget))
    assert result.status == "completed"
    assert result.answer.count('"result": "so far, so good"') == result.answer.count('"status": "budget"') == size
    alone = run_swarm(work, tmp_path / "b.db", [page], SwarmConfig(budget=budget, max_depth=0))
    assert (alone.status, alone.answer) == ("budget", "so far, so good")
