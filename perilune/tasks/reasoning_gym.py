"""reasoning-gym's procedural problems as tasks.

reasoning-gym is an optional extra and is imported when a task is made. Splits are by question, not by seed: a hash of
the compact prompt decides, so that no evaluation question is ever trained on, however small the space of questions.
Scores are graded there and binary here.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

from perilune.errors import DataError, missing_extra
from perilune.seeding import derive_seed
from perilune.tasks.answers import extract_answer, repeats_question
from perilune.tasks.base import JSON, SPLITS, Problem, Reward, Split, Style, Trace
from perilune.tasks.config import Parameter, TaskConfig
from perilune.tasks.teacher import LESSONS, read_lesson, write_trace

CORRECT_THRESHOLD = 0.99
"""Graded scores from here on are right; some generators give 0.01 for any answer."""

SMALL_PARAMS: dict[str, dict[str, Parameter]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "count_bits": {"min_n": 1, "max_n": 255},
    "gcd": {"min_value": 2, "max_value": 60},
    "letter_counting": {"min_words": 2, "max_words": 3},
    "prime_factorization": {"min_value": 4, "max_value": 300},
    "products": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "simple_equations": {
        "min_terms": 2,
        "max_terms": 2,
        "min_value": 1,
        "max_value": 12,
        "operators": ["+", "-", "*"],
        "operators_weights": [0.5, 0.5, 0.0],
    },
}
"""Difficulties at which prompt and trace stay short enough for a model of a million parameters."""

_MAX_MISSES = 5000
_SPLIT_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


class _Dataset(Protocol):
    """The part of reasoning-gym's data sets that is used here."""

    def __getitem__(self, idx: int) -> dict[str, Any]: ...

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float: ...


class ReasoningGymTask:
    """One reasoning-gym data set at one difficulty."""

    def __init__(self, config: TaskConfig) -> None:
        """Check the configuration by building the data set once.

        Raises:
            DataError: reasoning-gym is not installed, has no such data set, or refuses the parameters.
        """
        self.config = config
        self._verifier = self._dataset(seed=0)

    def sample(self, split: Split, count: int, seed: int, *, allow_fewer: bool = False) -> list[Problem]:
        """Return `count` problems of a split, all different; with `allow_fewer`, as many as there are.

        Raises:
            DataError: the split has fewer different questions, as far as drawing can tell.
            ValueError: the split is unknown.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        problems: dict[str, Problem] = {}
        misses = 0
        draws = self._draw(seed)
        while len(problems) < count and misses < _MAX_MISSES:
            problem = next(draws)
            is_new = problem.split == split and problem.id not in problems
            misses = 0 if is_new else misses + 1
            if is_new:
                problems[problem.id] = problem
        if len(problems) >= count or (allow_fewer and problems):
            return list(problems.values())
        raise DataError(
            f"task {self.config.name!r} with {self._params()} has too few different questions: {count} of split "
            f"{split!r} were asked for, {len(problems)} found; ask for fewer or widen params"
        )

    def verify(self, problem: Problem, response: str) -> Reward:
        """Judge the final answer of a response; a verifier that fails gives 0 and says why."""
        found = extract_answer(response, self.config.answer_format)
        parts = {"multi_answer": float(found.has_many), "answered": float(found.answer is not None)}
        if found.answer is None:
            return Reward(score=0.0, correct=False, parts=parts)
        if self.config.require_simplified and repeats_question(found.answer, problem.prompt):
            return Reward(score=0.0, correct=False, parts=parts | {"repeats_question": 1.0})
        try:
            graded = float(self._verifier.score_answer(found.answer, _entry(problem)))
        except Exception as error:  # a verifier may fail in any way on text that a model wrote
            return Reward(score=0.0, correct=False, parts=parts, error=f"{type(error).__name__}: {error}")
        correct = graded >= CORRECT_THRESHOLD and not _merely_contains(found.answer, problem.answer, graded)
        return Reward(score=float(correct), correct=correct, parts=parts | {"graded": graded})

    def teach(self, problem: Problem, seed: int, style: Style | None = None) -> Trace:
        """Return a worked answer.

        Raises:
            DataError: this task has no scripted teacher.
        """
        return write_trace(
            problem,
            read_lesson(problem.task, _item_metadata(problem)),
            seed=seed,
            style=self.config.style if style is None else style,
            answer_format=self.config.answer_format,
            p_err=self.config.p_err,
            p_explore=self.config.p_explore,
        )

    def _params(self) -> dict[str, Parameter]:
        return {**SMALL_PARAMS.get(self.config.name, {}), **self.config.params}

    def _draw(self, seed: int) -> Iterator[Problem]:
        """Yield problems of all splits without end; equal questions may come again."""
        dataset = self._dataset(seed=derive_seed(seed, "tasks", self.config.name) % 2**62)
        return (self._problem(dataset[index]) for index in itertools.count())

    def _problem(self, item: Mapping[str, Any]) -> Problem:
        name = self.config.name
        metadata = cast("dict[str, JSON]", json.loads(json.dumps(item["metadata"], default=str)))
        key = read_lesson(name, metadata).prompt if name in LESSONS else str(item["question"])
        digest = hashlib.sha256(f"{name}\x1f{key}".encode()).digest()
        return Problem(
            id=f"{name}-{digest.hex()[:16]}",
            task=name,
            prompt=key if self.config.prompt == "compact" else str(item["question"]),
            answer=str(item["answer"]),
            split=_split_of(digest),
            metadata={"question": str(item["question"]), "item": metadata},
            tags=(f"task:{name}",),
        )

    def _dataset(self, seed: int) -> _Dataset:
        try:
            gym = importlib.import_module("reasoning_gym")
        except ImportError as error:
            raise missing_extra(DataError, "tasks need", "reasoning-gym", "tasks") from error
        params = {key: tuple(value) if isinstance(value, list) else value for key, value in self._params().items()}
        try:
            return gym.create_dataset(self.config.name, seed=seed, size=2**31, **params)
        except (AssertionError, TypeError, ValueError) as error:
            raise DataError(f"task {self.config.name!r} with {self._params()} is not possible: {error}") from error


def _split_of(digest: bytes) -> Split:
    """Return the split that a question's hash puts it into."""
    position = int.from_bytes(digest[-8:], "little") / 2**64
    if position < _SPLIT_SHARES["train"]:
        return "train"
    return "validation" if position < _SPLIT_SHARES["train"] + _SPLIT_SHARES["validation"] else "test"


def _entry(problem: Problem) -> dict[str, Any]:
    """Return the item in the form reasoning-gym scores."""
    return {
        "question": problem.metadata["question"],
        "answer": problem.answer,
        "metadata": dict(_item_metadata(problem)),
    }


def _item_metadata(problem: Problem) -> Mapping[str, JSON]:
    item = problem.metadata.get("item")
    if not isinstance(item, dict):
        raise DataError(f"problem {problem.id}: metadata has no item; only problems from sample can be worked on")
    return item


def _merely_contains(answer: str, reference: str, graded: float) -> bool:
    """Say whether a score below 1 came from the reference being part of the answer.

    reasoning-gym's default score is the share of the answer that is the reference, which passes the threshold when the
    reference is long.
    """
    return graded < 1.0 and answer != reference and reference in answer
