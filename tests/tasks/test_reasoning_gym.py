import json
import sys
from dataclasses import asdict
from random import Random

import pytest

from perilune.data import encode_prompt, encode_response, train_tokenizer
from perilune.errors import DataError
from perilune.tasks import SPLITS, TASKS, Problem, Task, TaskConfig, TaskMixture, build_task, encode_trace

gym = pytest.importorskip("reasoning_gym", reason="the tasks extra is not installed")

NAMES = sorted(TASKS)
GENERIC = ["spell_backward", "countdown", "number_sorting", "calendar_arithmetic"]


def make(name: str, **options) -> Task:
    return build_task(TaskConfig(name=name, **options))


def perturbed(answer: str, random: Random) -> list[str]:
    """Return 20 texts that are not the answer."""
    number = int(answer) if answer.lstrip("-").isdigit() else None
    numbers = [] if number is None else [str(number + d) for d in (-10, -2, -1, 1, 2, 10)] + [str(-number - 1)]
    edits = [answer + "1", "1" + answer + "3", f"{answer} {answer}", f"{answer}, maybe", f"not {answer}", f"={answer}="]
    odd = ["", " ", "none", "\\boxed{}", "<answer></answer>", "nan", "inf", "\0", "\U0001f600", "9" * 300]
    shuffled = ["".join(random.sample("abcdef0123", 6)) + "z" for _ in range(10)]
    return [text for text in numbers + edits + odd + shuffled if text != answer][:20]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer_format", ["bare", "boxed", "tag"])
def test_gold_is_accepted_and_twenty_others_are_refused(name: str, answer_format) -> None:
    task = make(name, answer_format=answer_format)
    random = Random(0)
    for problem in task.sample("train", 15, seed=0):
        gold = [f"\\boxed{{{problem.answer}}}", f"<answer>{problem.answer}</answer>"]
        gold += [problem.answer, f"The answer is {problem.answer}."] if answer_format == "bare" else []
        for response in gold:
            assert task.verify(problem, f"<think>0</think>{response}").correct, (problem, response)
            assert not task.verify(problem, f"<think>{response}").correct
        others = perturbed(problem.answer, random)
        assert len(others) == 20
        for other in others:
            for response in (other, f"\\boxed{{{other}}}", f"<answer>{other}</answer>"):
                reward = task.verify(problem, response)
                assert not reward.correct, (problem.answer, response)
                assert reward.score == 0.0


@pytest.mark.parametrize("name", GENERIC)
def test_tasks_without_a_lesson_verify_too(name: str) -> None:
    task = make(name)
    problem, other = task.sample("validation", 2, seed=0)
    reward = task.verify(problem, problem.answer)
    assert (reward.score, reward.correct, reward.error) == (1.0, True, None)
    assert not task.verify(problem, f"{other.answer} and more").correct


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_question(name: str) -> None:
    task = make(name)
    sizes = {"train": 150, "validation": 15, "test": 15}
    samples = {split: [p for seed in range(3) for p in task.sample(split, sizes[split], seed)] for split in SPLITS}
    for attribute in ("id", "prompt"):
        texts = {split: {getattr(p, attribute) for p in found} for split, found in samples.items()}
        assert not texts["train"] & (texts["validation"] | texts["test"])
        assert not texts["validation"] & texts["test"]
    questions = {split: {p.metadata["question"] for p in found} for split, found in samples.items()}
    assert not questions["train"] & (questions["validation"] | questions["test"])
    assert all(p.split == split for split, found in samples.items() for p in found)


def test_a_question_keeps_its_split_in_both_prompt_styles() -> None:
    compact = {p.id: p for p in make("chain_sum").sample("test", 40, seed=1)}
    full = {p.id: p for p in make("chain_sum", prompt="question").sample("test", 40, seed=1)}
    assert compact.keys() == full.keys()
    for key, problem in compact.items():
        assert problem.prompt != full[key].prompt == problem.metadata["question"]
        assert len(problem.prompt) < 0.5 * len(full[key].prompt)


def test_samples_are_pure_and_without_repetition() -> None:
    task = make("gcd")
    first = task.sample("train", 200, seed=3)
    assert first == make("gcd").sample("train", 200, seed=3)
    assert first[:50] == task.sample("train", 50, seed=3)
    assert first != task.sample("train", 200, seed=4)
    assert len({problem.id for problem in first}) == len({problem.prompt for problem in first}) == 200
    assert task.sample("train", 0, seed=3) == []


def test_neighboring_seeds_share_few_questions() -> None:
    # reasoning-gym seeds item i with seed + i, so raw seeds 0 and 1 would share all but one question.
    a, b = ({p.id for p in make("chain_sum").sample("train", 200, seed=seed)} for seed in (0, 1))
    assert len(a & b) < 40


def test_exhausted_question_space_is_named() -> None:
    task = make("chain_sum", params={"max_terms": 2, "max_digits": 1})
    with pytest.raises(DataError, match=r"too few different questions: 500 of split 'test' were asked for, \d+ found"):
        task.sample("test", 500, seed=0)
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        task.sample("dev", 1, seed=0)  # pyright: ignore[reportArgumentType]


