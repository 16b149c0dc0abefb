"""CIGCN against the equations, written out with dense matrices one node and one behavior at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perilune.errors import DataError
from perilune.recsys import InteractionData
from perilune.recsys.cigf import CIGF
from perilune.recsys.config import CIGFConfig
from tests.recsys.cases import model_of, small_data


def _mean_matrices(data: InteractionData, norm: str = "left") -> list[np.ndarray]:
    found = []
    for pairs in data.behaviors.values():
        a = np.zeros((data.num_users + data.num_items,) * 2)
        a[pairs.users, data.num_users + pairs.items] = 1
        a += a.T
        degrees = a.sum(1)
        inverse = np.divide(1, degrees, out=np.zeros_like(degrees), where=degrees > 0)
        left, right = {
            "left": (inverse, 1),
            "right": (1, inverse),
            "sym": (inverse**0.5, inverse**0.5),
            "none": (1, 1),
        }[norm]
        found.append(np.diag(left * np.ones(len(a))) @ a @ np.diag(right * np.ones(len(a))))
    return found


def _weights(model: CIGF, node: int, behavior: int, hop: int) -> np.ndarray:
    """alpha of one node by eq. 5, LeakyReLU spelled out."""
    layer = model.attn[str(behavior)][str(hop)]  # pyright: ignore[reportIndexIssue]
    x = model.embeddings()[node].detach().numpy()
    z = layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()
    return np.maximum(model.config.leaky_slope * z, z).reshape(model.config.heads, -1).sum(0)


def _official(model: CIGF, data: InteractionData) -> np.ndarray:
    """Sections 5.1's recursion with its residual, hop by hop."""
    graphs, x = _mean_matrices(data, model.config.norm), model.embeddings().detach().numpy()
    nodes, behaviors, layers = len(x), len(graphs), model.config.layers
    result = np.zeros((nodes, behaviors, x.shape[1]))
    for k in range(behaviors):
        e, z, total = graphs[k] @ x, x, x.copy()
        for hop in range(1, layers + 1):
            if hop > 1:
                steps = [graph @ e for graph in graphs]
                alpha = [_weights(model, v, k, hop - 1) for v in range(nodes)]
                e = np.stack([sum(alpha[v][j] * steps[j][v] for j in range(behaviors)) for v in range(nodes)])
            z = e + z
            total = total + z
        result[:, k] = total
    return result


@pytest.mark.parametrize("norm", ["left", "right", "sym", "none"])
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 1), (3, 2), (4, 1)])
def test_official_form(norm: str, layers: int, heads: int) -> None:
    data = small_data()
    model = model_of(data, layers=layers, heads=heads, norm=norm)
    np.testing.assert_allclose(model.tables().detach().numpy(), _official(model, data), rtol=1e-5, atol=1e-6)


def test_paper_form() -> None:
    data = small_data()
    model = model_of(data, layers=3, order="paper")
    graphs, x = _mean_matrices(data), model.embeddings().detach().numpy()
    nodes, behaviors = len(x), len(graphs)
    for k in range(behaviors):
        # C^l = sum_j diag(alpha^l_kj) A_j; E^l = A_k C^2 ... C^l X.
        mixed = {
            hop + 1: sum(
                np.diag([_weights(model, v, k, hop)[j] for v in range(nodes)]) @ graphs[j] for j in range(behaviors)
            )
            for hop in (1, 2)
        }
        hops = [graphs[k] @ x, graphs[k] @ mixed[2] @ x, graphs[k] @ mixed[2] @ mixed[3] @ x]
        expected = 4 * x + 3 * hops[0] + 2 * hops[1] + hops[2]
        np.testing.assert_allclose(model.tables()[:, k].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_the_paper_form_in_as_many_hops_as_layers_is_that_of_hop_by_hop(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import perilune.recsys.cigf as module

    data, steps = small_data(), []
    found = []
    for is_short in (True, False):
        model = model_of(data, layers=layers, order="paper", heads=2)
        x = model.embeddings()
        mixed = module.propagate_mixed
        with monkeypatch.context() as patch:
            patch.setattr(module, "propagate_mixed", lambda *parts, mixed=mixed: steps.append(1) or mixed(*parts))
            tables = model.tables() if is_short else model._total(x, model._paper_hops(x, model.graph))
        assert len(steps) == (layers - 1 if is_short else layers * (layers - 1) // 2)
        steps.clear()
        tables.sin().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"tables": tables.detach(), **gradients})
    assert len(found[0]) == 1 + 2 + 2 * 3 * (layers - 1)
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=1e-10, atol=1e-12)


def test_orders_agree_with_one_hop_and_differ_with_two() -> None:
    data = small_data()
    for layers, same in ((1, True), (2, False)):
        first, second = (model_of(data, layers=layers, order=order).tables() for order in ("official", "paper"))
        assert torch.allclose(first, second) == same


