"""Between tasks, which speak text, and rollouts, which speak tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import get_args

from perilune.data import Tokenizer, encode_prompt, encode_response
from perilune.errors import DataError
from perilune.rl.curation import Candidate
from perilune.rl.rollout import Prompt
from perilune.rl.scoring import Score
from perilune.seeding import derive_seed
from perilune.tasks import Problem, Style, Task, render_answer


def problem_prompt(tokenizer: Tokenizer, problem: Problem, pass_rate: float | None = None) -> Prompt:
    """The problem as one user turn, up to where the assistant begins."""
    return Prompt(
        id=problem.id,
        token_ids=tuple(encode_prompt(tokenizer, problem.prompt)),
        problem=problem,
        pass_rate=pass_rate,
    )


def response_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Text of a response with its thought tags and without the token that ended it."""
    ended = bool(token_ids) and token_ids[-1] in tokenizer.stop_ids
    return tokenizer.decode(token_ids[:-1] if ended else token_ids)


class TaskScorer:
    """Scores responses with a task's verifier (a `TaskMixture` hands each problem to the task that made it)."""

    def __init__(self, tokenizer: Tokenizer, task: Task) -> None:
        """Keep both."""
        self._tokenizer = tokenizer
        self._task = task

    def __call__(self, prompt: Prompt, token_ids: Sequence[int]) -> Score:
        """Decode and verify a response."""
        reward = self._task.verify(prompt.problem, response_text(self._tokenizer, token_ids))
        return Score(reward=reward.score, error=reward.error)


def task_candidates(tokenizer: Tokenizer, task: Task, problems: Sequence[Problem]) -> list[Candidate]:
    """Problems with what curation tries on each.

    The verifier must accept the right answer in a box and in each style that the task's teacher writes (if it has
    one), and must refuse an empty answer and the answer of the next problem that has another one. A guess is forced by
    an empty thought.
    """
    return [
        Candidate(
            prompt=problem_prompt(tokenizer, problem),
            question=problem.prompt,
            answer=problem.answer,
            guess_prefix=tuple(encode_response(tokenizer, "", thinking="")[:-1]),
            must_accept=(_boxed(tokenizer, problem.answer), *_worked_answers(tokenizer, task, problem)),
            must_refuse=(
                tuple(encode_response(tokenizer, "", thinking="")),
                *(_boxed(tokenizer, other.answer) for other in _with_another_answer(problems, place)),
            ),
            tags=problem.tags,
        )
        for place, problem in enumerate(problems)
    ]


def _boxed(tokenizer: Tokenizer, answer: str) -> tuple[int, ...]:
    return tuple(encode_response(tokenizer, render_answer(answer, "boxed"), thinking=""))


def _worked_answers(tokenizer: Tokenizer, task: Task, problem: Problem) -> list[tuple[int, ...]]:
    seed = derive_seed(0, "gate", problem.id)
    try:
        traces = [task.teach(problem, seed, style) for style in get_args(Style)]
    except DataError:  # the task has no teacher
        return []
    return [tuple(encode_response(tokenizer, trace.answer, trace.thinking)) for trace in traces]


def _with_another_answer(problems: Sequence[Problem], place: int) -> list[Problem]:
    """The first later problem (going round) of the same task with a different answer, if there is one."""
    mine = problems[place]
    around = (problems[(place + step) % len(problems)] for step in range(1, len(problems)))
    return list(islice((other for other in around if other.task == mine.task and other.answer != mine.answer), 1))
