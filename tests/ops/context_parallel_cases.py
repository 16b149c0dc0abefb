"""What one rank checks about context parallelism; `python -m tests.ops.context_parallel_cases RANK WORLD FOLDER`.

Every rank computes the whole batch alone, then its share together with the others, and compares. Spawning processes
costs seconds, so that one run goes through all checks and leaves `FOLDER/RANK.json`: a line for each that failed.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from perilune.ops import ContextLayout, kda_context_parallel, short_conv, short_conv_context_parallel
from perilune.ops.kda import kda
from tests.helpers import assert_close
from tests.ops.kda_cases import Case

Layout = tuple[tuple[int, ...], tuple[int, ...] | None]
Check = Callable[[], None]

LAYOUTS: dict[int, list[Layout]] = {
    2: [
        ((37,), None),
        ((20, 17), (0, 20, 37)),
        ((5, 0, 12, 0, 0, 20), (0, 5, 37)),
        ((5, 0, 12, 0, 0, 20), (0, 17, 37)),
        ((5, 0, 12, 0, 0, 20), (0, 30, 37)),
        ((40,), (0, 0, 40)),
        ((0, 40, 0), (0, 40, 40)),
        ((3, 20), (0, 2, 23)),
        ((1, 1, 1), (0, 1, 3)),
        ((0, 0), None),
        ((), None),
    ],
    4: [
        ((61,), None),
        ((10, 10, 10, 10), None),
        ((30, 0, 30), (0, 10, 30, 40, 60)),
        ((5, 50, 0, 0, 9), (0, 20, 20, 40, 64)),
        ((25, 15), (0, 25, 25, 25, 40)),
        ((0, 33, 0, 7), (0, 0, 16, 33, 40)),
        ((8, 32), (0, 40, 40, 40, 40)),
        ((40,), (0, 0, 0, 0, 40)),
        ((5,), (0, 1, 2, 3, 5)),
        ((7, 1), (0, 2, 2, 5, 8)),
        ((6, 5), (0, 3, 7, 9, 11)),
        ((2, 1), None),
        ((0,), None),
    ],
}

KDA_VARIANTS: dict[str, dict[str, Any]] = {
    "raw": {"raw": True},
    "raw with a bounded gate and negative eigenvalues": {
        "raw": True,
        "lower_bound": -5.0,
        "switches": {"allow_neg_eigval": True},
    },
    "grouped values, own scale": {"groups": 3, "scale": 0.7, "chunk_size": 32},
    "no initial state": {"state": False},
    "unbounded gate": {"gate": "spiky"},
    "masks": {"gate": "masks_and_init"},
    "no decay": {"gate": "zero", "beta": 1.0},
    "token by token": {"switches": {"backend": "reference"}},
}


def layouts(world: int) -> list[Layout]:
    """The chosen ones and random ones, in which empty sequences, empty ranks and one-token parts are frequent."""
    random, found = Random(world), list(LAYOUTS[world])
    for _ in range(10):
        lengths = tuple(random.choice((0, 1, 2, 3, 17, 30)) for _ in range(random.randint(1, 5)))
        total = sum(lengths)
        found.append((lengths, (0, *sorted(random.randint(0, total) for _ in range(world - 1)), total)))
    return found


def context_of(layout: Layout) -> ContextLayout:
    lengths, cuts = layout
    return ContextLayout.split(lengths, world_size=dist.get_world_size(), rank=dist.get_rank(), cuts=cuts)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def summed(x: Tensor) -> Tensor:
    """A shared parameter's gradient, over all ranks."""
    total = x.double().contiguous()
    dist.all_reduce(total)
    return total


def compare(whole: dict[str, Tensor], got: dict[str, Tensor], parts: dict[str, Any], ratio: float) -> None:
    """Compare this rank's results with their parts of the whole; errors are relative to the whole."""
    for name, x in got.items():
        reference = whole[name].double()
        size = reference.square().mean().sqrt().item() if reference.numel() else 0.0
        assert_close(name, reference[parts[name]] if name in parts else reference, x, ratio, floor=ratio * size + 1e-14)


def whole_kda(case: Case) -> dict[str, Tensor]:
    tensors = case.tensors()
    o, final_state = kda(**tensors, **case.options())[:2]
    assert final_state is not None
    seeds = [normal(o.shape, 1), normal(final_state.shape, 2)]
    # Without any token, the results depend on next to nothing.
    lenient: Any = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad((o, final_state), list(tensors.values()), seeds, **lenient)
    return {"o": o, "final_state": final_state} | {f"d{x}": g for x, g in zip(tensors, grads, strict=True)}


