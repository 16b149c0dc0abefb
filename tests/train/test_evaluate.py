"""Held-out measures against their definitions."""

import math

import numpy as np
import pytest
import torch

from perilune.data import IGNORE_INDEX, Batch
from perilune.train import score_targets, score_text
from tests.train.doubles import VOCAB, TinyModel, make_batch

TEXT = np.random.default_rng(0).integers(VOCAB, size=50)


@torch.no_grad()
def nats_by_definition(model: TinyModel, tokens: np.ndarray, context: int, stride: int) -> float:
    """Each target on its own, with the inputs that its window gives it."""
    total, scored, nats = len(tokens) - 1, 0, 0.0
    while scored < total:
        end = min(total, context if scored == 0 else scored + stride)
        start = max(0, end - context)
        for position in range(scored, end):
            inputs = torch.as_tensor(tokens[start : position + 1])
            hidden = model.hidden(inputs, torch.tensor([0, len(inputs)], dtype=torch.int32))[-1]
            logprobs = (model.output_weight @ hidden).log_softmax(0)
            nats -= float(logprobs[tokens[position + 1]])
        scored = end
    return nats


@pytest.mark.parametrize(
    ("context", "stride", "windows"), [(8, 8, 3), (8, 3, 2), (8, 1, 8), (49, 49, 1), (100, 7, 2), (1, 1, 5)]
)
def test_every_token_is_scored_once_with_its_context(context: int, stride: int, windows: int) -> None:
    model = TinyModel()
    score = score_text(model, TEXT, 77, context=context, stride=stride, windows=windows)
    nats = nats_by_definition(model, TEXT, context, stride)
    assert score.num_tokens == 49
    assert score.nats_per_token == pytest.approx(nats / 49, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 77, rel=1e-5)


@torch.no_grad()
def test_losses_are_told_apart_by_position() -> None:
    model, text = TinyModel(), TEXT[:49]
    score = score_text(model, text, 77, context=8, parts=4)
    losses: list[list[float]] = [[], [], [], []]
    for start in range(0, 48, 8):
        inputs = torch.as_tensor(text[start : start + 8])
        hidden = model.hidden(inputs, torch.tensor([0, len(inputs)], dtype=torch.int32))
        logprobs = (hidden @ model.output_weight.T).log_softmax(-1)
        for position in range(8):
            losses[position // 2].append(-float(logprobs[position, text[start + position + 1]]))
    assert score.nats_by_part == pytest.approx([sum(part) / len(part) for part in losses], rel=1e-5)
    whole = score_text(model, text, 77, context=8)
    assert whole.nats_by_part == (whole.nats_per_token,)
    assert score.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-12)
    assert math.isnan(score_text(model, text, 77, context=96, parts=3).nats_by_part[2])


def test_windows_per_pass_do_not_change_the_score() -> None:
    scores = [score_text(TinyModel(), TEXT, 77, context=8, stride=4, windows=count) for count in (1, 4, 100)]
    assert scores[0].bits_per_byte == pytest.approx(scores[1].bits_per_byte, rel=1e-6)
    assert scores[0].bits_per_byte == pytest.approx(scores[2].bits_per_byte, rel=1e-6)


def test_a_uniform_model_needs_log_of_its_vocabulary() -> None:
    model = TinyModel()
    model.output_weight.data.zero_()
    assert score_text(model, TEXT, 49, context=8).bits_per_byte == pytest.approx(math.log2(VOCAB), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [1]}, "2 tokens and 1 byte at least, got 1"),
        ({"num_bytes": 0}, "2 tokens and 1 byte at least"),
        ({"stride": 9}, "1 <= stride <= context"),
        ({"stride": 0}, "1 <= stride <= context"),
        ({"windows": 0}, "windows >= 1"),
        ({"parts": 0}, "parts must be >= 1, got 0"),
    ],
)
def test_score_text_checks_its_arguments(changes: dict, message: str) -> None:
    arguments = {"tokens": TEXT, "num_bytes": 5, "context": 8} | changes
    with pytest.raises(ValueError, match=message):
        score_text(TinyModel(), **arguments)


def test_accuracy_counts_targets_and_whole_sequences() -> None:
    model = TinyModel()
    batch = make_batch([5, 4, 0, 6, 3], masked=0.0)
    best = (model.hidden(batch.tokens, batch.cu_seqlens) @ model.output_weight.T).argmax(-1)
    targets = best.clone()
    targets[1] = (best[1] + 1) % VOCAB
    targets[9:15] = IGNORE_INDEX
    scored = Batch(tokens=batch.tokens, cu_seqlens=batch.cu_seqlens, targets=targets)
    score = score_targets(model, [scored, scored])
    assert score.num_targets == 24
    assert score.accuracy == 22 / 24
    assert score.sequence_accuracy == 4 / 6


@torch.no_grad()
def test_losses_of_targets_are_mean_negative_log_probabilities() -> None:
    model, batch = TinyModel(), make_batch([5, 4, 0, 6, 3], masked=0.4)
    logprobs = (model.hidden(batch.tokens, batch.cu_seqlens) @ model.output_weight.T).log_softmax(-1)
    positions = torch.cat([torch.arange(length) for length in (5, 4, 0, 6, 3)])
    counts = batch.targets != IGNORE_INDEX
    nats = -logprobs[counts].gather(1, batch.targets[counts, None])[:, 0]
    score = score_targets(model, [batch, batch], parts=2)
    assert score.nats_per_target == pytest.approx(float(nats.mean()), rel=1e-5)
    late = positions[counts] >= 3
    assert score.nats_by_part == pytest.approx([float(nats[~late].mean()), float(nats[late].mean())], rel=1e-5)


def test_accuracy_without_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one target"):
        score_targets(TinyModel(), [make_batch([3], masked=1.1)])
