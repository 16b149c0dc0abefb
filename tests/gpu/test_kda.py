"""The kernels of KDA on a GPU, against the chunkwise backend in float64 and against themselves.

Totals are odd and packs have several sequences wherever it does not matter: Triton compiles anew for sizes that are 1
or multiples of 16. Every new combination of widths, chunk size and switches compiles for some seconds.
"""

import pytest
import torch

from perilune.ops import SequenceLayout, kda, kda_backend
from perilune.ops.cuda import CudaKernel
from perilune.ops.kda import cuda
from tests.gpu.kda_checks import (
    BOTH_WALKS,
    DEVICE,
    GRID,
    LIMITS,
    MAIN,
    PARAMETERS,
    SEGMENTED,
    WIDE,
    as_leaves,
    assert_same_bits,
    by_sequence,
    check,
    constants,
    leaves,
    options,
    piece,
    pulled_back,
    squares,
    worst_errors,
)
from tests.ops.kda_cases import Case, as_dtype
from tests.ops.kda_triton_cases import (
    PACKED,
    check_prefix,
    edited_after,
    relative_error,
    relative_errors,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BEYOND = {"gate tiny, keys identical, beta 0.95": {"dv": 1e-2}}
"""Limits of section 19 that no backend keeps, as "cuda" does (docs/kernels.md)."""


@pytest.mark.parametrize("name", GRID)
def test_values_and_gradients_stay_within_the_limits(name, backend, request):
    if backend == "triton" and name in BEYOND:
        request.applymarker(pytest.mark.xfail(strict=True, reason="write keys nearly cancel (docs/kernels.md)"))
    check(backend, GRID[name], torch.bfloat16, LIMITS | BEYOND.get(name, {}))


@pytest.mark.parametrize("name", SEGMENTED)
def test_segments_stay_within_the_limits(name, backend):
    check(backend, GRID[name], torch.bfloat16, LIMITS, segment_chunks=SEGMENTED[name])


@pytest.mark.parametrize("segments", [None, 2])
def test_hoppers_walks_run_and_agree_with_tritons(segments, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("walks in CUDA C++ are for Hopper")
    launched, launch = [], CudaKernel.launch

    def spy(kernel, *arguments):
        launched.append(kernel.name)
        launch(kernel, *arguments)

    monkeypatch.setattr(CudaKernel, "launch", spy)
    tensors, changes = leaves(MAIN), {"backend": "cuda", "segment_chunks": segments}
    ours = pulled_back(MAIN, tensors, **changes)
    assert {"walk_chunks", "walk_chunks_back"} <= set(launched)
    launched.clear()
    monkeypatch.setattr(cuda, "has_walks", lambda device: False)
    others = pulled_back(MAIN, tensors, **changes)
    assert "prepare_chunks" in launched
    assert "walk_chunks" not in launched
    errors = worst_errors(MAIN, ours, others)
    assert all(error < LIMITS[name] for name, error in errors.items()), errors


@pytest.mark.parametrize("gate", ["tiny", "zero"])
def test_many_segments_of_slow_decay_stay_within_the_limits(gate, backend):
    """Whatever enters the first of 64 segments is still there at the end."""
    case = Case(lengths=(4096, 77), gate=gate, keys="correlated", beta=0.5, **WIDE)
    check(backend, case, torch.bfloat16, LIMITS, segment_chunks=1)


@pytest.mark.parametrize(
    ("dtype", "key_dim", "value_dim", "chunk_size", "wanted"),
    [
        (torch.bfloat16, 128, 128, 64, "cuda"),
        (torch.float16, 64, 256, 64, "cuda"),
        (torch.bfloat16, 128, 128, 32, "triton"),
        (torch.bfloat16, 100, 128, 64, "triton"),
        (torch.bfloat16, 128, 96, 64, "triton"),
        (torch.float32, 128, 128, 64, "torch"),
        (torch.bfloat16, 300, 128, 64, "torch"),
    ],
)
def test_auto_is_the_fastest_that_takes_a_call(dtype, key_dim, value_dim, chunk_size, wanted):
    q, v = (torch.empty(1, 1, 2, width, dtype=dtype, device=DEVICE) for width in (key_dim, value_dim))
    assert kda_backend(q, v, chunk_size=chunk_size) == wanted


def test_strided_and_misaligned_inputs_are_copied(backend):
    tensors = constants(leaves(MAIN))
    apart = dict(tensors)
    for name in PACKED:
        x = tensors[name].flatten(2)
        rows = torch.empty(*x.shape[:2], 1 + x.shape[2], dtype=x.dtype, device=DEVICE)[..., 1:]
        apart[name] = rows.copy_(x).view_as(tensors[name])
    wanted = squares(as_leaves(tensors), **options(MAIN), backend=backend)
    found = squares({name: x.requires_grad_() for name, x in apart.items()}, **options(MAIN), backend=backend)
    assert_same_bits(found, wanted)


def test_one_segment_is_one_walk(backend):
    """But for what the fold hands on."""
    tensors = leaves(MAIN)
    whole, found = (pulled_back(MAIN, tensors, backend=backend, segment_chunks=chunks) for chunks in (None, 8))
    assert_same_bits(found, whole, "final_state", "dinitial_state", *PARAMETERS)
    assert max(relative_errors(found, whole).values()) < 1e-2


@pytest.mark.parametrize("name", ["64", "empty and single", "bounded, grouped", "gate masks, keys random, beta None"])
def test_float16_stays_within_the_limits(name, backend):
    check(backend, GRID[name], torch.float16, LIMITS)


def test_queries_of_zeros_read_nothing(backend):
    tensors = constants(leaves(MAIN))
    tensors["q"][:, 310:400] = 0
    found = squares(as_leaves(tensors), **options(MAIN), backend=backend)
    assert not found["o"][:, 310:400].any()
    assert found["dk"][:, 310:400].any()
    assert not [name for name, x in found.items() if not x.isfinite().all()]


def test_without_decay_orthonormal_keys_recall_their_values(backend):
    """Beta 1 replaces what a key had, so that each finds the last value written with it."""
    rotation = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0))).Q
    keys = torch.cat((torch.eye(128), torch.eye(128).flip(0), rotation))[None, :, None].expand(1, 384, 2, 128)
    v = torch.randn(1, 384, 2, 128, generator=torch.Generator().manual_seed(1))
    k, v = keys.to(DEVICE, torch.bfloat16).contiguous(), v.to(DEVICE, torch.bfloat16)
    g, beta = torch.zeros_like(k), torch.ones_like(k[..., 0])
    o, state = kda(k, k, v, g, beta, scale=1.0, output_final_state=True, backend=backend)
    assert torch.equal(o[:, :128], v[:, :128])
    assert relative_error(o, v) < LIMITS["o"]
    recalled = torch.einsum("thk,hkv->thv", k[0, -128:].double(), state[0].double())
    assert relative_error(recalled, v[0, -128:]) < LIMITS["o"]


