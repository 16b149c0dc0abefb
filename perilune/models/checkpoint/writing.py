"""Writing a model directory: configuration, sharded weights, index; whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from perilune.errors import CheckpointError
from perilune.files import fsync_directory
from perilune.models.checkpoint import deepseek_v3, kimi_linear, llama, own
from perilune.models.checkpoint.companions import COMPANION_NAME
from perilune.models.checkpoint.files import INDEX_NAME, WEIGHTS_NAME
from perilune.models.checkpoint.format import Details, Format
from perilune.models.checkpoint.mapping import Binding, Piece, float32_tensors
from perilune.models.checkpoint.opening import CONFIG_NAME, GENERATION_NAME, RUN, TensorSource
from perilune.models.checkpoint.quantization import FP8_BLOCK, fp8_scale_shape, fp8_scales, quantize_fp8
from perilune.models.config import ModelConfig
from perilune.tensorfile import stream_tensors, write_bytes_durably

FormatName = Literal["hf", "perilune"]
"""`hf`: the released format that fits the model, which transformers and vLLM load; `perilune`: our own."""

MAX_SHARD_BYTES = 5_000_000_000
"""Largest file of weights, unless one tensor is larger."""

_OWN_NAMES = {CONFIG_NAME, GENERATION_NAME, INDEX_NAME, WEIGHTS_NAME}
_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(FP8_BLOCK),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How a model is written."""

    format: FormatName = "hf"
    """Which format."""
    dtype: torch.dtype | None = None
    """Of the weights that do not have to be float32; None for the dtype that they have."""
    quantize: Literal["fp8"] | None = None
    """Store the weights of linear layers as FP8 with a scale for each block of 128 x 128; for `hf` only."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Weights are split into files of at most this size, tensors never."""

    def __post_init__(self) -> None:
        if self.format not in ("hf", "perilune"):
            raise ValueError(f"format must be 'hf' or 'perilune', got {self.format!r}")
        if self.dtype not in (None, torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"dtype must be a float dtype of 16 bits or more, got {self.dtype}")
        if self.quantize not in (None, "fp8"):
            raise ValueError(f"quantize must be 'fp8' or None, got {self.quantize!r}")
        if self.quantize is not None and self.format != "hf":
            raise ValueError(
                f"quantize must be None with format {self.format!r}: training needs the weights themselves"
            )
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be >= 1, got {self.max_shard_bytes}")


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor to be written."""

    ours: str
    piece: Piece
    meta: Tensor
    """Its shape and dtype, on the meta device."""
    part: Literal["whole", "fp8", "scale"]


def write_model(
    source: TensorSource,
    directory: Path,
    options: WriteOptions,
    *,
    tokenizer_files: Mapping[str, bytes] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model directory, holding no more than one tensor of a released format at a time.

    It is written beside its final name, synced, and renamed; what a killed writer left is replaced by the next.

    Args:
        source: of the numbers.
        directory: must not exist, or be an empty directory.
        options: how.
        tokenizer_files: further files by name, e.g. `tokenizer.json`, `additional_chat_templates/tool_use.jinja`.
        on_bytes: told after each piece how many bytes of weights are written, and of how many.

    Raises:
        CheckpointError: there is something already, the format cannot express the model, or the disk is full.
        ValueError: a name among `tokenizer_files` is no such name, or is a name of the checkpoint's own.
    """
    extras = _checked_extras(tokenizer_files or {})
    tree, outputs = _plan(source, options)
    with _new_directory(directory) as temporary:
        _write_weights(source, temporary, outputs, options.max_shard_bytes, on_bytes)
        for name, content in extras.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            write_bytes_durably(temporary / name, content)
            fsync_directory((temporary / name).parent)
        if options.format == "hf":
            write_bytes_durably(temporary / GENERATION_NAME, _json(_generation(source.details)))
        write_bytes_durably(temporary / CONFIG_NAME, _json(tree))


def released_format(config: ModelConfig) -> Format:
    """Return the released format whose layers are those of `config`.

    Raises:
        CheckpointError: there is none for this mixture of layers.
    """
    kinds = set(config.layers)
    if kinds <= {"gqa", "moba"}:
        return llama.FORMAT
    if kinds == {"mla"} and config.mla is not None and config.mla.use_rope:
        return deepseek_v3.FORMAT
    if kinds <= {"kda", "mla"}:
        return kimi_linear.FORMAT
    raise CheckpointError(
        f"no released format has layers {' and '.join(sorted(kinds))} in one model; the format perilune keeps "
        "everything"
    )


