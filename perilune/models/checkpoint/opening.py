"""Opening a checkpoint: which format it is, which model, and where each of our tensors is in it."""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from perilune.errors import CheckpointError
from perilune.models.checkpoint import deepseek_v3, kimi_linear, llama, own
from perilune.models.checkpoint.fields import Fields
from perilune.models.checkpoint.files import Quantization, WeightFiles
from perilune.models.checkpoint.format import Details, Format
from perilune.models.checkpoint.gguf import SUFFIX, GGUFFile
from perilune.models.checkpoint.mapping import Binding, Piece
from perilune.models.checkpoint.problems import Problems
from perilune.models.config import ModelConfig
from perilune.strict_json import read_json_object

FORMATS: tuple[Format, ...] = (kimi_linear.FORMAT, deepseek_v3.FORMAT, llama.FORMAT)
"""Released formats; a new one is one file and one entry."""

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"

RUN = 1 << 24
"""Elements that are copied at once where a tensor need not be whole."""

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class TensorSource(Protocol):
    """Where the numbers of a model come from."""

    config: ModelConfig
    details: Details
    dtype: torch.dtype

    def read(self, ours: str, start: int, count: int) -> Tensor:
        """Return `count` elements of one of our tensors from the flat position `start` on, of any float dtype."""
        ...


@dataclass(frozen=True, slots=True)
class Header:
    """What config.json says."""

    config: ModelConfig
    details: Details
    format: Format | None
    """None for perilune's own."""
    quantization: Quantization


def read_header(directory: Path, names: frozenset[str] = frozenset()) -> Header:
    """Read a model directory's config.json.

    Args:
        directory: of a model.
        names: of its tensors, which tell of parts that no field does.

    Raises:
        CheckpointError: it is missing or damaged, of a family that perilune does not have, or its fields are wrong.
    """
    if directory.suffix == SUFFIX:
        with GGUFFile(directory) as file:
            return _gguf_header(file)
    path = directory / CONFIG_NAME
    if directory.is_file():
        raise CheckpointError(f"{directory}: is a file; name the directory that holds {CONFIG_NAME} and *.safetensors")
    if not path.is_file():
        raise CheckpointError(f"{directory}: is no model directory, it has no {CONFIG_NAME}")
    tree = read_json_object(path, follow_links=True)
    if tree.get("format") == own.FORMAT_NAME:
        config, details = own.read_tree(tree, str(path))
        return Header(config, details, None, Quantization())
    released = _format_of(tree, str(path))
    fields = Fields(tree, str(path))
    try:
        config = released.read(fields, names)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Header(config, _read_details(fields, directory), released, _read_quantization(fields))


class StoredModel:
    """A checkpoint on disk as a source of our tensors."""

    def __init__(
        self, files: WeightFiles | GGUFFile, header: Header, bindings: Mapping[str, tuple[Piece, ...]]
    ) -> None:
        """Wrap open files; `bindings` maps our names to pieces under the names that the files have."""
        self.config = header.config
        self.details = header.details
        self.dtype = files.main_dtype
        self._files = files
        self._pieces = bindings
        self._last: tuple[str, Tensor] | None = None

    def read(self, ours: str, start: int, count: int) -> Tensor:
        """Return `count` elements of one of our tensors from the flat position `start` on."""
        pieces = self._pieces[ours]
        first = bisect_right([piece.start for piece in pieces], start) - 1
        parts: list[Tensor] = []
        end = start + count
        for piece in pieces[first:]:
            if piece.start >= end and parts:
                break
            low, high = max(start, piece.start), min(end, piece.start + piece.numel)
            parts.append(self._read_run(piece, low - piece.start, high - low))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_run(self, piece: Piece, start: int, count: int) -> Tensor:
        if piece.heads is None:
            run = self._files.read_run(piece.name, start, count)
            if run is not None:
                return run
        if self._last is None or self._last[0] != piece.name:
            # dropped before the next is read, not after
            self._last = None
            self._last = piece.name, piece.to_ours(self._files.read(piece.name).reshape(piece.shape))
        return self._last[1][start : start + count]


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[StoredModel]:
    """Open a model directory of any format that perilune reads, or a GGUF file; no tensor is read yet.

    Raises:
        CheckpointError: it is not one, or config and tensors do not fit; every tensor that does not is named at once.
    """
    if directory.suffix == SUFFIX:
        with GGUFFile(directory) as file:
            header = _gguf_header(file)
            yield StoredModel(file, header, _resolve(file, header, directory))
        return
    header = read_header(directory)
    with WeightFiles(directory, header.quantization) as files:
        header = read_header(directory, frozenset(files.shapes))
        yield StoredModel(files, header, _resolve(files, header, directory))


def _gguf_header(file: GGUFFile) -> Header:
    fields = Fields(file.config_tree(), str(file.path))
    try:
        config = llama.FORMAT.read(fields, frozenset(file.shapes))
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    return Header(config, _read_details(fields, file.path.parent, has_files=False), llama.FORMAT, Quantization())


