"""Training a recommender on a GPU: on the whole graph and on parts, the same each time, and to what a CPU comes to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perilune.recsys import (
    CIGFConfig,
    FitConfig,
    FunnelConfig,
    Ranker,
    SubgraphConfig,
    build_recommender,
    fit,
    funnel,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PARTS = SubgraphConfig(chunk_users=300, rounds=1, nodes_per_round=200)


@pytest.mark.parametrize("subgraph", [None, PARTS])
def test_training_repeats_to_the_bit_and_ranks_as_on_a_cpu(subgraph: SubgraphConfig | None) -> None:
    data = funnel(FunnelConfig(num_users=600, num_items=400)).permuted(0).clean()
    config = FitConfig(epochs=40, batch_users=100, lr=1e-2, eval_interval=0, subgraph=subgraph)

    def trained(device: str) -> torch.nn.Module:
        model = build_recommender(CIGFConfig(dim=16), data, seed=0)
        settings = replace(config, device=device)
        fit(model, data, settings)
        return model

    first, second, on_cpu = trained("cuda"), trained("cuda"), trained("cpu")
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)
    ranker = Ranker(data, protocol="sampled99")
    found = [ranker.rank(model.scorer()).summary((10,))["ndcg@10"] for model in (first, on_cpu)]  # pyright: ignore
    untrained = ranker.rank(build_recommender(CIGFConfig(dim=16), data, seed=0).scorer()).summary((10,))["ndcg@10"]
    assert min(found) > 2 * untrained
    assert found[0] == pytest.approx(found[1], rel=0.15)
