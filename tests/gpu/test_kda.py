"""The kernels of KDA on a GPU, against the chunkwise backend in float64 and against themselves.

Totals are odd and packs have several sequences wherever it does not matter: Triton compiles anew for sizes that are 1
or multiples of 16. Every new combination of widths, chunk size and switches compiles for some seconds.
"""

import pytest
import torch

from perilune.ops import SequenceLayout, kda, kda_backend
from perilune.ops.cuda import CudaKernel
from perilune.ops.kda import cuda
from perilune.ops.kda.cuda import kda_cuda_obstacle
from tests.ops.kda_cases import Case, as_dtype
from tests.ops.kda_triton_cases import (
    PACKED,
    check_prefix,
    edited_after,
    relative_error,
    relative_errors,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    return request.param


LIMITS = {
    "o": 5e-3, "final_state": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dinitial_state": 8e-3, "dg": 2e-2,
    "dbeta": 2e-2, "ddt_bias": 8e-3, "dA_log": 2e-2,
}  # fmt: skip
PARAMETERS = {"dA_log", "ddt_bias"}
"""Sums over all chunks of a pack, whose order shows in their last bits."""
WIDE = {"key_dim": 128, "value_dim": 128, "chunk_size": 64}
NARROW = {"key_dim": 64, "value_dim": 64, "chunk_size": 64}
MAIN = Case(raw=True, lengths=(300, 0, 1, 466), **WIDE)
GRID = {
    "every length": Case(raw=True, lengths=(1, 15, 16, 17, 63, 64, 65, 500, 1024), **WIDE),
    "empty and single": MAIN,
    "no state": Case(raw=True, lengths=(129, 0, 70), state=False, **WIDE),
    "scale 1": Case(raw=True, lengths=(64, 33), scale=1.0, **WIDE),
    "repeated raw keys": Case(raw=True, lengths=(200, 1), keys="repeated", **WIDE),
    "zero raw keys": Case(raw=True, lengths=(200, 1), keys="some_zero", **WIDE),
    "128 x 256": Case(raw=True, lengths=(65, 130), key_dim=128, value_dim=256, chunk_size=64),
    "64": Case(raw=True, lengths=(500, 17), **NARROW),
    "100 x 60, doubled beta": Case(
        raw=True, lengths=(130, 0, 5), key_dim=100, value_dim=60, chunk_size=64, switches={"allow_neg_eigval": True}
    ),
    "bounded, grouped": Case(raw=True, lengths=(500, 1, 64), groups=2, lower_bound=-5.0, **WIDE),
    "chunks of 32": Case(raw=True, lengths=(129, 32), **{**WIDE, "chunk_size": 32}),
    "32, chunks of 64": Case(raw=True, lengths=(130, 64), key_dim=32, value_dim=32, chunk_size=64),
    "60 x 100": Case(raw=True, lengths=(130, 64), key_dim=60, value_dim=100, chunk_size=64, groups=2),
    "16 x 32, chunks of 16": Case(raw=True, lengths=(37, 0, 16), groups=4, key_dim=16, value_dim=32),
    **{
        f"gate {gate}, keys {keys}, beta {beta}": Case(lengths=(200, 65), gate=gate, keys=keys, beta=beta, **WIDE)
        for gate, keys, beta in (
            ("zero", "random", None),
            ("tiny", "identical", 0.95),
            ("init", "identical", None),
            ("init", "correlated", 1.0),
            ("init", "repeated", None),
            ("init", "random", 2.0),
            ("init", "some_zero", 0.0),
            ("saturated", "random", None),
            ("spiky", "correlated", 0.95),
            ("hundred", "repeated", None),
            ("masks", "random", None),
            ("masks_and_init", "random", None),
        )
    },
}

SEGMENTED = {
    "empty and single": 1,
    "128 x 256": 1,
    "64": 3,
    "100 x 60, doubled beta": 1,
    "bounded, grouped": 3,
    "chunks of 32": 2,
    "16 x 32, chunks of 16": 1,
    "gate zero, keys random, beta None": 1,
    "gate init, keys correlated, beta 1.0": 2,
    "gate hundred, keys repeated, beta None": 1,
    "gate masks_and_init, keys random, beta None": 2,
}
"""Cases of the grid with the chunks of their segments."""
BOTH_WALKS = pytest.mark.parametrize("segments", [None, 2], ids=["whole", "in segments"])


def leaves(case, dtype=torch.bfloat16, seed=0):
    """Leaf tensors in `dtype` on the device; states and gate parameters in float32."""
    made = case.tensors(seed=seed)
    kept = {name: x.detach().to(dtype if name in PACKED else torch.float32) for name, x in made.items()}
    return {name: x.to(DEVICE).requires_grad_() for name, x in kept.items()}


def options(case, segments=None):
    layout = SequenceLayout.from_lengths(case.lengths, DEVICE)
    return {**case.options(), "cu_seqlens": layout, "segment_chunks": segments}


def pulled_back(case, tensors, **changes):
    """Outputs, and gradients against ones that bfloat16 holds, so that no dtype of the call rounds them."""
    o, final_state = kda(**tensors, **{**options(case), **changes})[:2]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (o, final_state)]
    grads = torch.autograd.grad((o, final_state), list(tensors.values()), seeds)
    named = {f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}
    return {"o": o.detach(), "final_state": final_state.detach(), **named}


