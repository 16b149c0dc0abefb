"""Tables of MoBA's Triton backend: what fits into its workspace, and what is refused."""

import pytest
import torch

from perilune.errors import BackendError
from perilune.ops import SequenceLayout
from perilune.ops.moba.options import MobaOptions

pytest.importorskip("triton", reason="triton is not installed")
from perilune.ops.moba.triton import plan as tables


def make_plan(lengths, heads, kv_heads, *, block_size=16, topk=4, dim=32):
    layout = SequenceLayout.from_lengths(lengths)
    options = MobaOptions(block_size=block_size, topk=topk, scale=1.0, layout_q=layout, layout_k=layout)
    q, k = (torch.empty(sum(lengths), n, dim, dtype=torch.bfloat16, device="meta") for n in (heads, kv_heads))
    return tables.make_plan(options, q, k, k)


@pytest.mark.parametrize("workspace", [1, 1 << 16, 1 << 20, 1 << 30])
@pytest.mark.parametrize("lengths", [(1000,), (300, 0, 1, 700), (128, 128)])
def test_slices_cover_all_tiles_and_fit_into_their_share(monkeypatch, workspace, lengths):
    monkeypatch.setattr(tables, "WORKSPACE_BYTES", workspace)
    heads, kv_heads, topk, dim, block_size = 4, 2, 4, 32, 16
    plan = make_plan(lengths, heads, kv_heads)
    assert sum(part.num_queries for part in plan.slices) == sum(lengths)
    assert sum(part.num_tiles for part in plan.slices) == plan.tiles.shape[0]
    for part, after in zip(plan.slices, plan.slices[1:], strict=False):
        assert part.first_query + part.num_queries == after.first_query
        assert part.first_tile + part.num_tiles == after.first_tile
    for part in plan.slices:
        per_choice = 2 * dim + 8
        fits = part.num_queries * heads * (topk - 1) * per_choice <= workspace * 9 // 16
        assert fits or part.num_tiles == 1
    runs, blocks = plan.runs.shape[0], sum(-(-length // block_size) for length in lengths)
    shortest = len(plan.slices) + len(lengths) + sum(lengths) // tables.TILE
    assert kv_heads * blocks * runs * 8 <= workspace // 8 + 8 * kv_heads * blocks * shortest


def test_choices_beyond_32_bits_are_refused():
    past = torch.empty(1, 1, 1, dtype=torch.int32).expand(2**20, 64, 32)
    with pytest.raises(BackendError, match=r"32 bits, and \[1048576, 64, 32\] are too many; split"):
        tables.make_lists(past, make_plan([64], 1, 1), 16, 1)
