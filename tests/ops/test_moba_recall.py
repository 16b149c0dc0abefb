"""The share of attention that chosen blocks have, against a loop over pairs in float64."""

import math

import pytest
import torch

from perilune.ops import moba_route
from perilune.ops.moba import recall as recall_module
from perilune.ops.moba.options import POLICIES
from perilune.ops.moba.recall import router_recall
from tests.ops.moba_cases import make_moba

WITH_CHOICE = [
    "5 B + 3, k = 2",
    "5 B + 3, k = 3",
    "packed",
    "odd blocks",
    "chunks of a prefill",
    "full from some place",
]


def looped(q, k, options, past, queries):
    """Mass and recall of each head, and how many queries were counted, one query, head and key at a time."""
    size, topk = options["block_size"], options["topk"]
    lengths_q, lengths_k = options["cu_seqlens_q"].lengths, options["cu_seqlens_k"].lengths
    full_from = [math.inf] * len(lengths_q) if options["full_from"] is None else options["full_from"].tolist()
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    got, there, hits, counted = [0.0] * heads, [0.0] * heads, [0] * heads, 0
    row = start = 0
    for queries_n, keys_n, full in zip(lengths_q, lengths_k, full_from, strict=True):
        for position in range(keys_n - queries_n, keys_n):
            own = position // size
            if queries[row] and own >= topk and position < full:
                counted += 1
                for head in range(heads):
                    logits = [float(q[row, head] @ k[start + u, head // group]) for u in range(position + 1)]
                    weights = [math.exp(x * q.shape[2] ** -0.5) for x in logits]
                    masses = [sum(weights[j * size : (j + 1) * size]) / sum(weights) for j in range(own)]
                    best = sorted(range(own), key=lambda j: (-masses[j], j))[: topk - 1]
                    chosen = past[row, head].tolist()
                    got[head] += sum(masses[j] for j in chosen)
                    there[head] += sum(masses)
                    hits[head] += len(set(chosen) & set(best))
            row += 1
        start += keys_n
    mass = [g / t for g, t in zip(got, there, strict=True)]
    return mass, [h / (counted * (topk - 1)) for h in hits], counted


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", WITH_CHOICE)
def test_it_equals_a_loop(monkeypatch, shape, policy):
    monkeypatch.setattr(recall_module, "SCORE_BYTES", 30_000)  # a few queries at a time
    (q, k, _), options = make_moba(shape)
    queries = torch.arange(q.shape[0]) % 3 > 0
    routing = moba_route(q, k, **options, policy=policy)
    found = router_recall(q, k, routing, queries)
    mass, recall, counted = looped(q.detach(), k.detach(), options, routing.past, queries)
    assert found.queries == counted > 0
    assert found.mass == pytest.approx(mass, rel=1e-12)
    assert found.recall == pytest.approx(recall, rel=1e-12)


def test_the_oracle_has_full_recall_and_the_most_mass():
    (q, k, _), options = make_moba("odd blocks")
    found = {policy: router_recall(q, k, moba_route(q, k, **options, policy=policy)) for policy in POLICIES}
    assert found["oracle"].recall == (1.0,) * 4
    for policy in set(POLICIES) - {"oracle"}:
        assert all(mass < best for mass, best in zip(found[policy].mass, found["oracle"].mass, strict=True))
        assert max(found[policy].recall) < 1


def test_half_types_are_measured_in_float32():
    (q, k, _), options = make_moba("packed")
    q, k = q.detach().bfloat16(), k.detach().bfloat16()
    routing = moba_route(q, k, **options)
    found, exact = router_recall(q, k, routing), router_recall(q.double(), k.double(), routing)
    assert found.mass == pytest.approx(exact.mass, rel=1e-5)
    assert found.recall == pytest.approx(exact.recall, abs=0.02)  # near-ties


@pytest.mark.parametrize("shape", ["no tokens", "2 B", "5 B + 3, k = n", "full from everywhere"])
def test_without_a_choice_there_is_nothing_to_tell(shape):
    (q, k, _), options = make_moba(shape)
    options["topk"] = max(2, options["topk"])
    found = router_recall(q, k, moba_route(q, k, **options))
    assert found.queries == 0
    assert all(math.isnan(x) for x in found.mass + found.recall)


def test_what_does_not_fit_is_refused():
    (q, k, _), options = make_moba("5 B + 3, k = 3")
    routing = moba_route(q, k, **options)
    for other in ((q[1:], k), (q[:, :2], k), (q, k[1:])):
        with pytest.raises(ValueError, match="routing is of 83 queries in 4 heads and 83 keys"):
            router_recall(*other, routing)
    (q, k, _), options = make_moba("5 B + 3, k = 1")
    with pytest.raises(ValueError, match="topk must be >= 2"):
        router_recall(q, k, moba_route(q, k, **options))
