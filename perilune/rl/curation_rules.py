"""Rules that decide whether a problem may become an RL prompt: statistics and text patterns, no model."""

from __future__ import annotations

import math
import re

_CHOICE_ANSWER = re.compile(r"(?:\(?[a-h]\)?\.?|yes|no|true|false)", re.IGNORECASE)
_PROOF = re.compile(r"\s*(?:prove|show\s+that|demonstrate\s+that)\b", re.IGNORECASE)
_OPTION = re.compile(r"(?:^|\s)\(?([A-Ha-h])[).:]\s+\S")
_SPACE = re.compile(r"\s+")


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a proportion (95 % by default).

    >>> low, high = wilson_interval(1, 10)
    >>> round(low, 3), round(high, 3)
    (0.018, 0.404)

    Raises:
        ValueError: `total` is below 1 or `correct` is not in [0, total].

    Source: Wilson 1927.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"correct must be in [0, total] with total >= 1, got {correct} of {total}")
    rate = correct / total
    center = rate + z * z / (2 * total)
    spread = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At 0 and 1 rounding could leave the rate itself outside.
    return min(rate, max(0.0, (center - spread) / scale)), max(rate, min(1.0, (center + spread) / scale))


def exclusion_reason(question: str, answer: str) -> str | None:
    """Why a problem is prone to false positives: `choice` or `proof`; None if it is not.

    A choice is a single letter A-H, yes/no or true/false as the answer, or lettered options from A on in the question.

    Source: Kimi k1.5, section 2.1 (multiple choice, true/false and proof problems are excluded); the patterns are this
    project's.
    """
    if _PROOF.match(question):
        return "proof"
    if _CHOICE_ANSWER.fullmatch(answer.strip()):
        return "choice"
    letters = [letter.upper() for letter in _OPTION.findall(question)]
    return "choice" if letters[:2] == ["A", "B"] else None


def normalized_question(question: str) -> str:
    """Text by which duplicates are found: lower case, single spaces."""
    return _SPACE.sub(" ", question).strip().lower()
