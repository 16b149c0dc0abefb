"""Checkpoints of the released sizes on a small disk: true headers, true lengths, and holes where the weights would be.

A hole reads as zeros. What is written from it is zeros too, and is dug out again while it is written, so that a
checkpoint of 98 GB passes through a few hundred megabytes of disk. A few elements are not zero: they have to arrive.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from perilune.models import PRESETS, ModelConfig
from perilune.models.checkpoint import deepseek_v3, kimi_linear
from perilune.models.checkpoint.format import Details
from perilune.models.checkpoint.mapping import Piece, float32_tensors
from perilune.models.checkpoint.opening import open_checkpoint
from perilune.models.checkpoint.quantization import fp8_scale_shape
from perilune.tensorfile import tensor_file_header
from perilune.tensorreader import TensorFile

SHARD_BYTES = 5_000_000_000
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_INT4_GROUP = 32
_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
}
_TAIL_BYTES = 1 << 26
_GRAIN_BYTES = 1 << 20

FULL = ("kimi-linear-48b-a3b", "kimi-k2-fp8", "kimi-k2-int4")
"""What `write_sparse` makes: every layer of Kimi Linear; one layer of Kimi K2 with all its experts, in FP8 as released
in July 2025 or with INT4 experts as Kimi K2 Thinking."""


def write_sparse(directory: Path, name: str) -> int:
    """Write a checkpoint of `FULL` and return its size in bytes, most of which is a hole."""
    tree, layout = _released(name)
    directory.mkdir()
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for tensor_name, tensor in layout.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][tensor_name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        header = tensor_file_header(shard, {"format": "pt"})
        with (directory / file).open("xb") as handle:
            handle.write(header)
            handle.truncate(len(header) + sum(tensor.nbytes for tensor in shard.values()))
    total = sum(tensor.nbytes for tensor in layout.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (directory / "config.json").write_text(json.dumps(tree))
    return total


def set_marks(directory: Path, every: int = 199) -> dict[tuple[str, int], float]:
    """Set an element of every so many tensors of a sparse bfloat16 checkpoint; returns its place and value."""
    marks: dict[tuple[str, int], float] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with TensorFile(path) as file, path.open("r+b") as handle:
            for number, (name, entry) in enumerate(file.entries.items()):
                if number % every == 0 and entry.dtype == torch.bfloat16:
                    place, value = (number * 7919 + 1) % entry.numel, float(1 + number % 250)
                    handle.seek(entry.start + place * 2)
                    handle.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
                    marks[name, place] = value
    return marks


def missing_marks(directory: Path, marks: Mapping[tuple[str, int], float]) -> list[str]:
    """Return the marks that a checkpoint of any format, made of the marked one, does not have in their places."""
    with open_checkpoint(directory) as found:
        places = {
            piece.name: (binding.ours, piece.start)
            for binding in kimi_linear.bindings(found.config)
            for piece in binding.pieces
        }
        missing: list[str] = []
        for (name, place), value in marks.items():
            ours, start = places[name]
            if found.read(ours, start + place, 1).item() != value:
                missing.append(f"{name}[{place}]")
    return missing


class HoleDigger:
    """Turns zeros in files that are being written, or were, into holes, until the block ends."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ends: dict[int, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.most_bytes = 0
        """Most of the disk that the files took at a time."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(0.25):
            files = list(self._files())
            self.most_bytes = max(self.most_bytes, sum(status.st_blocks * 512 for _, status in files))
            for path, status in files:
                # a writer's last bytes are left alone: they may share a block with what comes next
                start = self._ends.get(status.st_ino, 0)
                end = (status.st_size - _TAIL_BYTES) // _GRAIN_BYTES * _GRAIN_BYTES
                if end > start:
                    command = ["fallocate", "--dig-holes", "-o", str(start), "-l", str(end - start), str(path)]
                    if subprocess.run(command, check=False, capture_output=True).returncode == 0:
                        self._ends[status.st_ino] = end

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._directory.rglob("*.safetensors"):
            try:
                yield path, path.stat()
            except FileNotFoundError:  # its directory has got its final name
                continue


def _released(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and layout of a checkpoint of `FULL`."""
    config = _config(name)
    released = kimi_linear if name.startswith("kimi-linear") else deepseek_v3
    tree = {**released.write(config, Details(model_type="kimi_k2")), "dtype": "bfloat16"}
    if name == "kimi-k2-fp8":
        tree["quantization_config"] = _FP8
    elif name == "kimi-k2-int4":
        tree["quantization_config"] = _INT4
    wide = float32_tensors(config)
    layout: dict[str, Tensor] = {}
    for binding in released.bindings(config):
        dtype = torch.float32 if binding.ours in wide else torch.bfloat16
        for piece in binding.pieces:
            layout |= _stored(piece, dtype, name)
    return tree, layout


def _config(name: str) -> ModelConfig:
    if name.startswith("kimi-linear"):
        return PRESETS[name]
    return replace(PRESETS["kimi-k2"], layers=("mla",), first_k_dense=0)


def _stored(piece: Piece, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    def meta(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    if name == "kimi-k2-fp8" and piece.is_linear:
        return {
            piece.name: meta(piece.shape, torch.float8_e4m3fn),
            f"{piece.name}_scale_inv": meta(fp8_scale_shape((piece.shape[0], piece.shape[1])), torch.float32),
        }
    if name == "kimi-k2-int4" and ".experts." in piece.name:
        rows, columns = piece.shape
        return {
            f"{piece.name}_packed": meta((rows, columns // 8), torch.int32),
            f"{piece.name}_scale": meta((rows, columns // _INT4_GROUP), torch.bfloat16),
        }
    return {piece.name: meta(piece.shape, dtype)}
