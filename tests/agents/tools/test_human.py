import asyncio
import json

import pytest

from perilune.agents.tools.base import Tool, ToolError, ToolOutput
from perilune.agents.tools.human import Approvals, Request, Resolution, Rule, ask_human_tool
from tests.agents.tools.helpers import call, context, run


async def nothing(arguments, context):
    return ToolOutput(text="")


WRITE = Tool(name="write_file", description="", parameters={}, run=nothing, effect="idempotent")
READ = Tool(name="read_file", description="", parameters={}, run=nothing, effect="pure")
ASK = [Rule(mode="ask", tool="write_*")]


async def pending(approvals, count=1):
    for _ in range(200):
        if len(approvals.requests()) >= count:
            return approvals.requests()
        await asyncio.sleep(0.001)
    raise AssertionError(approvals.requests())


async def answered(approvals, allowed, scope="once", agent_id="root", call_id="c1", arguments=None):
    """Ask about a write, and answer."""
    task = asyncio.ensure_future(approvals.check(WRITE, arguments or {"path": "a"}, context(agent_id, call_id)))
    request = (await pending(approvals))[0]
    approvals.resolve(request.id, allowed, scope=scope)
    return await task


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [({"path": "tmp/a"}, True), ({"path": "src/a"}, False), ({}, True), ({"path": "src/a", "n": 1}, False)],
)
def test_rules_go_by_name_and_arguments(arguments, allowed):
    approvals = Approvals([Rule(mode="deny", tool="write_*", arguments={"path": "src/*"})])
    decision = run(approvals.check(WRITE, arguments, context()))
    assert decision.allowed is allowed
    assert allowed or "not permitted in this run" in decision.reason


def test_the_first_rule_that_fits_decides():
    approvals = Approvals([Rule(mode="auto", tool="write_file"), Rule(mode="deny")])
    assert run(approvals.check(WRITE, {}, context())).allowed
    assert not run(approvals.check(READ, {}, context())).allowed


def test_rules_go_by_effect_and_by_other_values_json():
    approvals = Approvals([Rule(mode="deny", effect="pure"), Rule(mode="deny", arguments={"deep": '{"a": *}'})])
    assert not run(approvals.check(READ, {}, context())).allowed
    assert not run(approvals.check(WRITE, {"deep": {"a": [1]}}, context())).allowed
    assert run(approvals.check(WRITE, {"deep": {"b": 1}}, context())).allowed


def test_where_nobody_is_asking_is_denying():
    decision = run(Approvals(ASK).check(WRITE, {}, context()))
    assert not decision.allowed
    assert decision.reason == "write_file needs a person's consent, and nobody is here to give it"


@pytest.mark.parametrize("allowed", [True, False])
def test_a_person_decides(allowed):
    approvals = Approvals(ASK, is_interactive=True)
    decision = run(answered(approvals, allowed))
    assert decision.allowed is allowed
    assert approvals.requests() == ()
    with pytest.raises(ToolError, match="already"):
        approvals.resolve("c1", True)
    with pytest.raises(ToolError, match="no request"):
        approvals.resolve("other", True)


def test_no_answer_in_time_is_a_denial():
    recorded = []
    approvals = Approvals(ASK, is_interactive=True, timeout_s=0.01, record=recorded.append)
    decision = run(approvals.check(WRITE, {}, context()))
    assert (decision.allowed, decision.reason) == (False, "write_file was not run: nobody answered in time")
    assert recorded[-1] == Resolution(id="c1", allowed=False, by="timeout")


def test_a_single_consent_is_not_inherited():
    approvals = Approvals(ASK, is_interactive=True, timeout_s=0.01)

    async def both():
        assert (await answered(approvals, True)).allowed
        return [
            await approvals.check(WRITE, {"path": "a"}, context(agent, f"d{agent}")) for agent in ("root", "root/1")
        ]

    assert [decision.allowed for decision in run(both())] == [False, False]


