"""Muon: its equations, logical matrices, low-precision weights, state, plain torch models and bad input."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perilune.nn.roles import MatrixLayout
from perilune.ops.newton_schulz import newton_schulz
from perilune.optim import Muon, MuonClip, parameter_groups
from perilune.optim.orthogonalize import Orthogonalizer, rms_scale


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(gaussian(*shape, seed=seed, dtype=dtype))


def reference_direction(update: Tensor) -> Tensor:
    return 0.2 * math.sqrt(max(update.shape)) * newton_schulz(update, backend="reference")


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_update_rule(nesterov: bool, weight_decay: float) -> None:
    weights = [parameter(6, 10, seed=i, dtype=torch.float64) for i in range(2)] + [
        parameter(10, 6, seed=2, dtype=torch.float64)
    ]
    expected = [w.detach().clone() for w in weights]
    momenta = [torch.zeros_like(w) for w in expected]
    optimizer = Muon(weights, 0.03, nesterov=nesterov, weight_decay=weight_decay, momentum=0.9)
    for step in range(4):
        for i, weight in enumerate(weights):
            weight.grad = gaussian(*weight.shape, seed=100 * step + i, dtype=torch.float64)
            momenta[i] = 0.9 * momenta[i] + weight.grad
            update = weight.grad + 0.9 * momenta[i] if nesterov else momenta[i]
            expected[i] = (1 - 0.03 * weight_decay) * expected[i] - 0.03 * reference_direction(update)
        optimizer.step()
        for i, weight in enumerate(weights):
            torch.testing.assert_close(weight.detach(), expected[i], rtol=0, atol=1e-12)
            torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], momenta[i], rtol=0, atol=1e-12)


def test_against_torch_muon_and_taking_over_its_state() -> None:
    ours = [parameter(48, 80), parameter(80, 32, seed=1)]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
    optimizer = Muon(ours, **options)
    reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(6):
        if step == 3:
            optimizer = Muon(ours, 0.5)
            optimizer.load_state_dict(reference.state_dict(), momentum_form="ema")
            assert optimizer.param_groups[0]["lr"] == 0.02
        before = [w.detach().clone() for w in ours]
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            with torch.no_grad():
                b.copy_(a)
            a.grad = gaussian(*a.shape, seed=10 * step + i)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            average = reference.state[b]["momentum_buffer"]
            torch.testing.assert_close(optimizer.state[a]["momentum_buffer"] * 0.05, average, rtol=1e-5, atol=1e-6)
            mine, other = ((p.detach() - 0.998 * old).flatten() for p in (a, b))
            # torch iterates in bfloat16, so only the direction and the length can agree.
            assert torch.cosine_similarity(mine, other, dim=0) > 0.999
            assert mine.norm() / other.norm() == pytest.approx(1, abs=0.01)


def test_update_rms_is_that_of_adamw() -> None:
    weight = parameter(192, 768)
    weight.grad = gaussian(192, 768, seed=1)
    before = weight.detach().clone()
    Muon([weight], 1.0, weight_decay=0.0).step()
    assert 0.15 <= (weight - before).square().mean().sqrt() <= 0.21


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_steps_do_not_depend_on_the_scale_of_the_gradient(scale: float) -> None:
    results = []
    for factor in (1.0, scale):
        weight = parameter(12, 20)
        optimizer = Muon([weight], 0.1)
        for step in range(3):
            weight.grad = factor * gaussian(12, 20, seed=step)
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-6)


def test_transposed_weights_take_transposed_steps() -> None:
    weight = parameter(12, 20)
    transposed = nn.Parameter(weight.detach().T.contiguous())
    optimizer = Muon([weight, transposed], 0.1)
    for step in range(3):
        weight.grad = gaussian(12, 20, seed=step)
        transposed.grad = weight.grad.T.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), transposed.detach().T, rtol=0, atol=2e-6)


def test_zero_gradient_only_decays_and_no_gradient_changes_nothing() -> None:
    decayed, untouched = parameter(4, 6), parameter(4, 6, seed=1)
    before = decayed.detach().clone(), untouched.detach().clone()
    optimizer = Muon([decayed, untouched], 0.1, weight_decay=0.5)
    decayed.grad = torch.zeros_like(decayed)
    optimizer.step()
    torch.testing.assert_close(decayed.detach(), before[0] * 0.95, rtol=1e-6, atol=0)
    assert torch.equal(untouched, before[1])
    assert untouched not in optimizer.state


def test_why_logical_matrices_are_separated() -> None:
    q, k = gaussian(96, 48), gaussian(96, 48, seed=1) / 20
    together = 0.2 * math.sqrt(192) * newton_schulz(torch.cat([q, k]))[96:]
    alone = 0.2 * math.sqrt(96) * newton_schulz(k)
    assert 0.15 < alone.square().mean().sqrt() < 0.21
    assert together.square().mean().sqrt() < 0.025
    experts = gaussian(4, 96, 40)
    stacked = newton_schulz(experts).reshape(384, 40)
    flattened = newton_schulz(experts.reshape(384, 40))
    assert flattened.norm() / stacked.norm() == pytest.approx(0.52, abs=0.03)
    assert torch.cosine_similarity(flattened.flatten(), stacked.flatten(), dim=0) == pytest.approx(0.92, abs=0.02)


H, NOPE, ROPE, RANK = 3, 8, 4, 20
QUERY = MatrixLayout(row_groups=(NOPE, ROPE), num_periods=H)


def split_by_hand(gradient: Tensor, split: str) -> Tensor:
    """What each `mla_split` must do to a query projection `[H (nope + rope), rank]`."""
    heads = gradient.reshape(H, NOPE + ROPE, RANK)
    if split == "none":
        return reference_direction(gradient)
    if split == "head":
        return torch.stack([reference_direction(head) for head in heads]).reshape(gradient.shape)
    nope = reference_direction(heads[:, :NOPE].reshape(-1, RANK)).reshape(H, NOPE, RANK)
    rope = reference_direction(heads[:, NOPE:].reshape(-1, RANK)).reshape(H, ROPE, RANK)
    return torch.cat([nope, rope], 1).reshape(gradient.shape)


@pytest.mark.parametrize("split", ["component", "head", "none"])
def test_splits_of_latent_attention(split: str) -> None:
    weight = parameter(H * (NOPE + ROPE), RANK, dtype=torch.float64)
    before = weight.detach().clone()
    gradient = gaussian(*weight.shape, seed=1, dtype=torch.float64)
    weight.grad = gradient
    Muon([{"params": [weight], "layouts": [QUERY]}], 0.1, mla_split=split, weight_decay=0.0, momentum=0.5).step()
    # The first Nesterov update is (1 + mu) G, whose factor Newton-Schulz removes but for eps.
    expected = before - 0.1 * split_by_hand(1.5 * gradient, split)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)


def test_scale_factors_of_the_split_shapes() -> None:
    assert rms_scale(12288, 1536) == pytest.approx(22.2, abs=0.05)
    assert rms_scale(192, 1536) == pytest.approx(7.84, abs=0.005)


def test_stacks_and_fused_projections_are_separate_matrices() -> None:
    gate_up = MatrixLayout(row_groups=(6, 6), is_fused=True)
    experts, fused = parameter(4, 12, 10), parameter(12, 10, seed=1)
    plain = parameter(3, 9, 14, seed=2)
    befores = [p.detach().clone() for p in (experts, fused, plain)]
    for i, p in enumerate((experts, fused, plain)):
        p.grad = gaussian(*p.shape, seed=5 + i)
    gradients = [p.grad * 1.95 for p in (experts, fused, plain)]
    groups = [{"params": [experts, fused, plain], "layouts": [gate_up, gate_up, None]}]
    # A fused layout is split even where latent attention is not.
    Muon(groups, 1.0, weight_decay=0.0, mla_split="none").step()
    for e in range(4):
        for rows in (slice(0, 6), slice(6, 12)):
            step = befores[0][e, rows] - experts[e, rows].detach()
            torch.testing.assert_close(step, reference_direction(gradients[0][e, rows]), rtol=0, atol=1e-5)
    for rows in (slice(0, 6), slice(6, 12)):
        step = befores[1][rows] - fused[rows].detach()
        torch.testing.assert_close(step, reference_direction(gradients[1][rows]), rtol=0, atol=1e-5)
    for e in range(3):
        step = befores[2][e] - plain[e].detach()
        torch.testing.assert_close(step, reference_direction(gradients[2][e]), rtol=0, atol=1e-5)


shapes = st.tuples(st.integers(0, 3), st.integers(2, 9), st.integers(2, 9))


@settings(max_examples=30, deadline=None)
@given(
    plain=st.lists(shapes, min_size=1, max_size=5), max_batch=st.sampled_from([None, 1, 2]), periods=st.integers(1, 3)
)
def test_batching_by_shape_changes_nothing(
    plain: list[tuple[int, int, int]], max_batch: int | None, periods: int
) -> None:
    updates = [gaussian(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(plain)]
    layouts: list[MatrixLayout | None] = [None] * len(plain)
    updates.append(gaussian(5 * periods, 6, seed=99, dtype=torch.float64))
    layouts.append(MatrixLayout(row_groups=(2, 3), num_periods=periods))
    kept = [u.clone() for u in updates]
    results = Orthogonalizer(max_batch=max_batch)(updates, layouts)
    assert all(torch.equal(a, b) for a, b in zip(updates, kept, strict=True))
    for update, result in zip(updates[:-1], results[:-1], strict=True):
        assert result.shape == update.shape
        for matrix, solved in zip(update, result, strict=True):
            torch.testing.assert_close(solved, reference_direction(matrix), rtol=0, atol=1e-11)
    parts = [reference_direction(p) for p in layouts[-1].split(updates[-1], "component")]
    torch.testing.assert_close(results[-1], layouts[-1].merge(parts, "component"), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_low_precision_weights_follow_a_float32_master(dtype: torch.dtype, kind: str) -> None:
    low, full = parameter(16, 24, dtype=dtype), nn.Parameter(gaussian(16, 24).to(dtype).float())
    optimizers = [Muon([p], 1e-4, kind=kind, weight_decay=0.0) for p in (low, full)]
    for step in range(20):
        low.grad = gaussian(16, 24, seed=step % 2).to(dtype)
        full.grad = low.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    master = optimizers[0].state[low]["master"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, full.detach(), rtol=0, atol=1e-7)
    assert torch.equal(low, master.to(dtype))
    moments = [value for key, value in optimizers[0].state[low].items() if key != "step"]
    assert {value.dtype for value in moments} == {torch.float32}
    assert "master" not in optimizers[1].state[full]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4))
    for index, p in enumerate(model.parameters()):
        p.data = gaussian(*p.shape, seed=index)
    return model.to(dtype)


def take_steps(model: nn.Module, optimizer: Muon, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(model.parameters()):
            p.grad = gaussian(*p.shape, seed=97 * step + i).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resuming_from_a_state_dict_is_bit_exact(dtype: torch.dtype) -> None:
    straight = small_model(dtype)
    optimizer = Muon(parameter_groups(straight, lr=0.02), 0.02)
    take_steps(straight, optimizer, range(3))
    saved_weights = copy.deepcopy(straight.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    take_steps(straight, optimizer, range(3, 7))

    resumed = small_model(dtype)
    resumed.load_state_dict(saved_weights)
    again = Muon(parameter_groups(resumed, lr=0.5, weight_decay=0.3), 0.5)
    again.load_state_dict(saved)
    first, second = again.state_dict(), saved
    assert json.loads(json.dumps(first["param_groups"])) == json.loads(json.dumps(second["param_groups"]))
    for index, state in second["state"].items():
        for key, value in state.items():
            assert first["state"][index][key].dtype == value.dtype
            assert torch.equal(first["state"][index][key], value)
    take_steps(resumed, again, range(3, 7))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for state, other in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(state[key], other[key]) for key in state)


def test_loading_copies_and_survives_a_trip_through_json() -> None:
    model = small_model()
    optimizer = Muon(parameter_groups(model, lr=0.02))
    take_steps(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"] = json.loads(json.dumps(saved["param_groups"]))
    kept = copy.deepcopy(saved["state"])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.95)
    take_steps(model, optimizer, range(2, 4))
    for index, state in kept.items():
        assert all(torch.equal(saved["state"][index][key], value) for key, value in state.items())


def test_reset_state_forgets_moments_but_keeps_masters_and_rates() -> None:
    model = small_model(torch.bfloat16)
    optimizer = Muon(parameter_groups(model, lr=0.02))
    take_steps(model, optimizer, range(3))
    masters = {p: optimizer.state[p]["master"].clone() for p in model.parameters()}
    optimizer.param_groups[0]["lr"] = 0.007
    optimizer.reset_state()
    assert [sorted(state) for state in optimizer.state.values()] == [["master"]] * len(masters)
    assert all(torch.equal(optimizer.state[p]["master"], master) for p, master in masters.items())
    assert optimizer.param_groups[0]["lr"] == 0.007
    fresh = small_model(torch.bfloat16)
    other = Muon(parameter_groups(fresh, lr=0.02))
    other.param_groups[0]["lr"] = 0.007
    for p, (_, master) in zip(fresh.parameters(), masters.items(), strict=True):
        other.master(p).copy_(master)
    take_steps(model, optimizer, range(5, 6))
    take_steps(fresh, other, range(5, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 3])
def test_a_non_finite_gradient_skips_the_step_everywhere(bad: float, where: int) -> None:
    model = small_model()
    optimizer = Muon(parameter_groups(model, lr=0.02))
    take_steps(model, optimizer, range(2))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for i, p in enumerate(model.parameters()):
        p.grad = gaussian(*p.shape, seed=i)
    list(model.parameters())[where].grad.view(-1)[1] = bad
    optimizer.step()
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    for index, state in before[1].items():
        assert all(torch.equal(after[1][index][key], value) for key, value in state.items())


def test_a_huge_but_finite_gradient_is_used() -> None:
    weight = parameter(4, 6)
    before = weight.detach().clone()
    weight.grad = gaussian(4, 6, seed=1) * 1e30
    optimizer = Muon([weight], 0.1, weight_decay=0.0)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    expected = before - 0.1 * reference_direction(gaussian(4, 6, seed=1))
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-5)


def test_a_plain_torch_transformer_learns() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.ModuleDict({"embedding": nn.Embedding(17, 32), "body": body, "lm_head": nn.Linear(32, 17)})
    tokens = torch.randint(0, 17, (8, 12), generator=torch.Generator().manual_seed(1))
    optimizer = Muon(parameter_groups(model, lr=5e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.02 * step))
    losses = []
    for _ in range(25):
        logits = model["lm_head"](model["body"](model["embedding"](tokens)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 / 1.5)


def test_torch_hooks_and_closures_run_once() -> None:
    Muon([parameter(3, 4)])
    weight = parameter(3, 4)
    optimizer = MuonClip([weight])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> float:
        calls.append("closure")
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return 42.0

    assert optimizer.step(closure) == 42.0
    assert calls == ["pre", "closure", "post"]


def test_bfloat16_iteration_is_selectable() -> None:
    results = []
    for dtype in (None, torch.float32, torch.bfloat16):
        weight = parameter(24, 32)
        weight.grad = gaussian(24, 32, seed=1)
        Muon([weight], 0.1, ns_dtype=dtype).step()
        results.append(weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": -1.0}, "lr must be in"),
        ({"lr": math.nan}, "lr must be in"),
        ({"weight_decay": -0.1}, "weight_decay must be in"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"adamw_eps": -1e-8}, "adamw_eps must be in"),
        ({"kind": "sgd"}, "kind must be one of"),
        ({"mla_split": "row"}, "mla_split must be one of"),
        ({"ns_steps": 0}, "steps must be at least 1"),
        ({"ns_coefficients": "none"}, "unknown coefficients"),
        ({"ns_eps": 0.0}, "eps must be positive"),
        ({"ns_max_batch": 0}, "max_batch must be at least 1"),
        ({"update_rms": 0.0}, "update_rms must be positive"),
    ],
)
def test_bad_options_are_named(option: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([parameter(3, 4)], **option)


@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4, 5), (1, 6), (6, 1), (0, 4), (3, 1, 4)])
def test_muon_refuses_what_is_not_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"head\.bias has shape .*adamw"):
        Muon([("head.bias", nn.Parameter(torch.zeros(shape)))])


def test_other_bad_parameters_are_named() -> None:
    weight = parameter(6, 4)
    with pytest.raises(ValueError, match="parameter 0 has 6 rows but its layout describes 5"):
        Muon([{"params": [weight], "layouts": [MatrixLayout(row_groups=(5,))]}])
    with pytest.raises(ValueError, match="one entry per parameter, 1, got 2"):
        Muon([{"params": [weight], "layouts": [None, None]}])
    with pytest.raises(TypeError, match=r"must be floating point, got torch\.complex64"):
        Muon([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])
    optimizer = Muon([weight])
    with pytest.raises(ValueError, match="Muon takes"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradients must be dense"):
        Muon(table.parameters(), kind="adamw").step()


def test_states_that_do_not_fit_are_refused() -> None:
    weight = parameter(6, 4)
    weight.grad = torch.ones_like(weight)
    optimizer = Muon([weight])
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, this optimizer of \[2\]"):
        Muon([parameter(6, 4), parameter(6, 4)]).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 has shape \(6, 4\), the parameter \(4, 6\)"):
        Muon([parameter(4, 6)]).load_state_dict(saved)
    with pytest.raises(ValueError, match="saved as kind 'muon' but is 'adamw'"):
        Muon([parameter(6, 4)], kind="adamw").load_state_dict(saved)
    foreign = torch.optim.AdamW([parameter(6, 4)])
    foreign.param_groups[0]["params"][0].grad = torch.ones(6, 4)
    foreign.step()
    with pytest.raises(ValueError, match="has exp_avg, but its group is of kind 'muon'"):
        Muon([parameter(6, 4)]).load_state_dict(foreign.state_dict())
    named = Muon([("left", weight)])
    with pytest.raises(ValueError, match="has 'left' where this optimizer has 'right'"):
        Muon([("right", parameter(6, 4))]).load_state_dict(named.state_dict())
    with pytest.raises(ValueError, match="momentum_form must be"):
        optimizer.load_state_dict(saved, momentum_form="average")