def test_without_cross_behavior_each_has_its_own_lightgcn() -> None:
    data = small_data()
    model = model_of(data, layers=3, cross_behavior=False)
    assert not list(model.attn.parameters())
    x = model.embeddings().detach().numpy()
    for k, graph in enumerate(_mean_matrices(data)):
        expected = x + graph @ x + graph @ graph @ x + graph @ graph @ graph @ x
        np.testing.assert_allclose(model.tables()[:, k].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["uniform", "global", "softmax"])
def test_attention_variants(attention: str) -> None:
    model = model_of(small_data(), layers=2, attention=attention)
    alpha = model.attention(model.embeddings(), 1)
    assert alpha.shape == (16, 3, 3)
    if attention == "uniform":
        assert torch.allclose(alpha, torch.full_like(alpha, 1 / 3))
        assert not list(model.attn.parameters())
    if attention == "global":
        assert (alpha.std(0) < 1e-12).all()
        assert (alpha.std((1, 2)) > 1e-3).all()
        assert not any(p.requires_grad for p in model.attn.parameters() if p.ndim == 2)
    if attention == "softmax":
        assert torch.allclose(alpha.sum(-1), torch.ones(16, 3, dtype=torch.float64))
        assert alpha.std(0).min() > 1e-3


@pytest.mark.parametrize("encoder", ["lrgccf", "gcn", "ngcf"])
def test_encoders_change_what_is_added_and_not_what_is_passed_on(encoder: str) -> None:
    data = small_data()
    model = model_of(data, layers=2, encoder=encoder)
    raw = model._official_hops(model.embeddings(), model.graph)
    x = model.embeddings()

    def leaky(z: torch.Tensor) -> torch.Tensor:
        return torch.maximum(0.1 * z, z)

    total = 3 * x[:, None]
    for hop, sums in enumerate(raw):
        added = leaky(sums)
        if encoder != "lrgccf":
            w = model.encoder.W_gc[hop]
            added = leaky(sums @ w.weight.T + w.bias)  # pyright: ignore
        if encoder == "ngcf":
            w = model.encoder.W_bi[hop]
            added = added + leaky((x[:, None] * added) @ w.weight.T + w.bias)  # pyright: ignore
        total = total + (2 - hop) * added
    torch.testing.assert_close(model.tables(), total)


def test_gradients_reach_everything_that_is_trained() -> None:
    data = small_data()
    model = model_of(data, layers=3, encoder="ngcf")
    tables = model.tables()
    x, y = tables[:3], tables[data.num_users : data.num_users + 3]
    sum(model.logits(x, y, task).sin().sum() for task in range(3)).backward()  # pyright: ignore
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_user_with_nothing_keeps_its_embedding() -> None:
    data = small_data(density=0.0)
    model = model_of(data, layers=2)
    torch.testing.assert_close(model.tables(), 3 * model.embeddings()[:, None].expand(-1, 3, -1))


def test_one_behavior() -> None:
    data = small_data(behaviors=("buy",))
    model = model_of(data, layers=2)
    np.testing.assert_allclose(model.tables().detach().numpy(), _official(model, data), rtol=1e-5, atol=1e-6)
    tables = model.tables()
    dots = (tables[:1] * tables[8:9]).sum(-1)
    torch.testing.assert_close(model.logits(tables[:1], tables[8:9], 0), 300 * dots[:, 0])


def test_dropped_and_hidden_edges() -> None:
    data = small_data()
    names = list(data.behaviors)
    model = CIGF(CIGFConfig(graph_behaviors=("buy",)), data)
    sizes = [len(model.graph.neighbors_of(j)) for j in range(3)]
    assert sizes == [0, 0, 2 * len(data.target)]
    bought = set(zip(data.target.users.tolist(), data.target.items.tolist(), strict=True))
    hidden = CIGF(CIGFConfig(hide_target_pairs=True), data)
    for j, name in enumerate(names):
        pairs = set(zip(data.behaviors[name].users.tolist(), data.behaviors[name].items.tolist(), strict=True))
        left = pairs if name == "buy" else pairs - bought
        assert len(hidden.graph.neighbors_of(j)) == 2 * len(left)
    with pytest.raises(DataError, match="no behavior 'pv' in the data; there are: view, cart, buy"):
        CIGF(CIGFConfig(graph_behaviors=("pv",)), data)


def test_collapse_tells_constants_from_weights_that_vary() -> None:
    data = small_data()
    varied = model_of(data, layers=2).collapse()
    constant = model_of(data, layers=2, attention="global").collapse()
    assert varied["alpha_std_2"] > 1e-2 > 1e-9 > constant["alpha_std_2"]
    assert varied["gate_std"] > 1e-3
    assert sum(varied[f"gate_{name}"] for name in data.behaviors) == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim must be >= 1, got 0"),
        ({"norm": "mean"}, "norm must be one of left"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite and > 0"),
        ({"cross_behavior": False, "order": "paper"}, "cross_behavior must be true"),
        ({"leaky_slope": 2.0}, r"leaky_slope must be in \[0, 1\]"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIGFConfig(**settings)  # pyright: ignore[reportArgumentType]
