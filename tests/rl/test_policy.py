import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.rl import Trajectory
from perilune.rl.policy import pack_responses, plan_micro_batches, response_logprobs, sum_by_sequence

CPU = torch.device("cpu")


def trajectory(prompt, response):
    return Trajectory(
        prompt_ids=tuple(prompt),
        token_ids=tuple(response),
        behavior_logprobs=(0.0,) * len(response),
        finish_reason="eos",
        version=0,
    )


TRAJECTORIES = [trajectory([1, 2, 3], [4, 5]), trajectory([6], [7]), trajectory([8, 9], [10, 11, 12])]


def test_packing_names_the_positions_that_predict_the_response():
    packed = pack_responses(TRAJECTORIES, CPU)
    assert packed.tokens.tolist() == [1, 2, 3, 4, 6, 8, 9, 10, 11]
    assert packed.layout.lengths == (4, 1, 4)
    assert packed.positions.tolist() == [2, 3, 4, 6, 7, 8]
    assert packed.targets.tolist() == [4, 5, 7, 10, 11, 12]
    assert packed.rows.tolist() == [0, 0, 1, 2, 2, 2]
    assert packed.prompt_lengths.tolist() == [3, 1, 2]


def test_a_response_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no response token"):
        pack_responses([trajectory([1], [])], CPU)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_equal_the_dense_softmax(make_model, temperature):
    model = make_model().requires_grad_(False)
    packed = pack_responses(TRAJECTORIES, CPU)
    logprobs, entropy = response_logprobs(model, packed, temperature)
    for row, sequence in enumerate(TRAJECTORIES):
        inputs = torch.tensor([*sequence.prompt_ids, *sequence.token_ids[:-1]])[len(sequence.prompt_ids) - 1 :]
        dense = (model.embedding[inputs].double() @ model.output_weight.double().T / temperature).log_softmax(-1)
        expected = dense.gather(1, torch.tensor(sequence.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[packed.rows == row].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            entropy[packed.rows == row].double(), -(dense.exp() * dense).sum(-1), rtol=1e-5, atol=1e-5
        )
        assert float(sum_by_sequence(logprobs, packed)[row]) == pytest.approx(float(expected.sum()), abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100))
def test_micro_batches_cover_every_sequence_once_within_the_limit(lengths, limit):
    packs = plan_micro_batches(lengths, limit)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[index] for index in pack) <= limit or len(pack) == 1
    flat = [lengths[index] for pack in packs for index in pack]
    assert flat == sorted(flat, reverse=True)