@pytest.mark.parametrize(
    ("scope", "covered"),
    [
        ("run", {"root": True, "root/1": True, "root/1/2": True, "root/10": True, "root/2": True}),
        ("agent", {"root": False, "root/1": True, "root/1/2": True, "root/10": False, "root/2": False}),
    ],
)
def test_wider_consent_is_inherited_downwards(scope, covered):
    approvals = Approvals(ASK, is_interactive=True, timeout_s=0.01)

    async def all_of_them():
        await answered(approvals, True, scope, agent_id="root/1")
        return {
            agent: (await approvals.check(WRITE, {"path": "z"}, context(agent, f"c-{agent}"))).allowed
            for agent in covered
        }

    assert run(all_of_them()) == covered


def test_wider_consent_does_not_cover_what_another_rule_asks_or_denies():
    rules = [
        Rule(mode="deny", tool="write_file", arguments={"path": "/etc/*"}),
        Rule(mode="ask", tool="write_file", arguments={"path": "src/*"}),
        *ASK,
    ]
    approvals = Approvals(rules, is_interactive=True, timeout_s=0.01)

    async def some():
        await answered(approvals, True, "run", arguments={"path": "a"})
        paths = ("b", "src/x", "/etc/x")
        return [(await approvals.check(WRITE, {"path": path}, context(call_id=path))).allowed for path in paths]

    assert run(some()) == [True, False, False]


def test_a_denial_grants_nothing():
    approvals = Approvals(ASK, is_interactive=True, timeout_s=0.01)

    async def twice():
        await answered(approvals, False, "run")
        return await approvals.check(WRITE, {"path": "a"}, context(call_id="c2"))

    assert not run(twice()).allowed


def test_state_survives_a_crash():
    """What was recorded, as JSON, rebuilds what was decided and what still waits."""
    journal: list[str] = []

    def record(entry):
        journal.append(json.dumps([type(entry).__name__, entry.to_dict()]))

    before = Approvals(ASK, is_interactive=True, record=record)

    async def until_the_crash():
        await answered(before, True, call_id="allowed")
        await answered(before, False, call_id="denied")
        await answered(before, True, "agent", agent_id="root/1", call_id="wide")
        task = asyncio.ensure_future(before.check(WRITE, {"path": "p"}, context(call_id="open")))
        await pending(before)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(until_the_crash())
    kinds = {"Request": Request, "Resolution": Resolution}
    entries = [kinds[kind].from_dict(value) for kind, value in map(json.loads, journal)]
    after = Approvals(ASK, is_interactive=True, timeout_s=1, record=record)
    after.restore(entries)
    length = len(journal)

    async def after_it():
        assert [request.id for request in after.requests()] == ["open"]
        assert (await after.check(WRITE, {"path": "a"}, context(call_id="allowed"))).allowed
        assert not (await after.check(WRITE, {"path": "a"}, context(call_id="denied"))).allowed
        assert (await after.check(WRITE, {"path": "q"}, context("root/1/7", "fresh"))).allowed
        changed = await after.check(WRITE, {"path": "other"}, context(call_id="allowed"))
        assert not changed.allowed
        assert "another call was already asked about" in changed.reason
        task = asyncio.ensure_future(after.check(WRITE, {"path": "p"}, context(call_id="open")))
        await asyncio.sleep(0.01)
        after.resolve("open", True)
        assert (await task).allowed

    run(after_it())
    assert len(journal) == length + 1  # the open request was not asked anew


def test_a_resolution_of_nothing_is_refused():
    with pytest.raises(ToolError, match="no such request"):
        Approvals().restore([Resolution(id="x", allowed=True)])


def test_a_cancelled_call_waits_no_more():
    approvals = Approvals(ASK, is_interactive=True)

    async def cancelled():
        task = asyncio.ensure_future(approvals.check(WRITE, {}, context()))
        await pending(approvals)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(cancelled())
    assert approvals.requests() == ()


def test_a_question_reaches_a_person():
    async def ask(question):
        return f"answer to {question}"

    assert run(call(ask_human_tool(), context(ask=ask), question="q?")).text == "answer to q?"
    assert "nobody is here" in run(call(ask_human_tool(), question="q?")).text
    assert run(call(ask_human_tool(), context(ask=ask), question=" ")).is_error
