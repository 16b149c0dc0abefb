"""Layers with parameters, their configurations and their caches."""

from perilune.nn.block_entry import BlockEntry
from perilune.nn.cache import HybridCache
from perilune.nn.cache_entries import CacheEntry, StateEntry, TokenEntry
from perilune.nn.config import (
    AttentionMode,
    GQAConfig,
    KDAConfig,
    MixerConfig,
    MLAConfig,
    MoBAConfig,
    MoEConfig,
    RopeConfig,
)
from perilune.nn.conv import ShortConv
from perilune.nn.gqa import GroupedQueryAttention
from perilune.nn.init import initialize
from perilune.nn.kda import KimiDeltaAttention
from perilune.nn.linear import Linear, Packing, apply_linear, find_packings
from perilune.nn.mixers import MIXERS, Mixer
from perilune.nn.mla import MultiHeadLatentAttention
from perilune.nn.mlp import MLP
from perilune.nn.moba import KeyConv, MoBAttention, zero_key_convs
from perilune.nn.moe import MoE
from perilune.nn.norm import RMSNorm
from perilune.nn.paged import PagedBlocks, PagedCache, PagedLayer, PageRows
from perilune.nn.qk_clip import QKClipSpec
from perilune.nn.roles import DeclaresAdamW, DeclaresMatrices, DeclaresQKClip, MatrixLayout, MatrixSplit
from perilune.nn.rope import Rotary, rotate
from perilune.nn.stores import BlockStore, HasRows, LayerCaches, TokenStore

__all__ = [
    "MIXERS",
    "MLP",
    "AttentionMode",
    "BlockEntry",
    "BlockStore",
    "CacheEntry",
    "DeclaresAdamW",
    "DeclaresMatrices",
    "DeclaresQKClip",
    "GQAConfig",
    "GroupedQueryAttention",
    "HasRows",
    "HybridCache",
    "KDAConfig",
    "KeyConv",
    "KimiDeltaAttention",
    "LayerCaches",
    "Linear",
    "MLAConfig",
    "MatrixLayout",
    "MatrixSplit",
    "Mixer",
    "MixerConfig",
    "MoBAConfig",
    "MoBAttention",
    "MoE",
    "MoEConfig",
    "MultiHeadLatentAttention",
    "Packing",
    "PageRows",
    "PagedBlocks",
    "PagedCache",
    "PagedLayer",
    "QKClipSpec",
    "RMSNorm",
    "RopeConfig",
    "Rotary",
    "ShortConv",
    "StateEntry",
    "TokenEntry",
    "TokenStore",
    "apply_linear",
    "find_packings",
    "initialize",
    "rotate",
    "zero_key_convs",
]
