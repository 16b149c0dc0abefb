"""Context parallelism over two GPUs by NCCL, against one in float64; run as a module, this file is one rank."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from perilune.ops import ContextLayout, kda, kda_context_parallel, short_conv, short_conv_context_parallel
from perilune.ops.layout import SequenceLayout
from tests.helpers import assert_close
from tests.ops.kda_cases import Case
from tests.ops.test_context_parallel import run_ranks

LAYOUTS = [
    ((1500,), None),
    ((300, 0, 900, 5), None),
    ((700, 20), (0, 650, 720)),
    ((64, 64), (0, 64, 128)),
    ((70,), (0, 70, 70)),
]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one(tmp_path):
    logs = run_ranks("tests.gpu.test_context_parallel", 2, tmp_path)
    results = [tmp_path / f"{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in results), "\n".join(logs)
    assert [json.loads(path.read_text()) for path in results] == [2 * len(LAYOUTS)] * 2


def check_kda(lengths, cuts, rank, world):
    case = Case(lengths=lengths, key_dim=128, value_dim=128, chunk_size=64, raw=True, lower_bound=-5.0)
    context = ContextLayout.split(lengths, world_size=world, rank=rank, device="cuda", cuts=cuts)
    whole = {name: x.detach().cuda().bfloat16().double().requires_grad_() for name, x in case.tensors().items()}
    options = {**case.options(), "cu_seqlens": SequenceLayout.from_lengths(lengths, "cuda")}
    o, final_state = kda(**whole, **options)[:2]
    generator = torch.Generator("cuda").manual_seed(0)
    seeds = [torch.randn(x.shape, generator=generator, device="cuda").bfloat16() for x in (o, final_state)]
    want = torch.autograd.grad((o, final_state), list(whole.values()), [seed.double() for seed in seeds])
    parts = dict.fromkeys(("q", "k", "v", "g", "beta"), (slice(None), context.tokens))
    parts["initial_state"] = context.starting
    mine = {}
    for name, x in whole.items():
        dtype = torch.bfloat16 if name in ("q", "k", "v", "g", "beta") else torch.float32
        mine[name] = x.detach()[parts.get(name, ...)].to(dtype).requires_grad_()
    del options["cu_seqlens"]
    got_o, got_state = kda_context_parallel(**mine, context=context, **options)
    given = [seeds[0][:, context.tokens], seeds[1][context.ending].float()]
    got = torch.autograd.grad((got_o, got_state), list(mine.values()), given)
    pairs = {"o": (o[:, context.tokens], got_o), "state": (final_state[context.ending], got_state)}
    for name, a, b in zip(mine, want, got, strict=True):
        if name in ("A_log", "dt_bias"):
            dist.all_reduce(b)
        pairs[f"d{name}"] = a[parts.get(name, ...)], b
    for name, (a, b) in pairs.items():
        limit = 2e-2 if name in ("dg", "dbeta", "dA_log") else 1e-2
        size = a.square().mean().sqrt().item() if a.numel() else 0.0
        assert_close(f"{name} of {lengths}", a, b.double(), limit, floor=limit * size)


def check_conv(lengths, cuts, rank, world):
    context = ContextLayout.split(lengths, world_size=world, rank=rank, device="cuda", cuts=cuts)
    generator = torch.Generator("cuda").manual_seed(1)
    x, seed = (torch.randn(sum(lengths), 256, generator=generator, device="cuda") for _ in range(2))
    weight = torch.randn(256, 4, generator=generator, device="cuda").requires_grad_()
    x.requires_grad_()
    y, _ = short_conv(x, weight, SequenceLayout.from_lengths(lengths, "cuda"), activation="silu")
    want = torch.autograd.grad(y, (x, weight), seed)
    mine = x.detach()[context.tokens].requires_grad_()
    local, _ = short_conv_context_parallel(mine, weight, context, activation="silu")
    got = torch.autograd.grad(local, (mine, weight), seed[context.tokens])
    dist.all_reduce(got[1])
    assert_close("y", y[context.tokens], local, 1e-6)
    assert_close("dx", want[0][context.tokens], got[0], 1e-6)
    assert_close("dweight", want[1], got[1], 1e-5)


def main(rank: int, world: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(
        "nccl", init_method=store, rank=rank, world_size=world, device_id=torch.device("cuda", rank)
    )
    done = 0
    for lengths, cuts in LAYOUTS:
        for check in (check_kda, check_conv):
            check(lengths, cuts, rank, world)
            done += 1
    (folder / f"{rank}.json").write_text(json.dumps(done))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