@pytest.mark.parametrize("segments", [None, 1])
def test_float32_is_closer(segments):
    case = Case(raw=True, lengths=(37, 0, 130), key_dim=32, value_dim=32, chunk_size=64)
    check("triton", case, torch.float32, dict.fromkeys(LIMITS, 1e-4), segment_chunks=segments)


@BOTH_WALKS
def test_what_the_forward_keeps_is_what_the_backward_computes_again(segments, backend):
    tensors, changes = leaves(MAIN), {"backend": backend, "segment_chunks": segments}
    again, kept = (pulled_back(MAIN, tensors, save_states=save, **changes) for save in (False, True))
    assert max(relative_errors(kept, again).values()) < 1e-3


@BOTH_WALKS
@pytest.mark.parametrize("save_states", [False, True])
def test_chunk_states_are_right_and_leave_gradients_as_they_are(save_states, segments, backend):
    tensors, changes = leaves(MAIN), {"backend": backend, "segment_chunks": segments}
    plain = pulled_back(MAIN, tensors, **changes)
    with_states = pulled_back(MAIN, tensors, **changes, save_states=save_states, return_chunk_states=True)
    assert max(relative_errors(with_states, plain).values()) < 1e-3
    arguments = {**options(MAIN), "return_chunk_states": True}
    found = kda(**constants(tensors), **{**arguments, **changes})[2]
    wanted = kda(**as_dtype(tensors, torch.float64), **arguments, backend="torch")[2]
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) < LIMITS["final_state"]


@BOTH_WALKS
@pytest.mark.parametrize("cut", [64, 150, 299])
def test_edits_after_a_token_change_no_bit_before_it(cut, segments, backend):
    tensors = leaves(MAIN)
    check_prefix(
        MAIN, tensors, edited_after(cut, tensors, leaves(MAIN, seed=3)), cut, **options(MAIN, segments), backend=backend
    )


@BOTH_WALKS
def test_cutting_a_sequence_off_changes_no_bit_before_the_cut(segments, backend):
    tensors = leaves(MAIN)
    whole = kda(**constants(tensors), **options(MAIN, segments), backend=backend)[0]
    layout = SequenceLayout.from_lengths((150, 1), DEVICE)
    part = constants(piece(tensors, slice(0, 151), slice(0, 2)))
    o = kda(**part, **{**options(MAIN, segments), "cu_seqlens": layout}, backend=backend)[0]
    assert torch.equal(o[:, :150], whole[:, :150])


