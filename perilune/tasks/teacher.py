"""The scripted teacher: verified long-CoT traces that plan, evaluate, reflect and explore.

    plan: {plan}
    {steps}
    check: {check} ok

With probability `p_err` a step goes wrong first, the check notices, and the work is done again; else, with probability
`p_explore` of all, another way follows. Each behavior has its marker, so that it can be counted.

Source: Kimi k1.5, section 2.2 (long-CoT warm-up); the scripts are this project's small-scale form of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from perilune.errors import DataError
from perilune.seeding import derive_seed
from perilune.tasks.answers import AnswerFormat, render_answer
from perilune.tasks.base import Problem, Style, Trace
from perilune.tasks.lessons import Attempt, ChainSum, Lesson, Products, SimpleEquation
from perilune.tasks.number_lessons import CountBits, GreatestCommonDivisor, LetterCounting, PrimeFactorization

LESSONS: dict[str, Callable[[Mapping[str, object]], Lesson]] = {
    "chain_sum": ChainSum.parse,
    "count_bits": CountBits.parse,
    "gcd": GreatestCommonDivisor.parse,
    "letter_counting": LetterCounting.parse,
    "prime_factorization": PrimeFactorization.parse,
    "products": Products.parse,
    "simple_equations": SimpleEquation.parse,
}
"""Tasks that have a lesson, with the function that reads a problem's metadata."""

MARKERS = {"planning": "plan:", "evaluation": "check:", "reflection": "redo:", "exploration": "or:"}
"""How each of the four behaviors of a long chain of thought begins its line."""

_SLIP_TRIES = 16


def behaviors_of(thinking: str) -> frozenset[str]:
    """Return which behaviors a thought shows, by its lines' markers; also of thoughts that a model wrote."""
    lines = thinking.splitlines()
    return frozenset(name for name, marker in MARKERS.items() if any(line.startswith(marker) for line in lines))


def read_lesson(task: str, metadata: Mapping[str, object]) -> Lesson:
    """Return the lesson of a problem.

    Raises:
        DataError: the task has no lesson, or its metadata cannot be read.
    """
    if task not in LESSONS:
        raise DataError(f"task {task!r} has no scripted teacher; tasks that have one: {', '.join(sorted(LESSONS))}")
    try:
        return LESSONS[task](metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"task {task!r}: the teacher cannot read this problem's metadata: {error}") from error


def write_trace(
    problem: Problem,
    lesson: Lesson,
    *,
    seed: int,
    style: Style,
    answer_format: AnswerFormat,
    p_err: float,
    p_explore: float,
) -> Trace:
    """Write a worked answer; pure in the problem's id and `seed`.

    Raises:
        DataError: the lesson does not lead to the problem's answer.

    Source: Kimi k1.5, section 2.2 (planning, evaluation, reflection, exploration).
    """
    right = lesson.solve()
    if right.answer != problem.answer:
        raise DataError(
            f"problem {problem.id}: the teacher found {right.answer!r}, the reference answer is {problem.answer!r}"
        )
    random = Random(derive_seed(seed, "teacher", problem.id))
    answer = render_answer(problem.answer, answer_format)
    if style == "direct":
        return Trace(answer=answer, thinking=None, style=style)
    if style == "short":
        return Trace(answer=answer, thinking=right.text, style=style)
    chance = random.random()
    if chance < p_err and (wrong := _slip(lesson, right, random)):
        lines = _reflecting_lines(lesson, right, wrong)
    else:
        lines = _plain_lines(lesson, right, explore=p_err <= chance < p_err + p_explore)
    thinking = "\n".join(lines)
    return Trace(answer=answer, thinking=thinking, style=style, behaviors=behaviors_of(thinking))


def _plain_lines(lesson: Lesson, right: Attempt, *, explore: bool) -> list[str]:
    """Return plan, steps and check, and another way if wanted."""
    lines = [f"{MARKERS['planning']} {lesson.plan}", right.text]
    lines.append(f"{MARKERS['evaluation']} {lesson.check(right.answer).text} ok")
    if explore:
        lines.append(f"{MARKERS['exploration']} {lesson.alternative().text} ok")
    return lines


def _reflecting_lines(lesson: Lesson, right: Attempt, wrong: Attempt) -> list[str]:
    """Return plan, steps with a slip, the check that notices it, the right steps, and a second check if one is owed."""
    noticed = lesson.check(wrong.answer)
    lines = [f"{MARKERS['planning']} {lesson.plan}", wrong.text, f"{MARKERS['evaluation']} {noticed.text} wrong"]
    if noticed.recomputes:
        return [*lines, f"{MARKERS['reflection']} {right.text} ok"]
    checked = f"{MARKERS['evaluation']} {lesson.check(right.answer).text} ok"
    return [*lines, f"{MARKERS['reflection']} {right.text}", checked]


def _slip(lesson: Lesson, right: Attempt, random: Random) -> Attempt | None:
    """Return an attempt with a wrong step and a wrong end that the check notices; None if the lesson yields none."""
    for _ in range(_SLIP_TRIES):
        attempt = lesson.solve(random)
        if attempt.answer != right.answer and not lesson.check(attempt.answer).is_right:
            return attempt
    return None
