"""MoBA against its oracle and against what the paper says it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import BackendError
from perilune.ops import SequenceLayout, moba_attention, moba_route, varlen_attention
from perilune.ops.moba import blockwise, routing
from perilune.ops.moba.options import POLICIES
from perilune.seeding import make_generator
from tests.helpers import assert_close
from tests.ops.interpreter import assert_equal_in_the_interpreter, patient
from tests.ops.moba_cases import SHAPES, make_moba, run_moba
from tests.ops.spies import LargestTensor

RATIO = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def compare(expected, got, dtype) -> None:
    assert torch.equal(expected["blocks"], got["blocks"])
    for name in ("o", "dq", "dk", "dv"):
        assert got[name].dtype == dtype
        assert_close(name, expected[name], got[name], RATIO[dtype], floor=1e-14)
    torch.testing.assert_close(got["lse"].double(), expected["lse"].double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(got["max"], expected["max"].float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 1)])
def test_blockwise_equals_the_oracle_with_gradients(shape, heads, kv_heads):
    inputs, options = make_moba(shape, heads=heads, kv_heads=kv_heads, value_dim=6)
    compare(run_moba(inputs, options, "dense"), run_moba(inputs, options, "blockwise"), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_lower_precision_stays_near_float64(dtype, dim):
    inputs, options = make_moba("packed", dim=dim, dtype=dtype)
    # means are rounded to the keys' dtype: the oracle has to choose from the same
    chosen = moba_route(*inputs[:2], **options, backend="dense")
    assert torch.equal(chosen.past, moba_route(*inputs[:2], **options, backend="blockwise").past)
    expected = run_moba([x.double() for x in inputs], options, "dense", routing=chosen)
    compare(expected, run_moba(inputs, options, "blockwise"), dtype)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_gradcheck(backend):
    inputs, options = make_moba("5 B + 3, k = 2", heads=2, kv_heads=1, dim=3, value_dim=2)
    q, k, v = (x[:23].detach().requires_grad_() for x in inputs)
    options |= {"block_size": 5, "cu_seqlens_q": None, "cu_seqlens_k": None}
    chosen = moba_route(q, k, **options)  # fixed: a step across a tie is no derivative
    assert torch.autograd.gradcheck(
        lambda *x: moba_attention(*x, **options, routing=chosen, backend=backend), (q, k, v)
    )


@pytest.mark.parametrize("backend", ["auto", "dense", "blockwise"])
@pytest.mark.parametrize("shape", ["5 B + 3, k = n", "5 B + 3, k = 100", "full from everywhere"])
def test_enough_blocks_are_full_attention(backend, shape):
    inputs, options = make_moba(shape)
    full, top = varlen_attention(*inputs, options["cu_seqlens_q"], return_max_logits=True)
    found, found_top = moba_attention(*inputs, **options, backend=backend, return_max_logits=True)
    torch.testing.assert_close(found, full, rtol=1e-12, atol=1e-12)
    assert torch.equal(found_top, top)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_one_block_is_attention_inside_blocks(backend):
    (q, k, v), options = make_moba("5 B + 3, k = 1")
    blocks = SequenceLayout.from_lengths([16] * 5 + [3])
    torch.testing.assert_close(
        moba_attention(q, k, v, **options, backend=backend),
        varlen_attention(q, k, v, blocks)[0],
        rtol=1e-12,
        atol=1e-12,
    )


@settings(max_examples=60)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24), st.integers(0, 50)), min_size=1, max_size=4),
    is_full_from=st.booleans(),
    heads=st.sampled_from([(1, 1), (2, 2), (2, 1), (6, 2)]),
    block_size=st.integers(1, 12),
    topk=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_any_call_equals_the_oracle_with_gradients_and_each_sequence_alone(
    sequences, is_full_from, heads, block_size, topk, seed
):
    queries, before, full_from = zip(*sequences, strict=True)
    keys = [sum(pair) for pair in zip(queries, before, strict=True)]
    generator = make_generator(seed, "moba")
    shapes = (sum(queries), heads[0], 4), (sum(keys), heads[1], 4), (sum(keys), heads[1], 3)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if block_size.bit_count() == 1:  # means of integers are exact, and so are ties, of which there are many
        q, k = q.round(), k.round()
    layout_q, layout_k = (SequenceLayout.from_lengths(lengths) for lengths in (queries, keys))
    options = {"block_size": block_size, "topk": topk, "cu_seqlens_q": layout_q, "cu_seqlens_k": layout_k}
    options["full_from"] = torch.tensor(full_from) if is_full_from else None
    found = run_moba((q, k, v), options, "blockwise")
    compare(run_moba((q, k, v), options, "dense"), found, torch.float64)
    for n in range(len(sequences)):
        rows, columns = (slice(x.starts[n], x.starts[n] + x.lengths[n]) for x in (layout_q, layout_k))
        options |= {
            f"cu_seqlens_{name}": SequenceLayout.from_lengths([x[n]]) for name, x in (("q", queries), ("k", keys))
        }
        options["full_from"] = torch.tensor(full_from[n : n + 1]) if is_full_from else None
        alone = moba_attention(q[rows], k[columns], v[columns], **options, backend="blockwise")
        torch.testing.assert_close(found["o"][rows], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 30, 40, 63, 82])
def test_later_tokens_change_nothing(cut):
    (q, k, v), options = make_moba("5 B + 3, k = 3")
    options |= {"cu_seqlens_q": None, "cu_seqlens_k": None}
    whole = moba_attention(q, k, v, **options)
    part = moba_attention(q[:cut], k[:cut], v[:cut], **options)
    torch.testing.assert_close(whole[:cut], part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
@pytest.mark.parametrize("step", [1, 5, 16, 50])
def test_a_prefill_in_chunks_equals_one(backend, step):
    (q, k, v), options = make_moba("5 B + 3, k = 3")
    options |= {"cu_seqlens_q": None, "cu_seqlens_k": None}
    whole = moba_attention(q, k, v, **options, backend="dense")
    for start in range(0, 83, step):
        end = min(start + step, 83)
        layouts = {f"cu_seqlens_{name}": torch.tensor([0, n]) for name, n in (("q", end - start), ("k", end))}
        chunk = moba_attention(q[start:end], k[:end], v[:end], **{**options, **layouts}, backend=backend)
        torch.testing.assert_close(chunk, whole[start:end], rtol=1e-12, atol=1e-12)


def test_full_from_reads_everything_after_it_and_nothing_else_changes():
    (q, k, v), options = make_moba("5 B + 3, k = 2")
    sparse = moba_attention(q, k, v, **options)
    mixed = moba_attention(q, k, v, **{**options, "full_from": torch.tensor([50])})
    full = varlen_attention(q, k, v, options["cu_seqlens_q"])[0]
    torch.testing.assert_close(mixed[:50], sparse[:50], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed[50:], full[50:], rtol=1e-12, atol=1e-12)
    assert (sparse[50:] - full[50:]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_ties_go_to_the_lower_block(backend):
    q, k = torch.zeros(60, 1, 4), torch.randn(60, 1, 4, generator=make_generator(0, "moba"))
    k[1::2] = -k[::2]  # sums of either sign of zero
    chosen = moba_route(q, k, block_size=10, topk=3, backend=backend).blocks()[:, 0]
    assert chosen[59].tolist() == [0, 1, 5]
    assert chosen[30].tolist() == [0, 1, 3]
    assert chosen[20].tolist() == [0, 1, 2]
    assert chosen[19].tolist() == [0, 1, -1]


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_a_score_that_is_not_a_number_is_the_lowest(backend):
    q, k = torch.ones(50, 1, 2), torch.ones(50, 1, 2)
    k[10:20] = -3e30
    k[0:10] = torch.nan
    q[49] = 3e30  # scores of -inf
    chosen = moba_route(q, k, block_size=10, topk=3, backend=backend).blocks()[:, 0]
    assert chosen[40].tolist() == [2, 3, 4]
    assert chosen[30].tolist() == [1, 2, 3]
    out = moba_attention(q, k, torch.ones(50, 1, 2), block_size=10, topk=3, backend=backend)
    assert out[:30].isnan().any(-1).all()  # they read the NaN
    assert out[30:].isfinite().all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", ["5 B + 3, k = 1", "5 B + 3, k = 3", "packed", "full from some place"])
@pytest.mark.parametrize("backend", ["dense", "blockwise"])
@torch.no_grad()
def test_a_value_that_is_no_finite_number_reaches_those_that_read_it_alone(backend, shape, number):
    (q, k, v), options = make_moba(shape)
    options["routing"] = moba_route(q, k, **options)
    expected = moba_attention(q, k, v, **options, backend="dense")
    for token in (0, 5, 43, 59, v.shape[0] - 1):
        seen, spoilt = torch.zeros_like(v), v.clone()
        seen[token, 1], spoilt[token, 1, 3] = 1, number
        is_reading = moba_attention(q, k, seen, **options, backend="dense")[..., 3] > 0
        assert is_reading.any()
        wanted = expected.clone()
        wanted[..., 3][is_reading] = number
        out = moba_attention(q, k, spoilt, **options, backend=backend)
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_scores_that_overflow_both_ways_are_the_lowest():
    q, k = torch.full((40, 1, 2), 1e30), torch.ones(40, 1, 2)
    k[:, :, 0], k[:, :, 1] = 1e30, -1e30  # products overflow both ways
    chosen = moba_route(q, k, block_size=10, topk=2).blocks()[:, 0]
    assert chosen[39].tolist() == [0, 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_choose_what_they_say(policy):
    (q, k, _), options = make_moba("packed", heads=2, kv_heads=1)
    chosen = moba_route(q, k, **options, policy=policy)
    again = moba_route(q, k, **options, policy=policy)
    assert torch.equal(chosen.past, again.past)
    last = chosen.past[-1]  # block 11 of 12
    match policy:
        case "recent":
            assert last.tolist() == [[9, 10]] * 2
        case "sink_recent":
            assert last.tolist() == [[0, 10]] * 2
        case "random":
            assert not torch.equal(chosen.past, moba_route(q, k, **options, policy=policy, seed=1).past)
        case "oracle":
            keys = k[38:128, 0]
            logits = (q[127] @ keys.T) * 8**-0.5
            mass = torch.softmax(logits, -1)[:, :88].unflatten(-1, (11, 8)).sum(-1)
            assert last.tolist() == mass.topk(2).indices.sort().values.tolist()
        case "minmax":
            blocks = k[38:126, 0].unflatten(0, (11, 8))
            bound = torch.maximum(q[127][:, None] * blocks.amax(1), q[127][:, None] * blocks.amin(1)).sum(-1)
            assert last.tolist() == bound.topk(2).indices.sort().values.tolist()
        case "mean":
            means = k[38:126, 0].unflatten(0, (11, 8)).mean(1)
            assert last.tolist() == (q[127] @ means.T).topk(2).indices.sort().values.tolist()


def test_many_blocks_are_sorted_and_few_are_searched_alike(monkeypatch):
    scores = torch.randn(60, 5, 2, generator=make_generator(0, "moba")).round(decimals=1)
    own = torch.tensor([30, 31, 40, 59, 60])
    searched = routing.top_blocks(scores.clone(), own, 20)
    monkeypatch.setattr(routing, "_MAXIMA", 0)
    assert torch.equal(searched, routing.top_blocks(scores, own, 20))


def test_means_are_summed_in_float32_and_rounded_once():
    k = (1 + torch.rand(256, 1, 8, generator=make_generator(0, "moba"))).bfloat16()
    options = moba_route(k, k, block_size=128, topk=2).options
    expected = k.double().view(2, 128, 1, 8).mean(1)
    assert torch.equal(routing.block_means(k, options, torch.bfloat16), expected.bfloat16())
    assert_close("mean", expected, routing.block_means(k, options, torch.float32), 1e-7)


def test_bytes_of_a_step_never_change_results(monkeypatch):
    inputs, options = make_moba("full from some place")
    expected = run_moba(inputs, options, "blockwise")
    monkeypatch.setattr(blockwise, "SCORE_BYTES", 400)
    monkeypatch.setattr(routing, "SCORE_BYTES", 400)
    compare(expected, run_moba(inputs, options, "blockwise"), torch.float64)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_more_blocks_than_there_are_cost_nothing_and_are_listed_as_none(backend):
    (q, k, v), options = make_moba("5 B + 3, k = 100")
    chosen = moba_route(q, k, **{**options, "topk": 10**9}, backend=backend)
    assert chosen.past.shape[-1] < 8  # for 6 blocks
    chosen = moba_route(q, k, **options, backend=backend)
    blocks = chosen.blocks()
    assert blocks.shape == (83, 4, 100)
    assert blocks[82, 0].tolist() == [0, 1, 2, 3, 4, 5] + [-1] * 94
    expected = moba_attention(q, k, v, **options, backend=backend)
    assert torch.equal(moba_attention(q, k, v, **options, routing=chosen, backend=backend), expected)


def test_repeats_to_the_bit():
    inputs, options = make_moba("packed", dtype=torch.float32)
    first, second = (run_moba(inputs, options, "blockwise") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_blockwise_makes_no_square_tensor():
    q, k, v = (torch.randn(2048, h, 8, requires_grad=True) for h in (2, 1, 1))
    with LargestTensor() as spy:
        moba_attention(q, k, v, block_size=64, topk=3, backend="blockwise").sum().backward()
    assert spy.numel < 2048 * 2048 / 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [1, 7, 50, 1000])
def test_queries_in_runs_give_the_rows_of_the_whole(shape, most):
    (q, k, v), options = make_moba(shape)
    whole = moba_route(q, k, **options).options
    expected, parts = moba_attention(q, k, v, **options), []
    for rows, keys, part in whole.chunks(most):
        assert part.layout_q.total <= most
        settings = {"block_size": part.block_size, "topk": part.topk}
        layouts = {"cu_seqlens_q": part.layout_q, "cu_seqlens_k": part.layout_k}
        full = None if part.full_from is None else torch.tensor(part.full_from)
        parts.append(moba_attention(q[rows], k[keys], v[keys], **settings, **layouts, full_from=full))
    if parts:
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-12, atol=1e-12)


def test_routing_serves_again_and_only_where_it_belongs():
    (q, k, v), options = make_moba("packed")
    chosen = moba_route(q, k, **options)
    expected = moba_attention(q, k, v, **options)
    assert torch.equal(moba_attention(q, k, v, **options, routing=chosen), expected)
    with pytest.raises(ValueError, match="routing was made for other"):
        moba_attention(q, k, v, **{**options, "topk": 2}, routing=chosen)
    # lengths are numbers by then: what happens to the tensor they came from changes nothing
    bounds = torch.tensor([0, 37, 128])
    before = moba_attention(q, k, v, block_size=8, topk=3, cu_seqlens_q=bounds)
    bounds[1] = 64
    assert not torch.equal(moba_attention(q, k, v, block_size=8, topk=3, cu_seqlens_q=bounds), before)


def test_autocast_brings_inputs_to_its_dtype():
    inputs, options = make_moba("packed", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = moba_attention(*inputs, **options)
    assert torch.equal(out, moba_attention(*(x.bfloat16() for x in inputs), **options))


WRONG = [
    ({"topk": 0}, "topk must be >= 1"),
    ({"topk": 2.0}, r"topk must be an integer, got 2\.0"),
    ({"block_size": 4.0}, r"block_size must be an integer, got 4\.0"),
    ({"block_size": 0}, "block_size must be >= 1"),
    ({"policy": "best"}, "policy must be one of 'mean'"),
    ({"backend": "fast"}, "backend must be 'auto', 'dense'"),
    ({"cu_seqlens_q": torch.tensor([0, 5])}, "must end with the number of tokens"),
    ({"cu_seqlens_q": torch.tensor([1, 10])}, "must start with 0"),
    ({"cu_seqlens_q": torch.tensor([0, 6, 5, 10])}, "must not decrease"),
    ({"cu_seqlens_q": torch.tensor([0.0, 10])}, "int32 or int64"),
    ({"cu_seqlens_k": torch.tensor([0, 10, 10])}, "both must have the same"),
    ({"full_from": torch.tensor([1, 2])}, "an entry for each of the 1 sequences"),
    ({"full_from": torch.tensor([1.5])}, "int32 or int64"),
    ({"full_from": [3]}, r"full_from must be a tensor \[N\] int32 or int64, got \[3\]"),
    ({"q": torch.zeros(10, 3, 4)}, "H=3 heads but k has Hkv=2; both must be >= 1 and Hkv divide H"),
    ({"q": torch.zeros(10, 0, 4)}, "H=0 heads but k has Hkv=2; both must be >= 1"),
    ({"q": torch.zeros(10, 4, 5)}, "D=5 but k has D=4; both must share a D >= 1"),
    ({"q": torch.zeros(10, 4, 0), "k": torch.zeros(10, 2, 0)}, "D=0 but k has D=0; both must share a D >= 1"),
    ({"q": torch.zeros(10, 4)}, r"\[tokens, heads, dim\]"),
    ({"q": torch.zeros(10, 4, 4).double()}, "one floating dtype"),
    ({"v": torch.zeros(9, 2, 4)}, "both must share tokens and heads"),
    ({"v": torch.zeros(10, 2, 4).double()}, "k's dtype"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
@pytest.mark.parametrize("topk", [2, 3], ids=["10 tokens choose", "12 are full attention"])
def test_wrong_arguments_are_named_however_long_sequences_are(change, message, topk):
    arguments = {"q": torch.zeros(10, 4, 4), "k": torch.zeros(10, 2, 4), "v": torch.zeros(10, 2, 4)}
    arguments |= {"block_size": 4, "topk": topk, **change}
    with pytest.raises(ValueError, match=message):
        moba_attention(**arguments)
    del arguments["v"]
    if "v" not in change:
        with pytest.raises(ValueError, match=message):
            moba_route(**arguments)


@pytest.mark.parametrize("change", [{"policy": "best"}, {"backend": "fast"}])
def test_choices_are_checked_though_blocks_are_given(change):
    (q, k, v), options = make_moba("packed")
    with pytest.raises(ValueError, match="must be"):
        moba_attention(q, k, v, **options, routing=moba_route(q, k, **options), **change)


@pytest.mark.parametrize("change", [{"block_size": 15}, {"topk": 8}, {"full_from": torch.tensor([4])}, {"scale": 2.0}])
def test_blocks_chosen_for_another_call_are_refused_in_full_attention_too(change):
    (q, k, v), options = make_moba("5 B + 3, k = n")
    chosen = moba_route(q, k, **options)
    moba_attention(q, k, v, **options, routing=chosen)
    with pytest.raises(ValueError, match="routing was made for other"):
        moba_attention(q, k, v, **{**options, **change}, routing=chosen)


def test_more_queries_than_keys_are_refused():
    q, k = torch.zeros(5, 1, 4), torch.zeros(5, 1, 4)
    bounds = {"cu_seqlens_q": torch.tensor([0, 3, 5]), "cu_seqlens_k": torch.tensor([0, 2, 5])}
    with pytest.raises(ValueError, match="sequence 0 has 3 queries but 2 keys"):
        moba_attention(q, k, k, block_size=2, topk=2, **bounds)


def test_the_oracle_refuses_what_it_cannot_hold():
    q = torch.zeros(20000, 1, 1)
    with pytest.raises(ValueError, match="use 'blockwise'"):
        moba_attention(q, q, q, block_size=20000, topk=1, backend="dense")


@patient
def test_the_triton_kernels_equal_the_oracle_in_their_interpreter():
    assert_equal_in_the_interpreter("moba_triton_cases")


def test_tensors_that_the_kernels_do_not_take_are_refused_with_the_reason(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    q = torch.zeros(4, 1, 8)
    with pytest.raises(BackendError, match="needs tensors on a GPU, got cpu"):
        moba_attention(q, q, q, block_size=2, topk=1, backend="triton")
    for policy in ("mean", "recent"):
        with pytest.raises(BackendError, match="needs tensors on a GPU, got cpu"):
            moba_route(q, q, block_size=2, topk=1, policy=policy, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=r"takes float32, bfloat16 and float16, got torch\.float64; use 'blockwise'"):
        moba_attention(*(q.double() for _ in range(3)), block_size=2, topk=1, backend="triton")
    wide = torch.zeros(4, 1, 300)
    with pytest.raises(BackendError, match="heads of up to 256 channels, got D=300"):
        moba_attention(wide, wide, wide, block_size=2, topk=1, backend="triton")
