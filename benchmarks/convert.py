"""Memory and speed of converting a checkpoint that does not fit in the memory allowed.

`make` writes a synthetic Kimi Linear checkpoint, released layout, bfloat16, of the asked size, one layer's tensors at a
time. `convert` then runs in a process of its own, whose peak resident memory the kernel counts, to perilune's format
and back, and the peak is compared with the limit and with the size. No peer: transformers holds the model whole.

    python benchmarks/convert.py --gib 6 --limit-gib 2

`--full` takes the released sizes instead: every tensor of Kimi Linear 48B under its name and in its shape (98 GB), or
one layer of Kimi K2 with its 384 experts, from FP8 to bfloat16 or from INT4 to FP8. The weights are holes in files, and
the zeros that are written from them are dug out at once (`fallocate`, Linux), so that it needs little disk and its
seconds are not those of a disk.

    python benchmarks/convert.py --full kimi-linear-48b-a3b --limit-gib 8
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
from typing import Literal

import torch
from sparse_checkpoint import FULL, HoleDigger, missing_marks, set_marks, write_sparse

from perilune.models import PRESETS, FormatName, ModelConfig, convert, hybrid_layers, parameter_counts
from perilune.models.checkpoint.format import Details
from perilune.models.checkpoint.writing import WriteOptions, write_model

Step = tuple[str, str, FormatName, Literal["fp8"] | None]
STEPS: dict[str, list[Step]] = {
    "kimi-linear-48b-a3b": [("hf", "own", "perilune", None), ("own", "back", "hf", None)],
    "kimi-k2-fp8": [("hf", "own", "perilune", None)],
    "kimi-k2-int4": [("hf", "fp8", "hf", "fp8")],
}
"""Source, target, format and quantization of the conversions of a checkpoint of `FULL`."""


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


def in_child(source: Path, target: Path, to: str, quantize: Literal["fp8"] | None = None) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(source), str(target), to, quantize or ""]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(source: str, target: str, to: FormatName, quantize: str) -> None:
    start = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    convert(source, target, to, quantize="fp8" if quantize else None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.monotonic() - start, "before": before, "peak": peak}))


def report(step: str, size: int, found: dict[str, float]) -> None:
    print(
        f"{step:<22}  peak {found['peak'] / 2**30:.2f} GiB ({found['before'] / 2**30:.2f} before it began)  "
        f"{found['seconds']:.0f} s  {size / 1e6 / found['seconds']:.0f} MB/s read",
        flush=True,
    )


def there_and_back(folder: Path, gib: float) -> tuple[int, float]:
    """Convert random weights; returns their size and the highest peak, in bytes."""
    write_model(Noise(config_of(gib)), folder / "hf", WriteOptions())
    size = size_bytes(folder / "hf")
    print(f"checkpoint {size / 2**30:.2f} GiB in {len(list((folder / 'hf').glob('*.safetensors')))} files")
    peaks: list[float] = []
    for source, target, to in (("hf", "own", "perilune"), ("own", "back", "hf")):
        found = in_child(folder / source, folder / target, to)
        report(f"to {to}", size, found)
        peaks.append(found["peak"])
        shutil.rmtree(folder / source)
    return size, max(peaks)


def full(folder: Path, name: str) -> tuple[int, float]:
    """Convert a checkpoint of a released size; returns its size and the highest peak, in bytes."""
    total = write_sparse(folder / "hf", name)
    files = list((folder / "hf").glob("*.safetensors"))
    print(f"{name}: {total / 1e9:.1f} GB in {len(files)} files, mostly holes", flush=True)
    marks = set_marks(folder / "hf") if name.startswith("kimi-linear") else {}
    peaks: list[float] = []
    for source, target, to, quantize in STEPS[name]:
        size = size_bytes(folder / source)
        with HoleDigger(folder) as digger:
            found = in_child(folder / source, folder / target, to, quantize)
        report(f"{source} to {to} {quantize or ''}", size, found)
        peaks.append(found["peak"])
        lost = missing_marks(folder / target, marks) if marks else []
        arrived = f"{len(marks) - len(lost)} of {len(marks)} marks arrived; " if marks else ""
        print(f"{arrived}{digger.most_bytes / 1e9:.1f} GB of disk at most", flush=True)
        if lost:
            raise SystemExit(f"lost: {', '.join(lost)}")
    return total, max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=6.0, help="size of the checkpoint")
    parser.add_argument("--full", choices=FULL, help="a released size instead")
    parser.add_argument("--limit-gib", type=float, default=2.0, help="what the peak must stay below")
    parser.add_argument("--folder", type=Path, help="where three copies of the checkpoint have room; of --full, 10 GB")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        size, peak = full(folder, arguments.full) if arguments.full else there_and_back(folder, arguments.gib)
        verdict = "below" if peak < arguments.limit_gib * 2**30 else "ABOVE"
        print(f"{verdict} the limit of {arguments.limit_gib} GiB; the checkpoint is {size / peak:.1f} times the peak")
        sys.exit(verdict == "ABOVE")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
