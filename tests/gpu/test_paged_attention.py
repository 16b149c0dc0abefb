"""Attention over pages on a GPU: the kernel against the reference in float64, and what must hold to the bit."""

import pytest
import torch

from perilune.ops import paged_decode_attention
from perilune.seeding import make_generator
from tests.helpers import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RATIO = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# Heads, key heads, Dk, Dv (None: half of the keys or 512 of 576), tokens of a page
SHAPES = [
    (32, 1, 576, 512, 64), (16, 1, 576, 512, 64), (64, 1, 576, 512, 48), (8, 1, 24, 16, 8),
    (32, 8, 128, None, 64), (9, 3, 64, None, 16), (4, 4, 80, None, 7),
]  # fmt: skip


def draw(shape, lengths, dtype):
    heads, kv_heads, dim, shared, block_size = shape
    generator = make_generator(0, "pages", *shape[:3], *lengths, device="cuda")
    width = max(1, -(-max(lengths) // block_size))
    pages = len(lengths) * width + 1

    def pool(width):
        return torch.randn(pages, block_size, kv_heads, width, generator=generator, device="cuda").to(dtype)

    keys = pool(dim)
    values = pool(dim) if shared is None else keys[..., :shared]
    tables = torch.randperm(pages, generator=generator, device="cuda")[:-1].view(len(lengths), width).int()
    q = torch.randn(len(lengths), heads, dim, generator=generator, device="cuda").to(dtype)
    return q, keys, values, tables, torch.tensor(lengths, device="cuda")


@pytest.mark.parametrize("dtype", RATIO)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_reference(shape, dtype):
    q, keys, values, tables, lengths = draw(shape, [0, 1, 63, 64, 65, 700], dtype)
    found = paged_decode_attention(q, keys, values, tables, lengths)
    wide = keys.double()
    pools = (wide, values.double() if shape[3] is None else wide[..., : shape[3]])
    expected = paged_decode_attention(q.double(), *pools, tables, lengths, backend="reference")
    assert_close("o", expected, found, RATIO[dtype])
    assert not found[0].any()


def test_rows_do_not_see_each_other_and_a_graph_serves_other_lengths():
    q, keys, values, tables, lengths = draw(SHAPES[0], [500, 3, 129], torch.bfloat16)
    expected = paged_decode_attention(q, keys, values, tables, lengths)
    changed = lengths.clone()
    changed[1:] = torch.tensor([400, 1])
    assert torch.equal(paged_decode_attention(q, keys, values, tables, changed)[0], expected[0])
    graph = torch.cuda.CUDAGraph()
    held = changed.clone()
    with torch.cuda.graph(graph):
        out = paged_decode_attention(q, keys, values, tables, held)
    held.copy_(lengths)
    graph.replay()
    assert torch.equal(out, expected)
