"""Judging answers to held-out problems: the same ones for every model, greedy is greedy, truncated is wrong."""

from dataclasses import replace

import pytest
import torch

from perilune.data import encode_prompt
from perilune.engine import Completion
from perilune.models import build_model
from perilune.report import NullProgress, read_samples
from perilune.run import evaluation
from perilune.run.directory import RunDirectory
from perilune.run.evaluation import evaluate_model, evaluation_problems, judge_problems
from perilune.run.loading import load_model, read_recipe
from perilune.run.prepared import prepare_data
from perilune.tasks import TaskConfig, TaskMixture
from tests.run.tiny_run import STAGES

TASKS = (TaskConfig(name="count_bits", style="direct"), TaskConfig(name="gcd"))


@pytest.fixture(scope="module")
def loaded(finished):
    return load_model(finished, "sft")


@pytest.fixture(scope="module")
def config(loaded):
    return replace(loaded.recipe.evaluation, problems=6, samples=3)


def judge(loaded, config, *, tasks=TASKS, seed=0, model=None):
    seeded = replace(config, seed=seed)
    return judge_problems(model or loaded.model, loaded.tokenizer, TaskMixture(tasks), seeded, NullProgress())


class Scripted:
    """An engine that answers what it is told to."""

    def __init__(self, tokenizer, answers, *, finish_reason="eos"):
        self.tokenizer, self.answers, self.finish_reason, self.requests = tokenizer, answers, finish_reason, []

    def __call__(self, model):
        return self

    def generate(self, requests, progress=None):
        self.requests += requests
        return [self._completion(request, sample) for request in requests for sample in range(request.num_samples)]

    def _completion(self, request, sample):
        _, _, name = request.id.partition(":")
        end = [self.tokenizer.end_id] if self.finish_reason == "eos" else []
        return Completion(
            request_id=request.id,
            sample=sample,
            token_ids=(*self.tokenizer.encode(self.answers[name]), *end),
            logprobs=(),
            finish_reason=self.finish_reason,
        )


def answers_of(judged, write):
    return {row.problem.id: write(row.problem) for rows in judged.values() for row in rows}


def scripted(monkeypatch, loaded, config, write, **options):
    """Judge an engine that answers each problem with `write(problem)`."""
    answers = answers_of(judge(loaded, config), write)
    engine = Scripted(loaded.tokenizer, answers, **options)
    monkeypatch.setattr(evaluation, "Engine", engine)
    return judge(loaded, config), engine


def test_a_model_that_answers_right_scores_one(monkeypatch, loaded, config):
    judged, engine = scripted(monkeypatch, loaded, config, lambda problem: problem.answer)
    assert judged.keys() == {"count_bits", "gcd"}
    for rows in judged.values():
        score = evaluation._task_score(rows)
        assert (score.greedy, score.sampled, score.count) == (1.0, 1.0, 6)
        assert sum(row.is_greedy for row in rows) == 6
        assert len(rows) == 24
    assert {request.params.temperature for request in engine.requests} == {0.0, config.temperature}


def test_worked_answers_of_the_teacher_score_one(monkeypatch, loaded, config):
    mixture = TaskMixture(TASKS)
    judged, _ = scripted(monkeypatch, loaded, config, lambda problem: mixture.teach(problem, 0, "long").text)
    assert all(row.is_correct for rows in judged.values() for row in rows)


def test_a_wrong_answer_scores_zero(monkeypatch, loaded, config):
    judged, _ = scripted(monkeypatch, loaded, config, lambda problem: str(int(problem.answer) + 1))
    assert not any(row.is_correct for rows in judged.values() for row in rows)


@pytest.mark.parametrize("reason", ["length", "context", "repeat", "error"])
def test_a_right_answer_that_does_not_end_by_itself_is_wrong(monkeypatch, loaded, config, reason):
    judged, _ = scripted(monkeypatch, loaded, config, lambda problem: problem.answer, finish_reason=reason)
    rows = [row for rows in judged.values() for row in rows]
    assert not any(row.is_correct for row in rows)
    assert all(row.response == row.problem.answer for row in rows), "nothing of a cut response is lost"


def test_only_the_greedy_share_counts_as_greedy(monkeypatch, loaded, config):
    answers = answers_of(judge(loaded, config), lambda problem: problem.answer)
    engine = Scripted(loaded.tokenizer, answers)
    completion = engine._completion

    def half(request, sample):
        made = completion(request, sample)
        wrong = replace(made, token_ids=(*loaded.tokenizer.encode("no"), loaded.tokenizer.end_id))
        return made if request.id.startswith("greedy:") or sample == 0 else wrong

    engine._completion = half
    monkeypatch.setattr(evaluation, "Engine", engine)
    score = evaluation._task_score(judge(loaded, config)["gcd"])
    assert (score.greedy, score.sampled) == (1.0, pytest.approx(1 / 3))


