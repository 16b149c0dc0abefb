import time

import pytest

from perilune.tasks import extract_answer, render_answer
from perilune.tasks.answers import repeats_question


@pytest.mark.parametrize("answer_format", ["bare", "boxed", "tag"])
@pytest.mark.parametrize("answer", ["7", "-12", "2 \u00d7 3", "{a: {b}}"])
def test_extraction_reads_what_rendering_writes(answer_format, answer: str) -> None:
    for thought in ("", "<think>5, \\boxed{5}, <answer>5</answer></think>"):
        found = extract_answer(thought + render_answer(answer, answer_format), answer_format)
        assert (found.answer, found.has_many, found.refusal) == (answer, False, None)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("7", "7"),
        (" 7\n", "7"),
        ("<think>6</think>7", "7"),
        ("<think>6</think>5</think>7", "7"),
        ("The answer is 7.", "7"),
        ("Answer: 7", "7"),
        ("\\boxed{7}", "7"),
        ("first \\boxed{6} then \\boxed{7}", "7"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{6} and \\boxed{7", "6"),
        ("\\boxed{ {6} \\boxed{7}", "7"),
        ("<answer> 7 </answer>", "7"),
        ("<answer>6</answer><answer>7</answer>", "7"),
        ("<answer>6</answer> \\boxed{7}", "7"),
        ("I think 7", "I think 7"),
        ("<think>never ends 7", None),
        ("<think>7</think>", None),
        ("", None),
        ("\\boxed{}", None),
        ("x" * 257, None),
        ("\\boxed{" + "7" * 257 + "}", None),
    ],
)
def test_bare_format_finds_the_last_answer_after_the_thought(response: str, answer: str | None) -> None:
    found = extract_answer(response, "bare")
    assert found.answer == answer
    assert (found.refusal is None) == (answer is not None)


@pytest.mark.parametrize("answer_format", ["boxed", "tag"])
def test_strict_formats_do_not_take_plain_text(answer_format) -> None:
    assert extract_answer("7", answer_format).answer is None
    assert "format" in str(extract_answer("The answer is 7.", answer_format).refusal)


def test_tag_format_prefers_the_tag() -> None:
    assert extract_answer("<answer>6</answer> \\boxed{7}", "tag").answer == "6"


def test_several_different_answers_are_noted() -> None:
    assert extract_answer("\\boxed{6} \\boxed{7}", "bare").has_many
    assert not extract_answer("\\boxed{7} \\boxed{7}", "bare").has_many


@pytest.mark.parametrize("unit", ["\\boxed{", "<answer>", "the answer is ", "{", " ", "</think>"])
def test_hostile_text_takes_bounded_time(unit: str) -> None:
    start = time.perf_counter()
    for answer_format in ("bare", "boxed", "tag"):
        extract_answer(unit * 100_000, answer_format)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("answer", "question", "repeats"),
    [
        ("4 + 3", "Calculate 4+3-2.", True),
        ("4+3-2", "Calculate 4 + 3 - 2.", True),
        ("5", "Calculate 4+3-2.", False),
        ("-4", "Calculate 3-4.", False),
        ("2 \u00d7 3", "Write 2 \u00d7 3", False),
        ("mother-in-law", "Is she a mother-in-law?", False),
        ("5+5", "Calculate 4+3.", False),
    ],
)
def test_copied_expressions_are_recognized(answer: str, question: str, repeats: bool) -> None:
    assert repeats_question(answer, question) is repeats
