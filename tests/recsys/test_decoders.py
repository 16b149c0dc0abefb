from __future__ import annotations

from typing import get_args

import pytest
import torch

from perilune.nn import initialize
from perilune.recsys.config import CIGFConfig, DecoderName
from perilune.recsys.decoders import MESI, Head, build_head
from tests.recsys.cases import scrambled


def _head(name: str, **settings: object) -> Head:
    config = CIGFConfig(decoder=name, dim=4, **settings)  # pyright: ignore[reportArgumentType]
    return scrambled(initialize(build_head(config, 3), seed=0), 1, 0.5).double()  # pyright: ignore[reportReturnType]


def _rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tower", ["sum", "mean"])
@pytest.mark.parametrize("sharing", ["shared", "per_task"])
def test_mesi_is_equations_10_to_12(tower: str, sharing: str) -> None:
    head = _head("mesi", tower=tower, gate_sharing=sharing)
    assert isinstance(head, MESI)
    x, y = _rows(1, 2)[0], _rows(1, 3)[0]
    for task in range(3):
        gate = head.gate_of(task)
        logits = gate.weight @ torch.cat((x[task], y[task])) + gate.bias
        weights = logits.exp() / logits.exp().sum()
        features = x * y
        mixed = sum(weights[j] * features[j] for j in range(3))
        assert isinstance(mixed, torch.Tensor)
        expected = 300 * (mixed.sum() if tower == "sum" else mixed.mean())
        torch.testing.assert_close(head(x[None], y[None], task)[0], expected)
    assert (head.gate_of(0) is head.gate_of(2)) == (sharing == "shared")


@pytest.mark.parametrize("name", get_args(DecoderName))
@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_scores_of_all_items_are_those_of_pairs(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perilune.recsys.decoders._SCORED_AT_ONCE", at_once)
    head, x, y = _head(name), _rows(5, 2), _rows(6, 3)
    for task in range(3):
        every = head.score(x, y, task)
        assert every.shape == (5, 6)
        pairs = [[head(x[u : u + 1], y[i : i + 1], task)[0].item() for i in range(6)] for u in range(5)]
        torch.testing.assert_close(every, torch.tensor(pairs, dtype=torch.float64))
        torch.testing.assert_close(head.score(x[:1], y, task), every[:1])
    assert head.score(x[:0], y, 0).shape == (0, 6)


def test_mesi_scores_a_block_of_items_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x, y = _head("mesi"), _rows(5, 2), _rows(60, 3)
    whole, blocks = head.score(x, y, 1), []
    assert isinstance(head, MESI)
    block = head._score_block
    monkeypatch.setattr(head, "_score_block", lambda x, y, task: blocks.append(len(y)) or block(x, y, task))
    monkeypatch.setattr("perilune.recsys.decoders._SCORED_AT_ONCE", 2 * 3 * 5 * 25)
    torch.testing.assert_close(head.score(x, y, 1), whole)
    assert blocks == [25, 25, 10]


def test_mesi_scores_do_not_overflow_where_gates_are_extreme() -> None:
    head = _head("mesi")
    x, y = 1e3 * _rows(2, 2), 1e3 * _rows(3, 3)
    scores = head.score(x, y, 0)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores, head(x[:, None].expand(2, 3, 3, 4), y.expand(2, 3, 3, 4), 0))
    torch.testing.assert_close(head.score(x[:1], y, 0), scores[:1])


def test_the_official_shared_bottom_ranks_alike_for_everybody_and_ours_does_not() -> None:
    x, y = _rows(5, 2), _rows(30, 3)
    linear = _head("shared_bottom_linear").score(x, y, 2).argsort(1)
    assert (linear == linear[0]).all()
    ours = _head("shared_bottom").score(x, y, 2).argsort(1)
    assert not (ours == ours[0]).all()


def test_a_task_reaches_another_expert_through_its_gate_alone() -> None:
    """d o^k / d x_j = scale * g^k_j * y_j for j != k; with a merged input it is the same for all j."""
    head, y = _head("mesi"), _rows(1, 3)
    x = _rows(1, 2).requires_grad_()
    (grad,) = torch.autograd.grad(head(x, y, 2).sum(), x)
    assert isinstance(head, MESI)
    gates = head.gates(x, y, 2).detach()
    torch.testing.assert_close(grad[0, :2], 300 * gates[0, :2, None] * y[0, :2])
    merged = _head("mmoe")
    (grad,) = torch.autograd.grad(merged(x, y, 2).sum(), x)
    torch.testing.assert_close(grad[0, 0], grad[0, 1])


def test_what_is_under_the_l2_term() -> None:
    decayed = {name: [tuple(p.shape) for p in _head(name).decayed()] for name in ("mesi", "bilinear", "dot")}
    assert decayed == {"mesi": [(3, 8)], "bilinear": [], "dot": []}
    assert all(p.ndim == 2 for p in _head("ple").decayed())


def test_ple_has_two_own_experts_unless_three_are_asked_for() -> None:
    for count, own in ((3, 1), (4, 2)):
        head = _head("ple", n_experts=count)
        assert [len(experts) for experts in head.specific] == [own] * 3  # pyright: ignore
