"""Models on disk: the released formats and our own, read and written without ever holding a second copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from perilune.models.attention_mode import config_as_set
from perilune.models.checkpoint.companions import read_companions
from perilune.models.checkpoint.format import Details
from perilune.models.checkpoint.gguf import GGUFFile
from perilune.models.checkpoint.opening import RUN, open_checkpoint, read_header
from perilune.models.checkpoint.writing import MAX_SHARD_BYTES, FormatName, WriteOptions, write_model
from perilune.models.config import ModelConfig
from perilune.models.decoder import Decoder
from perilune.nn.init import initialize_buffers

__all__ = ["Details", "FormatName", "GGUFFile", "convert", "load", "read_config", "read_details", "save"]


def load(path: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Decoder:
    """Read a model.

    Args:
        path: a directory with config.json and safetensors files, of a released format or our own, or a GGUF file.
        dtype: of the parameters, except those that always stay float32; None for the checkpoint's.
        device: where the model goes.

    Returns:
        The model, in evaluation mode. `read_details` tells what else the checkpoint says.

    Raises:
        CheckpointError: it is not a checkpoint that perilune reads, or damaged; every tensor that is missing,
            unexpected or of another shape is named at once.
    """
    with open_checkpoint(Path(path)) as source:
        with torch.device("meta"):
            model = Decoder(source.config)
        model = model.to(dtype or source.dtype).to_empty(device=device)
        initialize_buffers(model)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                # `state_dict` shares memory with the model; runs of a few elements keep the second copy small
                flat = tensor.view(-1)
                for start in range(0, flat.numel(), RUN):
                    count = min(RUN, flat.numel() - start)
                    flat[start : start + count].copy_(source.read(name, start, count))
    return model.eval()


def save(
    model: Decoder,
    path: Path | str,
    format: FormatName = "hf",
    *,
    dtype: torch.dtype | None = None,
    details: Details | None = None,
    tokenizer_files: Mapping[str, bytes] | None = None,
    quantize: Literal["fp8"] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model.

    Args:
        model: on any device.
        path: a directory that does not exist yet.
        format: `hf`, the released format that fits the model, or `perilune`, which keeps everything.
        dtype: of the weights that do not have to be float32; None for the model's.
        details: what else the checkpoint says: token ids, longest context, the family's name. What `read_details`
            returned is written back.
        tokenizer_files: tokenizer and chat template, by their file names.
        quantize: `fp8` stores the weights of linear layers in blocks, as Kimi K2 does.
        max_shard_bytes: size of the largest file.

    Raises:
        CheckpointError: `path` exists, the format cannot express the model, or the disk is full.
        ValueError: an option is out of range.
    """
    options = WriteOptions(format=format, dtype=dtype, quantize=quantize, max_shard_bytes=max_shard_bytes)
    write_model(_LiveModel(model, details or Details()), Path(path), options, tokenizer_files=tokenizer_files)


def convert(
    source: Path | str,
    target: Path | str,
    format: FormatName = "hf",
    *,
    dtype: torch.dtype | None = None,
    tokenizer_files: Mapping[str, bytes] | None = None,
    quantize: Literal["fp8"] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: Callable[[int, int], None] | None = None,
) -> None:
    """Write a checkpoint in another format or dtype, a tensor at a time.

    Args:
        source: a directory that `load` reads.
        target: a directory that does not exist yet.
        format: see `save`.
        dtype: see `save`; quantized weights become the dtype of the others by default.
        tokenizer_files: tokenizer and chat template, by their file names; None copies those of the source, with the
            code that its tokenizer_config.json names.
        quantize: see `save`.
        max_shard_bytes: see `save`.
        on_bytes: told after each piece how many bytes of weights are written, and of how many.

    Raises:
        CheckpointError: as of `load` and `save`.
        ValueError: an option is out of range.
    """
    options = WriteOptions(format=format, dtype=dtype, quantize=quantize, max_shard_bytes=max_shard_bytes)
    files = read_companions(Path(source)) if tokenizer_files is None else tokenizer_files
    with open_checkpoint(Path(source)) as stored:
        write_model(stored, Path(target), options, tokenizer_files=files, on_bytes=on_bytes)


def read_config(path: Path | str) -> ModelConfig:
    """Return the model that a directory's config.json describes; weights need not be there.

    Raises:
        CheckpointError: it is missing, damaged, or of a family that perilune does not have.
    """
    return read_header(Path(path)).config


def read_details(path: Path | str) -> Details:
    """Return what a checkpoint says beside its model; errors as of `read_config`."""
    return read_header(Path(path)).details


class _LiveModel:
    """A model in memory as a source of its tensors."""

    def __init__(self, model: Decoder, details: Details) -> None:
        self.config = config_as_set(model)
        self.details = details
        self.dtype = model.embed_tokens.weight.dtype
        self._state: dict[str, Tensor] = model.state_dict()

    def read(self, ours: str, start: int, count: int) -> Tensor:
        """Return a run of one of its tensors."""
        return self._state[ours].detach().reshape(-1)[start : start + count]
