"""KimiDeltaAttention against the equations of Kimi Linear, section 4, written out token by token in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perilune.nn import KDAConfig, KimiDeltaAttention, initialize
from perilune.nn import kda as kda_module
from perilune.ops.kda_decode import kda_decode
from perilune.ops.layout import SequenceLayout
from tests.nn.helpers import CONFIGS, D_MODEL, KDA, make_mixer, packed_input

VARIANTS = [name for name in CONFIGS if name.startswith("kda")]
PLAIN = ("kda", "kda-one-tap", "kda-rank", "kda-full-rank-gate", "kda-gate-bias")


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
        last = "g_proj" if config.full_rank_gate else "g_b_proj"
        z = (x if config.full_rank_gate else x @ p["g_a_proj.weight"].T) @ p[f"{last}.weight"].T
        z = z + p[f"{last}.bias"] if config.output_gate_bias else z
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


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in PLAIN])
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


STEP = SequenceLayout.from_lengths([1, 1])


@pytest.mark.parametrize("draft", [1, 4])
def test_decode_in_place_does_not_touch_a_clone(draft):
    mixer = make_mixer("kda")
    x, layout = packed_input((4, 4))
    with torch.no_grad():
        cache = mixer.new_cache(2, "cpu", torch.float64)
        mixer(x, layout, cache)
        kept = cache.clone()
        before = {name: kept[name].clone() for name in ("state", "conv")}
        mixer(*packed_input((draft, draft), seed=1), cache)
    for name, old in before.items():
        assert torch.equal(kept[name], old)
        assert not torch.equal(cache[name], old)


def test_decode_allocates_no_states():
    mixer = make_mixer("kda")
    x, layout = packed_input((4, 3))
    with torch.no_grad():
        cache = mixer.new_cache(2, "cpu", torch.float64)
        mixer(x, layout, cache)
        places = [cache[name].data_ptr() for name in ("state", "conv")]
        mixer(x[:2], STEP, cache)
    assert [cache[name].data_ptr() for name in ("state", "conv")] == places


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("length", "with_grad"), [(9, False), (1, False), (1, True)])
def test_the_entry_holds_the_memory_as_steps_take_it(name, length, with_grad):
    """Value channels first for the delta rule, key channels first without, whatever path wrote it."""
    mixer = make_mixer(name)
    x, layout = packed_input((1,))
    cache = mixer.new_cache(1, "cpu", torch.float64)
    with torch.set_grad_enabled(with_grad):
        # tokens of zeros write nothing, and the last one writes beta k v^T to an empty memory
        mixer(torch.cat([x.new_zeros(length - 1, D_MODEL), x]), SequenceLayout.from_lengths([length]), cache)
    with torch.no_grad():
        qkv, _, beta, _ = mixer._project(x)
        qkv = F.silu(qkv) if mixer.conv is None else mixer.conv(qkv, layout)[0]
        _, k, v = mixer._heads(qkv)
    k = k.repeat_interleave(v.shape[1] // k.shape[1], dim=1)
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    write = torch.sigmoid(beta)[..., None, None] * k[..., :, None] * v[..., None, :]
    write = write * 2 if mixer.config.allow_neg_eigval else write
    torch.testing.assert_close(cache["state"], write.mT if mixer.config.delta_rule else write)
    assert cache["state"].is_contiguous()


def spied(monkeypatch):
    """Count the tokens of every call of `kda_decode` by the layer."""
    calls = []

    def spy(qkv, *args, **kwargs):
        calls.append(qkv.shape[1])
        return kda_decode(qkv, *args, **kwargs)

    monkeypatch.setattr(kda_module, "kda_decode", spy)
    return calls


@pytest.mark.parametrize("name", VARIANTS)
def test_what_the_fused_step_serves(monkeypatch, name):
    calls = spied(monkeypatch)
    mixer = make_mixer(name)
    cache = mixer.new_cache(2, "cpu", torch.float64)
    x, _ = packed_input((1, 1))
    mixer(x, STEP, cache)
    assert calls == []
    with torch.no_grad():
        mixer(x, STEP, cache)
        mixer(x, STEP)
        mixer(x, SequenceLayout.from_lengths([2, 0]), cache)
    ablations = ("no-conv", "one-tap", "head-gate", "additive", "mamba2", "swish", "bounded-head")
    assert calls == ([] if name.removeprefix("kda-") in ablations else [1])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("draft", [2, 8])
def test_a_draft_is_taken_as_its_tokens_one_by_one(monkeypatch, name, draft):
    calls = spied(monkeypatch)
    mixer = make_mixer(name)
    x, layout = packed_input((5, 5))
    new, draft_layout = packed_input((draft, draft), seed=1)
    with torch.no_grad():
        cache = mixer.new_cache(2, "cpu", torch.float64)
        mixer(x, layout, cache)
        calls.clear()
        one_by_one = cache.clone()
        whole = mixer(new, draft_layout, cache)
        assert calls in ([], [draft])
        rows = new.view(2, draft, -1).unbind(1)
        expected = torch.stack([mixer(row, STEP, one_by_one) for row in rows], 1).flatten(0, 1)
        torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(cache["state"], one_by_one["state"], rtol=1e-10, atol=1e-11)
        calls.clear()
        more, long_layout = packed_input((9, 9))
        mixer(more, long_layout, cache)
        mixer(more[:5], SequenceLayout.from_lengths([2, 3]), cache)
    assert calls == []


def test_steps_with_and_without_gradients_may_alternate():
    mixer = make_mixer("kda")
    x, layout = packed_input((12, 12))
    expected = mixer(x, layout).view(2, 12, -1)
    cache = mixer.new_cache(2, "cpu", torch.float64)
    for token in range(12):
        with torch.set_grad_enabled(token % 3 == 0):
            found = mixer(x.view(2, 12, -1)[:, token], STEP, cache)
        torch.testing.assert_close(found.detach(), expected[:, token].detach())


def test_decoding_under_autocast_is_close():
    mixer = make_mixer("kda", torch.float32)
    x, layout = packed_input((12, 12), dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = mixer(x, layout).view(2, 12, -1)
        cache = mixer.new_cache(2, "cpu", torch.float32)
        found = torch.stack([mixer(token, STEP, cache) for token in x.view(2, 12, -1).unbind(1)], 1)
    assert found.dtype == expected.dtype
    assert cache["state"].dtype == torch.float32
    # both round their inputs to bfloat16, one of them what happens inside as well
    assert (found.float() - expected.float()).norm() <= 0.02 * expected.float().norm()
