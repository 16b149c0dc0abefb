"""Modules and optimizers as named tensors and JSON, and back."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perilune.errors import CheckpointError
from perilune.train import (
    CheckpointStore,
    flatten_state,
    module_tensors,
    optimizer_state,
    restore_module,
    restore_optimizer,
    unflatten_state,
)


def trees() -> st.SearchStrategy[object]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    keys = st.text(max_size=3) | st.integers() | st.sampled_from(["$tensor", "a.b", "$x"])
    return st.recursive(
        scalars,
        lambda child: (
            st.lists(child, max_size=3)
            | st.lists(child, max_size=3).map(tuple)
            | st.dictionaries(keys, child, max_size=3)
        ),
        max_leaves=10,
    )


@given(trees())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_plain_tree_survives_flattening(tree: object) -> None:
    tensors, skeleton = flatten_state(tree)
    restored = unflatten_state(tensors, json.loads(json.dumps(skeleton, allow_nan=False)))
    assert repr(restored) == repr(tree)


def test_tensors_with_equal_looking_paths_stay_apart() -> None:
    tree = {"a": {"b": torch.tensor(1.0)}, "a.b": torch.tensor(2.0), "n": float("nan")}
    tensors, skeleton = flatten_state(tree)
    restored = unflatten_state(tensors, skeleton)
    assert restored["a"]["b"] == 1
    assert restored["a.b"] == 2
    assert restored["n"] != restored["n"]


@pytest.mark.parametrize("tree", [{"x": object()}, {(1, 2): 3}, {"x": [{1.5: 2}]}])
def test_other_values_cannot_be_flattened(tree: object) -> None:
    with pytest.raises(TypeError, match=r"is a object|has a key of type"):
        flatten_state(tree)


@pytest.mark.parametrize(
    "skeleton",
    [{"$tensor": "gone"}, {"$tensor": "x", "y": 1}, {"$items": [[1]]}, {"$items": [[[], 1]]}, {"$code": "x"}],
)
def test_malformed_skeletons_are_refused(skeleton: object) -> None:
    with pytest.raises(CheckpointError, match="optimizer state"):
        unflatten_state({"x": torch.zeros(1)}, skeleton)


def make_optimizer(kind: str, module: nn.Module) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.95))
    return torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9, nesterov=True)


def descend(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(4, 3, generator=generator).to(next(module.parameters()).dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_optimizer_continues_bit_for_bit(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = make_optimizer(kind, module)
    descend(module, optimizer, 3, seed=0)
    tensors, skeleton = optimizer_state(optimizer)
    CheckpointStore(tmp_path).save(3, {"model": module_tensors(module), "optimizer": tensors}, {"o": skeleton})
    descend(module, optimizer, 3, seed=1)

    checkpoint = CheckpointStore(tmp_path).load()
    again = nn.Linear(3, 2)
    restored = make_optimizer(kind, again)
    restore_module(again, checkpoint)
    restore_optimizer(restored, checkpoint.group("optimizer"), checkpoint.state["o"])
    descend(again, restored, 3, seed=1)
    assert torch.equal(again.weight, module.weight)
    assert restored.param_groups[0]["lr"] == 1e-2


def test_float32_state_of_bfloat16_weights_is_not_rounded() -> None:
    module = nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    master = torch.tensor([[1.0 + 2**-20] * 3] * 2)
    optimizer.state[module.weight] = {"master": master, "momentum_buffer": master * 3}
    tensors, skeleton = optimizer_state(optimizer)
    again = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    restore_optimizer(again, tensors, skeleton)
    assert again.state[module.weight]["master"].dtype == torch.float32
    assert torch.equal(again.state[module.weight]["master"], master)


def test_an_optimizer_of_other_groups_is_refused() -> None:
    module = nn.Linear(3, 2)
    tensors, skeleton = optimizer_state(torch.optim.SGD([module.weight], lr=0.1))
    with pytest.raises(CheckpointError, match="does not fit the optimizer"):
        restore_optimizer(torch.optim.SGD(module.parameters(), lr=0.1), tensors, skeleton)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("bias", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)


def test_tied_weights_are_stored_once_and_scratch_buffers_not_at_all(tmp_path: Path) -> None:
    module = Tied()
    assert list(module_tensors(module)) == ["bias", "embedding.weight"]
    CheckpointStore(tmp_path).save(1, {"model": module_tensors(module)}, {})
    again = Tied()
    restore_module(again, CheckpointStore(tmp_path).load())
    assert torch.equal(again.head.weight, module.head.weight)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 2), r"lacks 2 tensors of the model, such as \['bias', 'weight'\]"),
        (nn.ModuleDict({"a": nn.Linear(3, 3, bias=False)}), r"a.weight has shape \(2, 3\), the model needs \(3, 3\)"),
        (
            nn.ModuleDict({"a": nn.Linear(3, 2, bias=False, dtype=torch.float64)}),
            "has dtype torch.float32, the model needs torch.float64",
        ),
        (nn.ModuleDict({}), "has 1 tensors the model lacks"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, other: nn.Module, message: str) -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False)})
    CheckpointStore(tmp_path).save(1, {"model": module_tensors(module)}, {})
    before = [tensor.clone() for tensor in module_tensors(other).values()]
    with pytest.raises(CheckpointError, match=message):
        restore_module(other, CheckpointStore(tmp_path).load())
    assert all(torch.equal(a, b) for a, b in zip(before, module_tensors(other).values(), strict=True))