def _resolve(files: WeightFiles | GGUFFile, header: Header, directory: Path) -> dict[str, tuple[Piece, ...]]:
    """Find every piece of every tensor among the files' names."""
    problems = Problems(damaged=list(files.broken))
    there = _canonical_names(files, header, problems)
    bindings = own.bindings(header.config) if header.format is None else header.format.bindings(header.config)
    resolved: dict[str, tuple[Piece, ...]] = {}
    for binding in bindings:
        form = _form_of(binding, there)
        found: list[Piece] = []
        for piece in form:
            name = there.pop(piece.name, None)
            if name is None:
                problems.missing.append(piece.name)
                continue
            shape = files.shapes[name]
            if shape != piece.shape and shape not in piece.also:
                problems.misshaped.append(f"{name} has {list(shape)}, expected {list(piece.shape)}")
            found.append(_renamed(piece, name))
        resolved[binding.ours] = tuple(found)
    problems.unexpected.extend(there.values())
    problems.raise_any(str(directory))
    return resolved


def _form_of(binding: Binding, there: Mapping[str, str]) -> tuple[Piece, ...]:
    """The form that the checkpoint has, or most of."""
    forms = (binding.pieces, *binding.others)
    return max(forms, key=lambda form: sum(piece.name in there for piece in form) / len(form))


def _renamed(piece: Piece, name: str) -> Piece:
    return Piece(
        name=name, shape=piece.shape, start=piece.start, also=piece.also, heads=piece.heads, is_linear=piece.is_linear
    )


def _canonical_names(files: WeightFiles | GGUFFile, header: Header, problems: Problems) -> dict[str, str]:
    """Map canonical names to those in the files, without what is not needed."""
    config, released = header.config, header.format
    if released is None:
        return {name: name for name in files.shapes}
    names: dict[str, str] = {}
    beyond: list[str] = []
    for name in files.shapes:
        layer = _LAYER.match(name)
        if released.predicts_further and layer is not None and int(layer[1]) == config.num_layers:
            beyond.append(name)
        elif not name.endswith(".rotary_emb.inv_freq") and not (config.tie_embeddings and name == "lm_head.weight"):
            canonical = released.canonical(name, config)
            if canonical in names:
                problems.unexpected.append(f"{name} (the same as {names[canonical]})")
            names[canonical] = name
    if beyond:
        logger.warning(
            "%d tensors behind layer %d are left out (%s, ...): they predict further tokens in training",
            len(beyond),
            config.num_layers - 1,
            beyond[0],
        )
    return names


def _format_of(tree: Mapping[str, Any], where: str) -> Format:
    model_type = tree.get("model_type")
    for released in FORMATS:
        if model_type in released.model_types:
            return released
    known = ", ".join(name for released in FORMATS for name in released.model_types)
    raise CheckpointError(f"{where}: model_type must be one of {known}, got {str(model_type)[:100]!r}")


def _read_details(fields: Fields, directory: Path, *, has_files: bool = True) -> Details:
    eos = fields.tree.get("eos_token_id")
    path = directory / GENERATION_NAME
    return Details(
        model_type=str(fields.tree["model_type"]),
        max_positions=fields.integer("max_position_embeddings", "model_max_length", default=None),
        bos_id=fields.integer("bos_token_id", default=None, least=0),
        eos_ids=tuple(fields.integers("eos_token_id") or ()) if isinstance(eos, list) else _one(fields),
        pad_id=fields.integer("pad_token_id", default=None, least=-1),
        generation=read_json_object(path, follow_links=True) if has_files and path.is_file() else {},
    )


def _one(fields: Fields) -> tuple[int, ...]:
    eos = fields.integer("eos_token_id", default=None, least=0)
    return () if eos is None else (eos,)


def _read_quantization(fields: Fields) -> Quantization:
    """How FP8 or INT4 weights are stored, refusing other quantizations, whose tensors would be taken for weights."""
    told = fields.table("quantization_config")
    if told is None:
        return Quantization()
    method = told.tree.get("quant_method")
    if method == "fp8":
        block = told.integers("weight_block_size")
        told.expect("fmt", "e4m3")
        if block is None or len(block) != 2 or min(block) < 1:
            raise told.wrong("weight_block_size", "two sizes, as [128, 128]", block)
        return Quantization(fp8_block=(block[0], block[1]))
    if method == "compressed-tensors":
        told.expect("format", "pack-quantized")
        return Quantization(int4_group=_int4_group(told))
    raise told.wrong("quant_method", "fp8 or compressed-tensors", method)


def _int4_group(told: Fields) -> int:
    groups = told.table("config_groups")
    sizes: set[int] = set()
    for name in groups.tree if groups is not None else ():
        group = groups.table(name) if groups is not None else None
        weights = group.table("weights") if group is not None else None
        if weights is None:
            raise told.wrong("config_groups", "groups with weights", name)
        weights.expect("num_bits", 4)
        weights.expect("symmetric", True)
        weights.expect("strategy", "group")
        weights.expect("type", "int")
        weights.expect("actorder", False)
        sizes.add(weights.integer("group_size"))
    if len(sizes) != 1:
        raise told.wrong("config_groups", "groups of one size", sorted(sizes))
    return sizes.pop()
