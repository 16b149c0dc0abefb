import math

import pytest
import torch

from perilune.engine import Completion
from perilune.errors import DataError, EngineError, NumericsError
from perilune.rl import (
    Group,
    LengthConfig,
    Prompt,
    RLConfig,
    RolloutConfig,
    Score,
    Trajectory,
    collect_groups,
    reward_metrics,
    score_groups,
    shape_rewards,
)
from perilune.rl.scoring import check_policy, check_verifier, shuffle_rewards

PROMPT = Prompt(id="p", token_ids=(1,), problem=None)


def group(*responses):
    """One group of (number of tokens, finish reason); the first token carries the reward that `score` gives."""
    return Group(
        prompt=PROMPT,
        trajectories=tuple(
            Trajectory(
                prompt_ids=(1,),
                token_ids=(first,) * length,
                behavior_logprobs=(0.0,) * length,
                finish_reason=reason,
                version=0,
            )
            for first, length, reason in responses
        ),
    )


def score(prompt, token_ids):
    match token_ids[0] if token_ids else 0:
        case 7:
            return Score(reward=None)
        case 8:
            return Score(reward=math.nan)
        case 9:
            raise RuntimeError("broken verifier")
        case 6:
            return Score(reward=1.0, error="timeout")
        case value:
            return Score(reward=float(value))


def test_cut_and_repetitive_responses_earn_nothing():
    scored = score_groups(
        [group((1, 3, "eos"), (1, 5, "length"), (1, 9, "repeat"), (1, 2, "context"))], score, RolloutConfig()
    )
    assert scored.rewards.tolist() == [[1, 0, 0, 0]]
    torch.testing.assert_close(scored.shaped, torch.tensor([[1, 0, -0.2, 0]]))
    assert scored.is_correct.tolist() == [[True, False, False, False]]
    assert scored.is_truncated.tolist() == [[False, True, False, True]]
    assert scored.lengths.tolist() == [[3, 5, 9, 2]]


def test_samples_without_a_reward_are_excluded_and_small_groups_dropped():
    groups = [
        group((1, 1, "eos"), (7, 1, "eos"), (0, 1, "eos")),
        group((8, 1, "eos"), (1, 1, "eos"), (0, 0, "error")),
    ]
    scored = score_groups(groups, score, RolloutConfig())
    assert scored.is_valid.tolist() == [[True, False, True], [False, False, False]]
    assert scored.has_signal.tolist() == [True, False]
    assert scored.rewards.isfinite().all()
    assert reward_metrics(scored)["invalid_share"] == pytest.approx(4 / 6)
    assert reward_metrics(scored)["reward"] == 0.5


def test_a_failing_verifier_costs_samples_until_it_fails_too_often(caplog):
    scored = score_groups([group((9, 1, "eos"), (6, 1, "eos"), (1, 1, "eos"), (1, 1, "eos"))], score, RolloutConfig())
    assert scored.rewards.tolist() == [[0, 0, 1, 1]]
    assert scored.has_error.tolist() == [[True, True, False, False]]
    assert "broken verifier" in caplog.text
    assert "timeout" in caplog.text
    check_verifier(scored, RLConfig(max_verifier_error_rate=0.5))
    with pytest.raises(DataError, match="failed on 50% of the responses"):
        check_verifier(scored, RLConfig(max_verifier_error_rate=0.49))


def test_the_length_reward_is_added_once_it_is_on():
    scored = score_groups(
        [group((1, 100, "eos"), (1, 300, "eos"), (0, 100, "eos"), (0, 200, "eos"))], score, RolloutConfig()
    )
    config = RLConfig(length=LengthConfig(weight=0.2, start=0.5))
    assert shape_rewards(scored, config, 0.4) is scored
    shaped = shape_rewards(scored, config, 0.5)
    torch.testing.assert_close(shaped.shaped, torch.tensor([[1.1, 0.9, 0.0, 0.0]]))
    assert shaped.rewards.tolist() == scored.rewards.tolist()


def test_all_right_is_a_signal_once_lengths_differ():
    scored = score_groups([group((1, 1, "eos"), (1, 2, "eos"))], score, RolloutConfig())
    assert scored.has_signal.tolist() == [False]
    assert shape_rewards(scored, RLConfig(), 1.0).has_signal.tolist() == [True]


def test_shuffling_keeps_rewards_but_not_their_place():
    scored = score_groups([group(*[(i % 2, 1, "eos") for i in range(16)])] * 4, score, RolloutConfig())
    shuffled = shuffle_rewards(scored, 0, 3)
    assert shuffled.rewards.sum() == scored.rewards.sum()
    assert shuffled.rewards.tolist() != scored.rewards.tolist()
    assert torch.equal(shuffled.is_correct, shuffled.rewards > 0.5)
    assert torch.equal(shuffle_rewards(scored, 0, 3).rewards, shuffled.rewards)


class FakeEngine:
    def __init__(self, edit):
        self.edit = edit

    def set_weights(self, model, version):
        pass

    def generate(self, requests, progress=None):
        completions = [
            Completion(request_id=r.id, sample=s, token_ids=(1, 0), logprobs=(-1.0, -1.0), finish_reason="eos")
            for r in requests
            for s in range(r.num_samples)
        ]
        return self.edit(completions)


def replaced(completion, **changes):
    fields = {name: changes.get(name, getattr(completion, name)) for name in completion.__slots__}
    return Completion(**fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c[:-1], r"request 3:1: the engine returned samples \[0, 1, 2\] but 4 were asked for"),
        (lambda c: [*c, c[0]], "request 3:0: the engine returned samples"),
        (
            lambda c: [*c[1:], replaced(c[0], token_ids=(1, 50))],
            r"request 3:0: .* token id 50; ids must be in \[0, 24\)",
        ),
        (lambda c: [*c[1:], replaced(c[0], logprobs=(0.0,))], "2 tokens with 1 log-probabilities"),
        (lambda c: [*c, replaced(c[0], request_id="x")], "unknown request 'x'"),
    ],
)
def test_an_engine_that_answers_wrongly_is_caught(edit, message):
    with pytest.raises(EngineError, match=message):
        collect_groups(
            FakeEngine(edit),
            [PROMPT, PROMPT],
            RolloutConfig(group_size=4),
            stop_ids=(0,),
            vocab_size=24,
            seed=0,
            version=3,
        )


def test_groups_carry_what_the_engine_sampled(make_model, native, prompts):
    config = RolloutConfig(group_size=3, max_response_tokens=5)
    groups = collect_groups(
        native(make_model()), [prompts[0]] * 2, config, stop_ids=(0,), vocab_size=24, seed=1, version=0
    )
    assert [len(g.trajectories) for g in groups] == [3, 3]
    assert groups[0].trajectories != groups[1].trajectories
    assert all(t.prompt_ids == prompts[0].token_ids for g in groups for t in g.trajectories)


def test_a_policy_without_a_single_finite_response_stops_the_run():
    broken = score_groups([group((0, 0, "error"), (0, 0, "error"))] * 2, score, RolloutConfig())
    with pytest.raises(
        NumericsError, match=r"iteration 3: the policy's logits are not finite.*lower the learning rate"
    ):
        check_policy(broken, 3)
    check_policy(score_groups([group((0, 0, "error"), (1, 1, "eos"))], score, RolloutConfig()), 3)
