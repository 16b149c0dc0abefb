from collections import Counter

import numpy as np
import pytest
import torch

from perilune.data import (
    Batch,
    ConversationSource,
    Example,
    MixtureSource,
    PreferencePair,
    PreferenceSource,
    WindowSource,
    apportion,
    encode_documents,
)
from perilune.errors import DataError

STREAM = np.arange(1003, dtype=np.int32)


def equal(a: Batch, b: Batch) -> bool:
    fields = ("tokens", "cu_seqlens", "targets", "weights", "pairs", "reference_logprobs")
    return all(
        (getattr(a, name) is None and getattr(b, name) is None) or torch.equal(getattr(a, name), getattr(b, name))
        for name in fields
    )


def windows(**options) -> WindowSource:
    return WindowSource(STREAM, **{"context": 10, "windows": 4, "seed": 7} | options)


def examples(count: int = 50) -> list[Example]:
    return [Example.document([1000 + i, *range(i % 17 + 2)]) for i in range(count)]


def pairs(count: int = 20, reference: bool = True) -> list[PreferencePair]:
    return [
        PreferencePair(
            chosen=Example.document([i, 1, 2]),
            rejected=Example.document([i, 3, 4, *range(i % 5)]),
            reference_logprobs=(-float(i), -float(i) - 0.5) if reference else None,
        )
        for i in range(count)
    ]


def sources() -> list:
    return [
        windows(),
        windows(order="random"),
        ConversationSource(examples(), budget=60, seed=7),
        PreferenceSource(pairs(), budget=40, seed=7),
    ]


@pytest.mark.parametrize("which", range(4))
def test_batches_depend_on_seed_and_step_alone(which: int) -> None:
    forward, backward = sources()[which], sources()[which]
    first = [forward.batch(step, 0) for step in range(40)]
    second = [backward.batch(step, 0) for step in reversed(range(40))][::-1]
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("order", ["epoch", "random"])
def test_other_seed_gives_other_windows(order: str) -> None:
    assert not equal(windows(order=order).batch(0, 0), windows(order=order, seed=8).batch(0, 0))


@pytest.mark.parametrize("order", ["epoch", "random"])
def test_window_targets_follow_the_inputs(order: str) -> None:
    for step in range(60):
        batch = windows(order=order).batch(step, 0)
        assert torch.equal(batch.targets, batch.tokens + 1)
        assert batch.cu_seqlens.tolist() == [0, 10, 20, 30, 40]
        assert batch.targets.max() <= 1002


def test_an_epoch_shows_each_token_at_most_once_and_loses_only_the_edge() -> None:
    source = windows(windows=1)
    for epoch in range(3):
        first = epoch * source.windows_per_epoch
        seen = Counter(
            token for i in range(source.windows_per_epoch) for token in source.draw(first + i).tokens.tolist()
        )
        assert max(seen.values()) == 1
        assert len(seen) == source.windows_per_epoch * 10 >= len(STREAM) - 20


def test_epochs_shift_and_reorder_the_windows() -> None:
    source = windows(windows=1)
    starts = [[int(source.draw(e * source.windows_per_epoch + i).tokens[0]) for i in range(99)] for e in range(6)]
    assert len({tuple(epoch) for epoch in starts}) == 6
    assert len({epoch[0] % 10 for epoch in starts}) > 1


def test_random_windows_reach_both_ends() -> None:
    source = WindowSource(np.arange(13), context=10, windows=8, seed=0, order="random")
    starts = {int(token) for step in range(20) for token in source.batch(step, 0).tokens[::10]}
    assert starts == {0, 1, 2}


@pytest.mark.parametrize("length", [11, 12, 19, 20, 21, 29, 30])
@pytest.mark.parametrize("order", ["epoch", "random"])
def test_short_streams_work(length: int, order: str) -> None:
    source = WindowSource(np.arange(length), context=10, windows=3, seed=0, order=order)  # pyright: ignore
    assert all(source.batch(step, 0).targets.max() < length for step in range(30))


def test_stream_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="needs 11 tokens of text, got 10"):
        WindowSource(np.arange(10), context=10, windows=1, seed=0)
    with pytest.raises(ValueError, match="context must be at least 1"):
        windows(context=0)


@pytest.mark.parametrize("which", range(4))
def test_accumulation_reads_the_same_batches(which: int) -> None:
    single = sources()[which]
    split = [
        windows(micro_steps=4),
        windows(order="random", micro_steps=4),
        ConversationSource(examples(), budget=60, seed=7, micro_steps=4),
        PreferenceSource(pairs(), budget=40, seed=7, micro_steps=4),
    ][which]
    assert all(
        equal(split.batch(step, micro), single.batch(4 * step + micro, 0)) for step in range(5) for micro in range(4)
    )


