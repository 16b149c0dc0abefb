"""Losses against their definitions in float64, and the invariance of accumulation."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from perilune.data import IGNORE_INDEX, Batch, concat_batches
from perilune.train import accumulate_gradients, dpo_loss, finish_gradients, lm_loss, sequence_logprobs, trainable
from tests.train.doubles import TinyModel, make_batch


def token_logprobs(model: TinyModel, batch: Batch) -> Tensor:
    """The definition: full logits, one log-softmax, one pick; 0 where there is no target."""
    logits = model.hidden(batch.tokens, batch.cu_seqlens) @ model.output_weight.T
    picked = logits.log_softmax(-1).gather(1, batch.targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(batch.targets == IGNORE_INDEX, 0.0, picked)


def gradients(model: TinyModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lengths", [[5, 3, 7], [1], [4, 0, 2]])
def test_lm_loss_is_the_weighted_negative_log_likelihood(lengths: list[int], weighted: bool) -> None:
    batch = make_batch(lengths, seed=sum(lengths), weighted=weighted, masked=0.2)
    model, oracle = TinyModel(dtype=torch.float64), TinyModel(dtype=torch.float64)
    weights = (batch.targets != IGNORE_INDEX).double() * (1 if batch.weights is None else batch.weights)
    expected = -(weights * token_logprobs(oracle, batch)).sum()
    expected.backward()
    loss, stats = lm_loss(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert float(stats.count) == float(weights.sum())
    for found, wanted in zip(gradients(model), gradients(oracle), strict=True):
        torch.testing.assert_close(found, wanted)


def test_positions_of_weight_zero_and_without_target_do_not_count() -> None:
    batch = make_batch([6, 6], masked=0.0)
    weights = torch.ones(12)
    weights[3] = 0
    targets = batch.targets.clone()
    targets[7] = IGNORE_INDEX
    masked = Batch(tokens=batch.tokens, cu_seqlens=batch.cu_seqlens, targets=targets, weights=weights)
    model = TinyModel()
    loss, stats = lm_loss(model, masked)
    logprobs = token_logprobs(model, batch)
    kept = [index for index in range(12) if index not in (3, 7)]
    assert float(stats.count) == 10
    torch.testing.assert_close(loss, -logprobs[kept].sum())


def test_a_batch_without_targets_gives_zero() -> None:
    batch = make_batch([3, 2], masked=1.1)
    loss, stats = lm_loss(TinyModel(), batch)
    assert float(loss.detach()) == 0
    assert float(stats.count) == 0


def one_by_one(batch: Batch) -> list[Batch]:
    bounds = batch.cu_seqlens.tolist()
    return [
        Batch(
            tokens=batch.tokens[a:b],
            cu_seqlens=torch.tensor([0, b - a], dtype=torch.int32),
            targets=batch.targets[a:b],
            weights=None if batch.weights is None else batch.weights[a:b],
        )
        for a, b in pairwise(bounds)
    ]


@pytest.mark.parametrize("weighted", [False, True])
def test_one_batch_of_eight_equals_eight_of_one(weighted: bool) -> None:
    batch = make_batch([3, 9, 1, 4, 6, 2, 5, 7], weighted=weighted)
    whole, parts = TinyModel(), TinyModel()
    one = accumulate_gradients(whole, [batch], lm_loss)
    eight = accumulate_gradients(parts, one_by_one(batch), lm_loss)
    assert one.count == eight.count
    assert one.num_tokens == eight.num_tokens == 37
    assert one.num_sequences == eight.num_sequences == 8
    assert one.loss == pytest.approx(eight.loss, rel=1e-6)
    norms = [finish_gradients(trainable(model), one.count, 0.1) for model in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for left, right in zip(gradients(whole), gradients(parts), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def preference_batch(pairs: int = 3, *, weighted: bool = False) -> Batch:
    batch = make_batch([4, 6, 3, 3, 7, 2][: 2 * pairs], weighted=weighted)
    generator = torch.Generator().manual_seed(1)
    return Batch(
        tokens=batch.tokens,
        cu_seqlens=batch.cu_seqlens,
        targets=batch.targets,
        weights=batch.weights,
        pairs=torch.tensor([[1, 0], [2, 3], [5, 4]][:pairs]),
        reference_logprobs=-10 * torch.rand(2 * pairs, generator=generator),
    )


@pytest.mark.parametrize("sft_weight", [0.0, 0.05])
def test_dpo_loss_is_its_equation(sft_weight: float) -> None:
    batch = preference_batch()
    model, oracle = TinyModel(dtype=torch.float64), TinyModel(dtype=torch.float64)
    beta = 0.3
    spans = list(pairwise(batch.cu_seqlens.tolist()))
    logprobs = token_logprobs(oracle, batch)
    expected = torch.zeros((), dtype=torch.float64)
    for chosen, rejected in batch.pairs.tolist():
        sums = {index: logprobs[slice(*spans[index])].sum() for index in (chosen, rejected)}
        log_ratio = {index: sums[index] - batch.reference_logprobs[index] for index in sums}
        expected = expected - torch.log(torch.sigmoid(beta * (log_ratio[chosen] - log_ratio[rejected])))
        count = (batch.targets[slice(*spans[chosen])] != IGNORE_INDEX).sum()
        expected = expected - sft_weight * sums[chosen] / count
    expected.backward()
    loss, stats = dpo_loss(model, batch, beta=beta, sft_weight=sft_weight)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert float(stats.count) == 3
    for found, wanted in zip(gradients(model), gradients(oracle), strict=True):
        torch.testing.assert_close(found, wanted)


def test_dpo_metrics_are_sums_over_pairs() -> None:
    batch = preference_batch()
    model = TinyModel()
    rewards = 0.1 * (sequence_logprobs(model, batch) - batch.reference_logprobs)
    margins = rewards[batch.pairs[:, 0]] - rewards[batch.pairs[:, 1]]
    totals = accumulate_gradients(model, [batch], dpo_loss)
    assert totals.metrics["preference_accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert totals.metrics["reward_margin"] == pytest.approx(float(margins.mean()))
    difference = totals.metrics["chosen_reward"] - totals.metrics["rejected_reward"]
    assert difference == pytest.approx(float(margins.mean()), abs=1e-6)


def test_at_the_reference_dpo_starts_at_log_two() -> None:
    model, batch = TinyModel(), preference_batch()
    at_reference = Batch(
        tokens=batch.tokens,
        cu_seqlens=batch.cu_seqlens,
        targets=batch.targets,
        pairs=batch.pairs,
        reference_logprobs=sequence_logprobs(model, batch),
    )
    loss, _ = dpo_loss(model, at_reference)
    assert float(loss.detach()) / 3 == pytest.approx(0.6931472, abs=1e-6)


def test_preference_micro_batches_add_up() -> None:
    batch = preference_batch()
    first, second = preference_batch(1), preference_batch(1)
    joined = concat_batches([first, second])
    whole, parts = TinyModel(), TinyModel()
    loss = partial(dpo_loss, beta=0.2, sft_weight=0.1)
    one, two = accumulate_gradients(whole, [joined], loss), accumulate_gradients(parts, [first, second], loss)
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    for left, right in zip(gradients(whole), gradients(parts), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)
    assert batch.pairs is not None


def test_sequence_logprobs_sum_the_targets_of_each_sequence() -> None:
    batch, model = make_batch([4, 0, 3], masked=0.5), TinyModel()
    logprobs = token_logprobs(model, batch)
    found = sequence_logprobs(model, batch)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.stack([logprobs[:4].sum(), logprobs[4:4].sum(), logprobs[4:].sum()]))


@pytest.mark.parametrize(("field", "value"), [("beta", 0.0), ("beta", -1.0), ("sft_weight", -0.1)])
def test_dpo_numbers_are_checked(field: str, value: float) -> None:
    with pytest.raises(ValueError, match="dpo_loss: beta must be > 0"):
        dpo_loss(TinyModel(), preference_batch(), **{field: value})


def test_dpo_needs_pairs_and_a_reference() -> None:
    with pytest.raises(ValueError, match="needs both pairs and reference_logprobs"):
        dpo_loss(TinyModel(), make_batch([3, 3]))
