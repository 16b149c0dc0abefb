"""The token mixers a decoder layer can name. A new one is a file beside this one and a row here."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from perilune.nn.cache_entries import CacheEntry
from perilune.nn.gqa import GroupedQueryAttention
from perilune.nn.kda import KimiDeltaAttention
from perilune.nn.mla import MultiHeadLatentAttention
from perilune.nn.moba import MoBAttention
from perilune.nn.qk_clip import QKClipSpec
from perilune.ops.layout import SequenceLayout


class Mixer(Protocol):
    """What the decoder asks of a token mixer; each is constructed from its config and the model width."""

    def __call__(
        self, x: Tensor, layout: SequenceLayout, cache: Any = None, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """Mix packed tokens `[T, d]` within their sequences, continuing and updating `cache`.

        Tokens behind the first `prompt_lengths[n]` of a sequence are generated, which a mixer may treat otherwise.
        """
        ...

    def new_cache(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> CacheEntry:
        """Cache entry of `num_sequences` sequences that have seen nothing."""
        ...

    def qk_clip_spec(self) -> QKClipSpec | None:
        """Which rows QK-Clip scales, or None."""
        ...


MIXERS: dict[str, type[nn.Module]] = {
    "kda": KimiDeltaAttention,
    "mla": MultiHeadLatentAttention,
    "gqa": GroupedQueryAttention,
    "moba": MoBAttention,
}