def test_without_samples_there_is_a_greedy_score_alone(loaded, config):
    score = evaluation._task_score(judge(loaded, replace(config, samples=0))["gcd"])
    assert score.sampled is None
    assert score.greedy is not None
    assert score.response_tokens > 0


def test_every_model_gets_the_same_problems_and_the_same_again(loaded, config):
    other = build_model(loaded.recipe.model, seed=5)
    first, second = judge(loaded, config), judge(loaded, config, model=other)
    assert [[row.problem for row in rows] for rows in first.values()] == [
        [row.problem for row in rows] for rows in second.values()
    ]
    assert judge(loaded, config) == first
    different = {row.problem.id for row in judge(loaded, config, seed=1)["gcd"]}
    assert different != {row.problem.id for row in first["gcd"]}


def test_the_problems_of_a_task_do_not_depend_on_the_other_tasks(loaded, config):
    alone = judge(loaded, config, tasks=TASKS[1:])
    assert [row.problem for row in alone["gcd"]] == [row.problem for row in judge(loaded, config)["gcd"]]


def test_a_split_with_fewer_problems_gives_those_it_has(loaded, config):
    few = (TaskConfig(name="count_bits", style="direct", params={"min_n": 1, "max_n": 60}),)
    rows = judge(loaded, replace(config, problems=50, samples=0), tasks=few)["count_bits"]
    assert 0 < len(rows) < 50
    assert len({row.problem.prompt for row in rows}) == len(rows)
    assert {row.problem.split for row in rows} == {"test"}


@torch.no_grad()
def greedy_by_hand(model, tokenizer, prompt, limit):
    """Take the most likely token of the whole sequence's forward again and again."""
    tokens = encode_prompt(tokenizer, prompt)
    start = len(tokens)
    while len(tokens) - start < limit:
        logits = model(torch.tensor(tokens), torch.tensor([0, len(tokens)], dtype=torch.int32))
        tokens.append(int(logits[-1].argmax()))
        if tokens[-1] in (tokenizer.end_id, tokenizer.eos_id):
            return tokenizer.decode(tokens[start:-1]), len(tokens) - start
    return tokenizer.decode(tokens[start:]), limit


def test_the_greedy_response_is_the_models_most_likely_one(loaded, config):
    rows = [row for rows in judge(loaded, config).values() for row in rows if row.is_greedy]
    assert len(rows) == 12
    for row in rows:
        by_hand = greedy_by_hand(loaded.model, loaded.tokenizer, row.problem.prompt, config.max_response_tokens)
        assert (row.response, row.num_tokens) == by_hand


def test_transcripts_are_of_the_same_prompts_after_each_stage(finished):
    samples = {stage: read_samples(finished / "samples" / f"{stage}.jsonl") for stage in STAGES if stage != "curate"}
    prompts = {tuple((sample.task, sample.prompt, sample.answer) for sample in found) for found in samples.values()}
    assert len(prompts) == 1
    assert len(prompts.pop()) == 2
    assert len({tuple(sample.response for sample in found) for found in samples.values()}) > 1


def test_transcripts_take_turns_between_the_tasks(loaded, config):
    kept = evaluation._transcripts(judge(loaded, config), 5)
    assert [sample.task for sample in kept] == ["count_bits", "gcd", "count_bits", "gcd", "count_bits"]
    assert evaluation._transcripts(judge(loaded, config), 0) == []


def test_a_model_is_left_in_the_mode_it_came_in(finished, loaded):
    recipe = read_recipe(RunDirectory(finished))
    data = prepare_data(recipe, RunDirectory(finished), NullProgress())
    model = build_model(recipe.model, seed=0)
    assert evaluate_model(model.train(), data, recipe).bits_per_byte > 0
    assert model.training
    evaluate_model(model.eval(), data, recipe)
    assert not model.training


def test_runs_of_other_seeds_answer_the_same_problems(loaded, config):
    recipe = replace(loaded.recipe, seed=loaded.recipe.seed + 1)
    ours, theirs = (evaluation_problems(r.tasks, r.evaluation) for r in (loaded.recipe, recipe))
    assert [problem.id for problem in ours] == [problem.id for problem in theirs]
    other = evaluation_problems(recipe.tasks, replace(recipe.evaluation, seed=1))
    assert [problem.id for problem in other] != [problem.id for problem in ours]
