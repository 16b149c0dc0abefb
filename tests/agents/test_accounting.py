from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.agents.critical import (
    critical_path,
    critical_steps,
    makespan,
    paper_steps,
    scheduled,
    speedups,
    time_to_target,
    totals,
)
from perilune.agents.simulate import LatencyModel, Lognormal, serial, simulate
from perilune.agents.timeline import AgentSpan, CallSpan, StintSpan, Timeline, TurnSpan


def run_of(stages: list[tuple[int, list[int]]], tokens: int = 10, turn_s: float = 1.0) -> Timeline:
    """A run whose orchestrator has stages of turns, the last of which starts sub-agents of so many steps each."""
    timeline = Timeline(run_id="r")
    root = AgentSpan(id="root", parent=None, profile="", spawned=0.0, started=0.0, ended=1.0, status="completed")
    timeline.agents["root"] = root
    number = children = 0
    for own, group in stages:
        for place in range(own):
            turn = _turn(number, tokens, turn_s)
            root.turns.append(turn)
            number += 1
            for steps in group if place == own - 1 else []:
                children += 1
                child = AgentSpan(id=f"root/{children}", parent="root", profile="w", spawned=0.0, started=0.0)
                child.turns = [_turn(n, tokens, turn_s) for n in range(steps)]
                timeline.agents[child.id] = child
                call = CallSpan(key=f"c{children}", name="assign_task", started=0.0)
                turn.calls.append(call)
                stint = StintSpan(agent=child.id, call=call.key, turn=turn.number, begin=0, spawned=0.0, started=0.0)
                root.given.append(stint)
    return timeline


def _turn(number: int, tokens: int, turn_s: float) -> TurnSpan:
    span = TurnSpan(number=number, started=0.0, ended=turn_s, is_answered=True, total_s=turn_s)
    span.prompt_tokens, span.completion_tokens = 100, tokens
    return span


STAGES = st.lists(st.tuples(st.just(1), st.lists(st.integers(0, 9), max_size=6)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([(1, []), (1, [10, 10]), (1, [])], 13),
        ([(1, [20]), (1, [])], 22),
        ([(1, [5] * 100), (1, [])], 7),
        ([], 0),
    ],
)
def test_critical_steps_are_the_papers(stages: list[tuple[int, list[int]]], expected: int) -> None:
    assert paper_steps(stages) == expected
    if stages:
        assert critical_steps(run_of(stages)) == expected


@given(STAGES)
def test_the_longest_path_by_steps_is_the_papers_formula(stages: list[tuple[int, list[int]]]) -> None:
    timeline = run_of(stages)
    path = critical_path(timeline, "steps")
    assert sum(segment.weight for segment in path) == critical_steps(timeline) == makespan(timeline, math.inf)
    assert makespan(timeline, 1) == timeline.total_steps


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(1, 12))
def test_a_schedule_lies_between_its_bounds(lengths: list[int], slots: int) -> None:
    found = scheduled(lengths, slots)
    least = max(max(lengths, default=0), sum(lengths) / slots)
    assert least <= found <= least + max(lengths, default=0)
    assert scheduled(lengths, slots + 1) <= found


def test_queues_count_in_the_makespan_alone() -> None:
    timeline = run_of([(1, [10] * 100), (1, [])])
    assert [makespan(timeline, slots) for slots in (8, 16, 100)] == [132, 72, 12]
    assert speedups(timeline, (1, math.inf)) == {1: 1.0, math.inf: pytest.approx(1002 / 12)}


def test_totals_stand_beside_every_ratio() -> None:
    found = totals(run_of([(1, [4, 2]), (2, [3]), (1, [])]))
    assert (found.steps, found.critical_steps, found.subagents) == (13, 11, 3)
    assert (found.prompt_tokens, found.completion_tokens) == (1300, 130)
    assert (found.average_group, found.parallelism) == (1.5, pytest.approx(13 / 11))


def test_a_target_that_is_not_reached_is_not_made_up() -> None:
    assert time_to_target([1, 2, 4], [0.1, 0.5, 0.6], 0.5) == 2
    assert time_to_target([1, 2, 4], [0.1, 0.5, 0.6], 0.7) is None


@given(STAGES)
def test_the_simulator_counts_steps_when_each_takes_a_second(stages: list[tuple[int, list[int]]]) -> None:
    timeline, model = run_of(stages), LatencyModel(turn=Lognormal(median_s=1.0))
    assert simulate(timeline, model).wall_s == pytest.approx(critical_steps(timeline))
    assert serial(timeline, model).wall_s == pytest.approx(timeline.total_steps)
    slots = LatencyModel(turn=Lognormal(median_s=1.0), agents_running=2)
    assert simulate(timeline, slots).wall_s == pytest.approx(makespan(timeline, 2))
    one = LatencyModel(turn=Lognormal(median_s=1.0), concurrency=1)
    assert simulate(timeline, one).wall_s == pytest.approx(timeline.total_steps)


def test_sequences_that_are_written_together_share_the_engine() -> None:
    """n equal workers on one replica are n t_d(1) / t_d(n) times as fast as one."""
    timeline = run_of([(1, [5] * 8)], tokens=100)
    model = LatencyModel(decode_s=0.01, decode_shared_s=0.002)
    alone = 100 * 0.012
    found = simulate(timeline, model)
    assert found.wall_s == pytest.approx(alone + 5 * 100 * (0.01 + 8 * 0.002))
    assert found.peak_decoding == 8
    assert serial(timeline, model).wall_s == pytest.approx(41 * alone)