def by_sequence(name, x, lengths):
    """Parts of a result; gradients of gate parameters have none."""
    if name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
        return x.split(lengths, 1)
    return x.unbind() if name in ("final_state", "dinitial_state") else (x,)


def worst_errors(case, found, wanted):
    """Of all sequences; dbeta is measured over the pack, as a token has but one a head."""
    errors = {}
    for name in wanted:
        lengths = case.lengths if name != "dbeta" else (sum(case.lengths),)
        parts = (by_sequence(name, x[name], lengths) for x in (found, wanted))
        errors[name] = max(relative_error(*part) for part in zip(*parts, strict=True))
    return errors


def check(backend, case, dtype, limits, **changes):
    tensors = leaves(case, dtype)
    if backend == "cuda" and (obstacle := kda_cuda_obstacle(tensors["q"], tensors["v"], case.chunk_size)):
        pytest.skip(f"backend 'cuda' {obstacle}")
    found = pulled_back(case, tensors, backend=backend, **changes)
    wanted = pulled_back(case, as_dtype(tensors, torch.float64), backend="torch")
    errors = worst_errors(case, found, wanted)
    beyond = {name: f"{error:.1e}" for name, error in errors.items() if not error < limits[name]}
    assert not beyond


def piece(tensors, tokens, sequences):
    """Leaves of some of the tokens and sequences."""
    parts = {name: x[:, tokens] if name in PACKED else x for name, x in tensors.items()}
    parts["initial_state"] = tensors["initial_state"][sequences]
    return as_leaves(parts)


def as_leaves(tensors):
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def constants(tensors):
    return {name: x.detach() for name, x in tensors.items()}


def squares(tensors, call=kda, **arguments):
    """Outputs, and gradients of the sum of their squares."""
    o, final_state = call(**tensors, **arguments)[:2]
    loss = o.float().square().sum() + final_state.square().sum()
    grads = torch.autograd.grad(loss, list(tensors.values()))
    return {"o": o, "final_state": final_state, **{f"d{n}": x for n, x in zip(tensors, grads, strict=True)}}


def assert_same_bits(found, wanted, *but):
    differing = [name for name in wanted if name not in but and not torch.equal(found[name], wanted[name])]
    assert not differing


BEYOND = {"gate tiny, keys identical, beta 0.95": {"dv": 1e-2}}
"""Limits of section 19 that no backend keeps: dv is 8.3e-3 on an H100 (docs/kernels.md)."""