def check_kda(layout: Layout, dtype: torch.dtype, ratio: float, state_v_first: bool = False, **settings: Any) -> None:
    case = Case(lengths=layout[0], **{"key_dim": 12, "value_dim": 6, **settings})
    whole = whole_kda(case)
    context = context_of(layout)
    tokens, starting, ending = (slice(None), context.tokens), context.starting, context.ending
    parts = {"o": tokens, "final_state": ending, "initial_state": starting, "dinitial_state": starting}
    parts |= {name: tokens for x in ("q", "k", "v", "g", "beta") for name in (x, f"d{x}")}
    leaves = {name: x.detach()[parts.get(name, ...)].clone().to(dtype) for name, x in case.tensors().items()}
    if state_v_first and case.state:
        leaves["initial_state"] = leaves["initial_state"].mT.contiguous()
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    options = {name: x for name, x in case.options().items() if name != "cu_seqlens"}
    o, final_state = kda_context_parallel(**leaves, context=context, state_v_first=state_v_first, **options)
    assert final_state is not None
    assert o.dtype == dtype
    if state_v_first:
        final_state = final_state.mT
    seeds = [normal(whole["o"].shape, 1)[tokens].to(dtype), normal(whole["final_state"].shape, 2)[ending]]
    seeds[1] = seeds[1].to(final_state.dtype)
    grads = torch.autograd.grad((o, final_state), list(leaves.values()), seeds)
    got = {"o": o, "final_state": final_state} | {f"d{x}": grad for x, grad in zip(leaves, grads, strict=True)}
    assert all(got[f"d{name}"].dtype == x.dtype for name, x in leaves.items())
    if state_v_first and case.state:
        got["dinitial_state"] = got["dinitial_state"].mT
    compare(whole, {name: summed(x) if name in ("dA_log", "ddt_bias") else x for name, x in got.items()}, parts, ratio)


def check_conv(layout: Layout, dtype: torch.dtype, ratio: float, taps: int, activation: Any, with_state: bool) -> None:
    width, count, context = 5, len(layout[0]), context_of(layout)
    leaves = {"x": normal((sum(layout[0]), width), 0), "weight": normal((width, taps), 1)}
    if with_state:
        leaves["state"] = normal((count, width, taps - 1), 2)
    cu_seqlens = torch.tensor([0, *layout[0]]).cumsum(0)

    def run(local: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        mine = {"x": context.tokens, "state": context.starting} if local else {}
        inputs = {name: x[mine.get(name, ...)].to(dtype).clone().requires_grad_() for name, x in leaves.items()}
        if local:
            y, new_state = short_conv_context_parallel(**inputs, context=context, activation=activation)
        else:
            y, new_state = short_conv(**inputs, cu_seqlens=cu_seqlens, activation=activation)
        seeds = [normal((sum(layout[0]), width), 3), normal((count, width, taps - 1), 4)]
        if local:
            seeds = [seeds[0][context.tokens], seeds[1][context.ending]]
        outputs = [(x, seed.to(dtype)) for x, seed in zip((y, new_state), seeds, strict=True) if x.requires_grad]
        is_needed = {name: local and name != "state" for name in inputs}  # an empty rank, too, gives the others zeros
        grads = torch.autograd.grad(
            [x for x, _ in outputs], list(inputs.values()), [seed for _, seed in outputs], allow_unused=True
        )
        assert all(g is not None or not is_needed[name] for name, g in zip(inputs, grads, strict=True))
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs.values(), grads, strict=True)]
        assert {x.dtype for x in (y, new_state, *grads)} == {dtype}
        return {"y": y, "new_state": new_state} | {f"d{x}": g for x, g in zip(inputs, grads, strict=True)}

    whole, got = run(False, torch.float64), run(True, dtype)
    got["dweight"] = summed(got["dweight"])
    parts = {"y": context.tokens, "new_state": context.ending, "dx": context.tokens, "dstate": context.starting}
    compare(whole, got, parts, ratio)


