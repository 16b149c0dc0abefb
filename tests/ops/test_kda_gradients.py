"""The hand-written backward against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from perilune.ops import kda
from tests.ops.kda_cases import GATES, Case

SMALL = {"heads": 1, "groups": 2, "key_dim": 3, "value_dim": 2, "lengths": (2, 0, 18)}


def function(case: Case, names: list[str]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def run(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        return kda(**dict(zip(names, tensors, strict=True)), **case.options())[:2]

    return run


def check(case: Case, fast: bool) -> None:
    tensors = case.tensors()
    assert gradcheck(function(case, list(tensors)), tuple(tensors.values()), fast_mode=fast, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_at_every_gate(gate: str) -> None:
    check(Case(**SMALL, gate=gate), fast=True)


@pytest.mark.parametrize("keys", ["identical", "correlated", "some_zero"])
def test_gradients_at_hard_keys(keys: str) -> None:
    check(Case(**SMALL, keys=keys, beta=1.0), fast=True)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_gradients_of_raw_inputs(lower_bound: float | None, allow_neg_eigval: bool) -> None:
    switches = {"allow_neg_eigval": allow_neg_eigval}
    check(Case(**SMALL, raw=True, lower_bound=lower_bound, switches=switches), fast=True)


def test_gradients_element_by_element() -> None:
    check(Case(heads=1, groups=2, key_dim=2, value_dim=2, lengths=(17,), gate="spiky"), fast=False)


def test_bounded_gate_without_rate_or_bias() -> None:
    case = Case(**SMALL, raw=True, lower_bound=-2.0)
    tensors = {name: x for name, x in case.tensors().items() if name not in ("A_log", "dt_bias")}
    assert gradcheck(function(case, list(tensors)), tuple(tensors.values()), fast_mode=True)


def test_only_the_final_state_needs_a_gradient() -> None:
    case = Case(lengths=(20, 0, 5))
    tensors = case.tensors()
    _, final = kda(**tensors, **case.options())[:2]
    assert final is not None
    final.sum().backward()
    assert tensors["q"].grad is not None
    assert not tensors["q"].grad.any()
    state_grad = tensors["initial_state"].grad
    assert state_grad is not None
    assert torch.equal(state_grad[1], torch.ones_like(state_grad[1])), "an empty sequence passes its gradient through"


def test_backward_can_run_twice() -> None:
    case = Case(lengths=(20, 5), gate="spiky")
    tensors = case.tensors()
    o, _ = kda(**tensors, **case.options())[:2]
    first = torch.autograd.grad(o.sum(), list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(o.sum(), list(tensors.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