@pytest.mark.parametrize("name", GRID)
def test_values_and_gradients_stay_within_the_limits(name, backend):
    check(backend, GRID[name], torch.bfloat16, LIMITS | BEYOND.get(name, {}))


@pytest.mark.parametrize("name", SEGMENTED)
def test_segments_stay_within_the_limits(name, backend):
    check(backend, GRID[name], torch.bfloat16, LIMITS, segment_chunks=SEGMENTED[name])


@pytest.mark.parametrize("segments", [None, 2])
def test_hoppers_walks_run_and_equal_tritons_to_the_bit(segments, monkeypatch):
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
    assert_same_bits(ours, others)


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


def lengths_argument(case, host_knows):
    """A layout, or a tensor that leaves the last tokens out; nothing of it is to be read from the device."""
    if host_knows:
        return SequenceLayout.from_lengths(case.lengths, DEVICE)
    return torch.tensor([0, 300, 300, 301, 700], dtype=torch.int32, device=DEVICE)


@BOTH_WALKS
@pytest.mark.parametrize("host_knows", [True, False])
def test_a_captured_forward_is_the_eager_one(host_knows, segments, backend):
    tensors = constants(leaves(MAIN))
    arguments = {**options(MAIN, segments), "cu_seqlens": lengths_argument(MAIN, host_knows), "backend": backend}
    expected = kda(**tensors, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kda(**tensors, **arguments)
    for _ in range(2):
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@BOTH_WALKS
def test_captured_gradients_are_the_eager_ones(segments, backend):
    tensors = leaves(MAIN)
    arguments = {**options(MAIN, segments), "backend": backend}
    # Without its graph, whose leaves would belong to the default stream, which a capture must not meet.
    expected = {name: x.detach() for name, x in squares(tensors, **arguments).items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        squares(tensors, **arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = squares(tensors, **arguments)
    for x in found.values():
        x.detach().fill_(torch.nan)
    graph.replay()
    assert_same_bits(found, expected)


@BOTH_WALKS
def test_a_replay_follows_new_lengths(segments, backend):
    tensors = constants(leaves(MAIN))
    bounds = lengths_argument(MAIN, False)
    arguments = {**options(MAIN, segments), "cu_seqlens": bounds, "backend": backend}
    kda(**tensors, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kda(**tensors, **arguments)
    bounds.copy_(torch.tensor([0, 5, 130, 130, 767]))
    graph.replay()
    expected = kda(**tensors, **arguments)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@BOTH_WALKS
@pytest.mark.parametrize("host_knows", [True, False])
def test_nothing_waits_for_the_device(host_knows, segments, backend):
    tensors = leaves(MAIN)
    arguments = {**options(MAIN, segments), "cu_seqlens": lengths_argument(MAIN, host_knows), "backend": backend}
    expected = squares(tensors, **arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = squares(tensors, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(found, expected)


@BOTH_WALKS
def test_uncovered_tokens_get_zeros_and_stay_unread(segments, backend):
    tensors = constants(leaves(MAIN))
    for name in PACKED:
        tensors[name][:, 700:] = torch.nan
    bounds = lengths_argument(MAIN, False)
    found = squares(as_leaves(tensors), **{**options(MAIN, segments), "cu_seqlens": bounds}, backend=backend)
    layout = SequenceLayout.from_lengths((300, 0, 1, 399), DEVICE)
    covered = piece(tensors, slice(0, 700), slice(None))
    wanted = squares(covered, **{**options(MAIN, segments), "cu_seqlens": layout}, backend=backend)
    for name, x in wanted.items():
        if name in PARAMETERS:
            assert relative_error(found[name], x) < 1e-4
        else:
            ours = found[name]
            is_token = name in ("o", "dq", "dk", "dv", "dg", "dbeta")
            assert torch.equal(ours[:, :700] if is_token else ours, x), name
            assert not is_token or not ours[:, 700:].any(), name


@BOTH_WALKS
def test_compiled_equals_eager(segments, backend):
    tensors = leaves(MAIN)
    arguments = {**options(MAIN, segments), "backend": backend}
    eager = squares(tensors, **arguments)
    compiled = squares(tensors, torch.compile(kda, fullgraph=True, backend="aot_eager"), **arguments)
    assert_same_bits(compiled, eager, *PARAMETERS)
    assert max(relative_error(compiled[name], eager[name]) for name in PARAMETERS) < 1e-5


def test_offsets_beyond_32_bits(backend):
    if torch.cuda.get_device_properties(0).total_memory < 76e9:
        pytest.skip("needs 76 GB of memory")
    torch.cuda.empty_cache()
    heads, tokens = 32, 540_000
    layout = SequenceLayout.from_lengths([tokens - 300, 300], DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    tensors = {name: draw(1, tokens, heads, 128) for name in ("q", "k", "v", "g")}
    assert tensors["q"][:, :-300].numel() > 2**31
    tensors["beta"] = draw(1, tokens, heads)
    switches = {"gate_in_kernel": True, "qk_l2norm_in_kernel": True, "beta_sigmoid_in_kernel": True}
    switches["A_log"] = torch.zeros(heads, device=DEVICE)
    last = {name: x[:, -300:].contiguous() for name, x in tensors.items()}
    with torch.no_grad():
        far = kda(**tensors, **switches, cu_seqlens=layout, backend=backend)[0][:, -300:].clone()
        near = kda(**last, **switches, backend=backend)[0]
    assert near.any()
    assert torch.equal(far, near)


def test_gradients_beyond_32_bits(backend):
    """Of states and their gradients, and of everything in bytes; more does not fit."""
    if torch.cuda.get_device_properties(0).total_memory < 76e9:
        pytest.skip("needs 76 GB of memory")
    torch.cuda.empty_cache()
    heads, tokens = 8, 1_070_000
    layout = SequenceLayout.from_lengths([tokens - 300, 300], DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    names = ("q", "k", "v", "g")
    shapes = dict.fromkeys(names, (1, tokens, heads, 128)) | {"beta": (1, tokens, heads)}
    whole = {
        name: torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    assert tokens * heads * 128 * 2 > 2**31
    assert tokens // 64 * heads * 128 * 128 > 2**31
    switches = {"gate_in_kernel": True, "qk_l2norm_in_kernel": True, "beta_sigmoid_in_kernel": True}
    switches["A_log"] = torch.zeros(heads, device=DEVICE)
    results = []
    for tensors, bounds in ((whole, layout), ({name: x[:, -300:].clone() for name, x in whole.items()}, None)):
        for x in tensors.values():
            x.requires_grad_()
        o = kda(**tensors, **switches, cu_seqlens=bounds, backend=backend)[0]
        grads = torch.autograd.grad(o, list(tensors.values()), o.detach())
        results.append([x[:, -300:].clone() for x in (o.detach(), *grads)])
        del o, grads
    for far, near in zip(*results, strict=True):
        assert near.any()
        assert torch.equal(far, near)


@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_sequence_bounds_may_lie_on_the_cpu(backend):
    """What reads them on the GPU would otherwise read anything."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, g = (torch.randn(1, 200, 2, 64, generator=generator, device="cuda").bfloat16() for _ in range(4))
    beta = torch.rand(1, 200, 2, generator=generator, device="cuda").bfloat16()
    layout = SequenceLayout.from_lengths([70, 0, 130], "cuda")
    options = {"A_log": None, "lower_bound": -5.0, "gate_in_kernel": True, "qk_l2norm_in_kernel": True}
    want = kda(q, k, v, g, beta, cu_seqlens=layout, backend=backend, **options)[0]
    for bounds in (SequenceLayout.from_lengths([70, 0, 130]), layout.cu_seqlens.cpu(), layout.cu_seqlens.cpu().long()):
        assert torch.equal(kda(q, k, v, g, beta, cu_seqlens=bounds, backend=backend, **options)[0], want)
