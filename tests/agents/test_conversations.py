"""What agents are told: histories that grow, people who speak, rules, wrong calls."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.client import EndpointError
from perilune.agents.config import AgentLimits, BudgetConfig, ContextConfig, SwarmConfig
from perilune.agents.context import HIDDEN
from perilune.agents.endpoint import Endpoint
from perilune.agents.journal import load_events
from perilune.agents.messages import ChatRequest, Message
from perilune.agents.state import RunState
from perilune.agents.swarm import Swarm
from perilune.agents.tools.function import tool
from perilune.agents.tools.human import Rule
from tests.agents.swarm_cases import (
    call,
    calls,
    endpoint,
    look_up,
    results,
    run_swarm,
    says,
)


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


def test_notes_take_the_place_of_earlier_notes() -> None:
    from perilune.agents.context import summarised

    history = [Message(role="system", content="s"), Message(role="user", content="task")]
    for n in range(3):
        history = summarised([*history, says("hm"), Message(role="user", content=f"hurry {n}")], f"notes {n}")
    assert [m.content for m in history[:2]] == ["s", "task"]
    assert [m.content.splitlines()[-1] for m in history[2:]] == ["hurry 0", "hurry 1", "notes 2", "hurry 2"]


def test_a_later_task_stays_beside_notes_whatever_it_says() -> None:
    from perilune.agents.context import summarised

    text = "[Notes of the work so far, which was dropped to save space] are what I want"
    task, later = (Message(role="user", content=content) for content in ("task", text))
    history = [Message(role="system", content="s"), task, says("old"), later]
    for notes in ("first", "second"):
        history = summarised([*history, says("more")], notes, [later])
    assert [m.content.splitlines()[-1] for m in history] == ["s", "task", text, "second"]


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


@pytest.mark.parametrize("fits", [True, False])
def test_only_overflows_in_a_row_end_an_agent(tmp_path: Path, fits: bool) -> None:
    """Each turn the history is dropped because it is near its limit; then one request is too long, or all are."""

    @tool(effect="pure")
    def page(number: int) -> str:
        """Read a page.

        Args:
            number: which.
        """
        return f"page {number} " + "x" * 2000

    asked: list[int] = []

    def reader(request: ChatRequest) -> Any:
        asked.append(request.turn)
        if request.turn >= 12 and (not fits or asked.count(12) == 1):
            return EndpointError("400: too long", fault="context_overflow", status=400)
        return says("read") if request.turn > 12 else calls(call("page", number=request.turn))

    context = ContextConfig(policy="discard_all", max_tokens=500, threshold=0.5)
    result = run_swarm(reader, tmp_path / "a.db", [page], SwarmConfig(orchestrator=AgentLimits(context=context)))
    compacted = [e for e in load_events(tmp_path / "a.db") if e.type == "context_compacted"]
    assert len(compacted) > 12
    assert (result.status, asked.count(12)) == (("completed", 2) if fits else ("context_overflow", 9))


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
