import re
from collections import Counter
from random import Random

import pytest

from perilune.errors import DataError
from perilune.tasks import MARKERS, TASKS, Problem, Task, TaskConfig, behaviors_of, build_task
from perilune.tasks.lessons import ChainSum, Products, SimpleEquation, add_chain, decimal_parts, multiply_chain
from perilune.tasks.number_lessons import CountBits, GreatestCommonDivisor, PrimeFactorization, factor
from perilune.tasks.teacher import LESSONS, read_lesson

pytest.importorskip("reasoning_gym", reason="the tasks extra is not installed")

NAMES = sorted(TASKS)


def make(name: str, **options) -> Task:
    return build_task(TaskConfig(name=name, **options))


@pytest.fixture(scope="module")
def problems() -> dict[str, list[Problem]]:
    return {name: make(name).sample("train", 120, seed=5) for name in NAMES}


def is_true(equation: str) -> bool:
    """Check one link of a chain, `a op b = c`."""
    match = re.fullmatch(r"(-?\d+)([-+*/%])(-?\d+)=(-?\d+)", equation)
    assert match, equation
    a, operator, b, c = int(match[1]), match[2], int(match[3]), int(match[4])
    results = {"+": a + b, "-": a - b, "*": a * b, "%": a % b if b else None, "/": a / b if b else None}
    return results[operator] == c


def links(line: str) -> list[str]:
    """Cut chains such as 47+30=77+8=85 into 47+30=77 and 77+8=85."""
    found = []
    for chain in re.findall(r"-?\d+(?:[-+*/%]-?\d+=-?\d+)+", line):
        first, *steps = re.split(r"(?<=\d)(?=[-+*/%]-?\d+=)", chain)
        for step in steps:
            found.append(first + step)
            first = step.split("=")[1]
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("style", ["long", "short", "direct"])
@pytest.mark.parametrize("answer_format", ["bare", "boxed", "tag"])
def test_every_trace_verifies(name: str, style, answer_format, problems) -> None:
    task = make(name, style=style, answer_format=answer_format)
    for problem in problems[name]:
        trace = task.teach(problem, seed=1)
        reward = task.verify(problem, trace.text)
        assert reward.correct, (problem.prompt, trace.text, reward)
        assert trace.style == style
        assert (trace.thinking is None) == (style == "direct")


@pytest.mark.parametrize("name", NAMES)
def test_behaviors_occur_as_often_as_configured(name: str, problems) -> None:
    task = make(name, p_err=0.3, p_explore=0.4)
    counts: Counter[str] = Counter()
    total = 0
    for problem in problems[name]:
        for seed in range(4):
            counts.update(task.teach(problem, seed).behaviors)
            total += 1
    assert counts["planning"] == counts["evaluation"] == total
    assert counts["exploration"] / total == pytest.approx(0.4, abs=0.09)
    # A prime number offers no step that could go wrong, so factorizations slip less often.
    expected = 0.24 if name == "prime_factorization" else 0.3
    assert counts["reflection"] / total == pytest.approx(expected, abs=0.09)


@pytest.mark.parametrize("name", NAMES)
def test_a_slip_is_noticed_and_mended(name: str, problems) -> None:
    task, plain = make(name, p_err=1.0, p_explore=0.0), make(name, p_err=0.0, p_explore=0.0)
    slipped = 0
    for problem in problems[name]:
        thinking = str(task.teach(problem, seed=2).thinking)
        if "redo:" not in thinking:
            continue
        slipped += 1
        lines = thinking.splitlines()
        steps = str(plain.teach(problem, seed=2).thinking).splitlines()[1]
        assert lines[1] != steps
        assert lines[2].startswith("check:")
        assert lines[2].endswith(" wrong")
        assert lines[3].removesuffix(" ok") == f"redo: {steps}"
        assert lines[-1].endswith(" ok")
        assert thinking.count(" wrong") == 1
    assert slipped >= 0.7 * len(problems[name])


@pytest.mark.parametrize("name", NAMES)
def test_right_steps_are_true_equations(name: str, problems) -> None:
    # Other ways to a divisor or a factorization write products, `56=2*2*2*7`, which are no chains.
    task = make(name, p_err=0.0, p_explore=0.0 if name in ("gcd", "prime_factorization") else 1.0)
    checked = 0
    for problem in problems[name]:
        for line in str(task.teach(problem, seed=0).thinking).splitlines()[1:]:
            for link in links(line.replace("back ", "")):
                checked += 1
                assert is_true(link), (link, line)
    assert checked > 50 or name == "letter_counting"


@pytest.mark.parametrize("name", NAMES)
def test_alternatives_lead_to_the_same_answer(name: str, problems) -> None:
    for problem in problems[name]:
        lesson = read_lesson(name, problem.metadata["item"])  # pyright: ignore[reportArgumentType]
        assert lesson.alternative().answer == lesson.solve().answer == problem.answer
        assert lesson.check(problem.answer).is_right


@pytest.mark.parametrize("name", NAMES)
def test_checks_refuse_every_slip_that_changes_the_answer(name: str, problems) -> None:
    random = Random(0)
    for problem in problems[name]:
        lesson = read_lesson(name, problem.metadata["item"])  # pyright: ignore[reportArgumentType]
        for _ in range(3):
            attempt = lesson.solve(random)
            assert lesson.check(attempt.answer).is_right == (attempt.answer == problem.answer)


