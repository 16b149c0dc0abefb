"""Question: how fast is the Triton KDA on a GPU beside every installed peer, checked against float64?

Asked on an H100 are 2.0x fla-core forward and 1.6x forward + backward; docs/kernels.md says what was measured.

Peers, if installed: fla-core's chunk_kda (gate in the kernel; for the slow gate also with the gate outside, which lets
it use its bounded path) and fused_recurrent_kda, attn-gym's fused chunk_kda, the KDA of cuDNN's frontend, FlashKDA. All
subjects take turns in one process; a time is the median of CUDA-graph replays, or of eager calls where a call cannot be
captured. What a peer cannot do in its kernels (gate, l2norm, sigmoid of beta) is done for it outside the timed region.
No time is reported before the output at the full shape (first two heads) and all gradients at 1024 tokens have been
compared with float64.

Two gates: "fast" is bounded (-5 sigmoid(exp(A_log) (f + dt_bias)), f ~ N(0, 1), A_log = 0); "slow" is the softplus gate
as a model starts with it. `--model` times training steps of a 100M-parameter Kimi Linear, with our operator and fla's.

    python benchmarks/kda.py                                 # everything, about 8 minutes with the peers' tuning
    python benchmarks/kda.py --quick --out /tmp/kda          # three shapes
    python benchmarks/kda.py --shapes 1x8192x16,8x1024@32 --name some   # B x T x H, or packed sequences @ H
    python benchmarks/kda.py --model
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
from harness import reason
from kda_cases import (
    GATES,
    OURS,
    QUICK,
    SHAPES,
    Case,
)
from kda_decode import copy_bandwidth, replay_s
from kda_model import run_model
from kda_peers import PEERS, load_contenders
from kda_report import Rows, plot, save, summary
from kda_timing import run_case
from kda_tuning import compile_part, forget_tuning, prepare_tuning

from perilune.seeding import make_generator


def machine_rates(reps: int) -> dict[str, float]:
    """Measure bytes/s of a device copy and FLOP/s of a bfloat16 product of two 8192 x 8192 matrices."""
    generator = make_generator(0, "kda", "matmul", device="cuda")
    a, b = (torch.randn(8192, 8192, generator=generator, device="cuda").bfloat16() for _ in range(2))
    matmul = 2 * 8192**3 / replay_s(lambda: a @ b, reps)
    return {"copy_bytes_per_s": copy_bandwidth(reps), "matmul_flop_per_s": matmul}


def run_operator(arguments: argparse.Namespace) -> int:
    """Time the operator; return the exit code: 1 if ours is wrong, 2 if the run broke off."""
    start = time.perf_counter()
    device, on_cpu = arguments.device, arguments.device == "cpu"
    name = "cpu" if on_cpu else torch.cuda.get_device_name()
    rates = {"copy_bytes_per_s": 1.0, "matmul_flop_per_s": 1.0} if on_cpu else machine_rates(20)
    if not on_cpu:
        prepare_tuning(arguments.shapes, arguments)
    contenders, found = load_contenders(arguments.backend)
    if arguments.only:
        contenders = [c for c in contenders if any(c.name.startswith(prefix) for prefix in arguments.only.split(","))]
    print("\n".join(f"{c.name}: {c.note} ({', '.join(c.gates)}; {', '.join(c.directions)})" for c in contenders))
    rows: Rows = {}
    stopped = False
    try:
        for gate in GATES:
            forget_tuning()
            for shape in arguments.shapes:
                if time.perf_counter() - start > arguments.limit_s:
                    print(f"no time left for {shape} {gate}")
                    continue
                for row in run_case(Case.parse(shape, gate, arguments.dim), contenders, arguments.reps, device):
                    rows[shape, gate, row.direction, row.name] = row
    except Exception as error:  # a peer's kernel may have killed the device; what was measured is still worth having
        print(f"stopped early: {reason(error)}")
        stopped = True
    ours_wrong = [row for row in rows.values() if row.name.startswith(OURS) and (row.wrong or row.problem)]
    record: dict[str, object] = {"device": name, **rates, "peers": found, "rows": [r.record() for r in rows.values()]}
    path = save(arguments.name, record, arguments.out)
    title = f"Kimi Delta Attention, K = V = {arguments.dim}, bfloat16, {name}"
    plot(rows, path.with_suffix(".png"), title)
    if arguments.out is not None and path.with_suffix(".png").exists():
        shutil.copy(path.with_suffix(".png"), arguments.out)
    print("\n".join(["", title, *summary(rows, found, rates), f"{path}, {time.perf_counter() - start:.0f} s"]))
    for row in ours_wrong:
        print(f"WRONG: {row.case.shape} {row.case.gate} {row.direction} {row.name} {row.problem or row.wrong}")
    return 1 if ours_wrong else 2 if stopped else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes only")
    parser.add_argument("--shapes", help="shapes, separated by ';' (or by ',' if none is a list of lengths)")
    parser.add_argument("--reps", type=int, default=30, help="rounds, at most; a case is cut off after two seconds")
    parser.add_argument("--limit-s", type=float, default=480.0, help="start no case later than this (default 480)")
    parser.add_argument("--only", help="contenders to run, by the beginning of their names, comma-separated")
    parser.add_argument("--name", default="kda", help="name of the files in benchmarks/results (default kda)")
    parser.add_argument("--out", type=Path, help="folder for copies of the JSON file and the plot")
    parser.add_argument("--model", action="store_true", help="time a model's training step instead of the operator")
    parser.add_argument("--no-compile-ahead", action="store_true", help="let the autotuners compile one by one")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="cuda", help="ours: cuda (default), triton, or torch")
    parser.add_argument("--dim", type=int, default=128, help=argparse.SUPPRESS)
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shapes:
        listed = ";" in arguments.shapes or any(
            len(part.split("@")[0].split("x")) == 1 for part in arguments.shapes.split(",")
        )
        arguments.shapes = arguments.shapes.split(";" if listed else ",")
    else:
        arguments.shapes = list(QUICK if arguments.quick else SHAPES)
    try:
        for shape in arguments.shapes:
            Case.parse(shape, GATES[0], arguments.dim)
    except ValueError as error:
        parser.error(str(error))
    known = (OURS, *PEERS)
    for prefix in (arguments.only or "").split(","):
        if not any(name.startswith(prefix) or prefix.startswith(name) for name in known):
            parser.error(f"--only knows {', '.join(known)}, got {prefix!r}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    if arguments.compile_part:
        part, parts = (int(x) for x in arguments.compile_part.split("/"))
        compile_part(arguments.shapes, part, parts)
        return 0
    if arguments.model:
        run_model(arguments)
        return 0
    return run_operator(arguments)


if __name__ == "__main__":
    sys.exit(main())