@BOTH_WALKS
def test_permuting_sequences_permutes_results(segments, backend):
    order = [3, 1, 0, 2]
    tensors = leaves(MAIN)
    parts = {name: x.detach().split(MAIN.lengths, 1) for name, x in tensors.items() if name in PACKED}
    permuted = {name: torch.cat([split[i] for i in order], 1) for name, split in parts.items()}
    permuted["initial_state"] = tensors["initial_state"][order]
    permuted = as_leaves({**tensors, **permuted})
    layout = SequenceLayout.from_lengths([MAIN.lengths[i] for i in order], DEVICE)
    wanted = squares(tensors, **options(MAIN, segments), backend=backend)
    found = squares(permuted, **{**options(MAIN, segments), "cu_seqlens": layout}, backend=backend)
    for name in wanted.keys() - PARAMETERS:
        before = by_sequence(name, wanted[name], MAIN.lengths)
        after = by_sequence(name, found[name], layout.lengths)
        assert all(torch.equal(part, before[i]) for part, i in zip(after, order, strict=True)), name


@BOTH_WALKS
def test_neighbors_in_a_pack_change_no_bit(segments, backend):
    """With many of them slices of the state are wider, with none N is a constant."""
    case = Case(raw=True, lengths=(*(17,) * 19, 466), **WIDE)
    tensors, results = leaves(case), []
    for start, first, lengths in ((0, 0, case.lengths), (17 * 18, 18, (17, 466)), (17 * 19, 19, (466,))):
        part = piece(tensors, slice(start, None), slice(first, None))
        layout = SequenceLayout.from_lengths(lengths, DEVICE)
        found = squares(part, **{**options(case, segments), "cu_seqlens": layout}, backend=backend)
        results.append({name: by_sequence(name, x, lengths)[-1] for name, x in found.items()})
    assert_same_bits(results[1], results[0], *PARAMETERS)
    assert_same_bits(results[2], results[0], *PARAMETERS)


@BOTH_WALKS
def test_a_sequence_of_nans_does_not_reach_the_others(segments, backend):
    tensors = leaves(MAIN)
    spoiled = as_leaves(tensors)
    for name in PACKED:
        spoiled[name].data[:, :300] = torch.nan
    clean, found = (squares(x, **options(MAIN, segments), backend=backend) for x in (tensors, spoiled))
    for name in clean.keys() - PARAMETERS:
        parts = (by_sequence(name, x[name], MAIN.lengths)[1:] for x in (clean, found))
        assert all(torch.equal(*pair) for pair in zip(*parts, strict=True)), name


@pytest.mark.parametrize("segments", [None, 1])
def test_a_split_at_a_chunk_with_the_state_carried_changes_no_bit(segments, backend):
    """At a segment, where there are any."""
    tensors = constants(leaves(MAIN))
    whole, final = kda(**tensors, **options(MAIN, segments), backend=backend)
    state, parts = tensors["initial_state"][-1:], []
    for start, length in ((301, 128), (429, 64), (493, 274)):
        part = piece(tensors, slice(start, start + length), slice(3, None))
        part["initial_state"] = state
        layout = SequenceLayout.from_lengths([length], DEVICE)
        o, state = kda(**constants(part), **{**options(MAIN, segments), "cu_seqlens": layout}, backend=backend)
        parts.append(o)
    assert torch.equal(torch.cat(parts, 1), whole[:, 301:])
    assert torch.equal(state, final[-1:])


@BOTH_WALKS
@pytest.mark.parametrize("save_states", [False, True])
def test_repeats_are_equal_to_the_last_bit(save_states, segments, backend):
    tensors = leaves(MAIN)
    runs = [squares(tensors, **options(MAIN, segments), backend=backend, save_states=save_states) for _ in range(4)]
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


def test_extreme_raw_inputs_stay_finite(backend):
    tensors = constants(leaves(MAIN))
    q, k, v, g, beta = (tensors[name] for name in PACKED)
    g[:, :100], g[:, 100:200], g[:, 400:500] = 3e4, -3e4, -3e4
    beta[:, 50:150], beta[:, 150:250] = 1e4, -1e4
    q[:, 350:400], k[:, 350:450], v[:, 600:650] = 0.0, 0.0, 1e4
    q[:, 500:550], k[:, 500:600] = 1e4, -1e4
    tensors["A_log"][0], tensors["A_log"][1] = 10.0, -10.0
    found = squares(as_leaves(tensors), **options(MAIN), backend=backend)
    assert not [name for name, x in found.items() if not x.isfinite().all()]


@pytest.mark.parametrize("strongest", [-1e4, -1e30])
def test_extreme_log_decays_stay_finite(strongest, backend):
    case = Case(lengths=(200, 65), gate="masks_and_init", keys="identical", beta=1.0, **WIDE)
    tensors = constants(leaves(case))
    tensors["g"][:, ::7] = strongest
    found = squares(as_leaves(tensors), **options(case), backend=backend)
    assert not [name for name, x in found.items() if not x.isfinite().all()]