def test_a_sequence_that_joins_slows_the_others_from_then_on() -> None:
    timeline = run_of([(1, [1, 1])], tokens=100)
    first, second = timeline.agents["root/1"], timeline.agents["root/2"]
    timeline.root.turns[0].completion_tokens = 0
    second.turns[0].prompt_tokens = 1050  # half a second of reading
    first.turns[0].prompt_tokens = 50
    model = LatencyModel(decode_s=0.0, decode_shared_s=0.01, prefill_tokens_per_s=2000)
    # root reads 100: 0.05; first begins to write at 0.075, second at 0.575, when 50 tokens of the first are written;
    # then both at half the speed: the first's 50 take 1 s, the second has 50 left, alone again: 0.5 s.
    assert simulate(timeline, model).wall_s == pytest.approx(0.575 + 1.0 + 0.5)


def test_requests_a_minute_and_tools_by_name() -> None:
    timeline = run_of([(1, [1] * 4)])
    assert simulate(timeline, LatencyModel(requests_per_minute=60)).wall_s == pytest.approx(4.0)
    timeline = run_of([(1, [])])
    timeline.root.turns[0].calls = [CallSpan(key="a", name="search", started=1.0, ended=3.0)]
    assert simulate(timeline, LatencyModel()).wall_s == pytest.approx(2.0)
    assert simulate(timeline, LatencyModel(tools={"*": Lognormal(median_s=0.5)})).wall_s == pytest.approx(0.5)


def test_draws_depend_on_what_they_are_for_and_on_the_seed() -> None:
    timeline = run_of([(1, [3, 3]), (1, [])])
    model = LatencyModel(turn=Lognormal(median_s=1.5, sigma=0.5))
    assert simulate(timeline, model, seed=1) == simulate(timeline, model, seed=1)
    assert simulate(timeline, model, seed=1).wall_s != simulate(timeline, model, seed=2).wall_s
    with pytest.raises(ValueError, match="concurrency must be >= 1"):
        LatencyModel(concurrency=0)


@st.composite
def busy_runs(draw: st.DrawFn) -> Timeline:
    """A run whose orchestrator waits for some, goes on while others work, and gives some another task."""
    own = draw(st.integers(1, 6))
    root = AgentSpan(id="root", parent=None, profile="", spawned=0.0, started=0.0)
    timeline = Timeline(run_id="r", agents={"root": root})
    root.turns = [_turn(number, 10, 1.0) for number in range(own)]
    for turn in range(own):
        for place in range(draw(st.integers(0, 3))):
            ready = [name for name in timeline.agents if name != "root" and _is_ready(root, name, turn)]
            name = draw(st.sampled_from([*ready, f"root/{len(timeline.agents)}"]))
            child = timeline.agents.setdefault(
                name, AgentSpan(id=name, parent="root", profile="w", spawned=0.0, started=0.0)
            )
            begin, steps = child.steps, draw(st.integers(0, 9))
            child.turns += [_turn(begin + n, 10, 1.0) for n in range(steps)]
            call = CallSpan(key=f"root:{turn}:{place}", name="assign_task", started=0.0)
            root.turns[turn].calls.append(call)
            is_background = draw(st.booleans())
            back = draw(st.sampled_from([None, *range(turn + 1, own + 1)])) if is_background else None
            stint = StintSpan(agent=name, call=call.key, turn=turn, begin=begin, end=begin + steps, spawned=0.0)
            stint.is_background, stint.back = is_background, back
            root.given.append(stint)
    return timeline


def _is_ready(root: AgentSpan, name: str, turn: int) -> bool:
    """Whether all that an agent did is read, so that it may be given something else."""
    found = [stint.read_in for stint in root.given if stint.agent == name]
    return all(read is not None and read <= turn for read in found)


def longest_chain(timeline: Timeline) -> int:
    """The longest chain of turns, each with those that it follows: slow, and plainly what is meant."""
    given = timeline.root.given

    def chain(agent: str, turn: int) -> int:
        stint = next((s for s in given if s.agent == agent and s.begin <= turn < (s.end or 0)), None)
        if stint is not None:
            return 1 + (chain("root", stint.turn) if turn == stint.begin else chain(agent, turn - 1))
        before = [chain("root", turn - 1)] if turn else [0]
        read = [chain(s.agent, s.end - 1) for s in given if s.read_in == turn and s.end and s.end > s.begin]
        return 1 + max(before + read)

    return max(chain(agent.id, turn.number) for agent in timeline.agents.values() for turn in agent.turns)


@given(busy_runs())
def test_critical_steps_are_the_longest_chain_with_the_background_and_with_other_tasks(timeline: Timeline) -> None:
    expected = longest_chain(timeline)
    path = critical_path(timeline, "steps")
    assert critical_steps(timeline) == sum(s.weight for s in path) == makespan(timeline, math.inf) == expected
    model = LatencyModel(turn=Lognormal(median_s=1.0))
    assert simulate(timeline, model).wall_s == pytest.approx(expected)
    assert serial(timeline, model).wall_s == pytest.approx(timeline.total_steps)
    assert expected <= makespan(timeline, 2) <= makespan(timeline, 1) <= timeline.total_steps
    two = LatencyModel(turn=Lognormal(median_s=1.0), agents_running=2)
    assert simulate(timeline, two).wall_s == pytest.approx(makespan(timeline, 2))


def test_turns_beside_the_background_do_not_add_to_it() -> None:
    """Turn 0 begins 5 steps in the background, turn 3 reads them: 1 + 5 + 1, whatever was done meanwhile."""
    timeline = run_of([(1, [5]), (1, []), (1, []), (1, [])])
    stint = timeline.root.given[0]
    assert critical_steps(timeline) == 9
    stint.is_background, stint.back = True, 3
    assert critical_steps(timeline) == 7
    stint.back = None
    assert critical_steps(timeline) == 6
