"""Finding the answer in a response, and refusing what is not one.

Only the text after the thought is searched; the last box counts; long answers and answers that repeat the question are
wrong.

Source: Kimi k1.5, section 2.3.5 (rewards for mathematics); the rules are this project's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from perilune.data.chat import split_response

AnswerFormat = Literal["bare", "boxed", "tag"]
"""How an answer is given: as the whole text after the thought, in a box, or between answer tags."""

MAX_ANSWER_CHARS = 256
"""Longer answers are wrong whatever they hold."""

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SENTENCE = re.compile(r"(?:the )?(?:final )?answer(?: is|:)\s*(.+?)\s*\.?", re.IGNORECASE | re.DOTALL)
_BOX = "\\boxed{"
_MAX_SEARCHED_CHARS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """What was found in a response."""

    answer: str | None
    """The answer, trimmed; None when there is none that counts."""
    has_many: bool = False
    """Whether the response gave several different boxed or tagged answers."""
    refusal: str | None = None
    """Why there is no answer."""


def render_answer(answer: str, answer_format: AnswerFormat) -> str:
    """Write an answer the way `extract_answer` reads it."""
    match answer_format:
        case "bare":
            return answer
        case "boxed":
            return f"\\boxed{{{answer}}}"
        case "tag":
            return f"<answer>{answer}</answer>"


def extract_answer(response: str, answer_format: AnswerFormat) -> Extraction:
    r"""Find the final answer of a response.

    The last `\boxed{}` after the thought counts, else the last `<answer>`; a task whose format is "bare" also takes
    "the answer is ..." and then the whole text. Only the last 4096 characters are searched, which bounds the time that
    hostile text can take.

    Args:
        response: the decoded response, thought included.
        answer_format: what the task asks for.
    """
    _, final = split_response(response)
    final = final[-_MAX_SEARCHED_CHARS:]
    boxed, tagged = _boxed(final), [match.strip() for match in _TAG.findall(final)]
    found = (boxed or tagged) if answer_format != "tag" else (tagged or boxed)
    if found:
        answer = found[-1]
    elif answer_format == "bare":
        sentence = _SENTENCE.fullmatch(final.strip())
        answer = sentence[1] if sentence else final.strip()
    else:
        return Extraction(answer=None, refusal=f"no answer in the format {answer_format!r}")
    many = len(set(found)) > 1
    if not answer:
        return Extraction(answer=None, has_many=many, refusal="empty answer")
    if len(answer) > MAX_ANSWER_CHARS:
        return Extraction(answer=None, has_many=many, refusal=f"answer longer than {MAX_ANSWER_CHARS} characters")
    return Extraction(answer=answer, has_many=many)


def repeats_question(answer: str, question: str) -> bool:
    """Say whether an answer is an expression copied from the question, as "4 + 3" for "Calculate 4 + 3."."""
    compact = "".join(answer.split())
    return bool(re.search(r"[\d)][-+*/^%][-\d(]", compact)) and compact in "".join(question.split())


def _boxed(text: str) -> list[str]:
    r"""Return the contents of every `\boxed{}` whose braces match, outermost ones only."""
    found = []
    start = text.find(_BOX)
    while start >= 0:
        begin = start + len(_BOX)
        end = _closing_brace(text, begin)
        if end is None:
            start = text.find(_BOX, begin)
            continue
        found.append(text[begin:end].strip())
        start = text.find(_BOX, end)
    return found


def _closing_brace(text: str, begin: int) -> int | None:
    """Return where the brace that opened just before `begin` closes, None when it does not."""
    depth = 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return None
