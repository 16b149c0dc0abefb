"""Whole models: configuration, decoder, presets, and what they cost."""

from perilune.models.attention_mode import (
    attention_modes,
    config_as_set,
    restore_attention_modes,
    set_attention_mode,
)
from perilune.models.checkpoint import Details, FormatName, GGUFFile, convert, load, read_config, read_details, save
from perilune.models.config import ModelConfig, hybrid_layers
from perilune.models.counts import CacheBytes, ParameterCounts, cache_bytes, flops_per_token, parameter_counts
from perilune.models.decoder import Block, Decoder, build_model
from perilune.models.presets import PRESETS, SCALING_LADDER, LadderRung
from perilune.models.routing import moba_recalls, moba_routings

__all__ = [
    "PRESETS",
    "SCALING_LADDER",
    "Block",
    "CacheBytes",
    "Decoder",
    "Details",
    "FormatName",
    "GGUFFile",
    "LadderRung",
    "ModelConfig",
    "ParameterCounts",
    "attention_modes",
    "build_model",
    "cache_bytes",
    "config_as_set",
    "convert",
    "flops_per_token",
    "hybrid_layers",
    "load",
    "moba_recalls",
    "moba_routings",
    "parameter_counts",
    "read_config",
    "read_details",
    "restore_attention_modes",
    "save",
    "set_attention_mode",
]
