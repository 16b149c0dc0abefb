"""How the engine divides its time and its memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Checked settings of an engine; see `Engine` for what they mean."""

    max_batch: int
    max_tokens_prefill: int
    max_tokens_mixed: int
    context_limit: int | None
    block_size: int
    prefix_cache: bool
    snapshot_interval: int
    deterministic: bool
    graphs: bool
    """Whether steps of rows are captured."""
    vocab_size: int

    @property
    def chunk(self) -> int:
        """Tokens of a piece of a deterministic prefill: the same for every text, and a whole number of pages."""
        tokens = min(self.max_tokens_prefill, self.max_tokens_mixed)
        return max(1, tokens // self.block_size) * self.block_size
