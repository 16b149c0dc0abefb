"""Claim: a decode step over pages reads grouped keys at 80 % of a copy or more, latents of long rows at 45 % or more.

Bytes of keys and values (latents once) a second, beside what a copy of 1 GiB reads and writes. Peers, in the same
process: copying the pages together and multiplying (`backend="torch"`), which is what one does without a kernel. Before
timing, the output is checked against the float64 reference. Times
are medians of CUDA-graph replays, the peer's of eager calls: it waits for the GPU.

    python benchmarks/paged_decode.py [--reps 30]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

import torch
from harness import spread, write_result
from kda_decode import copy_bandwidth, median_s, replays_s
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perilune.ops import paged_decode_attention

SHAPES = {
    "latent, 16 heads": (16, 1, 576, 512),
    "latent, 32 heads": (32, 1, 576, 512),
    "latent, 64 heads": (64, 1, 576, 512),
    "grouped, 32 / 8 heads of 128": (32, 8, 128, None),
}
"""Query heads, key heads, channels of keys, channels of keys that are values."""
LOADS = ((64, 4096), (1, 65536), (4, 1 << 20))
"""Rows, tokens of each."""
BLOCK = 64
LIMIT = 4e-3


def make(shape: tuple[int, int, int, int | None], rows: int, length: int) -> tuple[Tensor, ...]:
    heads, kv_heads, dim, shared = shape
    width = -(-length // BLOCK)
    keys = torch.empty(rows * width, BLOCK, kv_heads, dim, device="cuda", dtype=torch.bfloat16).normal_()
    values = keys[..., :shared] if shared else torch.empty_like(keys).normal_()
    tables = torch.randperm(rows * width, device="cuda").view(rows, width).int()
    q = torch.randn(rows, heads, dim, device="cuda").bfloat16()
    return q, keys, values, tables, torch.full((rows,), length, device="cuda")


class _Call:
    def __init__(self, *tensors: Tensor, backend: Literal["auto", "torch"] = "auto") -> None:
        self.tensors = tensors
        self.backend: Literal["auto", "torch"] = backend

    def __call__(self) -> Tensor:
        return paged_decode_attention(*self.tensors, backend=self.backend)


def check(shape: tuple[int, int, int, int | None]) -> None:
    q, keys, values, tables, lengths = make(shape, 3, 777)
    found = paged_decode_attention(q, keys, values, tables, lengths).double()
    wide = (keys.double(), values.double())
    expected = paged_decode_attention(q.double(), *wide, tables, lengths, backend="reference")
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if not error < LIMIT:
        raise SystemExit(f"{shape}: error {error:.1e} against float64; no speed is reported")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    torch.manual_seed(0)
    copy = copy_bandwidth(arguments.reps)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e12:.2f} TB/s")
    record: dict[str, object] = {"device": torch.cuda.get_device_name(), "copy_bytes_per_s": copy}
    for name, shape in SHAPES.items():
        check(shape)
        for rows, length in LOADS:
            if shape[3] is None and rows * length > 1 << 20:
                continue  # 17 GB, and a gather of as much
            q, keys, values, tables, lengths = make(shape, rows, length)
            moved = rows * length * shape[1] * (shape[2] if shape[3] else 2 * shape[2]) * keys.itemsize
            ours = spread(tuple(replays_s([_Call(q, keys, values, tables, lengths)], arguments.reps)[0]))
            row = {"us": ours["median"] * 1e6, "of_copy": moved / ours["median"] / copy}
            against = ""
            if rows * length <= 1 << 20:
                gather = median_s(_Call(q, keys, values, tables, lengths, backend="torch"), 12)
                row["vs_torch"] = gather / ours["median"]
                against = f"  {row['vs_torch']:5.1f}x the gather"
            record[f"{name}, {rows} x {length}"] = row
            print(
                f"{name:30s} {rows:3d} x {length:<8d} {row['us']:9.1f} us  "
                f"{moved / ours['median'] / 1e12:5.2f} TB/s  {row['of_copy']:5.0%} of the copy{against}"
            )
            torch.cuda.empty_cache()
    print(write_result("paged_decode", record))


if __name__ == "__main__":
    main()
