"""MoBA's kernels on a GPU: against float64 for the same routing, and what must hold to the bit."""

import pytest
import torch

import perilune.ops.moba.triton.plan as tables
from perilune.ops import SequenceLayout, moba_attention, moba_route
from perilune.seeding import make_generator
from tests.helpers import assert_close
from tests.ops.moba_cases import run_moba

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# a row's share of each chosen block is rounded to 16 bits once, as are its probabilities
RATIO = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def make(lengths, heads, kv_heads, dim, dtype=torch.bfloat16, keys=None, value_dim=None):
    generator = make_generator(0, "moba", *lengths, dim)
    shapes = [(sum(n), h, d) for n, h, d in (
        (lengths, heads, dim), (keys or lengths, kv_heads, dim), (keys or lengths, kv_heads, value_dim or dim)
    )]  # fmt: skip
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to("cuda", dtype) for s in shapes]
    layouts = (SequenceLayout.from_lengths(n, "cuda") for n in (lengths, keys or lengths))
    return inputs, dict(zip(("cu_seqlens_q", "cu_seqlens_k"), layouts, strict=True))


def compare(inputs, options, dtype):
    chosen = moba_route(*inputs[:2], **options, backend="triton")
    peer = moba_route(*inputs[:2], **options, backend="blockwise")
    if chosen.past.numel():  # sums in another order may part near-ties
        assert (chosen.past != peer.past).any(-1).float().mean() < 5e-3
    got = run_moba(inputs, options, "triton", routing=chosen)
    expected = run_moba([x.double() for x in inputs], options, "blockwise", routing=chosen)
    for name in ("o", "dq", "dk", "dv"):
        assert_close(name, expected[name], got[name], RATIO[dtype], floor=1e-5)  # the gradients of one key are zero
    torch.testing.assert_close(got["lse"], expected["lse"].float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(got["max"], expected["max"], rtol=1e-5, atol=1e-6)
    if got["o"].numel():
        # of a mean over a few values alone, rounding to 16 bits is more
        assert (got["o"].double() - expected["o"]).abs().mean() < max(4e-4, 2**-8 * expected["o"].abs().mean())
    for name in ("o", "dq", "dk", "dv"):
        size = expected[name].abs().amax().item() if expected[name].numel() else 0.0
        assert (got[name].double() - expected[name]).abs().le(2e-2 * max(1.0, size)).all(), name


LENGTHS = (1, 127, 128, 129, 256, 643)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("topk", [1, 2, 3, 6, 100])
def test_lengths_and_choices(length, topk):
    inputs, layouts = make([length], 4, 2, 64)
    compare(inputs, {"block_size": 128, "topk": topk, **layouts}, torch.bfloat16)


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_widths(dim, dtype):
    inputs, layouts = make([900, 0, 1, 300], 4, 2, dim, dtype)
    compare(inputs, {"block_size": 64, "topk": 3, **layouts}, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_means_in_float32(dim, dtype):
    inputs, layouts = make([900, 300], 4, 2, dim, dtype)
    compare(inputs, {"block_size": 64, "topk": 3, "float32_means": True, **layouts}, dtype)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_grouped_heads(group):
    inputs, layouts = make([1200, 700], 8, 8 // group, 64)
    compare(inputs, {"block_size": 128, "topk": 3, **layouts}, torch.bfloat16)


@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 100, 256, 512, 1000])
def test_block_sizes(block_size):
    inputs, layouts = make([2100, 300], 2, 1, 64)
    compare(inputs, {"block_size": block_size, "topk": 3, **layouts}, torch.bfloat16)


def test_values_of_another_width():
    inputs, layouts = make([700], 2, 2, 64, value_dim=128)
    compare(inputs, {"block_size": 64, "topk": 4, **layouts}, torch.bfloat16)


def test_chunks_of_a_prefill_and_full_attention_from_some_place():
    inputs, layouts = make([300, 1, 0, 64], 4, 2, 64, keys=[1900, 700, 5, 640])
    compare(inputs, {"block_size": 64, "topk": 3, **layouts}, torch.bfloat16)
    inputs, layouts = make([2000, 700], 4, 2, 64)
    compare(inputs, {"block_size": 64, "topk": 3, "full_from": torch.tensor([1500, 0]), **layouts}, torch.bfloat16)


def test_slices_and_pieces_change_no_bit_but_in_sums_of_pieces(monkeypatch):
    inputs, layouts = make([1500, 700], 4, 2, 64)
    options = {"block_size": 64, "topk": 4, **layouts}
    whole = run_moba(inputs, options, "triton")
    monkeypatch.setattr(tables, "WORKSPACE_BYTES", 1 << 20)
    sliced = run_moba(inputs, options, "triton")
    assert all(torch.equal(whole[name], sliced[name]) for name in ("o", "lse", "dq", "max"))
    monkeypatch.setattr(tables, "PIECE", 64)
    monkeypatch.setattr(tables, "WORKSPACE_BYTES", 1 << 30)
    pieces = run_moba(inputs, options, "triton")
    for name in ("dk", "dv"):
        assert_close(name, whole[name], pieces[name], 4e-3)


def test_repeats_to_the_bit_and_later_tokens_change_nothing():
    inputs, layouts = make([2048], 4, 2, 128)
    options = {"block_size": 128, "topk": 3}
    runs = [run_moba(inputs, {**options, **layouts}, "triton") for _ in range(3)]
    assert all(torch.equal(runs[0][name], run[name]) for run in runs for name in run)
    part = moba_attention(*(x[:1300] for x in inputs), **options, backend="triton")
    assert torch.equal(part, runs[0]["o"][:1300])


def test_ties_and_identical_keys_choose_the_lower_blocks():
    q = torch.zeros(1024, 2, 64, dtype=torch.bfloat16, device="cuda")
    k = torch.ones_like(q)
    chosen = moba_route(q, k, block_size=64, topk=4, backend="triton").past
    assert (chosen[256:] == torch.arange(3, device="cuda")).all()
    assert torch.equal(chosen, moba_route(q, k, block_size=64, topk=4, backend="dense").past)


@pytest.mark.parametrize("blocks", [9, 64, 65, 1500])
def test_many_blocks(blocks):
    inputs, layouts = make([blocks * 16 + 5], 2, 1, 32)
    compare(inputs, {"block_size": 16, "topk": 8, **layouts}, torch.bfloat16)


def test_popular_and_unpopular_blocks():
    inputs, layouts = make([4096], 2, 2, 64)
    inputs[1][:64] += 3 * inputs[0].mean(0)  # a sink
    inputs[0] += inputs[0].mean(0)
    inputs[1][640:704] = -50 * inputs[0].float().mean(0).bfloat16()  # nobody's
    compare(inputs, {"block_size": 64, "topk": 3, **layouts}, torch.bfloat16)


@pytest.mark.parametrize("megabytes", [64, 1024])
def test_memory_stays_within_the_workspace(monkeypatch, megabytes):
    monkeypatch.setattr(tables, "WORKSPACE_BYTES", megabytes << 20)
    inputs, layouts = make([16384, 16384], 16, 8, 64)
    options = {"block_size": 64, "topk": 8, "backend": "triton", **layouts}
    choices, small = 32768 * 16 * 7, 2 << 20  # for tables, and what an allocator rounds up

    def extra(call):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)

    with torch.no_grad():
        assert extra(lambda: [moba_attention(*inputs, **options)]) <= (megabytes << 20) + 4 * 32768 * 16 + small
    leaves = [x.requires_grad_() for x in inputs]
    do = torch.ones_like(inputs[0])
    kept = (
        8 * choices + inputs[0].nbytes + 8 * 32768 * 16
    )  # choices and lists; o, lse and the product of o and its gradient
    training = extra(lambda: torch.autograd.grad(moba_attention(*leaves, **options), leaves, do))
    assert training <= (megabytes << 20) + kept + small