def test_an_epoch_of_conversations_holds_each_once() -> None:
    source = ConversationSource(examples(), budget=60, seed=7)
    for epoch in range(3):
        seen: Counter[int] = Counter()
        for i in range(source.batches_per_epoch):
            batch = source.draw(epoch * source.batches_per_epoch + i)
            assert batch.num_tokens <= 60
            seen.update(batch.tokens[batch.cu_seqlens[:-1].long()].tolist())
        assert seen == Counter({1000 + i: 1 for i in range(50)})


def test_conversations_regroup_between_epochs() -> None:
    source = ConversationSource(examples(), budget=60, seed=7)
    first = {tuple(source.draw(i).tokens.tolist()) for i in range(source.batches_per_epoch)}
    second = {tuple(source.draw(source.batches_per_epoch + i).tokens.tolist()) for i in range(source.batches_per_epoch)}
    assert first != second


@pytest.mark.parametrize(
    ("items", "budget", "words"),
    [
        ([], 60, "no conversation to train on"),
        (examples(3), 3, "conversation 2 takes 4 tokens, more than the budget of 3"),
    ],
)
def test_conversations_that_cannot_be_packed_are_named(items, budget: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ConversationSource(items, budget=budget, seed=0)


def test_preference_pairs_stay_together() -> None:
    source = PreferenceSource(pairs(), budget=40, seed=7)
    seen = []
    for i in range(source.batches_per_epoch):
        batch = source.draw(i)
        assert batch.pairs is not None
        assert batch.reference_logprobs is not None
        assert batch.num_tokens <= 40
        starts = batch.cu_seqlens[:-1].long()
        for chosen, rejected in batch.pairs.tolist():
            name = int(batch.tokens[starts[chosen]])
            assert int(batch.tokens[starts[rejected]]) == name
            assert (int(batch.targets[starts[chosen]]), int(batch.targets[starts[rejected]])) == (1, 3)
            assert batch.reference_logprobs[[chosen, rejected]].tolist() == [-name, -name - 0.5]
            seen.append(name)
    assert sorted(seen) == list(range(20))


def test_preference_pairs_without_reference_carry_none() -> None:
    assert PreferenceSource(pairs(reference=False), budget=40, seed=0).draw(0).reference_logprobs is None
    with pytest.raises(DataError, match="on all preference pairs or on none, got 2/4"):
        PreferenceSource(pairs(2) + pairs(2, reference=False), budget=40, seed=0)
    with pytest.raises(DataError, match="no preference pair"):
        PreferenceSource([], budget=40, seed=0)


def test_mixture_keeps_proportions_and_order_of_each_part() -> None:
    text, talk = windows(windows=1), ConversationSource(examples(), budget=60, seed=7)
    mixture = MixtureSource([text, talk], [0.8, 0.2], draws=5, micro_steps=2)
    assert mixture.counts == (4, 1)
    batch = mixture.batch(1, 1)
    wanted = [text.draw(12 + i) for i in range(4)] + [talk.draw(3)]
    assert torch.equal(batch.tokens, torch.cat([part.tokens for part in wanted]))
    assert batch.cu_seqlens[-1] == batch.num_tokens
    assert torch.equal(batch.cu_seqlens.diff(), torch.cat([part.cu_seqlens.diff() for part in wanted]))


def test_mixture_moves_pair_indices() -> None:
    mixture = MixtureSource([PreferenceSource(pairs(), budget=40, seed=7)], [1.0], draws=2)
    batch = mixture.batch(0, 0)
    assert batch.pairs is not None
    assert batch.pairs.flatten().tolist() == list(range(batch.cu_seqlens.numel() - 1))


@pytest.mark.parametrize(
    ("weights", "draws", "words"),
    [([1.0], 4, "one weight for each part"), ([1.0, 0.0], 4, "positive"), ([0.99, 0.01], 5, "leave part 1 out of 5")],
)
def test_impossible_mixtures_are_refused(weights: list[float], draws: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MixtureSource([windows(), windows()], weights, draws=draws)


@pytest.mark.parametrize("total", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("weights", [[1], [0.8, 0.2], [1, 1, 1], [0.1, 5, 3, 0.7]])
def test_apportionment_sums_and_stays_near_the_quota(weights: list[float], total: int) -> None:
    counts = apportion(weights, total)
    assert sum(counts) == total
    assert all(abs(count - total * w / sum(weights)) < 1 for count, w in zip(counts, weights, strict=True))


def test_documents_are_encoded_whole(tokenizer) -> None:
    stream = encode_documents(tokenizer, ["first document", "second"])
    assert stream[0] == tokenizer.bos_id
    assert (stream == tokenizer.eos_id).sum() == 2
    assert tokenizer.count_bytes(stream) == len(b"first documentsecond")
