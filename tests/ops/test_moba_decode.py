"""Decoding with MoBA: each row's result is the last row of `moba_attention` over its tokens."""

from __future__ import annotations

import pytest
import torch

from perilune.ops import decode_attention, moba_attention, moba_decode, moba_route
from perilune.ops.moba import decode
from perilune.seeding import make_generator
from tests.helpers import assert_close

TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def make_cache(lengths, *, heads=4, kv_heads=2, dim=6, value_dim=6, block_size=8, dtype=torch.float64, room=3):
    """q, and a cache of N rows with `room` places beyond the longest that hold large stale numbers."""
    generator = make_generator(0, "moba decode", *lengths)
    count, places = len(lengths), max(lengths, default=0) + room
    draws = [(count, heads, dim), (count, places, kv_heads, dim), (count, places, kv_heads, value_dim)]
    q, keys, values = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in draws)
    means = torch.full((count, places // block_size + 1, kv_heads, dim), 1e4, dtype=dtype)
    for row, length in enumerate(lengths):
        keys[row, length:], values[row, length:] = 1e4, 1e4
        complete = length // block_size
        blocks = keys[row, : complete * block_size].unflatten(0, (complete, block_size))
        wide = torch.promote_types(dtype, torch.float32)
        means[row, :complete] = blocks.mean(1, dtype=wide).to(dtype)
    return q, keys, values, means, torch.tensor(lengths)


def last_rows(q, keys, values, lengths, **options):
    rows = [
        moba_attention(
            q[n : n + 1],
            keys[n, :length],
            values[n, :length],
            cu_seqlens_q=torch.tensor([0, 1]),
            cu_seqlens_k=torch.tensor([0, length]),
            **options,
        )
        for n, length in enumerate(lengths.tolist())
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("topk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(("block_size", "lengths"), [(8, [1, 7, 8, 9, 16, 17, 83]), (1, [1, 5, 19]), (7, [61, 100])])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_decoding_equals_the_last_row_of_attention(backend, topk, block_size, lengths, heads, kv_heads):
    q, *cache, lengths = make_cache(lengths, heads=heads, kv_heads=kv_heads, value_dim=5, block_size=block_size)
    options = {"block_size": block_size, "topk": topk}
    found = moba_decode(q, *cache, lengths, **options, scale=0.7, backend=backend)
    torch.testing.assert_close(found, last_rows(q, *cache[:2], lengths, **options, scale=0.7), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_chooses_the_same_blocks_and_stays_near(dtype):
    q, keys, values, means, lengths = make_cache([300, 90, 217], dtype=dtype, block_size=8, dim=32, value_dim=32)
    found = moba_decode(q, keys, values, means, lengths, block_size=8, topk=4)
    exact = moba_decode(*(x.double() for x in (q, keys, values, means)), lengths, block_size=8, topk=4)
    assert found.dtype == dtype
    # everything before the rounding of the result is float32
    assert_close("o", exact, found, max(1e-6, torch.finfo(dtype).eps))


def test_rows_of_no_tokens_are_zero_and_no_rows_are_none():
    q, *cache = make_cache([0, 40, 0])
    found = moba_decode(q, *cache, block_size=8, topk=2)
    assert torch.equal(found[::2], torch.zeros(2, 4, 6, dtype=torch.float64))
    assert found[1].abs().min() > 0
    assert moba_decode(*(x[:0] for x in (q, *cache)), block_size=8, topk=2).shape == (0, 4, 6)


def test_enough_blocks_are_full_attention_bit_by_bit():
    q, keys, values, means, lengths = make_cache([37, 40])
    found = moba_decode(q, keys, values, means, lengths, block_size=8, topk=6)
    assert torch.equal(found, decode_attention(q, keys, values, lengths))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_ties_go_to_the_lower_block_and_nan_is_the_lowest(backend):
    q, keys, values, means, lengths = make_cache([60, 60], heads=1, kv_heads=1, block_size=10, room=4)
    means[0] = 1.0  # every block of row 0 scores the same
    means[1] = torch.arange(7.0)[:, None, None]
    means[1, 4] = torch.nan
    q[1] = 1.0
    for row, chosen in ((0, [0, 1, 5]), (1, [2, 3, 5])):
        seen = [t for j in chosen for t in range(10 * j, 10 * j + 10)]
        expected = decode_attention(q, keys[:, seen], values[:, seen], torch.tensor([30, 30]))
        found = moba_decode(q, keys, values, means, lengths, block_size=10, topk=3, backend=backend)
        torch.testing.assert_close(found[row], expected[row], **TIGHT)


def test_blocks_that_are_not_chosen_are_not_read():
    q, keys, values, means, lengths = make_cache([83, 83], heads=2, kv_heads=2)
    cut = {"cu_seqlens_q": torch.tensor([0, 1]), "cu_seqlens_k": torch.tensor([0, 83])}
    expected = moba_decode(q, keys, values, means, lengths, block_size=8, topk=3)
    for row in range(2):
        routing = moba_route(q[row : row + 1], keys[row, :83], block_size=8, topk=3, **cut)
        for head, blocks in enumerate(routing.blocks()[0].tolist()):
            unread = [t for t in range(83) if t // 8 not in blocks]
            keys[row, unread, head], values[row, unread, head] = torch.nan, torch.nan
    assert torch.equal(moba_decode(q, keys, values, means, lengths, block_size=8, topk=3), expected)


@pytest.mark.parametrize("kind", ["view of a longer cache", "heads first", "repeated rows"])
def test_the_cache_may_lie_in_memory_as_it_likes(kind):
    q, keys, values, means, lengths = make_cache([83, 41])
    if kind == "repeated rows":
        keys, values = (x[:1].expand(2, *x.shape[1:]) for x in (keys, values))
    expected = moba_decode(q, keys.contiguous(), values.contiguous(), means, lengths, block_size=8, topk=2)
    match kind:
        case "view of a longer cache":
            keys, values = (torch.cat([x, x], 1)[:, : x.shape[1]] for x in (keys, values))
        case "heads first":
            keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
    assert torch.equal(moba_decode(q, keys, values, means, lengths, block_size=8, topk=2), expected)


def test_bytes_gathered_at_a_time_never_change_results(monkeypatch):
    q, *cache = make_cache([83, 41, 5])
    expected = moba_decode(q, *cache, block_size=8, topk=3)
    monkeypatch.setattr(decode, "GATHER_BYTES", 1)
    torch.testing.assert_close(moba_decode(q, *cache, block_size=8, topk=3), expected, **TIGHT)


def test_queries_have_gradients():
    q, *cache = make_cache([41, 17])
    assert torch.autograd.gradcheck(lambda x: moba_decode(x, *cache, block_size=8, topk=2), q.requires_grad_())


GOOD = {
    "q": torch.zeros(2, 4, 6),
    "keys": torch.zeros(2, 20, 2, 6),
    "values": torch.zeros(2, 20, 2, 6),
    "means": torch.zeros(2, 2, 2, 6),
    "lengths": torch.tensor([20, 3]),
    "block_size": 8,
    "topk": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 24)}, r"q must be \[N, H, D\]"),
        ({"q": torch.zeros(3, 4, 6)}, "must agree on N"),
        ({"q": torch.zeros(2, 3, 6)}, "H=3 heads but keys Hkv=2; both must be >= 1 and Hkv divide H"),
        ({"q": torch.zeros(2, 0, 6)}, "H=0 heads but keys Hkv=2"),
        ({"q": torch.zeros(2, 4, 5)}, "all must share D"),
        ({"q": torch.zeros(2, 4, 6).double()}, "one floating dtype"),
        ({"values": torch.zeros(2, 19, 2, 6)}, "must agree on N"),
        ({"means": torch.zeros(2, 2, 1, 6)}, "all but q and lengths on Hkv"),
        (
            {"means": torch.zeros(2, 1, 2, 6)},
            "20 tokens have 2 blocks of 8 before the last token's own, but means hold",
        ),
        ({"lengths": torch.tensor([21, 3])}, r"lengths must be in \[0, 20\]"),
        ({"lengths": torch.tensor([-1, 3])}, r"lengths must be in \[0, 20\]"),
        ({"block_size": 0}, "moba_decode: block_size must be >= 1, got 0"),
        ({"topk": 0}, "moba_decode: topk must be >= 1"),
        ({"topk": 2.0}, "moba_decode: topk must be an integer"),
        ({"backend": "fast"}, "backend must be 'auto', 'reference' or 'torch'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    moba_decode(**GOOD)
    with pytest.raises(ValueError, match=message):
        moba_decode(**{**GOOD, **change})


def test_checks_ask_nothing_of_a_device():
    """Tensors on `meta` have no values that could be read."""
    shapes = ((2, 4, 8), (2, 64, 2, 8), (2, 64, 2, 8), (2, 8, 2, 8))
    q, keys, values, means = (torch.empty(shape, device="meta") for shape in shapes)
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    assert decode._check(q, keys, values, means, lengths, block_size=8, topk=3) is None
    with pytest.raises(ValueError, match="must agree on N"):
        decode._check(q[:1], keys, values, means, lengths, block_size=8, topk=3)
