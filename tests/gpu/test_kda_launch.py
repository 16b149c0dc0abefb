"""How KDA's kernels are launched: graphs, compiled code, no wait for the device, 64-bit offsets, bounds on the CPU."""

import pytest
import torch

from perilune.ops import SequenceLayout, kda
from tests.gpu.kda_checks import (
    BOTH_WALKS,
    DEVICE,
    MAIN,
    PARAMETERS,
    as_leaves,
    assert_same_bits,
    constants,
    leaves,
    options,
    piece,
    squares,
)
from tests.ops.kda_triton_cases import (
    PACKED,
    relative_error,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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
