"""Cases of small Triton kernels that their interpreter runs; `python -m tests.ops.small_triton_cases` checks them all.

Run with TRITON_INTERPRET=1. They share a process: to load the libraries takes longer than most of them.
"""

from __future__ import annotations

import itertools

import torch

from perilune.ops import SequenceLayout, short_conv, swiglu, varlen_attention
from perilune.ops.attention.triton import max_logits
from perilune.ops.kda_decode import kda_decode
from perilune.ops.norm import rms_norm, rms_norm_gated
from tests.ops import conv_cases, kda_decode_cases, loss_cases, norm_cases, swiglu_cases


def check_norms() -> None:
    for gate in norm_cases.GATES:
        for shape in ((1, 1), (5, 2, 7), (33, 128), (3, 300), (70, 4)):
            norm_cases.compare(shape, gate, torch.float32, 1e-6)
        norm_cases.compare((9, 24), gate, torch.bfloat16, 8e-3)
        norm_cases.compare((9, 24), gate, torch.float16, 1e-3)
        norm_cases.compare((6, 5, 16), gate, torch.float32, 1e-6, is_strided=True)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, _ = norm_cases.make((9, 24), dtype)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got = rms_norm(a, weight, 1e-5, dtype=torch.bfloat16, backend="triton")
        want = rms_norm(b, weight, 1e-5, backend="triton")
        torch.testing.assert_close(got, want.bfloat16(), rtol=8e-3, atol=0)  # the interpreter cuts off
        got.backward(x.bfloat16())
        want.backward(x.bfloat16().to(dtype))
        torch.testing.assert_close(a.grad, b.grad)
    x = torch.zeros(0, 3, 8, requires_grad=True)
    y = rms_norm_gated(x, torch.ones(8), x, 1e-5, backend="triton")
    assert y.shape == x.shape
    y.sum().backward()
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm_gated(x, torch.ones(8), torch.full((2, 8), -1e30), 1e-5, backend="triton").sum().backward()
    assert not x.grad.any()


