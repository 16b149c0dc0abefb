"""Small layers in float64 and packed inputs for the tests of this folder."""

import torch
from torch import Tensor, nn

from perilune.nn import MIXERS, GQAConfig, KDAConfig, MLAConfig, MoBAConfig, RopeConfig, initialize
from perilune.ops.layout import SequenceLayout

D_MODEL = 12
KDA = {"num_heads": 2, "head_dim": 6, "chunk_size": 16}
MLA = {"num_heads": 3, "kv_rank": 8, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}
GQA = {"num_heads": 4, "head_dim": 6}
MOBA = {**GQA, "moba_chunk_size": 4, "moba_topk": 2, "moba_decode": "moba"}
YARN = RopeConfig(theta=100.0, factor=4.0, original_max_positions=32, beta_fast=4.0, mscale_all_dim=1.0)

CONFIGS = {
    "kda": KDAConfig(**KDA),
    "kda-grouped-values": KDAConfig(**KDA, num_value_heads=4),
    "kda-no-conv": KDAConfig(**KDA, conv_size=0),
    "kda-one-tap": KDAConfig(**KDA, conv_size=1),
    "kda-head-gate": KDAConfig(**KDA, gate="head"),
    "kda-additive": KDAConfig(**KDA, delta_rule=False),
    "kda-mamba2": KDAConfig(**KDA, delta_rule=False, gate="head", num_value_heads=4),
    "kda-swish": KDAConfig(**KDA, output_gate="swish"),
    "kda-no-output-gate": KDAConfig(**KDA, output_gate="none"),
    "kda-bounded": KDAConfig(**KDA, gate_lower_bound=-5.0),
    "kda-bounded-head": KDAConfig(**KDA, gate_lower_bound=-2.0, gate="head"),
    "kda-negative": KDAConfig(**KDA, allow_neg_eigval=True),
    "kda-rank": KDAConfig(**KDA, gate_rank=3),
    "kda-full-rank-gate": KDAConfig(**KDA, full_rank_gate=True),
    "kda-gate-bias": KDAConfig(**KDA, output_gate_bias=True),
    "mla": MLAConfig(**MLA),
    "mla-rope": MLAConfig(**MLA, use_rope=True),
    "mla-yarn": MLAConfig(**MLA, use_rope=True, rope=YARN),
    "mla-low-rank-query": MLAConfig(**MLA, q_rank=7),
    "mla-no-shared-key": MLAConfig(**{**MLA, "rope_dim": 0}),
    "mla-output-gate": MLAConfig(**MLA, output_gate=True),
    "gqa": GQAConfig(**GQA, num_kv_heads=2),
    "gqa-mha": GQAConfig(**GQA),
    "gqa-mqa-nope": GQAConfig(**GQA, num_kv_heads=1, use_rope=False),
    "gqa-bias": GQAConfig(**GQA, num_kv_heads=2, qkv_bias=True),
    "gqa-qk-norm": GQAConfig(**GQA, num_kv_heads=2, qk_norm=True),
    "moba": MoBAConfig(**MOBA, num_kv_heads=2),
    "moba-mha": MoBAConfig(**{**MOBA, "moba_topk": 3}),
    "moba-block-alone": MoBAConfig(**{**MOBA, "moba_topk": 1}, num_kv_heads=1, use_rope=False),
    "moba-key-conv": MoBAConfig(**MOBA, num_kv_heads=2, moba_key_conv=3),
    "moba-wide-key-conv": MoBAConfig(**MOBA, moba_key_conv=5, use_rope=False),
    "moba-float32-gate": MoBAConfig(**MOBA, moba_gate_dtype="float32"),
    # sequences of these tests are too short to be told from full attention, which is what it generates with
    "moba-decode-full": MoBAConfig(**{**MOBA, "moba_chunk_size": 16, "moba_decode": "full"}, num_kv_heads=2),
}
"""One configuration per switch; the name starts with the mixer's kind."""


def kind_of(name: str) -> str:
    return name.split("-")[0]


def make_mixer(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A mixer with weights large enough that every term of it matters."""
    mixer = MIXERS[kind_of(name)](CONFIGS[name], D_MODEL)
    return initialize(mixer, seed=seed, init_range=0.4).to(dtype)


def packed_input(
    lengths: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, SequenceLayout]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), D_MODEL, generator=generator, dtype=torch.float64).to(dtype)
    return x, SequenceLayout.from_lengths(lengths)


def split_packed(x: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    return list(x.split(list(lengths)))


def run_pieces(
    mixer: nn.Module, sequences: list[Tensor], pieces: list[tuple[int, ...]], *told: Tensor
) -> tuple[list[Tensor], object]:
    """Feed `pieces[i][n]` tokens of sequence n in forward i, through one cache; returns outputs per sequence.

    What is `told` goes to every forward.
    """
    cache = mixer.new_cache(len(sequences), "cpu", sequences[0].dtype)
    done = [0] * len(sequences)
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    for lengths in pieces:
        parts = [s[start : start + n] for s, start, n in zip(sequences, done, lengths, strict=True)]
        y = mixer(torch.cat(parts), SequenceLayout.from_lengths(lengths), cache, *told)
        for n, part in enumerate(y.split(list(lengths))):
            outputs[n].append(part)
            done[n] += lengths[n]
    return [torch.cat(parts) for parts in outputs], cache