def _plan(source: TensorSource, options: WriteOptions) -> tuple[dict[str, Any], list[_Output]]:
    """The config.json, and every tensor to be written."""
    config, dtype = source.config, options.dtype or source.dtype
    repeated: list[Piece] = []
    if options.format == "perilune":
        tree, bindings = own.write_tree(config, source.details), own.bindings(config)
    else:
        released = released_format(config)
        if released.repeats_tied and config.tie_embeddings:
            repeated.append(Piece(name="lm_head.weight", shape=(config.vocab_size, config.d_model)))
        tree, bindings = released.write(config, source.details), released.bindings(config)
        tree |= {"dtype": str(dtype).removeprefix("torch."), **_token_ids(source.details)}
        if options.quantize:
            tree["quantization_config"] = {**_FP8, **_kept_layers(released, bindings)}
    wide = float32_tensors(config)
    outputs = [
        output for piece in repeated for output in _outputs("embed_tokens.weight", piece, dtype, is_quantized=False)
    ]
    for binding in bindings:
        kept = torch.promote_types(dtype, torch.float32) if binding.ours in wide else dtype
        for piece in binding.pieces:
            outputs += _outputs(binding.ours, piece, kept, is_quantized=options.quantize is not None)
    return tree, outputs


def _kept_layers(released: Format, bindings: list[Binding]) -> dict[str, list[str]]:
    """The linear layers that are not quantized, as servers want them listed."""
    if released.unquantized is None:
        return {}
    ending = f"{released.unquantized}.weight"
    names = [piece.name for binding in bindings for piece in binding.pieces if piece.name.endswith(ending)]
    return {"modules_to_not_convert": [name.removesuffix(".weight") for name in names]}


def _outputs(ours: str, piece: Piece, dtype: torch.dtype, *, is_quantized: bool) -> list[_Output]:
    def meta(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    if not (is_quantized and piece.is_linear):
        return [_Output(ours, piece, meta(piece.shape, dtype), "whole")]
    return [
        _Output(ours, piece, meta(piece.shape, torch.float8_e4m3fn), "fp8"),
        _Output(ours, piece, meta(fp8_scale_shape(piece.shape), torch.float32), "scale"),
    ]


def _name(output: _Output) -> str:
    return f"{output.piece.name}_scale_inv" if output.part == "scale" else output.piece.name


def _content(source: TensorSource, output: _Output) -> Iterator[Tensor]:
    """A tensor's elements in order, a run of them at a time unless they have to be seen together."""
    piece = output.piece
    if output.part == "whole" and piece.heads is None:
        for start in range(0, piece.numel, RUN):
            count = min(RUN, piece.numel - start)
            yield source.read(output.ours, piece.start + start, count).to(output.meta.dtype)
        return
    theirs = piece.to_theirs(source.read(output.ours, piece.start, piece.numel))
    if output.part == "whole":
        yield theirs.to(output.meta.dtype)
        return
    yield quantize_fp8(theirs)[0] if output.part == "fp8" else fp8_scales(theirs)


def _write_weights(
    source: TensorSource,
    directory: Path,
    outputs: list[_Output],
    max_bytes: int,
    on_bytes: Callable[[int, int], None] | None,
) -> None:
    shards = _shards(outputs, max_bytes)
    total = sum(_size(output) for output in outputs)
    done = 0
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        by_name = {_name(output): output for output in shard}
        names |= dict.fromkeys(by_name, file)

        def pieces(name: str, by_name: dict[str, _Output] = by_name) -> Iterator[Tensor]:
            nonlocal done
            for run in _content(source, by_name[name]):
                yield run
                done += run.numel() * run.element_size()
                if on_bytes is not None:
                    on_bytes(done, total)

        layout = {name: output.meta for name, output in by_name.items()}
        # readers of the format ask which library's tensors these are
        stream_tensors(directory / file, layout, pieces, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        write_bytes_durably(directory / INDEX_NAME, _json(index))


def _shards(outputs: list[_Output], max_bytes: int) -> list[list[_Output]]:
    shards: list[list[_Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + _size(output) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += _size(output)
    return shards


def _size(output: _Output) -> int:
    return output.meta.numel() * output.meta.element_size()


def _token_ids(details: Details) -> dict[str, Any]:
    """Every id, null where none is known: a reader's own default may lie outside the vocabulary."""
    eos = details.eos_ids[0] if len(details.eos_ids) == 1 else list(details.eos_ids) or None
    return {"bos_token_id": details.bos_id, "eos_token_id": eos, "pad_token_id": details.pad_id}


def _generation(details: Details) -> Mapping[str, Any]:
    if details.generation:
        return details.generation
    return {name: value for name, value in _token_ids(details).items() if value is not None}


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, allow_nan=False) + "\n").encode()


def _checked_extras(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    for name in files:
        if not COMPANION_NAME.fullmatch(name) or name in _OWN_NAMES or name.endswith(".safetensors"):
            raise ValueError(f"tokenizer_files must have plain names, and none of the checkpoint's own; got {name!r}")
    return files


@contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    """Give a directory that takes the final name when the block ends without an error, and is gone after one."""
    if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
        raise CheckpointError(f"{directory}: is there already and is not overwritten; remove it or name another")
    temporary = directory.with_name(f".{directory.name}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        fsync_directory(temporary)
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
        fsync_directory(directory.parent)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
