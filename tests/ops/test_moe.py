"""Routing and experts against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perilune.errors import BackendError
from perilune.ops import Routing, balance_bias_update, moe_experts, route, routed_scaling_factor
from perilune.seeding import make_generator
from tests.helpers import assert_close

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed, "moe", *shape), dtype=torch.float64).to(dtype)


def make_experts(num_experts: int, d: int = 5, width: int = 3, dtype: torch.dtype = torch.float64):
    return randn(num_experts, 2 * width, d, dtype=dtype), randn(num_experts, d, width, dtype=dtype)


ROUTERS = [
    {"top_k": 1},
    {"top_k": 2, "scale": 2.446},
    {"top_k": 3, "renormalize": False},
    {"top_k": 2, "weight_includes_bias": True},
    {"top_k": 2, "num_groups": 4, "topk_groups": 2},
    {"top_k": 1, "num_groups": 8, "topk_groups": 1},
    {"top_k": 8},
]


@pytest.mark.parametrize("options", ROUTERS)
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_route_equals_reference_with_gradients(options, num_tokens):
    logits, bias = randn(num_tokens, 8).requires_grad_(), 0.3 * randn(8)
    expected = route(logits, bias, **options, backend="reference")
    got = route(logits, bias, **options)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.load, expected.load)
    assert int(got.load.sum()) == num_tokens * options["top_k"]
    assert_close("weights", expected.weights, got.weights, 1e-14)
    if num_tokens:
        direction = randn(*got.weights.shape, seed=1)
        reference, gradient = (torch.autograd.grad((r.weights * direction).sum(), logits)[0] for r in (expected, got))
        assert_close("dlogits", reference, gradient, 1e-13)


def test_bias_chooses_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
    routing = route(logits, bias, top_k=2, scale=3.0)
    assert routing.indices.tolist() == [[2, 0]]
    scores = torch.sigmoid(logits[0, [2, 0]])
    torch.testing.assert_close(routing.weights[0], 3 * scores / scores.sum())
    included = route(logits, bias, top_k=2, renormalize=False, weight_includes_bias=True)
    torch.testing.assert_close(included.weights[0], scores + torch.tensor([1.0, 0.0]))
    assert not included.weights.requires_grad


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_ties_go_to_the_lowest_index(backend):
    routing = route(torch.zeros(3, 64), torch.zeros(64), top_k=4, num_groups=8, topk_groups=3, backend=backend)
    assert routing.indices.tolist() == [[0, 1, 2, 3]] * 3


def test_groups_are_ranked_by_their_best_two():
    # group 0 has the single best expert, group 1 the better pair
    logits = torch.tensor([[4.0, -4.0, 2.0, 2.0]])
    routing = route(logits, torch.zeros(4), top_k=2, num_groups=2, topk_groups=1)
    assert routing.indices.tolist() == [[2, 3]]


def test_router_is_float32_for_bfloat16_logits():
    routing = route(randn(4, 8, dtype=torch.bfloat16), torch.zeros(8), top_k=2)
    assert routing.weights.dtype == torch.float32


def test_non_finite_logits_are_refused_on_request_and_never_hidden():
    logits = torch.zeros(2, 4)
    logits[1, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 8 logits are NaN"):
        route(logits, torch.zeros(4), top_k=2, check_finite=True)
    assert route(logits, torch.zeros(4), top_k=2).weights[1].isnan().any()


def run_with_gradients(backend: str, x: Tensor, routing: Routing, experts: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    x, weights, w_gate_up, w_down = (
        tensor.detach().clone().requires_grad_() for tensor in (x, routing.weights, *experts)
    )
    leaf_routing = Routing(indices=routing.indices, weights=weights, load=routing.load)
    y = moe_experts(x, leaf_routing, w_gate_up, w_down, backend=backend)
    gradients = torch.autograd.grad(y, (x, weights, w_gate_up, w_down), randn(*y.shape, seed=2).to(y.dtype))
    return {"y": y.detach(), **dict(zip(("dx", "dweights", "dgate_up", "ddown"), gradients, strict=True))}


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(0, 3, 2), (1, 3, 2), (40, 5, 1), (33, 8, 3), (4, 4, 4)]
)
def test_experts_equal_reference_with_gradients(num_tokens, num_experts, top_k):
    x, experts = randn(num_tokens, 5), make_experts(num_experts)
    routing = route(randn(num_tokens, num_experts, seed=3), torch.zeros(num_experts), top_k=top_k)
    expected = run_with_gradients("reference", x, routing, experts)
    got = run_with_gradients("torch", x, routing, experts)
    for name, reference in expected.items():
        assert_close(name, reference, got[name], 1e-13)


# three chained products of rounded operands
@pytest.mark.parametrize(
    ("dtype", "ratio", "backend"),
    [(torch.float32, 1e-6, "torch"), (torch.bfloat16, 2e-2, "torch"), (torch.bfloat16, 2e-2, "grouped")],
)
def test_lower_precision_stays_near_float64(dtype, ratio, backend):
    x, experts = randn(50, 16, dtype=dtype), make_experts(4, 16, 8, dtype)
    routing = route(randn(50, 4, seed=3, dtype=torch.float32), torch.zeros(4), top_k=2)
    exact = Routing(indices=routing.indices, weights=routing.weights.double(), load=routing.load)
    expected = run_with_gradients("reference", x.double(), exact, tuple(w.double() for w in experts))
    got = run_with_gradients(backend, x, routing, experts)
    assert got["y"].dtype == dtype
    assert got["dweights"].dtype == torch.float32
    for name, reference in expected.items():
        assert_close(name, reference, got[name].double(), ratio)


def test_grouped_products_take_idle_experts_and_no_tokens():
    experts = make_experts(4, 16, 8, torch.bfloat16)
    for num_tokens in (0, 3):
        x = randn(num_tokens, 16, dtype=torch.bfloat16)
        logits = torch.tensor([[5.0, 4.0, -5.0, -6.0]]).expand(num_tokens, 4)
        routing = route(logits, torch.zeros(4), top_k=2)
        got = run_with_gradients("grouped", x, routing, experts)
        assert_close("y", run_with_gradients("reference", x, routing, experts)["y"], got["y"], 2e-2)
        assert not got["dgate_up"][2:].any()


def test_grouped_products_say_what_they_do_not_take():
    routing = route(torch.zeros(2, 3), torch.zeros(3), top_k=1)
    x = randn(2, 16, dtype=torch.float32)
    with pytest.raises(BackendError, match=r"'grouped' takes bfloat16, got torch\.float32; use 'torch'"):
        moe_experts(x, routing, *make_experts(3, 16, 8, torch.float32), backend="grouped")
    with pytest.raises(BackendError, match="needs widths that 8 divides, got d=16 and f=3"):
        moe_experts(x.bfloat16(), routing, *make_experts(3, 16, 3, torch.bfloat16), backend="grouped")


def test_gradcheck_through_router_and_experts():
    logits, x, experts = randn(6, 4, seed=3), randn(6, 3), make_experts(4, 3, 2)
    leaves = [tensor.requires_grad_() for tensor in (logits, x, *experts)]

    def layer(logits, x, w_gate_up, w_down):
        return moe_experts(x, route(logits, torch.zeros(4), top_k=2, scale=1.5), w_gate_up, w_down)

    assert torch.autograd.gradcheck(layer, leaves)


def test_idle_experts_get_zero_gradients():
    logits = torch.tensor([[5.0, 4.0, -5.0, -6.0]]).expand(7, 4)
    routing = route(logits, torch.zeros(4), top_k=2)
    assert routing.load.tolist() == [7, 7, 0, 0]
    got = run_with_gradients("torch", randn(7, 5, dtype=torch.float32), routing, make_experts(4, dtype=torch.float32))
    for name in ("dgate_up", "ddown"):
        assert (got[name][2:] == 0).all()
        assert (got[name][:2] != 0).any()


def test_extreme_activations_stay_finite():
    routing = route(randn(9, 4, dtype=torch.float32), torch.zeros(4), top_k=2)
    got = run_with_gradients(
        "torch", 1e4 * randn(9, 5, dtype=torch.float32), routing, make_experts(4, dtype=torch.float32)
    )
    assert all(value.isfinite().all() for value in got.values())


def test_autocast_computes_in_its_dtype_and_returns_float32_gradients():
    x, (w_gate_up, w_down) = randn(9, 5, dtype=torch.float32), make_experts(4, dtype=torch.float32)
    w_gate_up.requires_grad_()
    routing = route(randn(9, 4, dtype=torch.float32), torch.zeros(4), top_k=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_experts(x, routing, w_gate_up, w_down)
    assert torch.equal(y, moe_experts(x.bfloat16(), routing, w_gate_up.bfloat16(), w_down.bfloat16()))
    assert torch.autograd.grad(y.sum(), w_gate_up)[0].dtype == torch.float32


@PROPERTY
@given(num_tokens=st.integers(1, 30), top_k=st.integers(1, 4), seed=st.integers(0, 9))
def test_permuting_tokens_commutes_with_the_layer(num_tokens, top_k, seed):
    logits, x, experts = randn(num_tokens, 6, seed=seed), randn(num_tokens, 5, seed=seed), make_experts(6)
    order = torch.randperm(num_tokens, generator=make_generator(seed, "order"))
    y = moe_experts(x, route(logits, torch.zeros(6), top_k=top_k), *experts)
    permuted = moe_experts(x[order], route(logits[order], torch.zeros(6), top_k=top_k), *experts)
    torch.testing.assert_close(permuted, y[order], rtol=1e-12, atol=1e-12)


@PROPERTY
@given(load=st.lists(st.integers(0, 100), min_size=1, max_size=12), rate=st.floats(0, 0.1))
def test_balance_update_lifts_starved_experts_and_keeps_the_mean(load, rate):
    bias = randn(len(load), dtype=torch.float32)
    counts = torch.tensor(load)
    step = balance_bias_update(bias, counts, rate) - bias
    assert abs(float(step.sum())) < 1e-5
    mean = sum(load) / len(load)
    starved, crowded = step[counts < mean], step[counts > mean]
    if len(starved) and len(crowded) and rate > 1e-3:
        assert starved.min() > crowded.max()
    assert float(step.abs().max()) <= 2 * rate + 1e-6


def test_balance_update_by_hand():
    bias = torch.zeros(4)
    new = balance_bias_update(bias, torch.tensor([4, 1, 1, 2]), 0.5)
    # mean 2, signs [-1, 1, 1, 0] with mean 1/4
    assert new.tolist() == [-0.625, 0.375, 0.375, -0.125]
    assert bias.tolist() == [0.0] * 4


def test_balance_update_evens_out_a_biased_router():
    logits, bias = randn(512, 8, dtype=torch.float32) + torch.linspace(-1, 1, 8), torch.zeros(8)
    before = route(logits, bias, top_k=2).load
    for _ in range(300):
        bias = balance_bias_update(bias, route(logits, bias, top_k=2).load, 3e-3)
    after = route(logits, bias, top_k=2).load
    assert before.max() > 1.5 * before.float().mean()
    assert after.max() < 1.15 * after.float().mean()


@pytest.mark.parametrize(
    ("num_experts", "top_k", "factor"), [(64, 6, 2.4463), (384, 8, 2.8277), (256, 8, 2.8273), (1, 1, 1.0)]
)
def test_scaling_factor_of_the_papers(num_experts, top_k, factor):
    assert routed_scaling_factor(num_experts, top_k) == pytest.approx(factor, abs=1e-3)


def test_scaling_factor_equals_plain_simulation():
    scores = torch.sigmoid(randn(40_000, 12)).topk(3).values
    plain = (scores.sum(1) / scores.square().sum(1).sqrt()).mean().item()
    assert routed_scaling_factor(12, 3) == pytest.approx(plain, abs=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 2, 2)}, r"logits must be floating \[T, E\]"),
        ({"bias": torch.zeros(3)}, r"bias must be \[4\]"),
        ({"top_k": 5}, r"top_k must be in \[1, 4\]"),
        ({"top_k": 3, "num_groups": 2}, r"top_k must be in \[1, 2\]"),
        ({"num_groups": 3}, "num_groups must divide the 4 experts"),
        ({"topk_groups": 2}, r"topk_groups must be in \[1, 1\]"),
        ({"backend": "c"}, "backend must be"),
    ],
)
def test_bad_routing_arguments_are_named(change, message):
    arguments = {"logits": torch.zeros(2, 4), "bias": torch.zeros(4), "top_k": 2} | change
    with pytest.raises(ValueError, match=message):
        route(arguments.pop("logits"), arguments.pop("bias"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, "routing is of 2 tokens but x has 3"),
        ({"x": torch.zeros(2, 6)}, "with d=6"),
        ({"w_down": torch.zeros(3, 5, 3), "w_gate_up": torch.zeros(3, 6, 5)}, "routing is to 4 experts"),
        ({"w_down": torch.zeros(4, 5, 3).double()}, "share one floating dtype"),
        ({"w_down": torch.zeros(5, 3)}, r"w_down \[E, d, f\]"),
        ({"backend": "c"}, "backend must be"),
    ],
)
def test_bad_expert_arguments_are_named(change, message):
    routing = route(torch.zeros(2, 4), torch.zeros(4), top_k=2)
    arguments = {
        "x": torch.zeros(2, 5),
        "routing": routing,
        "w_gate_up": torch.zeros(4, 6, 5),
        "w_down": torch.zeros(4, 5, 3),
    } | change
    with pytest.raises(ValueError, match=message):
        moe_experts(**arguments)


def test_bad_helper_arguments_are_named():
    with pytest.raises(ValueError, match=r"top_k must be in \[1, 4\], got 5"):
        routed_scaling_factor(4, 5)
    with pytest.raises(ValueError, match="rate must be >= 0"):
        balance_bias_update(torch.zeros(2), torch.zeros(2), -1.0)
    with pytest.raises(ValueError, match=r"both must be \[E\]"):
        balance_bias_update(torch.zeros(2), torch.zeros(3), 1.0)
