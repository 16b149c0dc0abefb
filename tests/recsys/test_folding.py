"""A node represented by its neighbors alone: what the tables have for one of the graph whose embedding is 0."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from perilune.errors import DataError
from perilune.ops.multigraph import Norm
from perilune.recsys import InteractionData
from perilune.recsys.config import CIGFConfig, DecoderName, FactorConfig, MBGCNConfig, RecommenderConfig
from perilune.recsys.models import build_recommender
from perilune.recsys.recommender import Recommender, Side
from tests.recsys.cases import scrambled, small_data

NORMS = get_args(Norm)
CONFIGS: list[RecommenderConfig] = [
    *(CIGFConfig(dim=4, layers=layers) for layers in (1, 2, 4)),
    *(CIGFConfig(dim=4, layers=3, order="paper", norm=norm) for norm in NORMS),
    *(CIGFConfig(dim=4, layers=3, norm=norm) for norm in NORMS),
    CIGFConfig(dim=4, layers=3, heads=2),
    CIGFConfig(dim=4, layers=3, cross_behavior=False),
    CIGFConfig(dim=4, layers=3, attention="uniform"),
    CIGFConfig(dim=4, graph_behaviors=("cart", "buy")),
    CIGFConfig(dim=4, hide_target_pairs=True),
    FactorConfig(dim=4),
    FactorConfig(dim=4, layers=1, norm="left", graph_behaviors=("view", "buy")),
    MBGCNConfig(dim=4),
    MBGCNConfig(dim=4, layers=3, item_share=0.2),
]
ENCODERS = [CIGFConfig(dim=4, encoder=encoder) for encoder in ("lrgccf", "gcn", "ngcf")]


def _model(config: RecommenderConfig, data: InteractionData) -> Recommender:
    return scrambled(build_recommender(config, data, seed=0), 1, 0.5).double()  # pyright: ignore[reportReturnType]


def neighbors_of(data: InteractionData, node: int, side: Side) -> list[Tensor]:
    if side == "user":
        found = [pairs.items[pairs.users == node] + data.num_users for pairs in data.behaviors.values()]
    else:
        found = [pairs.users[pairs.items == node] for pairs in data.behaviors.values()]
    return [torch.from_numpy(nodes.astype(np.int64)) for nodes in found]


@pytest.mark.parametrize("side", ["user", "item"])
@pytest.mark.parametrize("config", [*CONFIGS, *ENCODERS], ids=str)
def test_folding_in_a_node_with_an_embedding_of_zero_gives_its_row_of_the_tables(
    config: RecommenderConfig, side: Side
) -> None:
    data = small_data(density=0.5)
    model = _model(config, data)
    table, offset = (model.user_embedding, 0) if side == "user" else (model.item_embedding, data.num_users)
    for node in (0, 3, 5):
        with torch.no_grad():
            kept = table.weight[node].clone()
            table.weight[node] = 0
        found = model.fold_in(neighbors_of(data, node, side), model.fold_states(), side)
        torch.testing.assert_close(found, model.tables()[offset + node].detach(), rtol=1e-6, atol=1e-7)
        assert found.abs().max() > 1e-3
        with torch.no_grad():
            table.weight[node] = kept


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shares_of_events_and_the_own_embedding_add_up_to_the_row(config: RecommenderConfig) -> None:
    data = small_data(density=0.5)
    model = _model(config, data)
    tables, states = model.tables().detach(), model.fold_states()
    for user in range(data.num_users):
        own = model.user_embedding.weight[user].detach()
        shares = model.event_shares(neighbors_of(data, user, "user"), states, "user", own)
        assert shares is not None
        alone = torch.zeros_like(tables[user])
        match config:
            case CIGFConfig():
                alone += own * (config.layers + 1 if config.cross_behavior else 1)
            case FactorConfig():
                alone += own / (config.layers + 1)
            case MBGCNConfig():
                alone[0] = own * (1 - config.item_share) ** 0.5
        torch.testing.assert_close(alone + shares.sum(0), tables[user], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["mesi", "bilinear", "dot", "shared_bottom", "shared_bottom_linear"])
def test_directions_are_scores_without_what_is_the_same_for_all_users(name: DecoderName) -> None:
    data = small_data()
    model = _model(CIGFConfig(dim=4, decoder=name), data)
    tables = model.tables().detach()
    x, y = tables[:2], tables[data.num_users : data.num_users + 2]
    for task in range(3):
        directions = model.directions(x, y, task)
        assert directions is not None
        assert directions.shape == y.shape
        products = (directions * x).flatten(1).sum(1)
        constant = model.logits(torch.zeros_like(x), y, task) if name != "mesi" else torch.zeros(2).double()
        torch.testing.assert_close(products + constant, model.logits(x, y, task))


@pytest.mark.parametrize("name", ["mmoe", "ple"])
def test_heads_that_are_not_linear_have_no_directions_and_no_keys(name: DecoderName) -> None:
    data = small_data()
    model = _model(CIGFConfig(dim=4, decoder=name), data)
    tables = model.tables().detach()
    assert model.directions(tables[:1], tables[8:9], 2) is None
    assert model.keys(tables[8:]) == []
    assert model.queries(tables[:8], 2) == {}


@pytest.mark.parametrize("config", [CIGFConfig(dim=4, decoder="bilinear"), *CONFIGS[-4:]], ids=str)
def test_scores_are_products_of_queries_and_keys(config: RecommenderConfig) -> None:
    data = small_data()
    model = _model(config, data)
    tables = model.tables().detach()
    x, y = tables[: data.num_users], tables[data.num_users :]
    task = model.tasks[-1]
    ((place, query),) = model.queries(x, task).items()
    scale = model.score(x, y, task) / (query @ model.keys(y)[place].T)
    torch.testing.assert_close(scale, torch.full_like(scale, float(scale[0, 0].detach())))


def test_mesi_is_searched_expert_by_expert_and_by_their_mixture() -> None:
    data = small_data()
    model = _model(CIGFConfig(dim=4), data)
    x, y = model.tables().detach().split([data.num_users, data.num_items])
    queries, keys = model.queries(x, 2), model.keys(y)
    assert list(queries) == [0, 1, 2, 3]
    assert torch.equal(queries[1], x[:, 1])
    assert torch.equal(keys[1], y[:, 1])
    with torch.no_grad():  # a gate that does not look at the item
        model.decoder.gate.weight[:, 4:] = 0  # pyright: ignore
    torch.testing.assert_close(300 * model.queries(x, 2)[3] @ keys[3].T, model.score(x, y, 2))


def test_factors_without_a_graph_take_the_mean_of_the_neighbors() -> None:
    data = small_data()
    model = _model(FactorConfig(kind="mf", dim=4), data)
    empty = torch.zeros(0, dtype=torch.int64)
    neighbors = [torch.tensor([8, 9]), torch.tensor([9]), empty]
    found = model.fold_in(neighbors, model.fold_states(), "user")
    torch.testing.assert_close(found[0], model.item_embedding.weight[1:3].detach().mean(0))
    assert model.event_shares(neighbors, model.fold_states(), "user", model.user_embedding.weight[0]) is None


@pytest.mark.parametrize("config", [*CONFIGS, FactorConfig(kind="mf", dim=4)], ids=str)
def test_nothing_is_represented_by_zero(config: RecommenderConfig) -> None:
    data = small_data()
    model = _model(config, data)
    empty = [torch.zeros(0, dtype=torch.int64)] * 3
    assert not model.fold_in(empty, model.fold_states(), "user").any()


def test_a_neighbor_without_an_edge_in_that_graph_counts_as_one_with_one() -> None:
    data = small_data(empty=("cart",))
    empty = torch.zeros(0, dtype=torch.int64)
    for norm in NORMS:
        model = _model(CIGFConfig(dim=4, layers=1, norm=norm), data)
        found = model.fold_in([empty, torch.tensor([9]), empty], model.fold_states(), "user")
        torch.testing.assert_close(found[1], model.embeddings()[9].detach())


def test_an_encoder_that_is_not_linear_has_no_shares() -> None:
    data = small_data()
    for config in ENCODERS:
        model = _model(config, data)
        assert model.event_shares(neighbors_of(data, 0, "user"), model.fold_states(), "user") is None


def test_a_model_that_cannot_fold_says_so() -> None:
    data = small_data()

    class Plain(Recommender):
        pass

    model = Plain(data.num_users, data.num_items, tuple(data.behaviors), 4)
    assert model.folded_from == ()
    with pytest.raises(DataError, match="Plain cannot represent a user that it was not trained on"):
        model.fold_in(neighbors_of(data, 0, "user"), model.fold_states(), "user")


def test_what_a_model_learns_from_and_folds_from() -> None:
    data = small_data()
    cases: list[tuple[RecommenderConfig, tuple[str, ...], tuple[str, ...]]] = [
        (CIGFConfig(dim=4, graph_behaviors=("buy",)), ("view", "cart", "buy"), ("buy",)),
        (FactorConfig(kind="mf", dim=4), ("buy",), ("view", "cart", "buy")),
        (FactorConfig(dim=4), ("buy",), ("buy",)),
        (FactorConfig(dim=4, graph_behaviors=("view",)), ("buy", "view"), ("view",)),
        (MBGCNConfig(dim=4), ("view", "cart", "buy"), ("view", "cart", "buy")),
    ]
    for config, learned, folded in cases:
        model = _model(config, data)
        assert (model.learned_from, model.folded_from) == (learned, folded)
