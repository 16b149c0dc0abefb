"""Mixture-of-experts layer."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from perilune.nn import MoE, MoEConfig, initialize

CONFIG = MoEConfig(num_experts=6, top_k=2, d_expert=5, num_shared_experts=2, routed_scale=1.7)


def make_moe(config: MoEConfig = CONFIG, dtype: torch.dtype = torch.float64) -> MoE:
    layer = initialize(MoE(config, 8), seed=0, init_range=0.5)
    assert isinstance(layer, MoE)
    layer.router_bias.copy_(torch.linspace(-0.2, 0.2, config.num_experts))
    return layer.to(dtype)


def make_input(count: int = 11) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def oracle(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    config, rows = layer.config, []
    for x_t in x:
        scores = torch.sigmoid(layer.router.weight @ x_t)
        choice = scores + layer.router_bias
        chosen = choice.argsort(descending=True)[: config.top_k]
        weights = (choice if config.weight_includes_bias else scores)[chosen]
        weights = config.routed_scale * (weights / weights.sum() if config.renormalize else weights)
        y = torch.zeros_like(x_t)
        for e, w in zip(chosen.tolist(), weights, strict=True):
            gate, up = layer.w_gate_up[e].split(config.d_expert)
            y = y + w * layer.w_down[e] @ (F.silu(gate @ x_t) * (up @ x_t))
        if layer.shared is not None:
            gate, up = layer.shared.gate_up_proj.weight.chunk(2)
            y = y + layer.shared.down_proj.weight @ (F.silu(gate @ x_t) * (up @ x_t))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, num_shared_experts=0),
        replace(CONFIG, renormalize=False),
        replace(CONFIG, weight_includes_bias=True),
    ],
)
def test_layer_equals_equations_in_values_and_gradients(config):
    layer, x = make_moe(config), make_input().requires_grad_()
    inputs = [x, *layer.parameters()]
    results = [[y, *torch.autograd.grad(y.sin().sum(), inputs)] for y in (layer(x), oracle(layer, x))]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_groups_limit_the_choice():
    layer = make_moe(replace(CONFIG, num_groups=3, topk_groups=1))
    layer(make_input(200))
    pairs = layer.expert_load.view(3, 2)
    assert torch.equal(pairs[:, 0], pairs[:, 1])


def test_loads_are_counted_in_training_only():
    layer, x = make_moe(), make_input()
    with torch.no_grad():
        layer(x)
    layer.eval()
    layer(x)
    assert layer.expert_load.sum() == 0
    layer.train()
    layer(x)
    layer(x)
    assert layer.expert_load.sum() == 2 * x.shape[0] * CONFIG.top_k


def test_balancing_evens_out_the_loads():
    """A router that prefers one expert is brought to order by the bias alone; weights do not move."""
    layer, x = make_moe(), make_input(400)
    with torch.no_grad():
        layer.router_bias.zero_()
        layer.router_bias[0] = 0.8
    spreads = []
    for _ in range(150):
        layer(x)
        load = layer.expert_load / layer.expert_load.sum()
        spreads.append(float(load.max() / load.mean()))
        layer.update_router_bias(0.02)
        assert layer.expert_load.sum() == 0
    assert spreads[0] > 2.5
    assert spreads[-1] < 1.2


def test_zero_rate_and_no_tokens_leave_the_bias():
    layer = make_moe()
    before = layer.router_bias.clone()
    layer.update_router_bias(0.1)
    layer(make_input())
    layer.update_router_bias(0.0)
    assert torch.equal(layer.router_bias, before)
    assert layer.expert_load.sum() == 0


def test_bias_step_follows_the_formula():
    layer = make_moe()
    before = layer.router_bias.clone()
    layer.expert_load.copy_(torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0, 5.0]))
    layer.update_router_bias(0.1)
    sign = torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    torch.testing.assert_close(layer.router_bias, before + 0.1 * (sign - sign.mean()))


def test_router_stays_float32_in_half_precision():
    layer = make_moe(dtype=torch.float32)
    x = make_input(64).float()
    exact = layer._route(x).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer._route(x).indices, exact)
        assert torch.isfinite(layer(x)).all()
    bias = layer.router_bias.clone()
    layer.bfloat16()
    assert torch.equal(layer.router_bias, bias)
    assert layer._route(x.bfloat16()).weights.dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_no_tokens():
    assert make_moe()(make_input(0)).shape == (0, 8)


def test_bias_is_saved_and_load_is_not():
    assert set(make_moe().state_dict()) == {
        "router.weight",
        "w_gate_up",
        "w_down",
        "router_bias",
        "shared.gate_up_proj.weight",
        "shared.down_proj.weight",
    }