def test_problems_survive_json() -> None:
    for name in NAMES:
        task = make(name)
        (problem,) = task.sample("train", 1, seed=0)
        fields = json.loads(json.dumps(asdict(problem)))
        again = Problem(**{**fields, "tags": tuple(fields["tags"])})
        assert again == problem
        assert task.verify(again, problem.answer).correct
        assert task.teach(again, 0) == task.teach(problem, 0)


def test_a_failing_verifier_gives_zero_and_a_reason() -> None:
    task = make("prime_factorization")
    (problem,) = task.sample("train", 1, seed=0)
    reward = task.verify(problem, "not a number")
    assert (reward.score, reward.correct) == (0.0, False)
    assert reward.error is not None
    assert reward.error.startswith("ValueError")


def test_partial_scores_count_as_wrong() -> None:
    task = make("prime_factorization", params={"min_value": 12, "max_value": 12})
    problem = next(p for split in SPLITS for p in _try_sample(task, split))
    reward = task.verify(problem, "3 \u00d7 4")
    assert reward.parts["graded"] == 0.5
    assert not reward.correct


def _try_sample(task: Task, split) -> list[Problem]:
    try:
        return task.sample(split, 1, seed=0)
    except DataError:
        return []


def test_a_long_reference_inside_a_longer_answer_is_wrong() -> None:
    task = make("spell_backward")
    (problem,) = task.sample("train", 1, seed=0)
    long = Problem(**{**asdict(problem), "answer": "ab" * 60, "tags": ()})
    assert task.verify(long, "ab" * 60).correct
    assert not task.verify(long, "ab" * 60 + "x").correct


def test_repeating_the_question_is_wrong() -> None:
    task = make("chain_sum")
    (problem,) = task.sample("train", 1, seed=0)
    expression = problem.prompt.removeprefix("Calculate ").removesuffix(".")
    assert task.verify(problem, expression).parts.get("repeats_question") == 1.0
    lenient = make("chain_sum", require_simplified=False)
    assert "repeats_question" not in lenient.verify(problem, expression).parts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "no_such_task"}, "'no_such_task' .* is not possible"),
        ({"name": "chain_sum", "params": {"max_terms": 0}}, "max_terms must be >= min_terms"),
        ({"name": "chain_sum", "params": {"depth": 3}}, "depth"),
    ],
)
def test_impossible_tasks_are_refused(options: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        build_task(TaskConfig(**options))


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"pip install 'perilune\[tasks\]'"):
        make("gcd")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": 0.0}, "weight must be a positive number"),
        ({"weight": float("nan")}, "weight must be a positive number"),
        ({"p_err": 1.5}, r"p_err must be in \[0, 1\]"),
        ({"p_err": 0.7, "p_explore": 0.7}, "must be at most 1"),
    ],
)
def test_config_ranges_are_checked(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TaskConfig(name="gcd", **options)


def test_mixture_shares_out_by_weight_and_dispatches() -> None:
    mixture = TaskMixture([TaskConfig(name="gcd", weight=3.0), TaskConfig(name="chain_sum", style="short")])
    problems = mixture.sample("train", 40, seed=0)
    assert problems == mixture.sample("train", 40, seed=0)
    assert sum(p.task == "gcd" for p in problems) == 30
    assert len({p.id for p in problems}) == 40
    assert {p.task for p in problems[:15]} == {"gcd", "chain_sum"}
    for problem in problems:
        trace = mixture.teach(problem, 0)
        assert trace.style == ("long" if problem.task == "gcd" else "short")
        assert mixture.verify(problem, trace.text).correct
        assert mixture.teach(problem, 0, style="direct").thinking is None


def test_mixture_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(DataError, match="at least one task"):
        TaskMixture([])
    with pytest.raises(DataError, match="names each task once, got gcd, gcd"):
        TaskMixture([TaskConfig(name="gcd"), TaskConfig(name="gcd")])
    (problem,) = make("products").sample("train", 1, seed=0)
    with pytest.raises(DataError, match="of task 'products'; this mixture has"):
        TaskMixture([TaskConfig(name="gcd")]).verify(problem, "1")


def test_encoded_trace_trains_the_response_alone() -> None:
    tokenizer = train_tokenizer(["Calculate plan: check: ok\n"], 270)
    task = make("chain_sum")
    for problem in task.sample("train", 5, seed=0):
        trace = task.teach(problem, 0)
        example = encode_trace(tokenizer, problem, trace)
        prompt = encode_prompt(tokenizer, problem.prompt)
        assert list(example.tokens) == prompt + encode_response(tokenizer, trace.answer, trace.thinking)
        assert list(example.mask) == [False] * len(prompt) + [True] * (len(example.tokens) - len(prompt))
        assert task.verify(problem, tokenizer.decode(example.tokens[len(prompt) : -1])).correct
