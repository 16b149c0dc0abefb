import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.data import IGNORE_INDEX, Batch, Example, concat_batches, pack_examples, plan_bins
from perilune.ops.layout import SequenceLayout


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    lengths = batch.cu_seqlens.diff().tolist()
    inputs, targets = batch.tokens.split(lengths), batch.targets.split(lengths)
    return [(a.tolist(), b.tolist()) for a, b in zip(inputs, targets, strict=True)]


def test_targets_are_the_next_tokens_of_the_same_document() -> None:
    batch = pack_examples([Example.document([1, 2, 3]), Example.document([4, 5])])
    assert rows(batch) == [([1, 2], [2, 3]), ([4], [5])]
    assert batch.weights is None
    assert batch.num_tokens == batch.num_targets == 3


def test_masked_tokens_are_not_targets() -> None:
    batch = pack_examples([Example(tokens=(1, 2, 3, 4), mask=(True, False, True, True), weight=0.5)])
    assert rows(batch) == [([1, 2, 3], [IGNORE_INDEX, 3, 4])]
    assert batch.weights is not None
    assert batch.weights.tolist() == [0.5] * 3
    assert batch.num_targets == 2


def test_dtypes_and_layout() -> None:
    batch = pack_examples([Example.document([1, 2]), Example.document([3, 4, 5])])
    assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert batch.cu_seqlens.dtype == torch.int32
    assert SequenceLayout.from_cu_seqlens(batch.cu_seqlens, batch.num_tokens).lengths == (1, 2)


def test_empty_pack_is_an_empty_batch() -> None:
    batch = pack_examples([])
    assert batch.num_tokens == batch.num_targets == 0
    assert batch.cu_seqlens.tolist() == [0]


@pytest.mark.parametrize(
    ("tokens", "mask", "words"), [((1,), (True,), "at least 2"), ((1, 2), (True,), "2 tokens but 1")]
)
def test_impossible_examples_are_refused(tokens, mask, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Example(tokens=tokens, mask=mask)


def test_concatenation_equals_packing_at_once() -> None:
    parts = [Example.document([1, 2, 3]), Example(tokens=(4, 5), mask=(True, True), weight=2.0)]
    joined = concat_batches([pack_examples([part]) for part in parts])
    whole = pack_examples(parts)
    for name in ("tokens", "cu_seqlens", "targets", "weights"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert joined.cu_seqlens.dtype == torch.int32


def test_prompts_are_counted_in_packs_and_texts_have_nothing_generated() -> None:
    text, answer = Example.document([1, 2, 3]), Example(tokens=(4, 5, 6), mask=(False, True, True), prompt_length=1)
    assert pack_examples([text]).prompt_lengths is None
    assert pack_examples([text, answer]).prompt_lengths.tolist() == [2, 1]
    joined = concat_batches([pack_examples([answer, answer]), pack_examples([text, text])])
    assert joined.prompt_lengths.tolist() == [1, 1, 2, 2]
    assert joined.prompt_lengths.dtype == torch.int64
    assert concat_batches([pack_examples([text])] * 2).prompt_lengths is None
    # what is read on the host stays there
    assert joined.to("meta").prompt_lengths is joined.prompt_lengths


@pytest.mark.parametrize("length", [-1, 4])
def test_a_prompt_is_part_of_its_example(length: int) -> None:
    with pytest.raises(ValueError, match=rf"prompt_length must be in \[0, 3\], got {length}"):
        Example(tokens=(4, 5, 6), mask=(False, True, True), prompt_length=length)


def test_concatenation_needs_batches() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        concat_batches([])


def test_batch_moves_with_all_its_tensors() -> None:
    batch = pack_examples([Example(tokens=(4, 5), mask=(True, True), weight=2.0)]).to("meta")
    assert {batch.tokens.device.type, batch.cu_seqlens.device.type, batch.targets.device.type} == {"meta"}
    assert batch.weights is not None
    assert batch.weights.device.type == "meta"


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(50, 120))
def test_bins_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = plan_bins(lengths, budget)
    assert sorted(index for items in bins for index in items) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in items) <= budget for items in bins)
    assert all(items for items in bins) or not sum(lengths)


def test_bins_are_filled_well() -> None:
    lengths = [20 + (7 * i) % 60 for i in range(500)]
    bins = plan_bins(lengths, 1000)
    assert len(bins) <= -(-sum(lengths) // 1000) + 1


def test_sequence_above_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match="sequence 1 takes 9 positions, more than the budget of 8"):
        plan_bins([3, 9], 8)
