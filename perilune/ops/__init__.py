"""Functions of tensors: no parameters, no configuration.

Each op is a folder with an oracle and fast paths behind one front door.
"""

from perilune.ops.attention import PagePlan, decode_attention, paged_decode_attention, varlen_attention
from perilune.ops.context import ContextLayout
from perilune.ops.conv import short_conv, short_conv_step
from perilune.ops.conv.context_parallel import short_conv_context_parallel
from perilune.ops.gla import gla, gla_step
from perilune.ops.kda import dplr, kda, kda_backend, kda_step
from perilune.ops.kda.context_parallel import kda_context_parallel
from perilune.ops.kda_decode import kda_decode
from perilune.ops.layout import SequenceLayout, as_layout
from perilune.ops.loss import linear_cross_entropy, linear_logprobs
from perilune.ops.moba import MobaRouting, moba_attention, moba_decode, moba_route
from perilune.ops.moe import Routing, balance_bias_update, moe_experts, route, routed_scaling_factor
from perilune.ops.multigraph import MultiGraph, propagate, propagate_mixed
from perilune.ops.newton_schulz import newton_schulz
from perilune.ops.norm import rms_norm, rms_norm_gated
from perilune.ops.swiglu import swiglu

__all__ = [
    "ContextLayout",
    "MobaRouting",
    "MultiGraph",
    "PagePlan",
    "Routing",
    "SequenceLayout",
    "as_layout",
    "balance_bias_update",
    "decode_attention",
    "dplr",
    "gla",
    "gla_step",
    "kda",
    "kda_backend",
    "kda_context_parallel",
    "kda_decode",
    "kda_step",
    "linear_cross_entropy",
    "linear_logprobs",
    "moba_attention",
    "moba_decode",
    "moba_route",
    "moe_experts",
    "newton_schulz",
    "paged_decode_attention",
    "propagate",
    "propagate_mixed",
    "rms_norm",
    "rms_norm_gated",
    "route",
    "routed_scaling_factor",
    "short_conv",
    "short_conv_context_parallel",
    "short_conv_step",
    "swiglu",
    "varlen_attention",
]
