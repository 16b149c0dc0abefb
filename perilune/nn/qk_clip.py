"""What an attention layer tells QK-Clip: where the rows of each head are, and how large its logits were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

QKClipKind = Literal["mha", "gqa", "mla"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QKClipSpec:
    """Row addresses of the query and key projections of one attention layer.

    For every kind, query head h owns rows `[h * query_rows, (h + 1) * query_rows)` of `query`, in the order
    [nope | rope], and key head h owns rows `[h * key_rows, (h + 1) * key_rows)` of `key`, in the order [nope | value].
    `mha` and `gqa` have `rope_dim = value_dim = 0` (their rotary channels are head-private, so they scale like the
    others), unless keys are not linear in `key`, as behind a key convolution: then `nope_dim` is 0, and the query takes
    the whole factor. `mla` keeps the rotary key in `kv_a_proj`, shared by all heads, where it must not be scaled.

    Source: Kimi K2 (2507.20534), Algorithm 1, lines 11-17.
    """

    kind: QKClipKind
    """`mha`: one key head per query head; `gqa`: a key head serves several; `mla`: latent attention."""
    query: nn.Parameter
    """`[num_heads * query_rows, ...]`: `q_proj`, or `q_b_proj` with a low-rank query."""
    key: nn.Parameter
    """`[num_kv_heads * key_rows, ...]`: `k_proj`, or `kv_b_proj` of latent attention."""
    num_heads: int
    """H, query heads."""
    num_kv_heads: int
    """Key heads; divides `num_heads`."""
    nope_dim: int
    """Rows of a head in both projections whose product is split by the exponents alpha and 1 - alpha."""
    rope_dim: int = 0
    """Rows of a query head that meet the shared rotary key, and so take the whole factor."""
    value_dim: int = 0
    """Rows of a key head that hold values and are left alone."""
    max_logits: Callable[[], Tensor]
    """Returns `[H]` float32: each head's largest logit since the last reset; -inf where nothing was recorded."""
    reset: Callable[[], None]
    """Forgets the recorded maxima."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(QKClipKind):
            raise ValueError(f"kind must be one of {get_args(QKClipKind)}, got {self.kind!r}")
        if self.num_heads < 1 or self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.kind != "gqa" and self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads must equal num_heads={self.num_heads} for kind {self.kind}, got {self.num_kv_heads}"
            )
        self._check_rows("query", self.query, self.num_heads * self.query_rows)
        self._check_rows("key", self.key, self.num_kv_heads * self.key_rows)

    @property
    def query_rows(self) -> int:
        """Rows of one head in `query`."""
        return self.nope_dim + self.rope_dim

    @property
    def key_rows(self) -> int:
        """Rows of one head in `key`."""
        return self.nope_dim + self.value_dim

    def _check_rows(self, name: str, parameter: nn.Parameter, rows: int) -> None:
        if parameter.ndim < 1 or parameter.shape[0] != rows:
            raise ValueError(f"{name} must have {rows} rows, got shape {tuple(parameter.shape)}")
