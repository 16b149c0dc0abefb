"""Context parallelism: sequences split among processes give what one process computes, and cuts fall where they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perilune.ops import (
    ContextLayout,
    SequenceLayout,
    kda,
    kda_context_parallel,
    short_conv,
    short_conv_context_parallel,
)
from tests.ops.kda_cases import Case

ROOT = Path(__file__).parents[2]
DEADLINE_S = 90


def run_ranks(module: str, world: int, folder: Path) -> list[str]:
    """Run `python -m module RANK WORLD FOLDER` in `world` processes; return what each wrote to its standard error."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", module]
    logs = [folder / f"{rank}.log" for rank in range(world)]
    processes, deadline = [], time.monotonic() + DEADLINE_S
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                arguments = [*command, str(rank), str(world), str(folder)]
                processes.append(subprocess.Popen(arguments, stdout=out, stderr=out, env=environment, cwd=ROOT))
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # it leaves no results, which is what the test looks for
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [log.read_text()[-3000:] for log in logs]


@pytest.mark.parametrize("world", [2, 4])
def test_split_over_processes_equals_one_process(world: int, tmp_path: Path) -> None:
    logs = run_ranks("tests.ops.context_parallel_cases", world, tmp_path)
    results = [tmp_path / f"{rank}.json" for rank in range(world)]
    assert all(path.exists() for path in results), "\n".join(logs)
    found = [json.loads(path.read_text()) for path in results]
    assert [failure for result in found for failure in result["failures"]] == []
    assert {result["count"] for result in found} == {found[0]["count"]}
    assert found[0]["count"] > 200


@given(
    lengths=st.lists(st.integers(0, 6), max_size=6),
    world=st.integers(1, 6),
    spots=st.lists(st.integers(0, 36), max_size=5),
)
def test_every_token_and_every_sequence_is_held(lengths: list[int], world: int, spots: list[int]) -> None:
    total = sum(lengths)
    inner = sorted(min(spot, total) for spot in (*spots, *(0,) * 5)[: world - 1])
    for cuts in (None, [0, *inner, total]):
        ranks = [ContextLayout.split(lengths, world_size=world, rank=rank, cuts=cuts) for rank in range(world)]
        assert [index for x in ranks for index in range(total)[x.tokens]] == list(range(total))
        for which in ("starting", "ending"):
            held = [index for x in ranks for index in range(len(lengths))[getattr(x, which)]]
            assert held == list(range(len(lengths)))
        for index, length in enumerate(lengths):
            assert sum(x.sequences.lengths[index - x.held.start] for x in ranks if index in x.held) == length
        for x in ranks:
            assert x.sequences.total == x.tokens.stop - x.tokens.start
            assert len(x.held) == x.sequences.num_sequences
            assert x.at(x.rank) == x
        for left, right in pairwise(ranks):
            assert (left.post_num_ranks > 0) == (right.pre_num_ranks > 0)
            if left.post_num_ranks > 0:
                assert left.held[-1] == right.held[0]
        assert {x.is_split for x in ranks} == {any(x.pre_num_ranks for x in ranks)}
        for x in ranks:
            together = [y.rank for y in ranks if x.held and x.held[0] in y.held and y.rank < x.rank]
            assert together == list(range(x.rank - x.pre_num_ranks, x.rank))
            together = [y.rank for y in ranks if x.held and x.held[-1] in y.held and y.rank > x.rank]
            assert together == list(range(x.rank + 1, x.rank + 1 + x.post_num_ranks))


def test_ranges_are_equal_unless_told_otherwise() -> None:
    sizes = [ContextLayout.split([10, 13], world_size=4, rank=rank).sequences.total for rank in range(4)]
    assert sum(sizes) == 23
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2}, "rank must be in"),
        ({"rank": -1}, "rank must be in"),
        ({"world_size": 0}, "rank must be in"),
        ({"lengths": [3, -1]}, "lengths must be >= 0"),
        ({"cuts": [0, 8]}, "cuts must be 3 positions"),
        ({"cuts": [1, 2, 8]}, "cuts must be 3 positions"),
        ({"cuts": [0, 2, 7]}, "cuts must be 3 positions"),
        ({"cuts": [0, 9, 8]}, "cuts must be 3 positions"),
    ],
)
def test_impossible_cuts_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextLayout.split(**{"lengths": [3, 5], "world_size": 2, "rank": 0, **arguments})


def test_one_rank_needs_no_process_group() -> None:
    lengths = (5, 0, 9)
    case, context = Case(lengths=lengths), ContextLayout.split(lengths, world_size=1, rank=0)
    tensors = case.tensors()
    options = {name: x for name, x in case.options().items() if name != "cu_seqlens"}
    got = kda_context_parallel(**tensors, context=context, **options)
    want = kda(**tensors, **case.options())
    assert all(torch.equal(a, b) for a, b in zip(got, want[:2], strict=True) if a is not None and b is not None)
    grads = [torch.autograd.grad(results[0].sum(), list(tensors.values())) for results in (got, want)]
    assert all(map(torch.equal, *grads))
    assert kda_context_parallel(**tensors, context=context)[1] is None
    x, weight = tensors["v"][0].flatten(1).detach(), torch.ones(16, 4, dtype=torch.float64)
    layout = SequenceLayout.from_lengths(lengths)
    assert all(map(torch.equal, short_conv_context_parallel(x, weight, context), short_conv(x, weight, layout)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(1, 5, 2, 16)}, "k has leading dimensions"),
        ({name: torch.ones(1, 9, 2, 16) for name in "qkvg"} | {"beta": torch.ones(1, 9, 2)}, r"holds \[1, 8\]"),
        ({"initial_state": torch.ones(3, 2, 16, 16)}, "3 states for 2"),
        ({"initial_state": torch.ones(2, 2, 16, 8)}, "initial_state must be"),
        ({"chunk_size": 5}, "chunk_size"),
        ({"allow_neg_eigval": True}, "allow_neg_eigval"),
    ],
)
def test_kda_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    context = ContextLayout.split([3, 5], world_size=1, rank=0)
    tensors: dict[str, Any] = {name: torch.ones(1, 8, 2, 16) for name in "qkvg"} | {"beta": torch.ones(1, 8, 2)}
    with pytest.raises(ValueError, match=message):
        kda_context_parallel(**{**tensors, **changes}, context=context)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": (8,)}, r"x must be \[T, D\]"),
        ({"weight": (4, 4)}, r"x must be \[T, D\]"),
        ({"x": (9, 3)}, "holds 8 tokens"),
        ({"state": (1, 3, 3)}, "state must be"),
        ({"state": (2, 3, 4)}, "state must be"),
    ],
)
def test_the_convolution_refuses_what_does_not_fit(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    context = ContextLayout.split([3, 5], world_size=1, rank=0)
    given_shapes = {"x": (8, 3), "weight": (3, 4), **shapes}
    with pytest.raises(ValueError, match=message):
        short_conv_context_parallel(
            **{name: torch.ones(shape) for name, shape in given_shapes.items()}, context=context
        )
