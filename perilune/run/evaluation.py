"""What is measured on held-out data after every stage: bits per byte of text, and answers to problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from perilune.data import Tokenizer, encode_prompt
from perilune.engine import Completion, Engine, Request, SamplingParams
from perilune.errors import NumericsError
from perilune.models import Decoder
from perilune.report import NullProgress, Progress, Sample, StageResult, TaskScore
from perilune.run.config import EvaluationConfig, Recipe
from perilune.run.directory import RunDirectory
from perilune.run.loading import load_model
from perilune.run.prepared import PreparedData, prepare_data
from perilune.seeding import derive_seed
from perilune.tasks import Problem, TaskConfig, TaskMixture, build_task
from perilune.train import score_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Everything that is measured on one model."""

    bits_per_byte: float
    """On the held-out text."""
    tasks: Mapping[str, TaskScore]
    """Held-out problems, by task."""
    samples: Sequence[Sample]
    """Transcripts of greedy responses to the first problems."""


def evaluate_model(model: Decoder, data: PreparedData, recipe: Recipe, progress: Progress | None = None) -> Scores:
    """Measure a model on the run's held-out text and problems; every stage sees the same ones.

    Raises:
        NumericsError: the model gives no finite probability to the text.
    """
    progress = progress or NullProgress()
    was_training = model.training
    model.eval()
    config = recipe.evaluation
    text = score_text(model, data.held_out_tokens, data.held_out_bytes, context=config.context)
    if not isfinite(text.bits_per_byte):
        raise NumericsError(
            f"held-out text costs {text.bits_per_byte} bits per byte: the last steps have ruined the weights; lower "
            "the learning rate and start the stage anew"
        )
    scores: dict[str, TaskScore] = {}
    samples: list[Sample] = []
    if recipe.tasks:
        judged = judge_problems(model, data.tokenizer, TaskMixture(recipe.tasks), config, progress)
        scores = {name: _task_score(rows) for name, rows in judged.items()}
        samples = _transcripts(judged, config.transcripts)
    model.train(was_training)
    return Scores(bits_per_byte=text.bits_per_byte, tasks=scores, samples=samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One response to a held-out problem."""

    problem: Problem
    response: str
    num_tokens: int
    is_greedy: bool
    is_correct: bool


def evaluation_problems(tasks: Sequence[TaskConfig], config: EvaluationConfig) -> list[Problem]:
    """Return the held-out problems that models are measured on, `config.problems` of each task."""
    return [
        problem
        for task in tasks
        for problem in build_task(task).sample(
            config.split, config.problems, derive_seed(config.seed, "evaluation", task.name), allow_fewer=True
        )
    ]


def judge_problems(
    model: Decoder, tokenizer: Tokenizer, tasks: TaskMixture, config: EvaluationConfig, progress: Progress
) -> dict[str, list[Judged]]:
    """Answer `config.problems` held-out problems of each task, greedily and `config.samples` times at a temperature.

    A response that does not end by itself within `config.max_response_tokens` is wrong.
    """
    names = [task.name for task in tasks.configs]
    problems = evaluation_problems(tasks.configs, config)
    requests = [request for problem in problems for request in _requests(problem, tokenizer, config)]
    wanted = len(problems) * (1 + config.samples)
    with progress.task("answering held-out problems", total=wanted, unit="response") as task:
        completions = Engine(model).generate(requests, lambda finished, _: task.update(finished))
    judged: dict[str, list[Judged]] = {name: [] for name in names}
    by_id = {problem.id: problem for problem in problems}
    for completion in completions:
        kind, _, name = completion.request_id.partition(":")
        problem = by_id[name]
        judged[problem.task].append(_judge(completion, problem, tokenizer, tasks, is_greedy=kind == "greedy"))
    return judged


def evaluate_run(
    run_directory: Path, *, stage: str | None = None, count: int | None = None, progress: Progress | None = None
) -> StageResult:
    """Measure the model of a run's stage again, on as many problems per task as wanted.

    Args:
        run_directory: a run.
        stage: stage whose model; None for the last that made one.
        count: problems per task; None for the recipe's number.
        progress: what a person sees.

    Raises:
        DataError: it is not a run directory, or there is no such model.
        CheckpointError: the checkpoint is damaged.
    """
    loaded = load_model(run_directory, stage)
    directory = RunDirectory(run_directory)
    recipe = loaded.recipe
    if count is not None:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, problems=count))
    shown = progress or NullProgress()
    data = prepare_data(recipe, directory, shown)
    scores = evaluate_model(loaded.model, data, recipe, shown)
    return StageResult(
        stage=loaded.stage,
        kind=recipe.stages[loaded.stage].kind,
        bits_per_byte=scores.bits_per_byte,
        compressors=data.compressors,
        tasks=scores.tasks,
    )


def _requests(problem: Problem, tokenizer: Tokenizer, config: EvaluationConfig) -> list[Request]:
    prompt_ids = encode_prompt(tokenizer, problem.prompt)
    greedy = SamplingParams(
        max_new_tokens=config.max_response_tokens,
        temperature=0.0,
        stop_ids=tokenizer.stop_ids,
    )
    drawn = replace(greedy, temperature=config.temperature, seed=derive_seed(config.seed, "evaluation", problem.id))
    requests = [Request(prompt_ids=prompt_ids, params=greedy, id=f"greedy:{problem.id}")]
    if config.samples:
        requests.append(
            Request(prompt_ids=prompt_ids, params=drawn, num_samples=config.samples, id=f"sampled:{problem.id}")
        )
    return requests


def _judge(
    completion: Completion, problem: Problem, tokenizer: Tokenizer, tasks: TaskMixture, *, is_greedy: bool
) -> Judged:
    ended = completion.finish_reason == "eos"
    response = tokenizer.decode(completion.token_ids[:-1] if ended else completion.token_ids)
    return Judged(
        problem=problem,
        response=response,
        num_tokens=len(completion.token_ids),
        is_greedy=is_greedy,
        is_correct=ended and tasks.verify(problem, response).correct,
    )


def _task_score(rows: Sequence[Judged]) -> TaskScore:
    greedy = [row.is_correct for row in rows if row.is_greedy]
    sampled = [row for row in rows if not row.is_greedy]
    counted = sampled or rows
    return TaskScore(
        greedy=sum(greedy) / len(greedy),
        sampled=sum(row.is_correct for row in sampled) / len(sampled) if sampled else None,
        response_tokens=sum(row.num_tokens for row in counted) / len(counted),
        count=len(greedy),
    )


def _transcripts(judged: Mapping[str, Sequence[Judged]], count: int) -> list[Sample]:
    """Return greedy responses, taking turns between the tasks."""
    queues = [[row for row in rows if row.is_greedy] for rows in judged.values()]
    turns = [queue[place] for place in range(count) for queue in queues if place < len(queue)]
    return [
        Sample(
            task=row.problem.task,
            prompt=row.problem.prompt,
            response=row.response,
            answer=row.problem.answer,
            reward=float(row.is_correct),
            tokens=row.num_tokens,
        )
        for row in turns[:count]
    ]
