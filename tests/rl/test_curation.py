import json
from dataclasses import replace

import pytest

from perilune.engine import Completion
from perilune.errors import DataError
from perilune.rl import Candidate, CurationConfig, Prompt, Score, curate, wilson_interval

GUESS = 20
STOP = 0


def candidate(number, question=None, answer="42", **changes):
    """Problem `number` wants the token `number` first; its guess prefix is one token."""
    base = Candidate(
        prompt=Prompt(id=f"p{number}", token_ids=(1, number), problem=None),
        question=question or f"question {number}",
        answer=answer,
        guess_prefix=(GUESS,),
        must_accept=((number, STOP),),
        must_refuse=((STOP,), (number + 1, STOP)),
        tags=("domain:toy",),
    )
    return replace(base, **changes)


def scorer(prompt, token_ids):
    tokens = [token for token in token_ids if token != GUESS]
    return Score(reward=float(bool(tokens) and tokens[0] == prompt.token_ids[-1]))


class ScriptedEngine:
    """Answers problem n rightly in `right[n]` of the samples, and in `guessed[n]` of the guesses."""

    def __init__(self, right, guessed=None, reason="eos"):
        self.right, self.guessed, self.reason = right, guessed or {}, reason
        self.requests = []

    def set_weights(self, model, version):
        raise AssertionError("curation does not move weights")

    def generate(self, requests, progress=None):
        self.requests += requests
        return [self._answer(request, sample) for request in requests for sample in range(request.num_samples)]

    def _answer(self, request, sample):
        number = request.prompt_ids[1]
        table = self.guessed if request.prompt_ids[-1] == GUESS else self.right
        token = number if sample < table.get(number, 0) else 23
        return Completion(
            request_id=request.id,
            sample=sample,
            token_ids=(token, STOP),
            logprobs=(0.0, 0.0),
            finish_reason=self.reason,
        )


def run(candidates, engine, tmp_path, config=None, **options):
    options = {"stop_ids": (STOP,), "model_name": "sft", **options}
    return curate(candidates, engine, scorer, config or CurationConfig(), tmp_path, **options)


def removed(tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "part-00000.jsonl").read_text().splitlines()[1:]]
    return {row["id"]: row["removed"] or row["pool"] for row in rows}


def test_every_rule_removes_its_problem(tmp_path):
    candidates = [
        candidate(2),
        candidate(3),
        candidate(4),
        candidate(5),
        candidate(6, question="Is 6 even?", answer="yes"),
        candidate(7, question="Prove that 7 is odd."),
        candidate(8, must_accept=((8, STOP), (9, STOP))),
        candidate(9, must_refuse=((9, STOP),)),
        candidate(10, question="QUESTION  2"),
        candidate(11, question="held out"),
    ]
    engine = ScriptedEngine({2: 5, 3: 9, 4: 0, 5: 3}, {5: 1})
    result = run(candidates, engine, tmp_path, held_out=["Held Out"])
    assert removed(tmp_path) == {
        "p2": "main",
        "p3": "trivial",
        "p4": "hard_zero",
        "p5": "guessable",
        "p6": "choice",
        "p7": "proof",
        "p8": "unverifiable",
        "p9": "unverifiable",
        "p10": "duplicate",
        "p11": "held_out",
    }
    assert [(prompt.id, prompt.pass_rate) for prompt in result.prompts] == [("p2", 0.5), ("p4", 0.0)]
    assert result.manifest["removed"] == {
        "choice": 1, "duplicate": 1, "guessable": 1, "held_out": 1, "proof": 1, "trivial": 1, "unverifiable": 2,
    }  # fmt: skip
    assert result.manifest["pools"] == {"hard_zero": 1, "main": 1}
    assert result.manifest["tags"] == {"domain:toy": 2}
    assert json.loads((tmp_path / "manifest.json").read_text()) == json.loads(json.dumps(result.manifest))