def check_swiglu() -> None:
    for shape in swiglu_cases.SHAPES:
        swiglu_cases.compare(shape, torch.float32, 1e-6)
    for shape in swiglu_cases.SHAPES[:-1]:
        swiglu_cases.compare(shape, torch.bfloat16, 4e-3)
        swiglu_cases.compare(shape, torch.float16, 5e-4)
    x = torch.tensor([[-1e30, 1e30, -100.0, 100.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True)
    y = swiglu(x, backend="triton")
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def check_losses() -> None:
    wide, half = torch.float32, torch.bfloat16
    for sizes in ((0, 5, 4), (1, 1, 3), (7, 2500, 16), (5, 11, 6), (3, 2048, 8)):
        loss_cases.compare(sizes, (wide, wide))
        loss_cases.compare(sizes, (wide, wide), autocast=True, chunk_size=3)
        for dtypes in itertools.product((wide, half), repeat=2):
            loss_cases.compare(sizes, dtypes, chunk_size=2, temperature=0.7)
    loss_cases.compare((5, 11, 6), (torch.float16, wide))
    hidden, weight, targets = loss_cases.make_inputs(6, dtype=wide)
    got = loss_cases.run_with_gradients("triton", (1e6 * hidden, weight, targets))
    assert all(value.isfinite().all() for value in got.values())


def check_kda_decode() -> None:
    for shape in ((3, 1, 2, 2, 16, 16), (3, 3, 2, 4, 16, 32), (2, 5, 1, 1, 24, 20)):
        for gate in kda_decode_cases.GATES:
            inputs = kda_decode_cases.make_inputs(*shape, gated=shape[1] != 3)
            inputs["slots"][-1] = -1
            found = kda_decode_cases.errors(inputs, "triton", **gate)
            assert max(found.values()) < 1e-6, (shape, gate, found)
    for shape, taps in (((6, 2, 1, 1, 16, 16), 2), ((4, 3, 1, 2, 8, 16), 7), ((4, 4, 1, 1, 8, 8), 4)):
        inputs = kda_decode_cases.make_inputs(*shape, taps=taps, kept=True)
        inputs["slots"][2] = -1
        found = kda_decode_cases.errors(inputs, "triton")
        assert max(found.values()) < 1e-6, (shape, taps, found)
    none, every, plain = (kda_decode_cases.copied(inputs) for _ in range(3))
    plain["keep"] = None
    none["keep"], every["keep"] = torch.zeros(4, dtype=torch.int32), torch.full((4,), 4)
    outputs = [kda_decode(**each, backend="triton") for each in (none, every, plain)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[2])
    for pool in ("states", "conv_states"):
        assert torch.equal(none[pool], inputs[pool])
        assert torch.equal(every[pool], plain[pool])
    in_order = {**kda_decode_cases.make_inputs(2, 2, 1, 2, 8, 8), "slots": None}
    assert max(kda_decode_cases.errors(in_order, "triton").values()) < 1e-6


def check_maximum_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    cases = [
        ([3, 0, 200], [3, 0, 200], 4, 2, 24),
        ([1, 5], [300, 130], 2, 1, 192),
        ([], [], 2, 2, 8),
        ([0], [0], 3, 3, 8),
    ]
    for lengths_q, lengths_k, heads, kv_heads, dim in cases:
        q = torch.randn(sum(lengths_q), heads, dim, generator=generator)
        k = torch.randn(sum(lengths_k), kv_heads, dim, generator=generator)
        layouts = SequenceLayout.from_lengths(lengths_q), SequenceLayout.from_lengths(lengths_k)
        want = varlen_attention(q, k, k, *layouts, scale=0.3, return_max_logits=True, backend="torch")[1]
        torch.testing.assert_close(max_logits(q, k, *layouts, 0.3), want)


def check_convolutions() -> None:
    def compare(*arguments: object, dtype: torch.dtype = torch.float32, ratio: float = 1e-6, **options: object) -> None:
        conv_cases.compare(*arguments, dtype, ratio, **options)

    for index, (lengths, taps) in enumerate(itertools.product(conv_cases.RAGGED, (1, 2, 4, 8))):
        is_ragged = lengths is conv_cases.RAGGED[2]
        for with_state in (False, True) if is_ragged else ((index + index // 4) % 2 == 0,):
            compare(lengths, 5 + index, taps, with_state, "silu")
    compare(conv_cases.RAGGED[2], 5, 4, True, None)
    for dtype, ratio in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        compare((3, 0, 14), 6, 4, True, "silu", dtype=dtype, ratio=ratio)
    # More tokens than a program takes, so that sequences and windows cross tiles; more channels; rows of wider ones.
    compare((40, 1, 37, 66), 3, 4, True, "silu")
    compare((5, 2), 515, 4, True, "silu")
    compare((3, 0, 8), 6, 4, True, "silu", is_slice=True)
    compare((3, 0, 8), 6, 4, True, "silu", outputs=(0,))
    compare((3, 0, 8), 6, 4, True, "silu", outputs=(1,))
    for lengths in ((), (0,), (0, 0)):
        x, weight, state, layout = conv_cases.make(lengths, dtype=torch.float32)
        y, last = short_conv(x, weight, layout, state, backend="triton")
        assert y.shape == (0, 5)
        assert torch.equal(last, state)
    x, weight, state, layout = conv_cases.make((5, 5, 5), dtype=torch.float32)
    want, want_last = short_conv(x, weight, layout, state, "silu", backend="triton")
    x[7], state[1] = torch.nan, torch.nan
    y, last = short_conv(x, weight, layout, state, "silu", backend="triton")
    assert torch.equal(y[:5], want[:5])
    assert torch.equal(y[10:], want[10:])
    assert torch.equal(last[::2], want_last[::2])


CHECKS = (check_norms, check_swiglu, check_losses, check_kda_decode, check_maximum_logits, check_convolutions)

if __name__ == "__main__":
    for check in CHECKS:
        check()
    print("equal")
