"""Claim: on a CPU the products and the attention of a decode step in C++ take less than PyTorch's functions.

Products: rows of SmolLM2-135M's and of wider layers with weights that no cache holds, beside `F.linear`. Attention: one
query per row over pages of 64 tokens, beside PyTorch's fused kernel on the pages where they lie. Results are compared
first. A pass goes through 300 MB of operands; subjects take turns, and ratios are of one round. Nothing else should
run. It needs Linux and GCC.

    python benchmarks/cpu_native.py [--rounds 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn.functional as F
from harness import interleave, ratios, write_result

from perilune.ops import PagePlan, paged_decode_attention
from perilune.ops.packing import can_pack, pack, packed_linear

BYTES = 300 << 20
PRODUCTS = [(3072, 576), (576, 1536), (4096, 2048)]
ROWS = [1, 4, 8, 16, 32, 64, 128]
PAGE = 64
# rows, key heads, heads of each, channels, tokens; values are in the keys for 576
ATTENTION = [(32, 3, 3, 64, 96), (32, 3, 3, 64, 1024), (1, 8, 4, 128, 16384), (8, 1, 16, 576, 1024)]


def products(dtype: torch.dtype, outputs: int, inputs: int, rounds: int) -> list[dict[str, Any]]:
    count = max(2, BYTES // (outputs * inputs * dtype.itemsize))
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)]
    packed = [pack(weight) for weight in weights]
    found: list[dict[str, Any]] = []
    for rows in ROWS:
        x = torch.randn(rows, inputs).to(dtype)
        torch.testing.assert_close(
            packed_linear(x, packed[0]).double(), x.double() @ weights[0].double().T, rtol=1e-2, atol=1e-2 * inputs**0.5
        )
        timings = interleave(
            {
                "ours": lambda x=x: [packed_linear(x, weight) for weight in packed],
                "torch": lambda x=x: [F.linear(x, weight) for weight in weights],
            },
            rounds=rounds,
        )
        median, low, high = ratios(timings["ours"], timings["torch"])
        seconds = timings["ours"].median_s / count
        record = {
            "dtype": str(dtype).removeprefix("torch."), "shape": [outputs, inputs], "rows": rows, "us": seconds * 1e6,
            "gflops": 2 * rows * outputs * inputs / seconds / 1e9, "ratio": [median, low, high],
        }  # fmt: skip
        found.append(record)
        print(
            f"{record['dtype']:8s} {outputs} x {inputs}, {rows:3d} rows: {record['us']:7.0f} us "
            f"{record['gflops']:4.0f} GFLOP/s  {median:.2f}x ({low:.2f} to {high:.2f})",
            flush=True,
        )
    return found


def attention(dtype: torch.dtype, case: tuple[int, int, int, int, int], rounds: int) -> dict[str, Any]:
    rows, kv_heads, group, dim, length = case
    width = -(-length // PAGE)
    size = rows * kv_heads * length * dim * dtype.itemsize
    value_dim = 512 if dim == 576 else dim
    layers = max(2, BYTES // (size if dim == 576 else 2 * size))
    keys = [torch.randn(rows * width, kv_heads, PAGE, dim).to(dtype).transpose(1, 2) for _ in range(layers)]
    values = [x[..., :value_dim] if dim == 576 else torch.randn_like(x) for x in keys]
    q, tables = torch.randn(rows, kv_heads * group, dim).to(dtype), torch.arange(rows * width, dtype=torch.int32)
    tables, lengths = tables.view(rows, width), torch.full((rows,), length)
    plan = PagePlan.build(tables, lengths, PAGE)

    def run(layer: int, backend: Any) -> torch.Tensor:
        return paged_decode_attention(
            q, keys[layer], values[layer], tables, lengths, scale=dim**-0.5, plan=plan, backend=backend
        )

    torch.testing.assert_close(run(0, "native"), run(0, "torch"), rtol=1e-2, atol=1e-2)
    timings = interleave(
        {name: lambda name=name: [run(layer, name) for layer in range(layers)] for name in ("native", "torch")},
        rounds=rounds,
    )
    median, low, high = ratios(timings["native"], timings["torch"])
    seconds = timings["native"].median_s / layers
    read = size if dim == 576 else 2 * size
    record = {
        "dtype": str(dtype).removeprefix("torch."), "case": list(case), "us": seconds * 1e6,
        "gb_s": read / seconds / 1e9, "ratio": [median, low, high],
    }  # fmt: skip
    print(
        f"{record['dtype']:8s} {rows} rows of {length} tokens, {kv_heads} x {group} heads of {dim}: "
        f"{record['us']:7.0f} us {record['gb_s']:4.1f} GB/s  {median:.2f}x ({low:.2f} to {high:.2f})",
        flush=True,
    )
    return record


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not can_pack(torch.float32):
        raise SystemExit("the functions need Linux and GCC")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    torch.manual_seed(0)
    record: dict[str, Any] = {"arguments": vars(arguments), "products": [], "attention": []}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in PRODUCTS:
            record["products"] += products(dtype, *shape, arguments.rounds)
        record["attention"] += [attention(dtype, case, arguments.rounds) for case in ATTENTION]
    print(write_result("cpu_native", record))


if __name__ == "__main__":
    main()
