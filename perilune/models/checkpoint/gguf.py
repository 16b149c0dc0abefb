"""GGUF files of Llama, Mistral, Qwen2 and Qwen3, as the checkpoint in Hugging Face's layout that they stand for.

A GGUF file holds what a directory of config.json, weights and tokenizer holds: metadata by key and tensors, mostly
quantized. Fields and names are translated and the rest is done by the code for `llama`, so that there is one place that
knows what a Llama is. Llama's queries and keys are stored with the channel pairs of rotary embedding adjacent; Qwen's
as Hugging Face has them.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perilune.errors import CheckpointError, missing_extra
from perilune.models.checkpoint.gguf_header import TensorInfo, read_header
from perilune.models.checkpoint.mapping import halve_pairs
from perilune.nn import RopeConfig
from perilune.nn.rope import inverse_frequencies

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

SUFFIX = ".gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_FREQUENCY_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """An open file: metadata, and tensors under Hugging Face's names, shapes and order of rows, read when asked for."""

    def __init__(self, path: Path) -> None:
        """Open a file and read its header.

        Raises:
            CheckpointError: it is no GGUF file, damaged, or the gguf package is not installed.
        """
        self.path = path
        self._types = _tensor_types()
        try:
            with path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: not a GGUF file, it is empty") from error
        self._data = data
        header = read_header(data, str(path))
        self.metadata: Mapping[str, Any] = header.metadata
        """Numbers, texts, truth values, and lists of them, by key."""
        self._architecture = header.metadata.get("general.architecture")
        self._tensors: dict[str, TensorInfo] = {}
        self._factors: NDArray[np.float32] | None = None
        self.broken: list[str] = []
        """Tensors that cannot be read, and why."""
        for tensor in header.tensors:
            if self._check(tensor) and tensor.name == _FREQUENCY_FACTORS:
                self._factors = self._values(tensor)
            else:
                self._tensors[_translated(tensor.name)] = tensor
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in self._tensors.items()}
        """Name to shape."""

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most numbers, float32 for quantized ones."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self._tensors.values():
            kind = self._types[tensor.type_number].name if tensor.type_number in self._types else ""
            dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
            counts[dtype] = counts.get(dtype, 0) + math.prod(tensor.shape)
        return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32

    def config_tree(self) -> dict[str, Any]:
        """Return the config.json that Hugging Face's layout has for this model.

        Raises:
            CheckpointError: it is of a kind that perilune does not have.
        """
        if self._architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(
                f"{self.path}: general.architecture must be one of {known}, got {self._architecture!r}"
            )
        if self._field("expert_count"):
            raise CheckpointError(f"{self.path}: mixtures of experts are not read from GGUF; use the original files")
        heads = self._field("attention.head_count")
        self._refuse_other_attention()
        tree = {
            "model_type": self._architecture,
            "vocab_size": self.shapes.get("model.embed_tokens.weight", (None,))[0],
            "hidden_size": self._field("embedding_length"),
            "num_hidden_layers": self._field("block_count"),
            "intermediate_size": self._field("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("attention.head_count_kv", heads),
            "head_dim": self._field("attention.key_length"),
            "hidden_act": "silu",
            "rms_norm_eps": _shortest(self._field("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self._field("rope.freq_base", 10000.0)),
            "max_position_embeddings": self._field("context_length"),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }
        tree["rope_scaling"] = self._rope_scaling(tree)
        return {key: value for key, value in tree.items() if value is not None}

    def _refuse_other_attention(self) -> None:
        """Refuse what would be computed otherwise than the file means."""
        width = self._field("attention.key_length")
        if width is None and self._field("attention.head_count"):
            width = (self._field("embedding_length") or 0) // self._field("attention.head_count")
        for name, expected in (
            ("rope.dimension_count", width),
            ("attention.value_length", width),
            ("attention.sliding_window", 0),
            ("rope.scale_linear", 1.0),
        ):
            found = self._field(name)
            if found is not None and found != expected:
                raise CheckpointError(
                    f"{self.path}: {self._architecture}.{name} is {found}; such models are computed with {expected}"
                )

    def read(self, name: str) -> Tensor:
        """Return a tensor, dequantized to float32, with Hugging Face's order of rows.

        Raises:
            CheckpointError: it is of a type that gguf cannot dequantize.
        """
        tensor = torch.from_numpy(self._values(self._tensors[name])).reshape(self.shapes[name])
        heads = self._adjacent_heads(name)
        return tensor if heads is None else halve_pairs(tensor, heads)

    def read_run(self, name: str, start: int, count: int) -> Tensor | None:
        """Return None: tensors are read whole."""
        del name, start, count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of the file, which is unmapped with the last array of it."""
        self._data = memoryview(b"")

    def _check(self, tensor: TensorInfo) -> bool:
        """Return whether a tensor can be read, and note why not."""
        before = len(self.broken)
        kind = self._types.get(tensor.type_number)
        if kind is None:
            self.broken.append(f"{tensor.name}: unknown type {tensor.type_number}")
        elif tensor.shape[-1] % kind.block_elements:
            self.broken.append(f"{tensor.name}: rows of {tensor.shape[-1]}, no multiple of {kind.block_elements}")
        elif tensor.start + kind.size_bytes(tensor.shape) > len(self._data):
            self.broken.append(f"{tensor.name}: the file ends before it does")
        return len(self.broken) == before

    def _values(self, tensor: TensorInfo) -> NDArray[np.float32]:
        from gguf.quants import dequantize

        kind = self._types[tensor.type_number]
        row_bytes = tensor.shape[-1] // kind.block_elements * kind.block_bytes
        stored = np.frombuffer(self._data, np.uint8, kind.size_bytes(tensor.shape), tensor.start)
        try:
            values = dequantize(stored.reshape(-1, row_bytes), kind.ggml)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {tensor.name} of type {kind.name}: {error}") from error
        return np.array(values, dtype=np.float32).ravel()

    def _adjacent_heads(self, name: str) -> int | None:
        """Number of heads whose channel pairs stand next to each other in the file."""
        if self._architecture != "llama":
            return None
        if ".q_proj." in name:
            return int(self._field("attention.head_count"))
        if ".k_proj." in name:
            return int(self._field("attention.head_count_kv", self._field("attention.head_count")))
        return None

    def _field(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self._architecture}.{name}", default)

    def _rope_scaling(self, tree: Mapping[str, Any]) -> dict[str, Any] | None:
        if self._factors is not None:
            return self._llama3_scaling(tree)
        kind, factor = self._field("rope.scaling.type", "none"), self._field("rope.scaling.factor", 1.0)
        if kind == "none" or factor == 1:
            return None
        scaling = {"rope_type": kind, "factor": _shortest(factor)}
        original = self._field("rope.scaling.original_context_length")
        return scaling if original is None else {**scaling, "original_max_position_embeddings": original}

    def _llama3_scaling(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return the scaling that the frequencies' divisors come from: Llama 3's, whose bounds are always the same.

        Raises:
            CheckpointError: they are others.
        """
        divisors = np.ravel(self._factors) if self._factors is not None else np.ones(0)
        dim = 2 * len(divisors)
        low, high, original = 1.0, 4.0, 8192
        factor = float(divisors.max(initial=1.0))
        if dim and factor > 1:
            rope = RopeConfig(
                theta=tree["rope_theta"],
                scaling="llama3",
                factor=factor,
                original_max_positions=original,
                beta_fast=high,
                beta_slow=low,
            )
            plain = inverse_frequencies(dim, RopeConfig(theta=tree["rope_theta"]))
            if np.allclose(np.array(plain) / inverse_frequencies(dim, rope), divisors, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
        raise CheckpointError(f"{self.path}: {_FREQUENCY_FACTORS} are not those of Llama 3, others are not supported")


@dataclass(frozen=True, slots=True, kw_only=True)
class _TensorType:
    """How the elements of a row are stored: in blocks."""

    name: str
    ggml: GGMLQuantizationType
    block_elements: int
    block_bytes: int

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor."""
        return math.prod(shape) // self.block_elements * self.block_bytes


def _tensor_types() -> dict[int, _TensorType]:
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise missing_extra(CheckpointError, "reading GGUF files needs", error.name, "gguf") from error
    return {
        int(ggml): _TensorType(name=ggml.name, ggml=ggml, block_elements=elements, block_bytes=size)
        for ggml, (elements, size) in GGML_QUANT_SIZES.items()
    }


def _translated(name: str) -> str:
    """Hugging Face's name of a tensor; one that is unknown keeps its own, and is then unexpected."""
    top = _TOP.get(name.removesuffix(".weight"))
    if top is not None:
        return f"{top}.weight"
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _PARTS:
        return name
    return f"model.layers.{found[1]}.{_PARTS[found[2]]}.{found[3]}"


def _shortest(value: Any) -> Any:
    """The shortest decimal number that is the same float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
