"""Sharing out: worked answers for SFT, and problems where there are fewer than were asked for."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import DataError
from perilune.tasks import TaskConfig, TaskMixture, build_task

pytest.importorskip("reasoning_gym", reason="the tasks extra is not installed")

FEW = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""Sums of two digits: fewer than 200 questions."""


def few_questions(**options) -> TaskConfig:
    return TaskConfig(name="chain_sum", params=FEW, **options)


def test_exercises_are_shared_out_by_the_weights_and_shuffled():
    mixture = TaskMixture([TaskConfig(name="gcd", weight=3.0), TaskConfig(name="count_bits")])
    names = [problem.task for problem, _ in mixture.exercises(80, seed=0)]
    assert Counter(names) == {"gcd": 60, "count_bits": 20}
    assert len(set(names[:20])) == len(set(names[-20:])) == 2


def test_exercises_are_right_answers_to_training_problems():
    mixture = TaskMixture([TaskConfig(name="gcd"), few_questions(style="short")])
    for problem, trace in mixture.exercises(60, seed=1):
        assert problem.split == "train"
        assert mixture.verify(problem, trace.text).correct
        assert trace.style == {"gcd": "long", "chain_sum": "short"}[problem.task]


@pytest.mark.parametrize("style", ["long", "short", "direct"])
def test_a_style_overrides_that_of_the_tasks(style):
    mixture = TaskMixture([TaskConfig(name="gcd", style="direct"), TaskConfig(name="count_bits", style="short")])
    assert {trace.style for _, trace in mixture.exercises(10, seed=0, style=style)} == {style}


def test_exercises_are_pure_in_the_seed():
    configs = [TaskConfig(name="gcd"), TaskConfig(name="count_bits")]
    first = TaskMixture(configs).exercises(30, seed=2)
    assert first == TaskMixture(configs).exercises(30, seed=2)
    assert first != TaskMixture(configs).exercises(30, seed=3)


def test_a_task_with_few_questions_gives_them_again_evenly_with_other_traces():
    mixture = TaskMixture([few_questions()])
    exercises = mixture.exercises(400, seed=0)
    uses = Counter(problem.id for problem, _ in exercises)
    questions = mixture.sample("train", 400, seed=0, allow_fewer=True)
    assert len(exercises) == 400
    assert len(uses) == len(questions) < 200
    assert max(uses.values()) - min(uses.values()) == 1
    traces = {}
    for problem, trace in exercises:
        traces.setdefault(problem.id, []).append(trace.text)
    assert sum(len(set(texts)) > 1 for texts in traces.values()) > len(traces) / 4


def test_a_task_with_enough_questions_gives_each_once():
    exercises = TaskMixture([TaskConfig(name="gcd")]).exercises(300, seed=0)
    assert len({problem.id for problem, _ in exercises}) == 300


def test_a_task_whose_share_is_nothing_gives_nothing():
    mixture = TaskMixture([TaskConfig(name="gcd", weight=1000.0), TaskConfig(name="count_bits", weight=1e-3)])
    assert {problem.task for problem, _ in mixture.exercises(10, seed=0)} == {"gcd"}
    assert mixture.exercises(0, seed=0) == []


def test_a_task_without_a_teacher_cannot_give_exercises():
    with pytest.raises(DataError, match="spell_backward"):
        TaskMixture([TaskConfig(name="spell_backward")]).exercises(3, seed=0)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_fewer_problems_are_given_where_that_is_allowed(split):
    task = build_task(few_questions())
    with pytest.raises(DataError, match="too few different questions: 1000 of split"):
        task.sample(split, 1000, seed=0)
    problems = task.sample(split, 1000, seed=0, allow_fewer=True)
    assert 0 < len(problems) < 1000
    assert len({problem.id for problem in problems}) == len(problems)
    assert {problem.split for problem in problems} == {split}
    assert {p.id for p in task.sample(split, 1000, seed=7, allow_fewer=True)} == {p.id for p in problems}


def test_allowing_fewer_changes_nothing_where_there_are_enough():
    task = build_task(TaskConfig(name="gcd"))
    assert task.sample("test", 20, seed=0, allow_fewer=True) == task.sample("test", 20, seed=0)
    assert len(task.sample("test", 20, seed=0, allow_fewer=True)) == 20


def test_a_split_without_any_question_is_an_error_all_the_same():
    only = TaskConfig(name="count_bits", params={"min_n": 5, "max_n": 5})
    task = build_task(only)
    (problem,) = [p for split in ("train", "validation", "test") for p in _any(task, split)]
    empty = "test" if problem.split != "test" else "train"
    with pytest.raises(DataError, match="0 found"):
        task.sample(empty, 1, seed=0, allow_fewer=True)


def _any(task, split):
    try:
        return task.sample(split, 1, seed=0)
    except DataError:
        return []


def test_a_mixture_gives_what_its_small_tasks_have_and_all_of_the_others():
    mixture = TaskMixture([few_questions(), TaskConfig(name="gcd")])
    with pytest.raises(DataError, match="too few"):
        mixture.sample("test", 200, seed=0)
    found = Counter(problem.task for problem in mixture.sample("test", 200, seed=0, allow_fewer=True))
    assert found["gcd"] == 100
    assert 0 < found["chain_sum"] < 40


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from(["validation", "test"]))
def test_no_held_out_problem_is_ever_an_exercise(training_seed, evaluation_seed, split):
    mixture = TaskMixture([few_questions(), TaskConfig(name="count_bits")])
    trained = {problem.prompt for problem, _ in mixture.exercises(60, training_seed)}
    trained |= {problem.prompt for problem in mixture.sample("train", 20, training_seed, allow_fewer=True)}
    held_out = {problem.prompt for problem in mixture.sample(split, 20, evaluation_seed, allow_fewer=True)}
    assert held_out
    assert not trained & held_out
