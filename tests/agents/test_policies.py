import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.agents.messages import ChatRequest, Message, ToolCall
from perilune.agents.policies import Noise, WideTablePolicy
from perilune.agents.policies.history import find_document, past_calls
from perilune.agents.policies.wide_table import ASSIGN, CREATE, Order, read_order
from perilune.tasks.wide_table import build_corpus, parse_table, read_question, shrink_corpus, wide_table_task
from tests.tasks.library import SEARCH_TOOLS, SWARM_TOOLS, Library, solve

SEEDS = range(5)
TOOLS = [{"type": "function", "function": {"name": name}} for name in (*SEARCH_TOOLS, *SWARM_TOOLS)]


@pytest.fixture(scope="module")
def documents():
    return build_corpus()


@pytest.fixture
def small(documents):
    """Returns the library of a task, small enough to search in no time."""
    return lambda task, **options: Library(
        shrink_corpus(documents, read_question(task.question).subject, 600), **options
    )


@pytest.fixture(scope="module")
def library(documents):
    return Library(documents)


def total_turns(agent):
    return agent.turns + sum(child.turns for group in agent.groups for child in group)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("swarm", [False, True])
def test_both_arms_fill_any_table_from_the_whole_library(library, seed, swarm):
    task = wide_table_task(seed, num_rows=(8, 24))
    assert task.score(solve(WideTablePolicy(), library, task, swarm).answer).success


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("with_bound", [False, True])
def test_the_swarm_needs_a_seventh_of_the_turns_in_a_row(small, seed, with_bound):
    task = wide_table_task(seed, num_rows=(60, 64), with_bound=with_bound)
    alone, swarm = (solve(WideTablePolicy(), small(task), task, swarm) for swarm in (False, True))
    assert task.score(alone.answer).f1 == task.score(swarm.answer).f1 == 1.0
    assert alone.turns >= 60
    assert alone.turns / swarm.critical_turns >= 7
    assert swarm.critical_turns == swarm.turns + max(child.turns for child in swarm.groups[0])
    assert len(swarm.groups) == 1
    assert len(swarm.groups[0]) == -(-task.num_candidates // 4)
    assert total_turns(swarm) > alone.turns  # what it costs


@pytest.mark.parametrize("swarm", [False, True])
def test_wider_turns_are_fewer(small, swarm):
    task = wide_table_task(2, num_rows=(40, 50))
    turns = [
        solve(WideTablePolicy(calls_per_turn=width, rows_per_agent=8), small(task), task, swarm) for width in (1, 4)
    ]
    assert all(task.score(agent.answer).success for agent in turns)
    assert turns[1].critical_turns < 0.7 * turns[0].critical_turns


@pytest.mark.parametrize(
    "layout",
    [
        "{number}. [{id}] {title}\n   {snippet}",
        "{number}. {title} ({id})\n{snippet}",
        "{number}) {id} - {title}: {snippet}",
        "{number}. {id}\n   title: {title}\n   {snippet}",
        "{number}. {title} | {id} | {snippet}",
        "{number}. **{title}** [doc {id}]\n{snippet}",
    ],
)
def test_hits_are_read_in_other_layouts(small, layout):
    task = wide_table_task(1, num_rows=(8, 16))
    assert task.score(solve(WideTablePolicy(), small(task, layout=layout), task, swarm=True).answer).success


def test_a_hit_is_no_other_page_of_a_similar_name():
    result = "1. [p00000000000a] New Oslo (city in Norway)\n2. [p00000000000b] Osloo (city in Norway)"
    result += "\n   Oslo (city in Norway)"  # a snippet
    assert find_document(result, "Oslo (city in Norway)") is None
    assert (
        find_document(f"{result}\n3. [p00000000000c] Oslo (city in Norway)", "Oslo (city in Norway)") == "p00000000000c"
    )
    objects = '[{"query":"Osl\\u00f8","hits":[{"doc":"p1","title":"\\"Osl\\u00f8\\" (x)","snippet":""},{"doc":"p2","tit'
    assert find_document(objects, '"Osl\u00f8" (x)') == "p1"
    parts = "1. [p00000000000a] List of x, part 1 of 12\n2. [p00000000000b] List of x, part 1 of 1"
    assert find_document(parts, "List of x, part 1 of 1") == "p00000000000b"


@pytest.mark.parametrize("seed", range(6))
def test_with_noise_the_swarm_is_as_good_or_better(small, seed):
    task = wide_table_task(seed, num_rows=(60, 64))
    policy = WideTablePolicy(noise=Noise(seed=seed))
    alone, swarm = (task.score(solve(policy, small(task), task, swarm).answer) for swarm in (False, True))
    assert 0.5 < alone.f1 < 1.0
    assert alone.f1 <= swarm.f1
    again = task.score(solve(policy, small(task), task, swarm=True).answer)
    assert again == swarm


def test_noise_grows_with_the_context_and_never_mends():
    cells = [(f"title {number}", str(number)) for number in range(400)]
    wrong = {
        pages: {title for title, cell in cells if Noise().apply(cell, title=title, column="Size", pages=pages) != cell}
        for pages in (0, 64, 1000)
    }
    assert len(wrong[0]) < 15 < len(wrong[64]) < 60
    assert len(wrong[1000]) == 400
    assert wrong[0] <= wrong[64]
    with pytest.raises(ValueError, match="misread must be in"):
        Noise(misread=1.5)


@pytest.mark.parametrize("cell", ["0", "0.0", "-3", "6.4", "1,250", "x", "Oslo", "-0.1278", "12%"])
def test_what_is_misread_is_wrong_within_any_tolerance(cell):
    from perilune.tasks.wide_table import Column
    from perilune.tasks.wide_table.scoring import is_right

    wrong = Noise(misread=1.0).apply(cell, title="t", column="c", pages=0)
    for kind in ("text", "number"):
        assert not is_right(wrong, cell, Column(name="c", kind=kind, tolerance=0.05))


def test_rows_that_did_not_come_back_are_assigned_again(small):
    task = wide_table_task(3, num_rows=(40, 50), with_bound=False)
    seen = []

    def meddle(result):
        seen.append(result)
        if len(seen) == 1:
            return result | {"status": "error", "result": ""}
        if len(seen) == 2:
            return result | {"status": "max_steps", "result": "\n".join(result["result"].splitlines()[:-2])}
        if len(seen) == 3:
            return result | {"result": "I have found | nothing |."}
        return result

    agent = solve(WideTablePolicy(), small(task), task, swarm=True, meddle=meddle)
    assert task.score(agent.answer).success
    assert len(agent.groups) == 2
    assert 2 <= len(agent.groups[1]) <= 3  # groups of other sizes, as the last one may be smaller


def test_what_never_comes_back_is_left_out_in_the_end(small):
    task = wide_table_task(3, num_rows=(10, 16), with_bound=False)

    def meddle(result):
        return result | {"status": "error", "result": "broken"}

    agent = solve(WideTablePolicy(), small(task), task, swarm=True, meddle=meddle)
    assert len(agent.groups) == 3
    assert parse_table(agent.answer).rows == ()


def test_rows_that_nobody_asked_for_are_not_taken(small):
    task = wide_table_task(3, num_rows=(10, 16), with_bound=False)
    other = task.rows[-1][0]

    def meddle(result):
        lines = result["result"].splitlines()
        liar = f"| {other} |{' no |' * (len(task.columns) - 1)}"
        return result | {"result": "\n".join([*lines[:2], liar, *[line for line in lines[2:] if other not in line]])}

    agent = solve(WideTablePolicy(), small(task), task, swarm=True, meddle=meddle)
    lied = [row for row in parse_table(agent.answer).rows if row[1] == "no"]
    assert len(lied) == 1  # of the one agent that was asked for it


@pytest.mark.parametrize("swarm", [False, True])
@pytest.mark.parametrize("fault", ["nothing found", "nothing opened", "half opened", "garbage"])
def test_bad_tools_end_in_an_answer_after_bounded_turns(small, swarm, fault):
    task = wide_table_task(4, num_rows=(20, 30), with_bound=False)
    library = small(task)
    dice = random.Random(0)

    class Bad:
        def search(self, queries, k):
            found = library.search(queries, k)
            return {"nothing found": "no hits", "garbage": "1. 2. 3. []" * 99}.get(fault, found)

        def open_page(self, doc, offset):
            is_broken = fault == "nothing opened" or dice.random() < 0.5
            return "the page did not load" if is_broken else library.open_page(doc, offset)

    agent = solve(WideTablePolicy(), Bad(), task, swarm, max_turns=4 * 3 * 30)
    found = parse_table(agent.answer)
    assert found is not None
    assert found.header == tuple(column.name for column in task.columns)
    if fault == "half opened" and swarm:
        assert task.score(agent.answer).f1 > 0.7


def request(messages, tools=TOOLS, **options):
    return ChatRequest(model="m", messages=messages, tools=tools, **options)


def test_the_orchestrator_makes_one_profile_and_all_tasks_in_one_turn(small):
    task = wide_table_task(0, num_rows=(20, 30), with_bound=False)
    library, messages = small(task), [Message(role="user", content=task.question)]
    while True:
        reply = WideTablePolicy(rows_per_agent=8)(request(messages))
        names = [call.name for call in reply.tool_calls]
        if ASSIGN in names:
            break
        messages.append(reply)
        for call in reply.tool_calls:
            text = getattr(library, call.name)(**json.loads(call.arguments))
            messages.append(Message(role="tool", content=text, tool_call_id=call.id))
    assert names == [CREATE] + [ASSIGN] * -(-len(task.rows) // 8)
    orders = [read_order(json.loads(call.arguments)["prompt"]) for call in reply.tool_calls[1:]]
    assert sum(len(order.titles) for order in orders) == len(task.rows)
    assert len({call.arguments for call in reply.tool_calls}) == len(reply.tool_calls)


def test_without_tools_it_answers_from_what_it_has(small):
    task = wide_table_task(0, num_rows=(20, 30), with_bound=False)
    messages = [Message(role="user", content=task.question)]
    for last in (request(messages, tools=()), request(messages, tool_choice="none")):
        reply = WideTablePolicy()(last)
        assert not reply.tool_calls
        assert parse_table(reply.content).rows == ()


def test_an_order_is_read_from_its_prompt_and_from_nothing_else():
    order = Order(titles=("A (b | c)", "- D"), columns=("Key", "Size | m"))
    assert read_order(order.prompt()) == order
    assert read_order(f"Do this.\n{order.prompt()}") == order
    assert read_order("Pages:\n- A") is None
    assert read_order(wide_table_task(0).question) is None


@pytest.mark.parametrize("prompt", ["", "hello", "Pages:\n- x", "| a | b |"])
def test_other_prompts_are_answered_in_one_turn(prompt):
    reply = WideTablePolicy()(request([Message(role="user", content=prompt)]))
    assert reply.content
    assert not reply.tool_calls
    assert WideTablePolicy()(request([])).content


@pytest.mark.parametrize("name", ["calls_per_turn", "orchestrator_calls_per_turn", "rows_per_agent"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        WideTablePolicy(**{name: 0})


def test_results_belong_to_the_last_turn_that_called():
    call = ToolCall(id="c", name="search", arguments="[1]")
    messages = [
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content="one", tool_call_id="c"),
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content="two", tool_call_id="c"),
        Message(role="assistant", tool_calls=(call,)),
    ]
    assert [(found.turn, found.result) for found in past_calls(messages)] == [(0, "one"), (1, "two"), (2, "")]
    assert all(found.arguments == {} for found in past_calls(messages))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([*SEARCH_TOOLS, *SWARM_TOOLS, "other"]),
    arguments=st.one_of(
        st.text(),
        st.sampled_from(['{"queries": 5}', '{"queries": [null]}', '{"doc": []}', '{"prompt": 1}', "[" * 100_000]),
    ),
    result=st.one_of(st.text(), st.sampled_from(['{"result": {}}', "[]", "1. p00000000000a x"])),
)
def test_no_history_makes_the_policy_raise(name, arguments, result):
    call = ToolCall(id="c", name=name, arguments=arguments)
    history = [
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content=result, tool_call_id="c"),
    ]
    orders = (wide_table_task(0).question, Order(titles=("A (b)",), columns=("Key", "Size")).prompt())
    for prompt in orders:
        WideTablePolicy()(request([Message(role="user", content=prompt), *history]))
        WideTablePolicy()(request([Message(role="user", content=prompt), *history], tools=()))


@pytest.mark.parametrize("rows_per_agent", [4, 8])
@pytest.mark.parametrize("seed", range(2))
def test_with_lognormal_latency_the_swarm_is_four_and_a_half_times_as_fast(small, seed, rows_per_agent):
    task = wide_table_task(seed, num_rows=(64, 64))
    library, policy = small(task), WideTablePolicy(rows_per_agent=rows_per_agent)
    ratios = []
    for draw in range(2):
        dice = random.Random(draw)
        alone, swarm = (
            solve(policy, library, task, swarm, latency=lambda dice=dice: 1.5 * dice.lognormvariate(0, 0.5))
            for swarm in (False, True)
        )
        assert task.score(alone.answer).f1 <= task.score(swarm.answer).f1
        ratios.append(alone.seconds / swarm.seconds)
    assert min(ratios) >= 4.5
