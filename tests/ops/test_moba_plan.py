"""Tables of MoBA's Triton backend: what fits into its workspace, and what is refused."""

import pytest
import torch

from perilune.errors import BackendError
from perilune.ops import SequenceLayout
from perilune.ops.moba.options import MobaOptions

pytest.importorskip("triton", reason="triton is not installed")
from perilune.ops.moba.triton import plan as tables


def make_plan(lengths, heads, kv_heads, *, block_size=16, topk=4, dim=32, device="cpu"):
    layout = SequenceLayout.from_lengths(lengths)
    options = MobaOptions(block_size=block_size, topk=topk, scale=1.0, layout_q=layout, layout_k=layout)
    q, k = (torch.empty(sum(lengths), n, dim, dtype=torch.bfloat16, device=device) for n in (heads, kv_heads))
    return tables.make_plan(options, q, k, k)


def plan_runs(plan):
    return plan.runs.T.tolist()


@pytest.mark.parametrize("workspace", [1, 1 << 16, 1 << 20, 1 << 30])
@pytest.mark.parametrize("lengths", [(1000,), (300, 0, 1, 700), (128, 128)])
def test_slices_cover_all_tiles_and_fit_into_their_share(monkeypatch, workspace, lengths):
    monkeypatch.setattr(tables, "WORKSPACE_BYTES", workspace)
    heads, kv_heads, topk, dim = 4, 2, 4, 32
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


def test_each_block_is_counted_by_the_runs_of_its_sequence(monkeypatch):
    monkeypatch.setattr(tables, "WORKSPACE_BYTES", 1 << 20)
    lengths = (1000, 0, 40, 300)
    plan = make_plan(lengths, 4, 2)
    sequence, first, size, counter, stride = plan_runs(plan)
    blocks = [-(-length // 16) for length in lengths]
    owners = [n for n, count in enumerate(blocks) for _ in range(count)]
    taken = []
    for n, at, step in zip(sequence, counter, stride, strict=True):
        taken += [at + step * block for block in range(blocks[n])]
    assert sorted(taken) == list(range(plan.num_counters))  # every counter has one block and one run
    for part, border in zip(plan.slices, plan.borders.tolist(), strict=False):
        for block, at in enumerate(border):
            local = block - owners.index(owners[block])
            before = [
                c + s * local
                for run, (n, c, s) in enumerate(zip(sequence, counter, stride, strict=True))
                if n == owners[block] and run < part.first_run
            ]
            assert all(c < at for c in before)
            assert at - len(before) == min(
                c + s * local for n, c, s in zip(sequence, counter, stride, strict=True) if n == owners[block]
            )
    assert sum(size) == sum(lengths)
    assert first == sorted(first)


@pytest.mark.parametrize("lengths", [(1 << 17,), (1024,) * 1024, (512,) * 2048])
def test_counters_fit_into_their_share(lengths):
    plan = make_plan(lengths, 16, 16)
    assert 16 * plan.num_counters * 8 <= tables.WORKSPACE_BYTES // 8


def test_choices_beyond_32_bits_are_refused():
    past = torch.empty(1, 1, 1, dtype=torch.int32).expand(2**20, 64, 32)
    with pytest.raises(BackendError, match=r"32 bits, and \[1048576, 64, 32\] are too many; split"):
        tables.make_lists(past, make_plan([64], 1, 1), 16, 1)
