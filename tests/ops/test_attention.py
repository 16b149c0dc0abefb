"""Attention against its oracle: values, gradients and maximum logits, packed every way they can be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perilune.errors import BackendError
from perilune.ops import decode_attention, varlen_attention
from perilune.ops.attention import torch as blocked
from perilune.ops.attention.plan import plan_groups
from perilune.ops.layout import SequenceLayout
from perilune.seeding import make_generator
from tests.helpers import assert_close
from tests.ops.spies import LargestTensor

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
# softmax of float32 logits; rounding of a bfloat16 operand is 2^-9, and gradients chain three of them
RATIO = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.2e-2}


def make_qkv(
    tokens_q: int, tokens_k: int, *, heads: int = 4, kv_heads: int = 2, dk: int = 6, dv: int = 5, dtype=torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = make_generator(0, "attention", tokens_q, tokens_k)
    shapes = (tokens_q, heads, dk), (tokens_k, kv_heads, dk), (tokens_k, kv_heads, dv)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def run_with_gradients(backend, inputs, layout_q, layout_k, **options) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, top = varlen_attention(*leaves, layout_q, layout_k, return_max_logits=True, backend=backend, **options)
    direction = torch.randn(out.shape, generator=make_generator(1, "direction"), dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, direction)
    return {"o": out.detach(), "max": top, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


RAGGED = [
    ([], []),
    ([0, 0], [0, 0]),
    ([1], [1]),
    ([0, 1, 0, 5, 3, 0], [0, 1, 0, 5, 3, 0]),
    ([64, 65, 63], [64, 65, 63]),
    ([131], [131]),
    ([7, 7, 7], [7, 7, 7]),
    ([2, 0, 3, 1], [9, 4, 3, 70]),
    ([5, 5], [21, 21]),
    ([66, 70, 3], [130, 70, 100]),
]


@pytest.mark.parametrize(("lengths_q", "lengths_k"), RAGGED)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_blocked_equals_reference_with_gradients(lengths_q, lengths_k, heads, kv_heads):
    layout_q, layout_k = SequenceLayout.from_lengths(lengths_q), SequenceLayout.from_lengths(lengths_k)
    inputs = make_qkv(layout_q.total, layout_k.total, heads=heads, kv_heads=kv_heads)
    expected = run_with_gradients("reference", inputs, layout_q, layout_k)
    got = run_with_gradients("torch", inputs, layout_q, layout_k)
    torch.testing.assert_close(got.pop("max"), expected.pop("max"), rtol=1e-6, atol=0)
    for name, reference in expected.items():
        assert_close(name, reference, got[name], RATIO[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_float64(dtype):
    layout = SequenceLayout.from_lengths([70, 5, 33])
    inputs = make_qkv(layout.total, layout.total, dtype=dtype)
    expected = run_with_gradients("reference", [x.double() for x in inputs], layout, None)
    got = run_with_gradients("torch", inputs, layout, None)
    assert got["o"].dtype == dtype
    assert got["max"].dtype == torch.float32
    # logits are float32 even for bfloat16 inputs: the maximum is that of the rounded inputs
    torch.testing.assert_close(got.pop("max"), expected.pop("max"), rtol=1e-6, atol=0)
    for name, reference in expected.items():
        assert_close(name, reference, got[name].double(), RATIO[dtype])


def test_gradcheck():
    layout_q, layout_k = SequenceLayout.from_lengths([2, 0, 3]), SequenceLayout.from_lengths([4, 1, 3])
    inputs = make_qkv(layout_q.total, layout_k.total, heads=2, kv_heads=1, dk=3, dv=2)
    assert torch.autograd.gradcheck(lambda q, k, v: varlen_attention(q, k, v, layout_q, layout_k)[0], inputs)


def test_recomputed_backward_equals_kept(monkeypatch):
    layout = SequenceLayout.from_lengths([70, 5, 64])
    inputs = make_qkv(layout.total, layout.total)
    kept = run_with_gradients("torch", inputs, layout, None)
    monkeypatch.setattr(blocked, "KEPT_BYTES", 0)
    recomputed = run_with_gradients("torch", inputs, layout, None)
    for name, value in kept.items():
        assert torch.equal(value, recomputed[name]), name


@pytest.mark.parametrize("block_bytes", [1, 20_000, 1 << 30])
def test_block_size_never_changes_results(monkeypatch, block_bytes):
    layout_q, layout_k = SequenceLayout.from_lengths([30, 17, 40]), SequenceLayout.from_lengths([30, 80, 41])
    inputs = make_qkv(layout_q.total, layout_k.total)
    expected = run_with_gradients("torch", inputs, layout_q, layout_k)
    monkeypatch.setattr(blocked, "GROUP_BYTES", block_bytes)
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 2 * block_bytes)
    got = run_with_gradients("torch", inputs, layout_q, layout_k)
    for name, reference in expected.items():
        assert_close(name, reference, got[name], RATIO[torch.float64])


def test_extreme_logits_stay_finite_and_are_reported():
    q, k, v = make_qkv(40, 40, dtype=torch.float32)
    layout = SequenceLayout.from_lengths([25, 15])
    got = run_with_gradients("torch", (q * 1e3, k * 1e3, v), layout, None)
    assert all(value.isfinite().all() for value in got.values())
    assert got["max"].min() > 1e5


def test_max_logits_ignore_masked_and_padded_entries():
    # every visible logit is negative: zeros of padding or of future keys would show
    layout = SequenceLayout.from_lengths([3, 5])
    q = torch.ones(8, 1, 2)
    k = -torch.arange(1.0, 9.0)[:, None, None].expand(8, 1, 2).contiguous()
    k[2], k[7] = 50.0, 60.0
    _, top = varlen_attention(q, k, torch.ones(8, 1, 2), layout, scale=1.0, return_max_logits=True)
    assert top.tolist() == [120.0]
    k[2], k[7] = -50.0, -60.0
    _, top = varlen_attention(q, k, torch.ones(8, 1, 2), layout, scale=1.0, return_max_logits=True)
    assert top.tolist() == [-2.0]
    # the last key is seen by the last query only
    q[7] = -1.0
    k[7] = 60.0
    _, top = varlen_attention(q, k, torch.ones(8, 1, 2), layout, scale=1.0, return_max_logits=True)
    assert top.tolist() == [14.0]


def test_max_logits_are_optional_without_gradient_and_empty_is_minus_infinity():
    q, k, v = make_qkv(4, 4)
    layout = SequenceLayout.from_lengths([4])
    out, none = varlen_attention(q, k, v, layout)
    assert none is None
    _, top = varlen_attention(q, k, v, layout, return_max_logits=True)
    assert out.requires_grad
    assert not top.requires_grad
    for backend in ("torch", "reference"):
        empty = make_qkv(0, 0)
        _, top = varlen_attention(*empty, SequenceLayout.from_lengths([0]), return_max_logits=True, backend=backend)
        assert top.tolist() == [-math.inf] * 4


def test_autocast_casts_mixed_inputs_and_no_grad_changes_nothing():
    q, k, v = make_qkv(20, 20, dtype=torch.float32)
    layout = SequenceLayout.from_lengths([12, 8])
    low = varlen_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = varlen_attention(q, k, v.bfloat16(), layout)[0]
    assert torch.equal(out, low)
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(out.sum(), (q, k, v)))
    expected = varlen_attention(q, k, v, layout)[0]
    with torch.no_grad():
        assert torch.equal(varlen_attention(q, k, v, layout)[0], expected)


def test_non_contiguous_inputs_and_plain_cu_seqlens():
    q, k, v = (x.detach() for x in make_qkv(6, 6))
    strided = torch.cat([q, q], -1)[..., : q.shape[-1]]
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    expected = varlen_attention(q, k, v, SequenceLayout.from_lengths([2, 4]))[0]
    assert torch.equal(varlen_attention(strided, k, v, cu_seqlens)[0], expected)


def test_scores_of_a_long_sequence_never_live_at_once():
    length, heads = 4096, 2
    q, k, v = make_qkv(length, length, heads=heads, kv_heads=heads, dk=2, dv=2, dtype=torch.float32)
    with LargestTensor() as spy:
        out, _ = varlen_attention(q, k, v, SequenceLayout.from_lengths([length]), return_max_logits=True)
        out.sum().backward()
    assert spy.numel * 4 <= blocked.BLOCK_BYTES
    assert spy.numel < heads * length * length // 16


def test_one_long_sequence_does_not_pad_the_short_ones():
    lengths = [1000, *[20] * 50]
    layout = SequenceLayout.from_lengths(lengths)
    groups = plan_groups(layout, layout, max_scores=1 << 40, block_rows=64)
    padded = sum(len(group.offsets) * group.queries.length * group.keys.length for group in groups)
    assert padded == sum(n * n for n in lengths)


lengths_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@PROPERTY
@given(lengths=lengths_strategy, seed=st.integers(0, 5))
def test_permuting_packed_sequences_permutes_the_output(lengths, seed):
    layout = SequenceLayout.from_lengths(lengths)
    q, k, v = (x.detach() for x in make_qkv(layout.total, layout.total))
    order = torch.randperm(len(lengths), generator=make_generator(seed, "order")).tolist()
    index = torch.cat(
        [torch.arange(layout.starts[n], layout.starts[n] + lengths[n]) for n in order] or [torch.arange(0)]
    )
    out, top = varlen_attention(q, k, v, layout, return_max_logits=True)
    permuted = SequenceLayout.from_lengths([lengths[n] for n in order])
    out_p, top_p = varlen_attention(q[index], k[index], v[index], permuted, return_max_logits=True)
    torch.testing.assert_close(out_p, out[index], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(top_p, top)


@PROPERTY
@given(lengths=lengths_strategy, data=st.data())
def test_chunked_prefill_equals_one_shot(lengths, data):
    layout = SequenceLayout.from_lengths(lengths)
    q, k, v = (x.detach() for x in make_qkv(layout.total, layout.total))
    cuts = [data.draw(st.integers(0, n)) for n in lengths]
    spans = [(start, start + cut, start + n) for start, cut, n in zip(layout.starts, cuts, lengths, strict=True)]
    head = torch.cat([torch.arange(a, b) for a, b, _ in spans])
    tail = torch.cat([torch.arange(b, c) for _, b, c in spans])
    first = SequenceLayout.from_lengths(cuts)
    rest = SequenceLayout.from_lengths([n - cut for n, cut in zip(lengths, cuts, strict=True)])
    out, top = varlen_attention(q, k, v, layout, return_max_logits=True)
    out_a, top_a = varlen_attention(q[head], k[head], v[head], first, return_max_logits=True)
    out_b, top_b = varlen_attention(q[tail], k, v, rest, layout, return_max_logits=True)
    torch.testing.assert_close(out_a, out[head], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out_b, out[tail], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.maximum(top_a, top_b), top)


@PROPERTY
@given(lengths=lengths_strategy, n=st.integers(0, 5))
def test_a_sequence_never_sees_another(lengths, n):
    layout = SequenceLayout.from_lengths(lengths)
    n = min(n, len(lengths) - 1)
    mine = slice(layout.starts[n], layout.starts[n] + lengths[n])
    q, k, v = (x.detach() for x in make_qkv(layout.total, layout.total))
    out = varlen_attention(q, k, v, layout)[0][mine]
    for x in (q, k, v):
        saved = x[mine].clone()
        x.fill_(float("nan"))
        x[mine] = saved
    torch.testing.assert_close(varlen_attention(q, k, v, layout)[0][mine], out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(4, 2, 7)}, "q has Dk=6 but k has Dk=7"),
        ({"k": torch.zeros(4, 3, 6), "v": torch.zeros(4, 3, 5)}, "Hkv must divide H"),
        ({"v": torch.zeros(4, 1, 5)}, "both must share tokens and heads"),
        ({"q": torch.zeros(4, 24)}, r"q must be \[tokens, heads, dim\]"),
        ({"v": torch.zeros(4, 2, 5, dtype=torch.float64)}, "share one floating dtype"),
        ({"layout_q": SequenceLayout.from_lengths([3])}, "must end with the number of tokens 4, got 3"),
        ({"layout_k": SequenceLayout.from_lengths([1, 3])}, "layout_q has 1 sequences but layout_k has 2"),
        ({"backend": "triton"}, "backend must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "q": torch.zeros(4, 4, 6),
        "k": torch.zeros(4, 2, 6),
        "v": torch.zeros(4, 2, 5),
        "layout_q": SequenceLayout.from_lengths([4]),
    } | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments)


def test_more_queries_than_keys_is_refused():
    q, k, v = make_qkv(4, 4)
    layout_q, layout_k = SequenceLayout.from_lengths([1, 3]), SequenceLayout.from_lengths([2, 2])
    with pytest.raises(ValueError, match="sequence 1 has 3 queries but 2 keys"):
        varlen_attention(q, k, v, layout_q, layout_k)


def make_cache(n: int, length: int, heads: int, kv_heads: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = make_generator(2, "cache", n)
    shapes = (n, heads, 6), (n, length, kv_heads, 6), (n, length, kv_heads, 5)
    q, keys, values = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, keys, values


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [[], [0], [9], [3, 0, 9, 1]])
@pytest.mark.parametrize("block_bytes", [1, 1 << 22])
def test_decode_equals_reference(monkeypatch, heads, kv_heads, lengths, block_bytes):
    monkeypatch.setattr("perilune.ops.attention.decode.BLOCK_BYTES", block_bytes)
    q, keys, values = make_cache(len(lengths), 9, heads, kv_heads)
    index = torch.tensor(lengths, dtype=torch.int64)
    expected = decode_attention(q, keys, values, index, scale=0.3, backend="reference")
    assert_close("o", expected, decode_attention(q, keys, values, index, scale=0.3), 1e-12)


def test_decode_equals_last_query_of_varlen():
    lengths = [5, 1, 8]
    q, keys, values = make_cache(3, 8, 4, 2)
    packed = [torch.cat([x[n, :length] for n, length in enumerate(lengths)]) for x in (keys, values)]
    layout_q, layout_k = SequenceLayout.from_lengths([1] * 3), SequenceLayout.from_lengths(lengths)
    expected = varlen_attention(q, *packed, layout_q, layout_k)[0]
    got = decode_attention(q, keys, values, torch.tensor(lengths))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_decode_ignores_entries_past_the_length():
    q, keys, values = make_cache(2, 6, 4, 1)
    lengths = torch.tensor([2, 4])
    expected = decode_attention(q, keys, values, lengths)
    for n, length in enumerate(lengths.tolist()):
        keys[n, length:], values[n, length:] = 1e30, -1e30
    assert torch.equal(decode_attention(q, keys, values, lengths), expected)


def test_decode_in_bfloat16_stays_near_float64():
    q, keys, values = make_cache(5, 30, 4, 1, torch.bfloat16)
    lengths = torch.tensor([30, 1, 7, 15, 29])
    expected = decode_attention(q.double(), keys.double(), values.double(), lengths, backend="reference")
    assert_close("o", expected, decode_attention(q, keys, values, lengths).double(), RATIO[torch.bfloat16])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([1, 7])}, r"lengths must be in \[0, 6\]"),
        ({"lengths": torch.tensor([1])}, "must agree on N"),
        ({"q": torch.zeros(2, 3, 6)}, "Hkv must divide H"),
        ({"q": torch.zeros(2, 4, 5)}, "both must share Dk"),
        ({"keys": torch.zeros(2, 6, 6)}, r"keys, values \[N, L, Hkv, D\]"),
        ({"backend": "fast"}, "backend must be"),
    ],
)
def test_bad_decode_arguments_are_named(change, message):
    q, keys, values = make_cache(2, 6, 4, 2, torch.float32)
    arguments = {"q": q, "keys": keys, "values": values, "lengths": torch.tensor([1, 2])} | change
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)


def test_calls_that_the_flash_kernels_cannot_serve_say_why():
    q = torch.zeros(3, 2, 8)
    with pytest.raises(BackendError, match="varlen_attention: backend 'flash' needs tensors on a GPU, got cpu"):
        varlen_attention(q, q, q, SequenceLayout.from_lengths([3]), backend="flash")


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [0, 1, 0, 5, 3, 0], [64, 65, 63], [131], [7, 7, 7], [66, 70, 3]])
@pytest.mark.parametrize("dtype", list(RATIO))
def test_without_gradients_sequences_from_their_start_equal_the_reference(lengths, dtype):
    layout = SequenceLayout.from_lengths(lengths)
    inputs = make_qkv(layout.total, layout.total, heads=6, kv_heads=2, dk=8, dv=8)
    expected, _ = varlen_attention(*inputs, layout, scale=0.3, backend="reference")
    with torch.no_grad():
        out, top = varlen_attention(*(x.to(dtype) for x in inputs), layout, scale=0.3)
    assert top is None
    assert out.dtype == dtype
    assert_close("o", expected.detach(), out, RATIO[dtype])


@pytest.mark.parametrize("dtype", list(RATIO))
def test_without_gradients_scores_never_live_at_once(dtype):
    length = 1024
    q, k, v = make_qkv(length, length, heads=2, kv_heads=1, dk=8, dv=8, dtype=dtype)
    with torch.no_grad(), LargestTensor() as spy:
        varlen_attention(q, k, v, SequenceLayout.from_lengths([length]))
    assert spy.numel < length * length // 4
