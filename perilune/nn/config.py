"""Typed configuration of the layers, with what follows from it by arithmetic: parameters, cache bytes, FLOPs."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch

from perilune.ops.moba.options import Policy

OutputGate = Literal["sigmoid", "swish", "none"]
DecayGranularity = Literal["channel", "head"]
AttentionMode = Literal["moba", "full"]
RopeScaling = Literal["yarn", "linear", "llama3"]

KEY_CONV_REWIND = 16
"""Tokens that a cache behind a key convolution can take back, which costs the raw keys of so many."""


class MixerConfig(Protocol):
    """What a model needs to know of a token mixer's configuration."""

    def num_parameters(self, d_model: int) -> int:
        """Parameters of one layer."""
        ...

    def cache_bytes(self, element_bytes: int) -> tuple[int, int]:
        """Bytes per token and bytes per sequence of one layer's cache; float32 states count as such."""
        ...

    def mixing_flops(self, context: float) -> float:
        """Forward FLOPs per token beyond the weight products, for a token that sees `context` tokens."""
        ...


def check_positive(**values: int | float) -> None:
    """Require every keyword to be > 0.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Require `value` to be one of `choices`.

    Raises:
        ValueError: naming the field and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding with optional extension to longer contexts.

    Field names follow the released configurations.
    """

    theta: float = 10000.0
    """Base of the geometric sequence of wavelengths."""
    factor: float = 1.0
    """How many times longer contexts than the original one are served; 1 turns the extension off."""
    scaling: RopeScaling = "yarn"
    """How: `linear` divides every frequency by `factor`; `yarn` and `llama3` those of pairs that turn slowly, where
    between the two bounds YaRN blends by the pair's number and Llama 3 by its turns."""
    original_max_positions: int = 4096
    """YaRN, Llama 3: context of the training before extension, in tokens."""
    beta_fast: float = 32.0
    """YaRN, Llama 3 (`high_freq_factor`): pairs that turn at least this often in the original context keep their
    frequency."""
    beta_slow: float = 1.0
    """YaRN, Llama 3 (`low_freq_factor`): pairs that turn at most this often have their frequency divided by
    `factor`."""
    mscale: float = 1.0
    """YaRN: weight of the attention temperature in the size of cos and sin."""
    mscale_all_dim: float = 0.0
    """YaRN: weight of the temperature in all query and key channels; enters the softmax scale squared."""

    def __post_init__(self) -> None:
        if not self.theta > 1:
            raise ValueError(f"theta must be > 1, got {self.theta}")
        if not self.factor >= 1:
            raise ValueError(f"factor must be >= 1, got {self.factor}")
        check_choice("scaling", self.scaling, get_args(RopeScaling))
        check_positive(original_max_positions=self.original_max_positions, beta_slow=self.beta_slow)
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast must be >= beta_slow={self.beta_slow}, got {self.beta_fast}")
        if self.scaling == "llama3" and self.beta_fast == self.beta_slow:
            raise ValueError(f"beta_fast must be > beta_slow={self.beta_slow} with scaling llama3, got the same")
        if self.mscale < 0 or self.mscale_all_dim < 0:
            raise ValueError(f"mscale and mscale_all_dim must be >= 0, got {self.mscale} and {self.mscale_all_dim}")

    def temperature(self, weight: float) -> float:
        """YaRN's m = 0.1 * weight * ln(factor) + 1; 1 with the other ways of scaling.

        Source: Kimi K2, released configuration (`mscale`, `mscale_all_dim`); YaRN (2309.00071), section 3.4.
        """
        return 0.1 * weight * math.log(self.factor) + 1 if self.scaling == "yarn" else 1.0

    @property
    def softmax_factor(self) -> float:
        """What the softmax scale is multiplied by: m(mscale_all_dim)^2 (1.8133 for Kimi K2)."""
        return self.temperature(self.mscale_all_dim) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KDAConfig:
    """Kimi Delta Attention, with a switch for every ablation of the paper's table 1."""

    num_heads: int
    """H, query and key heads."""
    head_dim: int
    """K = V, channels of a head."""
    num_value_heads: int | None = None
    """HV, a multiple of H; value head j reads query and key head j // (HV / H). None: H."""
    conv_size: int = 4
    """Taps of the short convolutions on q, k and v; 0 leaves them out, and keeps the SiLU that follows them."""
    gate: DecayGranularity = "channel"
    """Decay per channel (KDA), or one per head (Gated DeltaNet; Mamba2 without the delta rule)."""
    delta_rule: bool = True
    """Whether a write first removes what the memory holds under its key; False only adds."""
    output_gate: OutputGate = "sigmoid"
    """Gate on the normalized output before the last projection."""
    gate_rank: int | None = None
    """Rank of the low-rank decay and output gates. None: `head_dim`."""
    full_rank_gate: bool = False
    """Compute the output gate by one projection instead of two of rank `gate_rank`."""
    output_gate_bias: bool = False
    """Add a bias to the logits of the output gate."""
    gate_lower_bound: float | None = None
    """Use the bounded gate g = bound * sigmoid(.) instead of the softplus gate; in [-5, 0)."""
    allow_neg_eigval: bool = False
    """beta in (0, 2) instead of (0, 1), so that a write can flip what is stored under its key."""
    chunk_size: int = 64
    """Tokens per chunk of the parallel form: 16, 32 or 64; a matter of speed only."""
    norm_eps: float = 1e-5
    """eps of the norm on the heads' outputs."""

    def __post_init__(self) -> None:
        check_positive(num_heads=self.num_heads, head_dim=self.head_dim, norm_eps=self.norm_eps)
        if self.num_value_heads is not None and (self.num_value_heads < 1 or self.num_value_heads % self.num_heads):
            raise ValueError(
                f"num_value_heads must be a multiple of num_heads={self.num_heads}, got {self.num_value_heads}"
            )
        if self.conv_size < 0:
            raise ValueError(f"conv_size must be >= 1, or 0 for no convolution, got {self.conv_size}")
        check_choice("gate", self.gate, get_args(DecayGranularity))
        check_choice("output_gate", self.output_gate, get_args(OutputGate))
        if self.gate_rank is not None:
            check_positive(gate_rank=self.gate_rank)
        if self.output_gate == "none" and (self.full_rank_gate or self.output_gate_bias):
            raise ValueError("full_rank_gate and output_gate_bias must be False without an output gate")
        if self.gate_lower_bound is not None and not -5 <= self.gate_lower_bound < 0:
            raise ValueError(f"gate_lower_bound must be in [-5, 0), got {self.gate_lower_bound}")
        if self.allow_neg_eigval and not self.delta_rule:
            raise ValueError(
                "allow_neg_eigval must be False without the delta rule: additive writes have no transition"
            )
        if self.chunk_size not in (16, 32, 64):
            raise ValueError(f"chunk_size must be 16, 32 or 64, got {self.chunk_size}")

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_value_heads or self.num_heads

    @property
    def rank(self) -> int:
        """Rank of the low-rank gates."""
        return self.gate_rank or self.head_dim

    @property
    def key_width(self) -> int:
        """H * K, channels of q and of k."""
        return self.num_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """HV * V, channels of v."""
        return self.value_heads * self.head_dim

    @property
    def num_decays(self) -> int:
        """Decays per token: HV * K, or HV with a head gate."""
        return self.value_heads * (self.head_dim if self.gate == "channel" else 1)

    def num_parameters(self, d_model: int) -> int:
        """Parameters of one layer (39,514,272 for Kimi Linear 48B)."""
        qkv = 2 * self.key_width + self.value_width
        decay = self.rank * (d_model + self.num_decays) if self.gate == "channel" else d_model * self.num_decays
        low_rank_gate, full_rank_gate = self.rank * (d_model + self.value_width), d_model * self.value_width
        gate = 0 if self.output_gate == "none" else full_rank_gate if self.full_rank_gate else low_rank_gate
        scalars = self.value_heads + self.num_decays + self.head_dim + self.value_width * self.output_gate_bias
        projections = d_model * (qkv + self.value_heads + self.value_width)
        return projections + qkv * self.conv_size + decay + gate + scalars

    def cache_bytes(self, element_bytes: int) -> tuple[int, int]:
        """Nothing per token; per sequence a float32 state and the convolution's last inputs."""
        state = self.value_heads * self.head_dim**2 * 4
        tail = (2 * self.key_width + self.value_width) * max(0, self.conv_size - 1) * element_bytes
        return 0, state + tail

    def mixing_flops(self, context: float) -> float:
        """The chunkwise operator and the convolutions: HV (6 K^2 + 3 C K + C^2), independent of the context.

        Source: Kimi Linear, eq. 13.
        """
        size, chunk = self.head_dim, self.chunk_size
        conv = 2 * self.conv_size * (2 * self.key_width + self.value_width)
        return self.value_heads * (6 * size**2 + 3 * chunk * size + chunk**2) + conv


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention."""

    num_heads: int
    """H."""
    kv_rank: int
    """Width of the latent that keys and values are expanded from."""
    nope_dim: int
    """Query-key channels per head that never carry position."""
    rope_dim: int
    """Query-key channels whose key is shared by all heads; rotated only if `use_rope`. May be 0."""
    value_dim: int
    """Value channels per head."""
    q_rank: int | None = None
    """Width of a latent for queries. None: queries are projected directly."""
    use_rope: bool = False
    """Rotate the `rope_dim` channels. Kimi Linear does not (NoPE); Kimi K2 does."""
    rope: RopeConfig = RopeConfig()
    """Rotation, read if `use_rope`."""
    kv_norm_eps: float = 1e-6
    """eps of the norms on the latents (the release builds them with the default, not the model's `norm_eps`)."""
    output_gate: bool = False
    """Sigmoid gate on the heads' outputs before the last projection."""

    def __post_init__(self) -> None:
        check_positive(
            num_heads=self.num_heads,
            kv_rank=self.kv_rank,
            nope_dim=self.nope_dim,
            value_dim=self.value_dim,
            kv_norm_eps=self.kv_norm_eps,
        )
        if self.rope_dim < 0 or self.rope_dim % 2:
            raise ValueError(f"rope_dim must be even and >= 0, got {self.rope_dim}")
        if self.use_rope and self.rope_dim == 0:
            raise ValueError("rope_dim must be > 0 with use_rope, got 0")
        if self.q_rank is not None:
            check_positive(q_rank=self.q_rank)

    @property
    def query_dim(self) -> int:
        """Query-key channels per head."""
        return self.nope_dim + self.rope_dim

    @property
    def cache_width(self) -> int:
        """Channels cached per token: latent and shared key."""
        return self.kv_rank + self.rope_dim

    @property
    def softmax_scale(self) -> float:
        """(nope_dim + rope_dim)^-0.5, times YaRN's factor if rotated.

        Source: Kimi K2, section 2.1 with the released `mscale_all_dim`.
        """
        return self.query_dim**-0.5 * (self.rope.softmax_factor if self.use_rope else 1.0)

    def num_parameters(self, d_model: int) -> int:
        """Parameters of one layer (29,114,880 for Kimi Linear 48B)."""
        queries = self.num_heads * self.query_dim
        query = d_model * queries if self.q_rank is None else self.q_rank * (d_model + queries + 1)
        key_value = d_model * self.cache_width + self.kv_rank * (1 + self.num_heads * (self.nope_dim + self.value_dim))
        outputs = self.num_heads * self.value_dim * d_model
        return query + key_value + outputs * (2 if self.output_gate else 1)

    def cache_bytes(self, element_bytes: int) -> tuple[int, int]:
        """The latent and the shared key, per token."""
        return self.cache_width * element_bytes, 0

    def mixing_flops(self, context: float) -> float:
        """Scores and weighted values of the expanded form."""
        return 2 * self.num_heads * (self.query_dim + self.value_dim) * context


@dataclass(frozen=True, slots=True, kw_only=True)
class GQAConfig:
    """Softmax attention with grouped (or as many, or one) key heads."""

    num_heads: int
    """H, query heads."""
    head_dim: int
    """Channels of a head."""
    num_kv_heads: int | None = None
    """Key and value heads, dividing H. None: H (multi-head attention)."""
    use_rope: bool = True
    """Rotate all channels of queries and keys."""
    rope: RopeConfig = RopeConfig()
    """Rotation, read if `use_rope`."""
    qkv_bias: bool = False
    """Add biases to queries, keys and values, as Qwen2 does."""
    qk_norm: bool = False
    """Normalize each head's query and key before rotation, as Qwen3 does."""
    qk_norm_eps: float = 1e-6
    """eps of those norms."""

    def __post_init__(self) -> None:
        check_positive(num_heads=self.num_heads, head_dim=self.head_dim, qk_norm_eps=self.qk_norm_eps)
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.use_rope and self.head_dim % 2:
            raise ValueError(f"head_dim must be even with use_rope, got {self.head_dim}")

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def softmax_scale(self) -> float:
        """head_dim^-0.5, times YaRN's factor if rotated."""
        return self.head_dim**-0.5 * (self.rope.softmax_factor if self.use_rope else 1.0)

    def num_parameters(self, d_model: int) -> int:
        """Parameters of one layer."""
        biases = self.head_dim * (self.num_heads + 2 * self.kv_heads) * self.qkv_bias
        norms = 2 * self.head_dim * self.qk_norm
        return 2 * d_model * self.head_dim * (self.num_heads + self.kv_heads) + biases + norms

    def cache_bytes(self, element_bytes: int) -> tuple[int, int]:
        """Keys and values, per token."""
        return 2 * self.kv_heads * self.head_dim * element_bytes, 0

    def mixing_flops(self, context: float) -> float:
        """Scores and weighted values."""
        return 4 * self.num_heads * self.head_dim * context


@dataclass(frozen=True, slots=True, kw_only=True)
class MoBAConfig:
    """Mixture of block attention: the heads of `GQAConfig`, each query reading its own block and some past ones."""

    num_heads: int
    """H, query heads."""
    head_dim: int
    """Channels of a head."""
    moba_chunk_size: int
    """B, tokens of a block; blocks are cut from the start of each sequence."""
    moba_topk: int
    """k, blocks that a query reads, its own included."""
    num_kv_heads: int | None = None
    """Key and value heads, dividing H. None: H (multi-head attention)."""
    use_rope: bool = True
    """Rotate all channels of queries and keys; blocks are chosen by rotated ones."""
    rope: RopeConfig = RopeConfig()
    """Rotation, read if `use_rope`."""
    moba_decode: AttentionMode = "full"
    """What a generated token reads: `full`, every earlier key, as in the paper's evaluations, or `moba`, what it reads
    in training, for which the cache keeps the means of blocks."""
    moba_key_conv: Literal[0, 3, 5] = 0
    """Taps of a convolution on keys, before their rotation: k' = k + silu(conv(k)); 0 leaves it out."""
    moba_gate_dtype: Literal["kv", "float32"] = "kv"
    """What means of blocks are rounded to before they are scored: the keys' dtype, or float32."""
    moba_policy: Policy = "mean"
    """Who chooses blocks, see `perilune.ops.moba_attention`; only `mean` goes with `moba_decode = "moba"`, and `random`
    draws anew in every chunk of a prefill."""

    def __post_init__(self) -> None:
        _ = self.full  # checks the heads
        check_positive(moba_chunk_size=self.moba_chunk_size, moba_topk=self.moba_topk)
        check_choice("moba_decode", self.moba_decode, get_args(AttentionMode))
        if self.moba_key_conv not in (0, 3, 5):
            raise ValueError(f"moba_key_conv must be 3 or 5, or 0 for no convolution, got {self.moba_key_conv}")
        check_choice("moba_gate_dtype", self.moba_gate_dtype, ("kv", "float32"))
        check_choice("moba_policy", self.moba_policy, get_args(Policy))
        if self.moba_decode == "moba" and self.moba_policy != "mean":
            raise ValueError(f"moba_policy must be 'mean' with moba_decode = 'moba', got {self.moba_policy!r}")

    @property
    def full(self) -> GQAConfig:
        """The same heads with full attention."""
        return GQAConfig(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_kv_heads=self.num_kv_heads,
            use_rope=self.use_rope,
            rope=self.rope,
        )

    @property
    def kv_width(self) -> int:
        """Hkv * D, channels of all keys."""
        return self.full.kv_heads * self.head_dim

    @property
    def float32_means(self) -> bool:
        """Whether means of blocks are kept as float32 at least, whatever the keys are."""
        return self.moba_gate_dtype == "float32"

    def mean_dtype(self, key_dtype: torch.dtype) -> torch.dtype:
        """What means of keys of `key_dtype` are rounded to."""
        return torch.promote_types(key_dtype, torch.float32) if self.float32_means else key_dtype

    def num_parameters(self, d_model: int) -> int:
        """Parameters of one layer: those of full attention and of the key convolution."""
        return self.full.num_parameters(d_model) + self.kv_width * self.moba_key_conv

    def cache_bytes(self, element_bytes: int) -> tuple[int, int]:
        """Keys, values and, to decode with, their share of a block's mean (rounded up); per sequence the raw keys.

        A block has a mean once it is complete, so that a sequence holds a little less than this, and exactly this at
        the end of a block.
        """
        per_token, _ = self.full.cache_bytes(element_bytes)
        if self.moba_decode == "moba":
            mean_bytes = max(4, element_bytes) if self.float32_means else element_bytes
            per_token += -(-self.kv_width * mean_bytes // self.moba_chunk_size)
        if not self.moba_key_conv:
            return per_token, 0
        # and an int64
        return per_token, self.kv_width * (self.moba_key_conv - 1 + KEY_CONV_REWIND) * element_bytes + 8

    def mixing_flops(self, context: float) -> float:
        """Scores and weighted values of what is read, the choice of blocks, and the key convolution.

        A query reads half of its own block on average and k - 1 others; it is compared with the mean of every past
        block, unless it reads them all.

        Source: MoBA, section 2.2.
        """
        own = (self.moba_chunk_size + 1) / 2
        read = min(context, (self.moba_topk - 1) * self.moba_chunk_size + own)
        scored = (context - own) / self.moba_chunk_size if read < context else 0.0
        products = {"mean": 1, "minmax": 2, "oracle": self.moba_chunk_size}.get(self.moba_policy, 0)
        gate = 2 * products * self.num_heads * self.head_dim * scored
        return self.full.mixing_flops(read) + gate + 2 * self.moba_key_conv * self.kv_width


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Mixture of experts with a sigmoid router and a balancing bias."""

    num_experts: int
    """E, routed experts."""
    top_k: int
    """Routed experts per token."""
    d_expert: int
    """Hidden width of one expert."""
    num_shared_experts: int = 1
    """Experts that every token visits, stored as one of that many times the width."""
    num_groups: int = 1
    """Groups the experts form; a token routes inside its best `topk_groups`."""
    topk_groups: int = 1
    """Groups a token may route to."""
    renormalize: bool = True
    """Divide the chosen scores by their sum."""
    routed_scale: float = 1.0
    """Factor on the combine weights; `perilune.ops.routed_scaling_factor` gives the one that keeps the output RMS."""
    weight_includes_bias: bool = False
    """Combine with the biased scores, as one released implementation seems to, instead of the unbiased ones."""

    def __post_init__(self) -> None:
        check_positive(num_experts=self.num_experts, d_expert=self.d_expert, routed_scale=self.routed_scale)
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be in [1, num_experts={self.num_experts}], got {self.top_k}")
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be >= 0, got {self.num_shared_experts}")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"num_groups must divide num_experts={self.num_experts}, got {self.num_groups}")
        if not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(f"topk_groups must be in [1, num_groups={self.num_groups}], got {self.topk_groups}")
        reachable = self.topk_groups * (self.num_experts // self.num_groups)
        if self.top_k > reachable:
            raise ValueError(f"top_k must be <= the {reachable} experts of {self.topk_groups} groups, got {self.top_k}")

    def num_parameters(self, d_model: int) -> int:
        """Parameters of one block without the balancing bias (1,819,607,040 for Kimi Linear 48B)."""
        return d_model * (self.num_experts + 3 * self.d_expert * (self.num_experts + self.num_shared_experts))

    def num_active_parameters(self, d_model: int) -> int:
        """Parameters that one token meets."""
        return d_model * (self.num_experts + 3 * self.d_expert * (self.top_k + self.num_shared_experts))
