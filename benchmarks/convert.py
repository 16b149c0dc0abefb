"""Memory and speed of converting a checkpoint that does not fit in the memory allowed.

`make` writes a synthetic Kimi Linear checkpoint, released layout, bfloat16, of the asked size, one layer's tensors at a
time. `convert` then runs in a process of its own, whose peak resident memory the kernel counts, to perilune's format
and back, and the peak is compared with the limit and with the size. No peer: transformers holds the model whole.

    python benchmarks/convert.py --gib 6 --limit-gib 2
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from perilune.models import PRESETS, ModelConfig, convert, hybrid_layers, parameter_counts
from perilune.models.checkpoint.format import Details
from perilune.models.checkpoint.writing import WriteOptions, write_model


class Noise:
    """Weights that repeat one block of random numbers."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.details, self.dtype = config, Details(), torch.bfloat16
        self._block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()

    def read(self, ours: str, start: int, count: int) -> torch.Tensor:
        del ours, start
        return self._block.repeat(-(-count // len(self._block)))[:count]


def config_of(gib: float) -> ModelConfig:
    """The 48B model with as many experts as its embedding, and as many layers as make the size."""
    small = replace(PRESETS["kimi-linear-48b-a3b"], vocab_size=32768, layers=hybrid_layers(2))
    per_layer = parameter_counts(small).by_part["moe"] * 2
    layers = max(2, 1 + round(gib * 2**30 / per_layer))
    return replace(small, layers=hybrid_layers(layers))


def size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def in_child(source: Path, target: Path, to: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(source), str(target), to]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(source: str, target: str, to: str) -> None:
    start = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    convert(source, target, to)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.monotonic() - start, "before": before, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=6.0, help="size of the checkpoint")
    parser.add_argument("--limit-gib", type=float, default=2.0, help="what the peak must stay below")
    parser.add_argument("--folder", type=Path, help="where three copies of the checkpoint have room")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write_model(Noise(config_of(arguments.gib)), folder / "hf", WriteOptions())
        size = size_bytes(folder / "hf")
        print(f"checkpoint {size / 2**30:.2f} GiB in {len(list((folder / 'hf').glob('*.safetensors')))} files")
        peaks = []
        for source, target, to in (("hf", "own", "perilune"), ("own", "back", "hf")):
            found = in_child(folder / source, folder / target, to)
            peaks.append(found["peak"])
            print(
                f"to {to:<8}  peak {found['peak'] / 2**30:.2f} GiB ({found['before'] / 2**30:.2f} before it began)  "
                f"{found['seconds']:.0f} s  {size / 1e6 / found['seconds']:.0f} MB/s"
            )
            shutil.rmtree(folder / source)
        verdict = "below" if max(peaks) < arguments.limit_gib * 2**30 else "ABOVE"
        times = size / max(peaks)
        print(f"{verdict} the limit of {arguments.limit_gib} GiB; the checkpoint is {times:.1f} times the peak")
        sys.exit(verdict == "ABOVE")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
