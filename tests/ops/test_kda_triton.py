"""The Triton kernels of KDA in their interpreter, and what the front door says where they cannot run."""

import pytest
import torch

from perilune.errors import BackendError
from perilune.ops import SequenceLayout, kda, kda_backend
from perilune.ops.kda import suggest_segment_chunks
from tests.ops.interpreter import assert_equal_in_the_interpreter, patient
from tests.ops.kda_cases import Case, as_dtype

pytest.importorskip("triton", reason="triton is not installed")


@patient
@pytest.mark.parametrize("section", ["walks", "segments"])
def test_the_kernels_equal_the_reference_in_their_interpreter(section):
    assert_equal_in_the_interpreter("kda_triton_cases", section)


def test_tensors_that_the_kernels_do_not_take_are_refused_with_the_reason(monkeypatch):
    case, wide = Case(), Case(key_dim=300)
    with pytest.raises(BackendError, match="needs tensors on a GPU, got cpu"):
        kda(**as_dtype(case.tensors(), torch.float32), **case.options(), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=r"takes float32, bfloat16 and float16, got torch\.float64; use 'torch'"):
        kda(**case.tensors(), **case.options(), backend="triton")
    with pytest.raises(BackendError, match="K and V up to 256, got K=300"):
        kda(**as_dtype(wide.tensors(), torch.float32), **wide.options(), backend="triton")


def test_auto_is_the_chunkwise_backend_on_a_cpu():
    x = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16)
    assert kda_backend(x, x) == "torch"


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_segments_are_refused_where_no_backend_walks_them(backend):
    case = Case()
    with pytest.raises(BackendError, match=r"segment_chunks=2 needs backend 'cuda' or 'triton', this call has '\w+'"):
        kda(**case.tensors(), **case.options(), segment_chunks=2, backend=backend)


def test_a_segment_has_chunks():
    case = Case()
    with pytest.raises(ValueError, match="segment_chunks must be >= 1, or None for whole sequences, got 0"):
        kda(**case.tensors(), **case.options(), segment_chunks=0)


@pytest.mark.parametrize("segment_chunks", [1, 2, 3, 100])
@pytest.mark.parametrize("host_knows", [True, False])
def test_segments_are_cut_at_multiples_from_the_start_of_each_sequence(segment_chunks, host_knows):
    from perilune.ops.kda.triton import plan_chunks, plan_layout

    lengths = (33, 0, 1, 96, 0)
    layout = SequenceLayout.from_lengths(lengths)
    if host_knows:
        plan = plan_layout(layout, 16, segment_chunks)
    else:
        plan = plan_chunks(layout.cu_seqlens.long(), 150, 16, segment_chunks)
    tokens, chunks, first, start, chunk = [], [], [0], 0, 0
    for length in lengths:
        cuts = range(0, -(-length // 16), segment_chunks)
        tokens += [start + 16 * cut for cut in cuts]
        chunks += [chunk + cut for cut in cuts]
        first.append(len(tokens))
        start, chunk = start + length, chunk - (-length // 16)
    segments = plan.segments
    unused = segments.num_segments + 1 - len(tokens)
    assert 1 <= unused <= len(lengths) + plan.num_slots - chunk
    assert segments.first.tolist() == first
    assert segments.cu_seqlens.tolist() == tokens + [start] * unused
    assert segments.offsets.tolist() == chunks + [chunk] * unused


@pytest.mark.parametrize(
    ("tokens", "walks", "suggested"),
    [(8191, 1, None), (8192, 1, 12), (32768, 4, 64), (8192, 11, 43), (8192, 12, None), (8192, 96, None), (0, 0, None)],
)
def test_segments_are_suggested_where_few_walks_are_long(tokens, walks, suggested):
    assert suggest_segment_chunks(tokens, walks, 128) == suggested