def test_graph_capture_and_no_word_to_the_host():
    inputs, layouts = make([1024, 640], 4, 2, 64)
    options = {"block_size": 64, "topk": 3, "backend": "triton", **layouts}
    expected = moba_attention(*inputs, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moba_attention(*inputs, **options)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_gradients_are_captured_too():
    inputs, layouts = make([1024, 640], 4, 2, 64)
    leaves, do = [x.requires_grad_() for x in inputs], torch.randn_like(inputs[0])

    def gradients():
        return torch.autograd.grad(
            moba_attention(*leaves, block_size=64, topk=3, backend="triton", **layouts), leaves, do
        )

    expected = gradients()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    for x in found:
        x.zero_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_compiled_call_is_the_same():
    inputs, layouts = make([1024, 640], 4, 2, 64)
    leaves = [x.requires_grad_() for x in inputs]

    def double(q, k, v):
        return 2 * moba_attention(q, k, v, block_size=64, topk=3, **layouts)

    expected = double(*leaves)
    found = torch.compile(double)(*leaves)
    assert torch.equal(found, expected)
    for x, y in zip(*(torch.autograd.grad(o.sum(), leaves) for o in (found, expected)), strict=True):
        assert torch.equal(x, y)


def test_auto_is_triton_for_half_types():
    inputs, layouts = make([1024], 2, 2, 64)
    options = {"block_size": 64, "topk": 3, **layouts}
    assert torch.equal(moba_attention(*inputs, **options), moba_attention(*inputs, **options, backend="triton"))
