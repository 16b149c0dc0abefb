"""What attention layers with queries, keys and values per head have in common, whatever their queries read."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from perilune.nn.config import GQAConfig
from perilune.nn.linear import Linear
from perilune.nn.qk_clip import QKClipSpec


class HeadsLayer(Protocol):
    """An attention layer with the projections of `head_projections`."""

    max_logits: Tensor

    def reset_max_logits(self) -> None:
        """Forget the recorded maxima."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter:
        """Parameter by name, as of `nn.Module`."""
        ...


def head_projections(config: GQAConfig, d_model: int) -> tuple[Linear, Linear, Linear, Linear]:
    """Projections to queries, keys and values, and from the heads' outputs, for inputs of width `d_model`."""
    width, kv_width = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    bias = config.qkv_bias
    return (
        Linear(d_model, width, bias=bias),
        Linear(d_model, kv_width, bias=bias),
        Linear(d_model, kv_width, bias=bias),
        Linear(width, d_model, bias=False),
    )


def heads_clip_spec(layer: HeadsLayer, config: GQAConfig, *, are_keys_linear: bool = True) -> QKClipSpec:
    """Rows of `q_proj` and `k_proj`.

    Args:
        layer: owner of the projections.
        config: its heads.
        are_keys_linear: whether scaling the rows of `k_proj` scales the keys; if not, queries take the whole factor.
    """
    shared = config.head_dim if are_keys_linear else 0
    return QKClipSpec(
        kind="mha" if config.kv_heads == config.num_heads else "gqa",
        query=layer.get_parameter("q_proj.weight"),
        key=layer.get_parameter("k_proj.weight"),
        num_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        nope_dim=shared,
        rope_dim=config.head_dim - shared,
        value_dim=config.head_dim - shared,
        max_logits=lambda: layer.max_logits,
        reset=layer.reset_max_logits,
    )