def check_conv_with_a_state_of_another_dtype(layout: Layout, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    context = context_of(layout)
    x, weight = normal((sum(layout[0]), 5), 0, dtype), normal((5, 4), 1, dtype)
    state, cu_seqlens = normal((len(layout[0]), 5, 3), 2, state_dtype), torch.tensor([0, *layout[0]]).cumsum(0)
    y, last = short_conv(x, weight, cu_seqlens, state)
    local = short_conv_context_parallel(x[context.tokens], weight, context, state=state[context.starting])
    assert (local[0].dtype, local[1].dtype) == (dtype, state_dtype)
    assert torch.equal(local[0], y[context.tokens])
    assert torch.equal(local[1], last[context.ending])


def check_stack(layout: Layout) -> None:
    """Two layers of convolutions and KDA under one loss: the ranks' backwards meet in the same order."""
    width, context, total = 8, context_of(layout), sum(layout[0])
    whole_tokens, cu_seqlens = slice(0, total), torch.tensor([0, *layout[0]]).cumsum(0)

    def run(local: bool) -> list[Tensor]:
        tokens = context.tokens if local else whole_tokens
        x = start = normal((total, width), 0)[tokens].requires_grad_()
        weights = [normal((width, 4), seed).requires_grad_() for seed in range(1, 7)]
        g, beta = normal((total, 2, 4), 7)[tokens].abs().neg(), normal((total, 2), 8)[tokens].sigmoid()
        for layer in (weights[:3], weights[3:]):
            if local:
                qkv = [short_conv_context_parallel(x, w, context, activation="silu")[0] for w in layer]
            else:
                qkv = [short_conv(x, w, cu_seqlens, activation="silu")[0] for w in layer]
            q, k, v = (y.view(1, -1, 2, 4) for y in qkv)
            switches: Any = {"qk_l2norm_in_kernel": True, "chunk_size": 16}
            if local:
                o, _ = kda_context_parallel(q, k, v, g[None], beta[None], context, **switches)
            else:
                o, _ = kda(q, k, v, g[None], beta[None], cu_seqlens=cu_seqlens, **switches)[:2]
            x = x + o.view(-1, width)
        loss = (x * normal((total, width), 9)[tokens]).sum()
        return [x, *torch.autograd.grad(loss, [start, *weights])]

    whole, got = run(False), run(True)
    for index, (a, b) in enumerate(zip(whole, got, strict=True)):
        shared = index > 1
        assert_close(str(index), a if shared else a[context.tokens], summed(b) if shared else b, 1e-10, floor=1e-10)


def check_other_sequences_survive_bad_numbers() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    context = context_of(((6, 12 * world - 12, 6), None))
    case = Case(lengths=(12 * world,), state=False)
    tensors = {name: x.detach()[:, context.tokens] for name, x in case.tensors().items()}
    is_bad = ((torch.arange(12 * world)[context.tokens] - 6) % (12 * world - 6)) < 12 * world - 12
    tensors["v"] = torch.where(is_bad[:, None, None], torch.nan, tensors["v"]).requires_grad_()
    o, _ = kda_context_parallel(**tensors, context=context, chunk_size=16)
    (dv,) = torch.autograd.grad(o.sum(), tensors["v"])
    assert rank not in (0, world - 1) or not is_bad.all()
    assert not o[:, ~is_bad].isnan().any()
    assert not dv[:, ~is_bad].isnan().any()


def check_what_is_sent_does_not_depend_on_tokens() -> None:
    sent: list[int] = []
    gather = dist.all_gather

    def counted(out: list[Tensor], x: Tensor, group: Any) -> None:
        sent.append(x.numel())
        gather(out, x, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", counted)
        for length in (64, 256):
            case = Case(lengths=(length,), state=False, key_dim=8, value_dim=6)
            context = context_of(((length,), None))
            tensors = {name: x.detach()[:, context.tokens].requires_grad_() for name, x in case.tensors().items()}
            kda_context_parallel(**tensors, context=context)[0].sum().backward()
            assert sent == [2 * 8 * (8 + 6)] * 2
            sent.clear()
            x = tensors["v"].flatten(2)[0].detach().requires_grad_()
            short_conv_context_parallel(x, normal((12, 4), 0), context)[0].sum().backward()
            assert sent == [12 * 3] * 2
            sent.clear()
        alone = context_of(((8,) * dist.get_world_size(), None))
        x = normal((8, 12), 0)
        short_conv_context_parallel(x, normal((12, 4), 0), alone)
        kda_context_parallel(*(x.view(1, 8, 2, 6),) * 4, x[None, :, :2], alone)
        assert sent == []


def check_bad_arguments_raise_on_every_rank() -> None:
    context = context_of(((16,), None))
    case = Case(lengths=(16,), state=False)
    tensors = {name: x.detach()[:, context.tokens] for name, x in case.tensors().items()}
    for switches in ({"chunk_size": 5}, {"A_log": torch.ones(2)}, {"allow_neg_eigval": True}, {"backend": "abacus"}):
        with pytest.raises(ValueError if "backend" not in switches else Exception, match=next(iter(switches))):
            kda_context_parallel(**tensors, context=context, **switches)  # pyright: ignore[reportArgumentType]
    other = context.at((context.rank + 1) % context.world_size)
    with pytest.raises(ValueError, match="this process is rank"):
        kda_context_parallel(**tensors, context=other)
    with pytest.raises(ValueError, match="this process is rank"):
        short_conv_context_parallel(normal((4, 3), 0), normal((3, 4), 1), other)


def check_modes(layout: Layout) -> None:
    """Neither autocast nor a missing gradient changes a number; a kept graph may be walked again."""
    case = Case(lengths=layout[0], state=False)
    context = context_of(layout)
    tensors = {name: x.detach()[:, context.tokens].float().requires_grad_() for name, x in case.tensors().items()}

    def run() -> Tensor:
        x = tensors["v"].flatten(2)[0]
        y, _ = short_conv_context_parallel(x, normal((16, 4), 0), context)
        return kda_context_parallel(**{**tensors, "v": y.view_as(tensors["v"])}, context=context, chunk_size=16)[0]

    o = run()
    grads = [torch.autograd.grad(o.sum(), list(tensors.values()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.inference_mode():
        assert torch.equal(run(), o)
    with torch.autocast("cpu", torch.bfloat16):
        again = run()
        assert torch.equal(again, o)
        assert all(map(torch.equal, torch.autograd.grad(again.sum(), list(tensors.values())), grads[0]))


def check_groups_inside_the_world() -> None:
    """Pairs of ranks share different batches."""
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    pair, place = divmod(rank, 2)
    lengths = (11 + pair, 9)
    context = ContextLayout.split(lengths, world_size=2, rank=place)
    case = Case(lengths=lengths)
    tensors = {name: x.detach() for name, x in case.tensors(seed=pair).items()}
    whole, final = kda(**tensors, **case.options())[:2]
    assert final is not None
    state = tensors.pop("initial_state")[context.starting]
    tensors = {name: x[:, context.tokens] for name, x in tensors.items()}
    switches: Any = {"group": groups[pair], "chunk_size": 16, "output_final_state": True}
    o, got = kda_context_parallel(**tensors, context=context, initial_state=state, **switches)
    assert got is not None
    assert_close("o", whole[:, context.tokens], o, 1e-10)
    assert_close("final_state", final[context.ending], got, 1e-10)
    x, weight = normal((sum(lengths), 3), pair), normal((3, 4), 1)
    y, _ = short_conv_context_parallel(x[context.tokens], weight, context, group=groups[pair])
    assert_close("y", short_conv(x, weight, torch.tensor([0, *lengths]).cumsum(0))[0][context.tokens], y, 1e-10)


def checks(world: int) -> Iterator[tuple[str, Check]]:
    """All checks in the same order on every rank."""
    every = layouts(world)
    for layout in every:
        yield f"kda {layout}", lambda layout=layout: check_kda(layout, torch.float64, 1e-10)
        yield f"kda float32 {layout}", lambda layout=layout: check_kda(layout, torch.float32, 1e-5)
        for number, taps in enumerate((1, 2, 4, 7)):
            activation, with_state = ("silu", None)[number % 2], number > 1
            arguments = (taps, activation, with_state)
            yield (
                f"conv {arguments} {layout}",
                lambda layout=layout, arguments=arguments: check_conv(layout, torch.float64, 1e-10, *arguments),
            )
        for with_state in (False, True):
            yield (
                f"conv float32 {with_state} {layout}",
                lambda layout=layout, s=with_state: check_conv(layout, torch.float32, 1e-5, 4, "silu", s),
            )
    for index, (name, settings) in enumerate(KDA_VARIANTS.items()):
        for layout in (every[0], *every[3 + index % 2 : 6 : 2], every[-1 - index]):
            yield (
                f"kda, {name}, {layout}",
                lambda layout=layout, settings=settings: check_kda(layout, torch.float64, 1e-10, **settings),
            )
    for layout in every[:5]:
        yield f"kda state_v_first {layout}", lambda layout=layout: check_kda(layout, torch.float64, 1e-10, True)
        yield f"kda bfloat16 {layout}", lambda layout=layout: check_kda(layout, torch.bfloat16, 3e-2)
        yield f"conv bfloat16 {layout}", lambda layout=layout: check_conv(layout, torch.bfloat16, 3e-2, 4, "silu", True)
        yield f"stack {layout}", lambda layout=layout: check_stack(layout)
        yield f"modes {layout}", lambda layout=layout: check_modes(layout)
        for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
            yield (
                f"conv {dtypes} {layout}",
                lambda layout=layout, dtypes=dtypes: check_conv_with_a_state_of_another_dtype(layout, *dtypes),
            )
    yield "bad numbers", check_other_sequences_survive_bad_numbers
    yield "what is sent", check_what_is_sent_does_not_depend_on_tokens
    yield "bad arguments", check_bad_arguments_raise_on_every_rank
    yield "groups", check_groups_inside_the_world


def main(rank: int, world: int, folder: Path) -> None:
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=20)
    )
    failures, count = [], 0
    for name, check in checks(world):
        count += 1
        try:
            check()
        except AssertionError as error:
            failures.append(f"{name}: {error}")
        except Exception:  # a rank that stops here leaves the others waiting, so that nothing after it would tell more
            failures.append(f"{name}: {traceback.format_exc()}")
            break
    (folder / f"{rank}.json").write_text(json.dumps({"count": count, "failures": failures}), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
