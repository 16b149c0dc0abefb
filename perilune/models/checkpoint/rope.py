"""Rotary position embedding in released configurations: `rope_theta`, `rope_scaling`, and their newer common form."""

from __future__ import annotations

import math
from typing import Any

from perilune.models.checkpoint.fields import Fields
from perilune.nn.config import RopeConfig

_PLAIN = ("default", None)


def read_rope(fields: Fields, *, is_latent: bool) -> RopeConfig:
    """Return the rotation that a config.json describes.

    Args:
        fields: the config.json; `rope_scaling.type` and `rope_type` mean the same, and `rope_parameters` holds all.
        is_latent: whether attention is latent, where `mscale_all_dim` enters the softmax scale; elsewhere it is only
            part of the size of cos and sin.

    Raises:
        CheckpointError: a kind of scaling that perilune does not have, or a field of one is missing.
    """
    scaling = fields.table("rope_parameters") or fields.table("rope_scaling") or Fields({}, fields.where)
    theta = (scaling if scaling.has("rope_theta") else fields).number("rope_theta", default=10000.0)
    kind = scaling.tree.get("rope_type", scaling.tree.get("type"))
    scaling.expect("partial_rotary_factor", 1.0, 1)
    if kind in _PLAIN:
        return RopeConfig(theta=theta)
    factor = scaling.number("factor")
    match kind:
        case "linear":
            return RopeConfig(theta=theta, scaling="linear", factor=factor)
        case "llama3":
            return RopeConfig(
                theta=theta,
                scaling="llama3",
                factor=factor,
                original_max_positions=scaling.integer("original_max_position_embeddings"),
                beta_fast=scaling.number("high_freq_factor"),
                beta_slow=scaling.number("low_freq_factor"),
            )
        case "yarn":
            return _read_yarn(fields, scaling, theta, factor, is_latent=is_latent)
        case _:
            raise scaling.wrong("rope_type", "default, linear, llama3 or yarn", kind)


def write_rope(rope: RopeConfig, *, is_latent: bool) -> dict[str, Any]:
    """Return the fields `rope_theta` and, if there is scaling, `rope_scaling`, in the form that the releases have.

    Args:
        rope: the rotation.
        is_latent: see `read_rope`.
    """
    if rope.factor == 1:
        return {"rope_theta": rope.theta}
    scaling: dict[str, Any] = {"type": rope.scaling, "rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling["low_freq_factor"] = rope.beta_slow
        scaling["high_freq_factor"] = rope.beta_fast
    if rope.scaling == "yarn":
        scaling["beta_fast"] = rope.beta_fast
        scaling["beta_slow"] = rope.beta_slow
        size = rope.temperature(rope.mscale)
        if is_latent:
            scaling["mscale"] = rope.mscale
            scaling["mscale_all_dim"] = rope.mscale_all_dim
            size /= rope.temperature(rope.mscale_all_dim)
        # Without both weights readers take a size of their own.
        if not (is_latent and rope.mscale and rope.mscale_all_dim):
            scaling["attention_factor"] = size
    if rope.scaling != "linear":
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _read_yarn(fields: Fields, scaling: Fields, theta: float, factor: float, *, is_latent: bool) -> RopeConfig:
    """YaRN, where the size of cos and sin is told in one of three ways.

    It is `attention_factor`, else m(mscale) / m(mscale_all_dim) if both are given and not 0, else m(1), with
    m(w) = 0.1 w ln(factor) + 1: so the transformers library reads it.
    """
    scaling.expect("truncate", True)
    log_tenth = 0.1 * math.log(factor) if factor > 1 else 0.0
    mscale, all_dim = scaling.number("mscale", default=0.0), scaling.number("mscale_all_dim", default=0.0)
    plain = (1 + mscale * log_tenth) / (1 + all_dim * log_tenth) if mscale and all_dim else 1 + log_tenth
    size = scaling.number("attention_factor", default=plain)
    if not is_latent:
        all_dim = 0.0
    if size == plain and mscale and all_dim:
        weight = mscale  # not computed back from the size, which would round it
    elif size == 1 + log_tenth and not all_dim:
        weight = 1.0
    else:
        weight = (size * (1 + all_dim * log_tenth) - 1) / log_tenth if log_tenth else 1.0
    if weight < 0:
        raise scaling.wrong("attention_factor", "at least 1 / m(mscale_all_dim)", size)
    longest = fields.integer("max_position_embeddings", "model_max_length", default=None)
    original = scaling.integer("original_max_position_embeddings", default=longest)
    if original is None:
        raise scaling.wrong("original_max_position_embeddings", "given", None)
    return RopeConfig(
        theta=theta,
        factor=factor,
        original_max_positions=original,
        beta_fast=scaling.number("beta_fast", default=32.0),
        beta_slow=scaling.number("beta_slow", default=1.0),
        mscale=weight,
        mscale_all_dim=all_dim,
    )
