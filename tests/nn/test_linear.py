"""Layers that compute with packed weights against the same layers that do not."""

import copy
import io

import pytest
import torch
from torch import nn

from perilune.nn import MLP, Linear, find_packings, initialize
from perilune.nn.linear import Packing, project_jointly
from perilune.ops.packing import can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="packed products need Linux and GCC")


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    """Pack weights of any size, which keeps the tests small."""
    monkeypatch.setattr("perilune.nn.linear.LEAST_WEIGHT", 1)


def turned_on(layer):
    for packing in find_packings(layer):
        packing.is_on = True
    return layer


def make(kind, dtype=torch.float32):
    layer = MLP(24, 40) if kind == "mlp" else Linear(24, 17, bias=kind == "biased")
    return turned_on(initialize(layer, seed=0, init_range=0.3).to(dtype))


def plain(layer, x):
    other = copy.deepcopy(layer)
    with torch.no_grad():
        return other(x)


def inputs(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kind", ["linear", "biased", "mlp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("shape", [(0,), (1,), (4,), (33,), (2, 5)])
def test_packed_equals_plain(kind, dtype, tolerance, shape):
    if not can_pack(dtype):
        pytest.skip("no packed weights of this dtype")
    layer, x = make(kind, dtype), inputs(*shape, 24, dtype=dtype)
    wanted = plain(layer, x)
    with torch.inference_mode():
        y = layer(x)
    assert y.shape == wanted.shape
    assert y.dtype == dtype
    assert (y - wanted).norm() <= tolerance * wanted.norm()
    is_packed = x[..., 0].numel() > (dtype == torch.float32)
    assert all(p.is_empty != is_packed for p in find_packings(layer))


@pytest.mark.parametrize("kind", ["linear", "biased", "mlp"])
def test_autocast_packs_in_its_dtype(kind):
    layer, x = make(kind), inputs(6, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = plain(layer, x)
        with torch.inference_mode():
            found = [layer(x), layer(x.bfloat16())]
    for y in found:
        assert y.dtype == torch.bfloat16
        assert (y - wanted).norm() <= 0.01 * wanted.norm()
    assert any(not packing.is_empty for packing in find_packings(layer)) == can_pack(torch.bfloat16)


def test_gradients_stay_plain():
    layer, x = make("mlp"), inputs(6, 24)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert all(p.is_empty for p in find_packings(layer))


def change_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def change_in_place(weight):
    with torch.no_grad():
        weight.add_(1)


def change_storage(weight):
    weight.data = weight.data + 1


@pytest.mark.parametrize("change", [change_step, change_in_place, change_storage])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_changed_weight_is_packed_anew(kind, change):
    layer, x = make(kind), inputs(6, 24)
    with torch.no_grad():
        before = layer(x)
    for weight in layer.parameters():
        change(weight)
    with torch.no_grad():
        after = layer(x)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, plain(layer, x), rtol=1e-5, atol=1e-5)


def test_what_is_not_counted_needs_clear():
    layer, x = make("linear"), inputs(6, 24)
    with torch.no_grad():
        before = layer(x)
        layer.weight.data.zero_()
        assert layer(x).equal(before)
        layer.packing.clear()
        assert not layer(x).any()


def test_copies_and_state_carry_no_packed_weight():
    layer, x = make("mlp"), inputs(6, 24)
    with torch.no_grad():
        layer(x)
    assert list(layer.state_dict()) == ["gate_up_proj.weight", "down_proj.weight"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert [(p.is_empty, p.is_on) for p in find_packings(other)] == [(True, False)] * 2
        torch.testing.assert_close(other(x), layer(x))


def test_a_linear_layer_is_torchs_to_others():
    layer = Linear(3, 5)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is not None
    assert list(layer.state_dict()) == list(nn.Linear(3, 5).state_dict())


def test_small_weights_and_other_dtypes_stay_plain(monkeypatch):
    with torch.no_grad():
        packing = Packing()
        packing.is_on = True
        assert packing.find(inputs(6, 24).double(), inputs(8, 24).double()) is None
        assert packing.find(inputs(6, 24), inputs(8, 24).bfloat16()) is None
        assert packing.find(inputs(6, 24), inputs(8, 24)) is not None
        monkeypatch.setattr("perilune.nn.linear.LEAST_WEIGHT", 8 * 24 + 1)
        assert packing.find(inputs(6, 24), inputs(8, 24)) is None


def test_where_nothing_can_be_packed_all_is_plain(monkeypatch):
    monkeypatch.setattr("perilune.nn.linear.can_pack", lambda dtype: False)
    layer, x = make("mlp"), inputs(6, 24)
    with torch.no_grad():
        assert layer(x).equal(plain(layer, x))
    assert all(packing.is_empty for packing in find_packings(layer))


def test_too_many_rows_and_single_ones_stay_plain(monkeypatch):
    monkeypatch.setattr("perilune.nn.linear.PACKED_ROWS", {torch.float32: range(2, 6)})
    for rows in (5, 6, 1):
        layer, x = make("mlp"), inputs(rows, 24)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-5, atol=1e-5)
        assert all(packing.is_empty == (rows != 5) for packing in find_packings(layer))


@pytest.mark.parametrize("bias", [False, True])
def test_joint_projections_equal_single_ones(bias):
    projections = [turned_on(initialize(Linear(24, size, bias=bias), seed=size, init_range=0.3)) for size in (8, 3, 5)]
    packing, x = Packing(), inputs(6, 24)
    packing.is_on = True
    with torch.no_grad():
        found = project_jointly(x, projections, packing)
        assert packing.is_empty == bias
        for part, projection in zip(found, projections, strict=True):
            torch.testing.assert_close(part, plain(projection, x), rtol=1e-5, atol=1e-5)
        projections[1].weight.zero_()
        assert bias or not project_jointly(x, projections, packing)[1].any()
