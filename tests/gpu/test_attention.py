"""Attention on a GPU: torch's flash kernels and our maximum logits, against the reference in float64."""

import pytest
import torch

from perilune.ops import varlen_attention
from perilune.ops.attention.triton import max_logits
from perilune.ops.layout import SequenceLayout
from perilune.seeding import make_generator
from tests.helpers import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Heads, key heads, Dk, Dv
HEADS = [(6, 6, 192, 128), (4, 2, 64, 64), (4, 1, 128, 128), (2, 2, 24, 20), (2, 1, 30, 45), (2, 2, 256, 256)]
RAGGED = [
    ([], []),
    ([0, 0], [0, 0]),
    ([1], [1]),
    ([0, 1, 0, 5, 3, 0], [0, 1, 0, 5, 3, 0]),
    ([127, 128, 129, 700], [127, 128, 129, 700]),
    ([333] * 4, [333] * 4),
    ([1024], [1024]),
    ([2, 0, 3, 1], [9, 4, 3, 270]),
    ([130, 300], [1030, 301]),
]


def draw(layout_q, layout_k, heads, kv_heads, dk, dv, dtype, factor=1.0):
    generator = make_generator(0, "attention", layout_q.total, layout_k.total, device="cuda")
    shapes = (layout_q.total, heads, dk), (layout_k.total, kv_heads, dk), (layout_k.total, kv_heads, dv)
    q, k, v = ((factor * torch.randn(shape, generator=generator, device="cuda")).to(dtype) for shape in shapes)
    return [q, k, torch.cat([v, v], -1)[..., :dv]]  # values lie beside keys in what a layer expands


def run(backend, inputs, layout_q, layout_k):
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, top = varlen_attention(*leaves, layout_q, layout_k, return_max_logits=True, backend=backend)
    seed = torch.randn(o.shape, generator=make_generator(1, "seed", device="cuda"), device="cuda").bfloat16().to(o)
    return dict(zip(("o", "dq", "dk", "dv"), [o.detach(), *torch.autograd.grad(o, leaves, seed)], strict=True)), top


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("lengths_q", "lengths_k"), RAGGED)
def test_flash_equals_the_reference(lengths_q, lengths_k, heads, dtype):
    layouts = [SequenceLayout.from_lengths(lengths, "cuda") for lengths in (lengths_q, lengths_k)]
    inputs = draw(*layouts, *heads, dtype)
    want, want_top = run("reference", [x.double() for x in inputs], *layouts)
    got, top = run("auto", inputs, *layouts)
    assert got["o"].dtype == dtype
    torch.testing.assert_close(top, want_top, rtol=2e-6, atol=1e-6)
    for name, reference in want.items():
        # With one key there is nothing to choose and dq is 0; values are of order 1.
        ratio = 1.2e-2 if dtype == torch.bfloat16 else 1.5e-3
        assert_close(name, reference, got[name].double(), ratio, floor=ratio)


def test_maximum_logits_beyond_32_bit_offsets():
    """The one large logit lies past the 2^31st element of q and k."""
    length, heads, dim = 2**20 + 64, 16, 128
    q, k = (torch.zeros(length, heads, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    q[-1, 3, 7], k[-2, 3, 7] = 6.0, 5.0
    layout = SequenceLayout.from_lengths([length - 4096, 4096], "cuda")
    want = torch.zeros(heads, device="cuda")
    want[3] = 15.0
    assert torch.equal(max_logits(q, k, layout, layout, 0.5), want)


def test_large_logits_are_found_and_stay_finite():
    layout = SequenceLayout.from_lengths([1025, 15], "cuda")
    inputs = draw(layout, layout, 4, 2, 128, 128, torch.bfloat16, factor=1e3)
    got, top = run("flash", inputs, layout, layout)
    assert all(x.isfinite().all() for x in got.values())
    assert top.min() > 1e5


def test_a_sequence_does_not_feel_its_neighbors():
    layout = SequenceLayout.from_lengths([300, 77, 512], "cuda")
    inputs = draw(layout, layout, 4, 4, 192, 128, torch.bfloat16)
    together, _ = varlen_attention(*inputs, layout)
    fewer, _ = varlen_attention(*(x[300:] for x in inputs), SequenceLayout.from_lengths([77, 512], "cuda"))
    assert torch.equal(together[300:], fewer)


def test_gradients_repeat_to_the_bit_where_that_is_asked_for():
    for lengths in ([300, 77, 512], [512, 512]):
        layout = SequenceLayout.from_lengths(lengths, "cuda")
        inputs = draw(layout, layout, 4, 4, 128, 128, torch.bfloat16)
        torch.use_deterministic_algorithms(True)
        try:
            first, second = (run("flash", inputs, layout, layout)[0] for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
