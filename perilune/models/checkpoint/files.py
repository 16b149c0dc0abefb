"""The safetensors files of a model directory, read lazily, quantized tensors as the numbers that they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from perilune.errors import CheckpointError
from perilune.models.checkpoint.problems import grouped
from perilune.models.checkpoint.quantization import (
    FP8_BLOCK,
    INT4_PER_WORD,
    dequantize_fp8,
    dequantize_int4,
    fp8_scale_shape,
)
from perilune.strict_json import read_json_object
from perilune.tensorreader import TensorFile

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's quantized weights are stored."""

    fp8_block: tuple[int, int] = FP8_BLOCK
    """Rows and columns of an FP8 block."""
    int4_group: int = 32
    """Columns of an INT4 group."""


class WeightFiles:
    """Every tensor of a model directory under its logical name: `X.weight`, however it is stored."""

    def __init__(self, directory: Path, quantization: Quantization | None = None) -> None:
        """Open the files and check their headers; no tensor is read.

        Raises:
            CheckpointError: there are none, only pickles, or they are damaged or disagree with their index.
        """
        self.directory = directory
        self._quantization = quantization or Quantization()
        self._open: dict[str, TensorFile] = {}
        try:
            self._files = self._locate()
        except BaseException:
            self.close()
            raise
        self.broken: list[str] = []
        """Quantized tensors without fitting scales, and why."""
        self.shapes: Mapping[str, tuple[int, ...]] = self._logical_shapes()
        """Logical name to shape."""

    def read(self, name: str) -> Tensor:
        """Return a logical tensor, dequantized to float32 if it is quantized."""
        stem = name.removesuffix(".weight")
        if f"{stem}.weight_packed" in self._files:
            packed, scale = self._raw(f"{stem}.weight_packed"), self._raw(f"{stem}.weight_scale")
            return dequantize_int4(packed, scale, self.shapes[name][1], self._quantization.int4_group)
        if self._dtype(name) == torch.float8_e4m3fn:
            return dequantize_fp8(self._raw(name), self._raw(f"{name}_scale_inv"), self._quantization.fp8_block)
        return self._raw(name)

    def read_run(self, name: str, start: int, count: int) -> Tensor | None:
        """Return `count` elements from position `start` on as a vector; None if it is quantized."""
        if not self.is_plain(name):
            return None
        return self._files[name].read(name, start, count)

    def is_plain(self, name: str) -> bool:
        """Return whether a logical tensor is stored as it is."""
        return name in self._files and self._dtype(name) != torch.float8_e4m3fn

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most numbers that are stored as they are: what the checkpoint was computed in."""
        counts: dict[torch.dtype, int] = {}
        for name in filter(self.is_plain, self.shapes):
            entry = self._files[name].entries[name]
            if entry.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.numel
        return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _raw(self, name: str) -> Tensor:
        return self._files[name].read(name)

    def _dtype(self, name: str) -> torch.dtype:
        return self._files[name].entries[name].dtype

    def _locate(self) -> dict[str, TensorFile]:
        """Map every stored name to its file."""
        index = self.directory / INDEX_NAME
        if index.is_file():
            return self._from_index(index)
        if (self.directory / WEIGHTS_NAME).is_file():
            file = self._file(WEIGHTS_NAME)
            return dict.fromkeys(file.entries, file)
        pickles = sorted(path.name for pattern in _PICKLES for path in self.directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.directory / pickles[0]}: a pickle file can run code and is never opened; convert it to "
                "safetensors where it was made"
            )
        raise CheckpointError(f"{self.directory}: has neither {WEIGHTS_NAME} nor {INDEX_NAME}")

    def _from_index(self, index: Path) -> dict[str, TensorFile]:
        weight_map: Any = read_json_object(index, follow_links=True).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map must be an object of tensor names to file names")
        for name in sorted(set(weight_map.values())):
            if not _FILE_NAME.fullmatch(name):
                raise CheckpointError(f"{index}: file name {name[:100]!r} is not allowed; plain *.safetensors only")
        files = {name: self._file(file) for name, file in weight_map.items()}
        absent = [f"{name} in {weight_map[name]}" for name, file in files.items() if name not in file.entries]
        if absent:
            lines = [f"{index}: {len(absent)} tensors are not in the files that it names", *grouped(absent)]
            raise CheckpointError("\n  ".join(lines))
        return files

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = TensorFile(self.directory / name, follow_links=True)
        return self._open[name]

    def _logical_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, file in self._files.items():
            entry = file.entries[name]
            if name.endswith(".weight_packed"):
                shapes[f"{name.removesuffix('_packed')}"] = self._unpacked_shape(name)
            elif entry.dtype == torch.float8_e4m3fn:
                shapes[name] = entry.shape
                self._check_fp8(name, entry.shape)
            elif not self._is_beside(name):
                shapes[name] = entry.shape
        return shapes

    def _is_beside(self, name: str) -> bool:
        """Whether a stored tensor only says how to read another."""
        for suffix, owner in (("_scale_inv", ""), ("_scale", "_packed"), ("_shape", "_packed")):
            if name.endswith(f".weight{suffix}") and name.removesuffix(suffix) + owner in self._files:
                return True
        return False

    def _check_fp8(self, name: str, shape: tuple[int, ...]) -> None:
        scale = f"{name}_scale_inv"
        if len(shape) != 2:
            self.broken.append(f"{name}: FP8 of shape {shape}, only matrices can be dequantized")
        elif scale not in self._files:
            self.broken.append(f"{name}: FP8 without its weight_scale_inv")
        else:
            expected = fp8_scale_shape(shape, self._quantization.fp8_block)
            found = self._files[scale].entries[scale].shape
            if found != expected:
                self.broken.append(f"{scale}: shape {found}, expected {expected} for a weight {shape}")

    def _unpacked_shape(self, name: str) -> tuple[int, ...]:
        """Shape of an INT4 weight, which is told beside it, since the last word of a row may be padded."""
        entry = self._files[name].entries[name]
        stem = name.removesuffix("_packed")
        rows, words = entry.shape if len(entry.shape) == 2 else (0, 0)
        shape = (rows, words * INT4_PER_WORD)
        if len(entry.shape) != 2 or entry.dtype != torch.int32:
            self.broken.append(f"{name}: {entry.dtype} of shape {entry.shape}, expected an int32 matrix")
            return shape
        if f"{stem}_shape" in self._files:
            told = self._raw(f"{stem}_shape").flatten().tolist()
            if len(told) != 2 or told[0] != rows or not shape[1] - INT4_PER_WORD < told[1] <= shape[1]:
                self.broken.append(f"{stem}_shape: {told}, which does not fit weight_packed of shape {entry.shape}")
                return shape
            shape = (rows, int(told[1]))
        expected = (rows, -(-shape[1] // self._quantization.int4_group))
        if f"{stem}_scale" not in self._files:
            self.broken.append(f"{name}: without its weight_scale")
        elif (found := self._files[f"{stem}_scale"].entries[f"{stem}_scale"].shape) != expected:
            self.broken.append(f"{stem}_scale: shape {found}, expected {expected} for a weight {shape}")
        return shape