def test_traces_are_pure_in_problem_and_seed(problems) -> None:
    task = make("chain_sum", p_err=0.5)
    for problem in problems["chain_sum"]:
        assert task.teach(problem, 3) == task.teach(problem, 3)
    different = [task.teach(problem, 3) != task.teach(problem, 4) for problem in problems["chain_sum"]]
    assert sum(different) > 30


def test_long_traces_are_short(problems) -> None:
    for name in NAMES:
        lengths = [len(make(name).teach(problem, 0).text) for problem in problems[name]]
        assert sum(lengths) / len(lengths) < 120, name


def test_behaviors_are_read_from_any_text() -> None:
    assert behaviors_of("plan: x\n1+1=2\ncheck: 2 ok") == {"planning", "evaluation"}
    assert behaviors_of("no plan: at the start of a line") == frozenset()
    assert behaviors_of("\n".join(MARKERS.values())) == set(MARKERS)


@pytest.mark.parametrize(
    ("expression", "prompt", "steps"),
    [
        ("47 + 38", "Calculate 47+38.", "47+30=77+8=85"),
        ("4 - 1 - 7", "Calculate 4-1-7.", "4-1=3-7=-4"),
        ("90 - 5", "Calculate 90-5.", "90-5=85"),
        ("3 + -4", "Calculate 3-4.", "3-4=-1"),
        ("305 - 210 + 0", "Calculate 305-210+0.", "305-200=105-10=95+0=95"),
    ],
)
def test_chain_sums_by_hand(expression: str, prompt: str, steps: str) -> None:
    lesson = ChainSum.parse({"expression": expression})
    assert (lesson.prompt, lesson.solve().text) == (prompt, steps)


def test_products_by_hand() -> None:
    lesson = Products.parse({"expression": "7 * 8 * 6"})
    assert lesson.solve().text == "7*8=56,50*6=300,6*6=36,300+30=330+6=336"
    assert lesson.check("336").text == "6*8=48,40*7=280,8*7=56,280+50=330+6=336"
    assert Products.parse({"expression": "8 * 8"}).check("64").text == "8*10=80,8*2=16,80-16=64"
    assert multiply_chain([0, 6]).text == "0*6=0"


@pytest.mark.parametrize(
    ("equation", "prompt", "answer"),
    [
        ("7*e + 13 = 55", "Solve 7*x+13=55.", "6"),
        ("56 - 98*e = -1218", "Solve -98*x+56=-1218.", "13"),
        ("e - 3 = 4", "Solve x-3=4.", "7"),
        ("5 - e = 4", "Solve -x+5=4.", "1"),
        ("3*e = 12", "Solve 3*x=12.", "4"),
        ("e = 12", "Solve x=12.", "12"),
    ],
)
def test_equations_by_hand(equation: str, prompt: str, answer: str) -> None:
    lesson = SimpleEquation.parse({"equation": equation})
    assert (lesson.prompt, lesson.solve().answer) == (prompt, answer)
    assert lesson.check(answer).is_right
    assert lesson.alternative().answer == answer
    assert not lesson.check(str(int(answer) + 1)).is_right


def test_number_lessons_by_hand() -> None:
    divisor = GreatestCommonDivisor(numbers=(48, 18, 8))
    assert divisor.solve().text == "48%18=12,18%12=6,12%6=0,8%6=2,6%2=0"
    assert divisor.check("2").text == "48/2=24,18/2=9,8/2=4,share 1"
    assert divisor.check("1").text == "48/1=48,18/1=18,8/1=8,share 2"
    assert GreatestCommonDivisor(numbers=(48, 18)).alternative().text == "48=2*2*2*2*3,18=2*3*3,common 2*3=6"
    assert CountBits(number=201).solve().text == "201-128=73-64=9-8=1-1=0,4 times"
    assert CountBits(number=201).check("4").text == "11001001 has 4"
    assert PrimeFactorization(number=84).solve().text == "84/2=42/2=21/3=7 prime"
    assert PrimeFactorization(number=97).alternative().text == "97/2 no,97/3 no,97/5 no,97/7 no"


@pytest.mark.parametrize("number", range(300))
def test_decimal_parts_sum_to_the_number(number: int) -> None:
    assert sum(decimal_parts(number)) == number
    assert add_chain([0, number, -number]).answer == "0"
    assert number == 0 or (all(len(factor(part)) == 1 for part in factor(number)))


def test_task_without_a_lesson_is_named() -> None:
    task = make("spell_backward")
    (problem,) = task.sample("train", 1, seed=0)
    assert problem.prompt == problem.metadata["question"]
    with pytest.raises(DataError, match="'spell_backward' has no scripted teacher; tasks that have one: chain_sum"):
        task.teach(problem, 0)


@pytest.mark.parametrize("metadata", [{}, {"expression": "a + b"}, {"expression": "1 * 2"}])
def test_unreadable_metadata_is_refused(metadata: dict) -> None:
    with pytest.raises(DataError, match="cannot read this problem's metadata"):
        read_lesson("chain_sum", metadata)
    with pytest.raises(DataError, match="two or more factors"):
        read_lesson("products", {"expression": "-3 * 4"})


def test_every_registered_task_has_a_lesson() -> None:
    assert set(LESSONS) == set(TASKS)