def test_prompts_are_written_with_their_measurements(tmp_path):
    run([candidate(2)], ScriptedEngine({2: 1}), tmp_path)
    row = json.loads((tmp_path / "prompts.jsonl").read_text())
    assert row["difficulty"]["n"] == 10
    assert row["difficulty"]["k"] == 1
    assert row["difficulty"]["interval"] == pytest.approx(wilson_interval(1, 10))
    assert row["difficulty"]["model"] == "sft"
    assert row["guess"] == {"n": 8, "hit": False}


def test_samples_and_guesses_are_asked_for_as_configured(tmp_path):
    engine = ScriptedEngine({2: 5})
    run([candidate(2)], engine, tmp_path, CurationConfig(passes=6, guess_n=3, temperature=0.8, seed=4))
    passes, guesses = engine.requests
    assert (passes.num_samples, passes.prompt_ids, passes.params.temperature) == (6, (1, 2), 0.8)
    assert (guesses.num_samples, guesses.prompt_ids, guesses.params.max_new_tokens) == (3, (1, 2, GUESS), 32)
    assert passes.params.seed != guesses.params.seed


def test_answers_that_were_cut_do_not_count(tmp_path):
    engine = ScriptedEngine({2: 10, 3: 10}, {2: 8, 3: 8}, reason="length")
    result = run([candidate(2), candidate(3)], engine, tmp_path)
    assert result.manifest["pools"] == {"hard_zero": 2}


def test_filters_can_be_switched_off(tmp_path):
    config = CurationConfig(guess_n=0, allow_choice=True, check_verifier=False, drop_at_or_above=1.1)
    candidates = [candidate(2, question="Is 2 even?", answer="yes"), candidate(3, must_refuse=((3, STOP),))]
    engine = ScriptedEngine({2: 10, 3: 10}, {2: 8, 3: 8})
    result = run(candidates, engine, tmp_path, config)
    assert len(result.prompts) == 2
    assert result.manifest["guess_filter"] == "off"


def test_a_curation_resumes_at_its_last_finished_part(tmp_path):
    candidates = [candidate(n) for n in range(2, 12)]
    config = CurationConfig(file_problems=4)
    right = {n: n % 5 for n in range(2, 12)}
    whole = run(candidates, ScriptedEngine(right), tmp_path / "whole", config)
    directory = tmp_path / "parts"

    class Dies(ScriptedEngine):
        def generate(self, requests, progress=None):
            if requests and requests[0].prompt_ids[1] >= 10:
                raise KeyboardInterrupt
            return super().generate(requests, progress)

    with pytest.raises(KeyboardInterrupt):
        run(candidates, Dies(right), directory, config)
    engine = ScriptedEngine(right)
    assert run(candidates, engine, directory, config).prompts == whole.prompts
    assert {request.prompt_ids[1] for request in engine.requests} == {10, 11}
    for name in ("prompts.jsonl", "manifest.json"):
        assert (directory / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_parts_of_other_settings_are_made_again(tmp_path):
    run([candidate(2)], ScriptedEngine({2: 5}), tmp_path)
    engine = ScriptedEngine({2: 2})
    assert run([candidate(2)], engine, tmp_path, model_name="other").prompts[0].pass_rate == 0.2
    engine = ScriptedEngine({2: 3})
    assert run([candidate(2)], engine, tmp_path, CurationConfig(seed=1)).prompts[0].pass_rate == 0.3


def test_a_broken_part_is_named(tmp_path):
    (tmp_path / "part-00000.jsonl").write_text("{nonsense\n")
    with pytest.raises(DataError, match=r"part-00000.jsonl: is not a part of a curation"):
        run([candidate(2)], ScriptedEngine({2: 5}), tmp_path)


def test_an_empty_result_says_what_removed_everything(tmp_path):
    with pytest.raises(DataError, match=r"kept none of 2 problems \(removed: guessable 1, trivial 1\)"):
        run([candidate(2), candidate(3)], ScriptedEngine({2: 10, 3: 5}, {3: 8}), tmp_path)
    with pytest.raises(DataError, match="no candidates"):
        run([], ScriptedEngine({}), tmp_path)
