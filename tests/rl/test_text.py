import pytest

from perilune.data import encode_response, train_tokenizer
from perilune.rl import TaskScorer, problem_prompt, response_text, task_candidates
from perilune.tasks import TaskConfig, TaskMixture


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is 12 + 34? The answer is 46. " * 20], 275)


@pytest.fixture(scope="module")
def task():
    pytest.importorskip("reasoning_gym")
    return TaskMixture([TaskConfig(name="gcd"), TaskConfig(name="chain_sum")])


@pytest.fixture(scope="module")
def problems(task):
    return task.sample("train", 12, 0)


def test_prompts_end_where_the_assistant_begins(tokenizer, problems):
    prompt = problem_prompt(tokenizer, problems[0], 0.4)
    assert prompt.token_ids[-1] == tokenizer.special_id("<|im_assistant|>")
    assert (prompt.id, prompt.pass_rate) == (problems[0].id, 0.4)
    assert problems[0].prompt in tokenizer.decode(prompt.token_ids)


def test_response_text_keeps_the_thought_and_drops_the_end(tokenizer):
    ids = encode_response(tokenizer, "46", thinking="12 + 34")
    assert response_text(tokenizer, ids) == "<think>12 + 34</think>46"
    assert response_text(tokenizer, ids[:-1]) == "<think>12 + 34</think>46"
    assert response_text(tokenizer, []) == ""


def test_the_scorer_reads_tokens_as_the_verifier_reads_text(tokenizer, task, problems):
    scorer = TaskScorer(tokenizer, task)
    for problem in problems:
        prompt = problem_prompt(tokenizer, problem)
        right = encode_response(tokenizer, task.teach(problem, 0, "direct").answer)
        assert scorer(prompt, right).reward == 1.0
        assert scorer(prompt, encode_response(tokenizer, "no idea")).reward == 0.0


def test_candidates_pass_their_own_gate(tokenizer, task, problems):
    scorer = TaskScorer(tokenizer, task)
    for candidate in task_candidates(tokenizer, task, problems):
        assert len(candidate.must_accept) == 4
        assert len(candidate.must_refuse) == 2
        assert all(scorer(candidate.prompt, ids).reward == 1.0 for ids in candidate.must_accept)
        assert all(scorer(candidate.prompt, ids).reward == 0.0 for ids in candidate.must_refuse)
        assert tokenizer.decode(candidate.guess_prefix) == "<think></think>"
        assert candidate.tags
