"""Typed description of a decoder."""

from dataclasses import dataclass
from typing import Literal, get_args

from perilune.nn.config import GQAConfig, KDAConfig, MixerConfig, MLAConfig, MoBAConfig, MoEConfig, check_positive

MixerKind = Literal["kda", "mla", "gqa", "moba"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder whose layers name their token mixers.

    >>> attention = GQAConfig(num_heads=2, head_dim=8)
    >>> config = ModelConfig(vocab_size=64, d_model=16, layers=("gqa",), gqa=attention, d_ff=32)
    >>> config.num_layers, config.is_moe(0)
    (1, False)
    """

    vocab_size: int
    """Rows of the embedding, padding included."""
    d_model: int
    """Width of the residual stream."""
    layers: tuple[str, ...]
    """Token mixer of each layer: `kda`, `mla`, `gqa` or `moba`; see `hybrid_layers`."""
    d_ff: int
    """Hidden width of the dense feed-forward layers."""
    kda: KDAConfig | None = None
    """Configuration of the `kda` layers."""
    mla: MLAConfig | None = None
    """Configuration of the `mla` layers."""
    gqa: GQAConfig | None = None
    """Configuration of the `gqa` layers."""
    moba: MoBAConfig | None = None
    """Configuration of the `moba` layers."""
    moba_layers: Literal["all"] | tuple[int, ...] = "all"
    """Which of the `moba` layers, counted from 0 among all layers, read blocks; the others start with full attention,
    and with the same parameters."""
    moba_full_last_n: int = 0
    """This many layers at the end start with full attention whatever `moba_layers` says, as supervised fine-tuning
    wants it."""
    moe: MoEConfig | None = None
    """Configuration of the mixture-of-experts layers. None: all layers are dense."""
    first_k_dense: int = 0
    """With `moe`, this many layers at the start are dense all the same."""
    norm_eps: float = 1e-5
    """eps of the norms on the residual stream."""
    tie_embeddings: bool = False
    """Use the embedding as the output matrix."""
    init_range: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        check_positive(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            d_ff=self.d_ff,
            norm_eps=self.norm_eps,
            init_range=self.init_range,
        )
        if not self.layers:
            raise ValueError("layers must name at least one mixer, got ()")
        for layer, kind in enumerate(self.layers):
            if kind not in get_args(MixerKind):
                raise ValueError(f"layers[{layer}] must be one of {get_args(MixerKind)}, got {kind!r}")
            if self._configs()[kind] is None:
                raise ValueError(f"layers[{layer}] is {kind!r} but {kind} is not configured")
        if not 0 <= self.first_k_dense <= len(self.layers):
            raise ValueError(f"first_k_dense must be in [0, {len(self.layers)}], got {self.first_k_dense}")
        if self.moe is None and self.first_k_dense:
            raise ValueError(f"first_k_dense must be 0 without moe (every layer is dense), got {self.first_k_dense}")
        self._check_moba_layers()

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def mixer(self, layer: int) -> MixerConfig:
        """Configuration of a layer's token mixer."""
        config = self._configs()[self.layers[layer]]
        if config is None:
            raise ValueError(f"layers[{layer}] is {self.layers[layer]!r} but it is not configured")
        return config

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is a mixture of experts."""
        return self.moe is not None and layer >= self.first_k_dense

    def is_moba(self, layer: int) -> bool:
        """Whether a layer is a `moba` one that starts by reading blocks, rather than every earlier token."""
        if self.layers[layer] != "moba" or layer >= self.num_layers - self.moba_full_last_n:
            return False
        return self.moba_layers == "all" or layer in self.moba_layers

    def _check_moba_layers(self) -> None:
        if not 0 <= self.moba_full_last_n <= self.num_layers:
            raise ValueError(f"moba_full_last_n must be in [0, {self.num_layers}], got {self.moba_full_last_n}")
        if "moba" not in self.layers and (self.moba_layers != "all" or self.moba_full_last_n):
            raise ValueError(
                f'moba_layers and moba_full_last_n must be "all" and 0 without moba among layers, got '
                f"{self.moba_layers!r} and {self.moba_full_last_n}"
            )
        if self.moba_layers == "all":
            return
        if isinstance(self.moba_layers, str):
            raise ValueError(f'moba_layers must be "all" or a list of layers, got {self.moba_layers!r}')
        there = [layer for layer, kind in enumerate(self.layers) if kind == "moba"]
        for layer in self.moba_layers:
            if layer not in there:
                raise ValueError(f"moba_layers must name moba layers, which are {there}, got {layer}")

    def _configs(self) -> dict[str, MixerConfig | None]:
        return {"kda": self.kda, "mla": self.mla, "gqa": self.gqa, "moba": self.moba}


def hybrid_layers(
    num_layers: int, ratio: int = 3, full: MixerKind = "mla", linear: MixerKind = "kda"
) -> tuple[str, ...]:
    """Interleave `ratio` linear layers with one of full attention; the last layer is always full.

    >>> hybrid_layers(6)
    ('kda', 'kda', 'kda', 'mla', 'kda', 'mla')

    Args:
        num_layers: layers in all.
        ratio: linear layers per full one; 0 makes every layer full.
        full: mixer of zero-based layer i where i % (ratio + 1) == ratio, and of the last.
        linear: mixer of the others.

    Raises:
        ValueError: `num_layers` < 1 or `ratio` < 0.

    Source: Kimi Linear, section 4 (3:1 ratio) and the released layer lists.
    """
    if num_layers < 1 or ratio < 0:
        raise ValueError(f"num_layers must be >= 1 and ratio >= 0, got {num_layers} and {ratio}")
    return tuple(full if i % (ratio + 1) == ratio or i == num_layers - 1 else linear for i in range(num_layers))
