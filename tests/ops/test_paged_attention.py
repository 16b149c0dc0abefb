"""Attention over pages equals attention over the same keys in rows."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import BackendError
from perilune.ops import PagePlan, attention, decode_attention, paged_decode_attention
from perilune.ops.native import native_library


def make(tables, lengths, block_size, heads, kv_heads, dim, value_dim, *, by_head=True, seed=0):
    """Random pools and queries; values are a view into the keys for `value_dim` None."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.tensor(tables, dtype=torch.int32).view(len(lengths), -1)
    pages = int(tables.max()) + 2 if tables.numel() else 1

    def pool(width):
        shape = (pages, kv_heads, block_size, width) if by_head else (pages, block_size, kv_heads, width)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.transpose(1, 2) if by_head else x

    keys = pool(dim)
    values = keys[..., : dim // 2] if value_dim is None else pool(value_dim)
    q = torch.randn(len(lengths), heads, dim, generator=generator, dtype=torch.float64)
    return q, keys, values, tables, torch.tensor(lengths)


def rows_of(pool, tables):
    return torch.stack([torch.cat([pool[page] for page in row]) for row in tables.tolist()])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_path_equals_the_dense_rows(data):
    block_size = data.draw(st.integers(1, 4))
    num_rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    highest = data.draw(st.sampled_from([3, 8, 60]))
    page = st.integers(0, highest)
    tables = data.draw(st.lists(st.lists(page, min_size=width, max_size=width), min_size=num_rows, max_size=num_rows))
    lengths = data.draw(st.lists(st.integers(0, width * block_size), min_size=num_rows, max_size=num_rows))
    kv_heads, value_dim = data.draw(st.sampled_from([(1, None), (2, 3), (1, 5)]))
    args = make(tables, lengths, block_size, 2, kv_heads, 6, value_dim, by_head=data.draw(st.booleans()))
    q, keys, values, tables, lengths = args
    expected = decode_attention(q, rows_of(keys, tables), rows_of(values, tables), lengths, scale=0.7)
    plan = PagePlan.build(tables, lengths, block_size)
    for given_plan, backend in ((None, "reference"), (None, "torch"), (plan, "auto")):
        found = paged_decode_attention(*args, scale=0.7, plan=given_plan, backend=backend)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("planned", [False, True])
def test_what_other_pages_hold_does_not_matter(planned):
    args = make([[3, 5], [6, 2]], [5, 8], 4, 4, 2, 6, 3)
    _, keys, values, tables, lengths = args
    plan = PagePlan.build(tables, lengths, 4) if planned else None
    expected = paged_decode_attention(*args, plan=plan)
    keys[[0, 1, 4, 7]] = torch.nan
    keys[5, 1:], values[5, 1:] = 1e300, -1e300
    values[[0, 1, 4, 7]] = torch.inf
    assert torch.equal(paged_decode_attention(*args, plan=plan), expected)


def test_pages_near_each_other_are_read_where_they_are():
    tables = torch.tensor([[4, 1], [2, 3], [4, 6]], dtype=torch.int32)
    plan = PagePlan.build(tables, torch.tensor([8, 8, 8]), 4)
    assert (plan.first, plan.count) == (1, 6)
    assert plan.gathered.tolist() == [4]  # the second reader of a shared page
    far = PagePlan.build(tables * 100, torch.tensor([8, 8, 8]), 4)
    assert far.count == 0
    assert far.gathered.tolist() == [100, 200, 300, 400, 400, 600]


@pytest.mark.parametrize("planned", [False, True])
def test_low_precision_keeps_logits_wide(planned):
    q, keys, values, tables, lengths = make([[0, 1]], [8], 4, 2, 1, 64, 4)
    low = [x.bfloat16() for x in (q * 8, keys * 8, values)]
    plan = PagePlan.build(tables, lengths, 4) if planned else None
    expected = paged_decode_attention(*(x.double() for x in low), tables, lengths, backend="reference")
    found = paged_decode_attention(*low, tables, lengths, plan=plan)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def bad(change):
    names = ("q", "keys", "values", "tables", "lengths")
    arguments = dict(zip(names, make([[0, 1]], [3], 4, 4, 2, 6, 3), strict=True))
    return {**arguments, **change(arguments)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"q": a["q"][0]}, r"q must be \[N, H, Dk\]"),
        (lambda a: {"keys": a["keys"].float()}, "share one floating dtype"),
        (lambda a: {"values": a["values"][:1]}, "agree on P, B and Hkv"),
        (lambda a: {"tables": a["tables"].long()}, r"tables must be \[N, M\] int32"),
        (lambda a: {"lengths": a["lengths"].float()}, "lengths must be int32 or int64"),
        (lambda a: {"lengths": a["lengths"] + 6}, r"lengths must be in \[0, 8\], got \[9\]"),
        (lambda a: {"tables": a["tables"] + 2}, r"tables must name pages in \[0, 3\)"),
        (lambda a: {"backend": "cuda"}, "backend must be"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        paged_decode_attention(**bad(change))


INTERPRETED = """
import torch
from perilune.ops import paged_decode_attention
from tests.ops.test_paged_attention import make
cases = [  # rows with many splits, with one, with none; values inside keys, beside them, narrower, wider
    ([[7, 0, 4, 2, 9, 1, 3, 8]] * 2, [300, 0], 40, 4, 1, 24, None),
    ([[0, 1], [3, 3]], [13, 20], 10, 6, 2, 16, 16),
    ([[5, 1, 2]], [193], 65, 3, 3, 20, 12),
    ([[5, 1, 2]], [7], 5, 2, 1, 6, 40),
    ([[0]], [0], 5, 2, 1, 6, 40),
]
for by_head in (True, False):
    for case in cases:
        q, keys, values, tables, lengths = make(*case, by_head=by_head)
        want = paged_decode_attention(q, keys, values, tables, lengths, scale=0.7, backend="reference")
        for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 3e-3)):
            low = keys.to(dtype)
            pools = (low, low[..., : values.shape[-1]] if case[6] is None else values.to(dtype))
            found = paged_decode_attention(q.to(dtype), *pools, tables, lengths, scale=0.7, backend="triton")
            torch.testing.assert_close(found.double(), want, rtol=0, atol=limit)
print("equal")
"""


def test_the_kernel_equals_the_reference_in_its_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr[-2000:]


needs_native = pytest.mark.skipif(native_library() is None, reason="backend 'native' needs Linux and GCC")


@needs_native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_native_path_equals_the_reference(data):
    block_size = data.draw(st.sampled_from([1, 5, 32, 40]))
    num_rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    page = st.integers(0, 8)
    tables = data.draw(st.lists(st.lists(page, min_size=width, max_size=width), min_size=num_rows, max_size=num_rows))
    lengths = data.draw(st.lists(st.integers(0, width * block_size), min_size=num_rows, max_size=num_rows))
    group, kv_heads = data.draw(st.sampled_from([(1, 3), (3, 2), (4, 1), (7, 1), (19, 1)]))
    dim, value_dim = data.draw(st.sampled_from([(6, None), (16, 16), (64, 64), (24, 130), (144, None)]))
    by_head = data.draw(st.booleans())
    args = make(tables, lengths, block_size, group * kv_heads, kv_heads, dim, value_dim, by_head=by_head)
    for dtype, limit in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2)):
        q, keys, *_ = (x.to(dtype) for x in args[:3])
        values = keys[..., : dim // 2] if value_dim is None else args[2].to(dtype)
        wide = (x.double() for x in (q, keys, values))
        want = paged_decode_attention(*wide, *args[3:], scale=0.7, backend="reference")
        found = paged_decode_attention(q, keys, values, *args[3:], scale=0.7, backend="native")
        assert found.dtype == dtype
        # the logits reach 0.7 * dim in size, and their error goes into the exponent
        torch.testing.assert_close(found.double(), want, rtol=0, atol=limit * (1 + dim / 16))


@needs_native
def test_the_native_path_and_extreme_logits():
    q, keys, values, tables, lengths = (
        x.float() if x.is_floating_point() else x for x in make([[3, 5], [6, 2]], [5, 8], 4, 4, 2, 6, 3)
    )
    alone = paged_decode_attention(q, keys, values, tables, lengths, backend="native")
    keys[[0, 1, 4, 7]], values[[0, 1, 4, 7]] = torch.nan, torch.inf  # pages of nobody
    keys[5, 1:], values[5, 1:] = torch.nan, torch.nan  # places behind the first row's last token
    assert torch.equal(paged_decode_attention(q, keys, values, tables, lengths, backend="native"), alone)
    far = paged_decode_attention(q * 1e4, keys, values, tables, lengths, backend="native")
    wide = paged_decode_attention(
        *(x.double() for x in (q * 1e4, keys.nan_to_num(), values.nan_to_num(posinf=0.0))), tables, lengths,
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(far.double(), wide, rtol=0, atol=1e-4)
    keys[6, 0] = torch.nan
    found = paged_decode_attention(q, keys, values, tables, lengths, backend="native")
    assert torch.equal(found[0], alone[0])
    assert found[1].isnan().all()


@needs_native
def test_auto_is_native_for_large_models_without_gradients(monkeypatch):
    q, keys, values, tables, lengths = make([[0, 1]], [7], 4, 8, 2, 64, 64)
    q, keys, values = q.float(), keys.float(), values.float()
    calls = []
    monkeypatch.setattr(attention, "paged_decode_attention_native", lambda *args: calls.append(args) or args[0])
    paged_decode_attention(q, keys, values, tables, lengths)
    with torch.no_grad():
        paged_decode_attention(q.double(), keys.double(), values.double(), tables, lengths)
        paged_decode_attention(q[:, :6], keys, values, tables, lengths)
        assert not calls
        paged_decode_attention(q, keys, values, tables, lengths)
    assert len(calls) == 1


def test_calls_that_native_code_cannot_serve_say_why(monkeypatch):
    q, keys, values, tables, lengths = make([[0, 1]], [3], 4, 4, 2, 6, 3)
    with pytest.raises(BackendError, match="'native' takes float32 and bfloat16, got"):
        paged_decode_attention(q, keys, values, tables, lengths, backend="native")
    with pytest.raises(BackendError, match="backend 'native' has no gradients"):
        paged_decode_attention(
            q.float().requires_grad_(), keys.float(), values.float(), tables, lengths, backend="native"
        )
    apart = keys.float().transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(BackendError, match="backend 'native' needs the channels of keys and values side by side"):
        paged_decode_attention(q.float(), apart, values.float(), tables, lengths, backend="native")
    monkeypatch.setattr("perilune.ops.attention.paged.native_library", lambda: None)
    with pytest.raises(BackendError, match="backend 'native' needs Linux and GCC"):
        paged_decode_attention(q.float(), keys.float(), values.float(), tables, lengths, backend="native")


def test_calls_that_the_kernel_cannot_serve_say_why(monkeypatch):
    args = make([[0, 1]], [3], 4, 4, 2, 6, 3)
    with pytest.raises(BackendError, match="paged_decode_attention: backend 'triton' needs tensors on a GPU, got cpu"):
        paged_decode_attention(*args, backend="triton")
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="takes float32, bfloat16 and float16"):
        paged_decode_attention(*args, backend="triton")
    q, keys, values = (x.float() for x in args[:3])
    apart = keys.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(BackendError, match="needs the channels of keys side by side; use 'torch'"):
        paged_decode_attention(q, apart, values, *args[3:], backend="triton")
