from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.agents.budget import KEPT_FOR_LAST_WORDS, QUANTITIES, Budget, BudgetExceeded, Reservation


def test_what_is_reserved_is_not_there_for_others_and_comes_back_when_settled() -> None:
    run = Budget("run", {"tokens_out": 1000.0})
    first, second = run.child("a"), run.child("b")
    held = first.reserve({"tokens_out": 900})
    with pytest.raises(BudgetExceeded, match="c: the budget of 100 tokens_out is used up"):
        run.child("c", {"tokens_out": 100.0}).reserve({"tokens_out": 200})
    with pytest.raises(BudgetExceeded, match="run: the budget of 1000 tokens_out"):
        second.reserve({"tokens_out": 200})
    held.settle({"tokens_out": 300})
    second.reserve({"tokens_out": 600}).settle({"tokens_out": 600})
    assert (run.used["tokens_out"], run.reserved["tokens_out"]) == (900, 0)
    assert (first.used["tokens_out"], second.used["tokens_out"]) == (300, 600)


def test_a_share_is_kept_for_last_words() -> None:
    run = Budget("run", {"tokens_out": 1000.0})
    run.reserve({"tokens_out": 970}).settle({"tokens_out": 970})
    assert run.clipped("tokens_out", 50) == 0
    assert run.clipped("tokens_out", 50, is_last=True) == pytest.approx(1000 * KEPT_FOR_LAST_WORDS)
    with pytest.raises(BudgetExceeded):
        run.reserve({"tokens_out": 10})
    run.reserve({"tokens_out": 30}, is_last=True)


def test_a_child_has_its_share_of_what_is_left_and_what_it_leaves_is_for_all() -> None:
    run = Budget("run", {"usd": 10.0})
    run.spend({"usd": 2.0})
    children = [run.child(f"c{i}", run.shares(3)) for i in range(3)]  # one share stays for whoever started them
    assert all(child.left("usd") == 2.0 for child in children)
    children[0].spend({"usd": 0.5})
    assert run.left("usd") == 7.5
    assert run.child("late").left("usd") == 7.5
    assert Budget("free").child("c").left("usd") == math.inf
    assert Budget("run", {"llm_calls": 30.0}).shares(10) == {"llm_calls": 2}
    assert Budget("run", {"llm_calls": 3.0}).shares(10) == {"llm_calls": 0}


def test_what_must_be_left_beside_is_not_reserved() -> None:
    run = Budget("run", {"tokens_in": 1000.0})
    run.reserve({"tokens_in": 400}, spare={"tokens_in": 600}).settle({"tokens_in": 400})
    with pytest.raises(BudgetExceeded):
        run.child("a").reserve({"tokens_in": 200}, spare={"tokens_in": 401})
    run.reserve({"tokens_in": 600}, is_last=True)
    assert Budget("run", {"tokens_out": 1000.0}).clipped("tokens_out", 1000, spare=200) == 800


def test_the_fullest_limit_is_named() -> None:
    run = Budget("run", {"usd": 10.0, "tool_calls": 4.0})
    assert run.fullest()[1] == 0
    run.spend({"usd": 1.0, "tool_calls": 3, "tokens_in": 1e9})
    assert run.fullest() == ("tool_calls", 0.75)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_node_is_ever_overspent_and_sums_match(data: st.DataObject) -> None:
    limit = data.draw(st.floats(10, 1000))
    run = Budget("run", {"tokens_out": limit, "llm_calls": 20.0})
    agents, held = [run], list[tuple[Budget, Reservation, float]]()
    granted = 0
    for _ in range(data.draw(st.integers(1, 60))):
        match data.draw(st.sampled_from(["child", "reserve", "settle"])):
            case "child":
                parent = data.draw(st.sampled_from(agents))
                agents.append(parent.child(f"a{len(agents)}", {"tokens_out": data.draw(st.floats(1, 500))}))
            case "reserve":
                agent = data.draw(st.sampled_from(agents))
                amount = agent.clipped("tokens_out", data.draw(st.floats(0, 400)))
                if granted == 20:
                    with pytest.raises(BudgetExceeded, match="llm_calls"):
                        agent.reserve({"tokens_out": amount, "llm_calls": 1})
                else:
                    held.append((agent, agent.reserve({"tokens_out": amount, "llm_calls": 1}), amount))
                    granted += 1
            case _ if held:
                agent, reservation, amount = held.pop(data.draw(st.integers(0, len(held) - 1)))
                reservation.settle({"tokens_out": amount * data.draw(st.floats(0, 1)), "llm_calls": 1})
        for agent in agents:
            total = agent.used["tokens_out"] + agent.reserved["tokens_out"]
            assert total <= agent.limits.get("tokens_out", math.inf) * (1 + 1e-9) + 1e-9
            assert min(agent.reserved.values()) >= 0
    assert run.used["llm_calls"] + run.reserved["llm_calls"] == granted <= 20
    for _, reservation, amount in held:
        reservation.settle({"tokens_out": amount, "llm_calls": 1})
    assert all(run.reserved[name] == pytest.approx(0, abs=1e-6) for name in QUANTITIES)
