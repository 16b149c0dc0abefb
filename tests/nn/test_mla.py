"""Multi-head latent attention against its equations, and its two forms against each other."""

import pytest
import torch
from torch import Tensor, nn

from perilune.nn import MLAConfig, MultiHeadLatentAttention, RopeConfig, initialize
from perilune.nn.rope import inverse_frequencies
from perilune.ops.layout import SequenceLayout
from tests.nn.helpers import CONFIGS, D_MODEL, MLA, make_mixer, packed_input

VARIANTS = [name for name in CONFIGS if name.startswith("mla")]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def turn(x: Tensor, position: int, config: MLAConfig) -> Tensor:
    """Rotate one vector by complex multiplication."""
    if not config.use_rope:
        return x
    rope = config.rope
    angle = position * torch.tensor(inverse_frequencies(config.rope_dim, rope), dtype=x.dtype)
    size = rope.temperature(rope.mscale) / rope.temperature(rope.mscale_all_dim)
    pairs = torch.view_as_complex(x.view(-1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.full_like(angle, size), angle)).flatten()


def oracle(mixer: nn.Module, config: MLAConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `[T, d]` of one sequence and the largest logit of each head."""
    p = dict(mixer.named_parameters())
    length, heads = x.shape[0], config.num_heads
    if config.q_rank is None:
        q = x @ p["q_proj.weight"].T
    else:
        q = rms(x @ p["q_a_proj.weight"].T, p["q_a_layernorm.weight"], config.kv_norm_eps) @ p["q_b_proj.weight"].T
    down = x @ p["kv_a_proj_with_mqa.weight"].T
    latent = rms(down[:, : config.kv_rank], p["kv_a_layernorm.weight"], config.kv_norm_eps)
    expanded = (latent @ p["kv_b_proj.weight"].T).view(length, heads, config.nope_dim + config.value_dim)
    scale = (config.nope_dim + config.rope_dim) ** -0.5
    if config.use_rope:
        scale *= config.rope.temperature(config.rope.mscale_all_dim) ** 2
    rows, largest = [], torch.full((heads,), -torch.inf, dtype=x.dtype)
    for t in range(length):
        for h in range(heads):
            q_h = q[t].view(heads, -1)[h]
            q_h = torch.cat([q_h[: config.nope_dim], turn(q_h[config.nope_dim :], t, config)])
            logits = torch.stack(
                [
                    scale
                    * q_h
                    @ torch.cat([expanded[s, h, : config.nope_dim], turn(down[s, config.kv_rank :], s, config)])
                    for s in range(t + 1)
                ]
            )
            largest[h] = torch.maximum(largest[h], logits.max().detach())
            rows.append(torch.softmax(logits, 0) @ expanded[: t + 1, h, config.nope_dim :])
    o = torch.stack(rows).view(length, -1)
    if config.output_gate:
        o = o * torch.sigmoid(x @ p["g_proj.weight"].T)
    return o @ p["o_proj.weight"].T, largest


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_equals_equations_in_values_and_gradients(name):
    mixer = make_mixer(name)
    x, layout = packed_input((9,))
    x.requires_grad_()
    y_expected, largest = oracle(mixer, mixer.config, x)
    y = mixer(x, layout)
    torch.testing.assert_close(y, y_expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(mixer.max_logits.double(), largest, rtol=1e-6, atol=1e-6)
    inputs = [x, *mixer.parameters()]
    for found, expected in zip(*(torch.autograd.grad(out.sin().sum(), inputs) for out in (y, y_expected)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_absorbed_equals_expanded(name):
    mixer = make_mixer(name)
    lengths = (7, 1, 12)
    x, layout = packed_input(lengths)
    with torch.no_grad():
        expanded = mixer(x, layout)
        cache = mixer.new_cache(3, "cpu", torch.float64)
        last = layout.last_indices
        before = torch.ones(x.shape[0], dtype=torch.bool).index_fill_(0, last, False)
        mixer(x[before], SequenceLayout.from_lengths([n - 1 for n in lengths]), cache)
        absorbed = mixer(x[last], SequenceLayout.from_lengths([1, 1, 1]), cache)
    torch.testing.assert_close(absorbed, expanded[last], rtol=1e-12, atol=1e-12)


def test_nope_sees_no_order_of_earlier_tokens_but_rope_does():
    x, layout = packed_input((6,))
    shuffled = torch.cat([x[[3, 1, 4, 0, 2]], x[5:]])
    plain, rotary = make_mixer("mla"), make_mixer("mla-rope")
    torch.testing.assert_close(plain(shuffled, layout)[-1], plain(x, layout)[-1])
    assert not torch.allclose(rotary(shuffled, layout)[-1], rotary(x, layout)[-1])


def test_scale_counts_the_unrotated_channels():
    config = MLAConfig(num_heads=32, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert config.softmax_scale == pytest.approx(192**-0.5)


def test_latent_norm_has_its_own_eps():
    x, layout = packed_input((4,))
    results = []
    for eps in (1e-6, 1.0):
        mixer = initialize(MultiHeadLatentAttention(MLAConfig(**MLA, kv_norm_eps=eps), D_MODEL), seed=0).double()
        results.append(mixer(x, layout))
    assert not torch.allclose(*results, rtol=0.05)


def test_kimi_k2_rotation_is_a_step():
    rope = RopeConfig(theta=50000.0, factor=32.0, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    plain, extended = (inverse_frequencies(64, config) for config in (RopeConfig(theta=50000.0), rope))
    ratios = [p / e for p, e in zip(plain, extended, strict=True)]
    assert ratios == pytest.approx([1.0] * 20 + [32.0] * 12)
    assert rope.softmax_factor == pytest.approx(1.8133, abs=1e-4)
    assert rope.temperature(rope.mscale) / rope.temperature(rope.mscale_all_dim) == 1
