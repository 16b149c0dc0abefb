"""KimiDeltaAttention against the equations of Kimi Linear, section 4, written out token by token in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perilune.nn import KDAConfig, KimiDeltaAttention, initialize
from perilune.ops.layout import SequenceLayout
from tests.nn.helpers import CONFIGS, D_MODEL, KDA, make_mixer, packed_input

VARIANTS = [name for name in CONFIGS if name.startswith("kda")]


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """y[t] = silu(sum_i w[i] x[t - W + 1 + i]) for one sequence `[T, D]`."""
    size = weight.shape[1]
    padded = torch.cat([x.new_zeros(size - 1, x.shape[1]), x])
    rows = [sum(padded[t + i] * weight[:, i] for i in range(size)) for t in range(x.shape[0])]
    return torch.stack([row / (1 + torch.exp(-row)) for row in rows])


def oracle(mixer: nn.Module, config: KDAConfig, x: Tensor) -> Tensor:
    """One sequence `[T, d]`, line by line from the equations."""
    p = dict(mixer.named_parameters())
    heads, groups, size = config.num_heads, config.value_heads // config.num_heads, config.head_dim
    q, k, v = (x @ p[f"{name}_proj.weight"].T for name in "qkv")
    if config.conv_size:
        filters = p["conv.weight"].split([q.shape[1], k.shape[1], v.shape[1]])
        q, k, v = (convolve(part, weight) for part, weight in zip((q, k, v), filters, strict=True))
    else:
        q, k, v = (part / (1 + torch.exp(-part)) for part in (q, k, v))
    beta = torch.sigmoid(x @ p["b_proj.weight"].T) * (2 if config.allow_neg_eigval else 1)
    to_decay = p["f_b_proj.weight"] @ p["f_a_proj.weight"] if config.gate == "channel" else p["f_proj.weight"]
    f = (x @ to_decay.T).view(x.shape[0], config.value_heads, -1) + p["dt_bias"]
    rate = p["A_log"].exp()[:, None]
    if config.gate_lower_bound is None:
        g = -rate * torch.log1p(torch.exp(f))
    else:
        g = config.gate_lower_bound * torch.sigmoid(rate * f)
    outputs = []
    for h in range(config.value_heads):
        state = x.new_zeros(size, size)
        part = slice(h // groups * size, (h // groups + 1) * size)
        for t in range(x.shape[0]):
            q_t = q[t, part] / torch.sqrt((q[t, part] ** 2).sum() + 1e-6)
            k_t = k[t, part] / torch.sqrt((k[t, part] ** 2).sum() + 1e-6)
            v_t = v[t, h * size : (h + 1) * size]
            state = torch.exp(g[t, h])[:, None] * state if config.gate == "channel" else torch.exp(g[t, h]) * state
            wrong = v_t - k_t @ state if config.delta_rule else v_t
            state = state + beta[t, h] * torch.outer(k_t, wrong)
            o = size**-0.5 * q_t @ state
            outputs.append(o / torch.sqrt((o**2).mean() + config.norm_eps) * p["o_norm.weight"])
    o = torch.stack(outputs).view(config.value_heads, x.shape[0], size).transpose(0, 1).flatten(1)
    if config.output_gate != "none":
        z = x @ p["g_a_proj.weight"].T @ p["g_b_proj.weight"].T
        o = o * torch.sigmoid(z) * (z if config.output_gate == "swish" else 1)
    assert heads * size == q.shape[1]
    return o @ p["o_proj.weight"].T


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_equals_equations_in_values_and_gradients(name):
    mixer = make_mixer(name)
    x, layout = packed_input((19,))
    x.requires_grad_()
    parameters = list(mixer.parameters())
    with torch.no_grad():
        mixer.o_norm.weight.copy_(torch.linspace(0.5, 1.5, mixer.config.head_dim))
    grads = [
        [y, *torch.autograd.grad(y.sin().sum(), [x, *parameters])]
        for y in (mixer(x, layout), oracle(mixer, mixer.config, x))
    ]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("kda", "kda-one-tap", "kda-rank")])
def test_every_switch_changes_the_result(name):
    """Weights that both layers share are equal, so a difference comes from the switch itself."""
    plain, switched = make_mixer("kda"), make_mixer(name)
    shared = {
        key: value
        for key, value in plain.state_dict().items()
        if key in switched.state_dict() and switched.state_dict()[key].shape == value.shape
    }
    switched.load_state_dict({**switched.state_dict(), **shared})
    x, layout = packed_input((12,))
    assert (plain(x, layout) - switched(x, layout)).norm() > 1e-2 * plain(x, layout).norm()


def gated_delta_net(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """S = alpha (I - beta k k^T) S + beta k v^T in the matrix form of the Gated DeltaNet paper, one head."""
    state, outputs = q.new_zeros(q.shape[1], v.shape[1]), []
    for t in range(q.shape[0]):
        forget = torch.eye(k.shape[1], dtype=k.dtype) - beta[t] * torch.outer(k[t], k[t])
        state = alpha[t] * forget @ state + beta[t] * torch.outer(k[t], v[t])
        outputs.append(q[t] @ state)
    return torch.stack(outputs)


def test_head_gate_with_delta_rule_is_gated_delta_net():
    config = replace(CONFIGS["kda-head-gate"], output_gate="none", conv_size=0)
    mixer = initialize(KimiDeltaAttention(config, D_MODEL), seed=1, init_range=0.4).double()
    x, layout = packed_input((33,))
    p = dict(mixer.named_parameters())
    q, k, v = (F.silu(x @ p[f"{n}_proj.weight"].T).view(33, 2, 6) for n in "qkv")
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    alpha = torch.exp(-p["A_log"].exp() * F.softplus(x @ p["f_proj.weight"].T + p["dt_bias"][:, 0]))
    beta = torch.sigmoid(x @ p["b_proj.weight"].T)
    o = torch.stack([gated_delta_net(q[:, h], k[:, h], v[:, h], alpha[:, h], beta[:, h]) for h in range(2)], 1)
    # the norm that follows forgets the factor K^-0.5 only up to its eps
    o = o * 6**-0.5
    o = o / (o.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    torch.testing.assert_close(mixer(x, layout), o.flatten(1) @ p["o_proj.weight"].T)


def test_chunk_size_is_a_matter_of_speed():
    x, layout = packed_input((70, 3))
    results = []
    for chunk_size in (16, 32, 64):
        config = KDAConfig(**{**KDA, "chunk_size": chunk_size})
        results.append(initialize(KimiDeltaAttention(config, D_MODEL), seed=0, init_range=0.4).double()(x, layout))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_initial_values_follow_the_release():
    config = KDAConfig(num_heads=32, head_dim=32)
    mixer = initialize(KimiDeltaAttention(config, 64), seed=0)
    rate, dt = mixer.A_log.detach().exp(), F.softplus(mixer.dt_bias.detach())
    assert 1 <= rate.min() < 3
    assert 14 < rate.max() <= 16
    assert 1e-3 * 0.999 <= dt.min() < 1.5e-3
    assert 0.07 < dt.max() <= 0.1001
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.15
    assert mixer.conv is not None
    assert mixer.conv.weight.abs().max() <= 0.5
    assert float(mixer.q_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(mixer.o_norm.weight, torch.ones(32))
    bounded = initialize(KimiDeltaAttention(replace(config, gate_lower_bound=-5.0), 64), seed=0)
    assert torch.equal(bounded.A_log, torch.zeros(32))


def test_decode_in_place_does_not_touch_a_clone():
    mixer = make_mixer("kda")
    x, layout = packed_input((3, 3))
    with torch.no_grad():
        cache = mixer.new_cache(2, "cpu", torch.float64)
        mixer(x, layout, cache)
        kept = cache.clone()
        before = kept["state"].clone()
        mixer(x[:2], SequenceLayout.from_lengths([1, 1]), cache)
    assert torch.equal(kept["state"], before)
    assert not torch.equal(cache["state"], before)
