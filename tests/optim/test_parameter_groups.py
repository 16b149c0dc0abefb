"""Sorting parameters by role: on plain torch models, on this library's layers, with overrides, and its refusals."""

from typing import Any

import pytest
import torch
from torch import nn

from perilune.nn.config import GQAConfig, KDAConfig, MLAConfig, MoEConfig
from perilune.nn.gqa import GroupedQueryAttention
from perilune.nn.kda import KimiDeltaAttention
from perilune.nn.mla import MultiHeadLatentAttention
from perilune.nn.moe import MoE
from perilune.nn.norm import RMSNorm
from perilune.nn.roles import MatrixLayout
from perilune.optim import MuonClip, OptimizerConfig, build_optimizer, parameter_groups, qk_clip_specs


def placed(groups: list[dict[str, Any]]) -> dict[str, tuple[str, float]]:
    """Name -> (kind, weight decay)."""
    return {name: (group["kind"], group["weight_decay"]) for group in groups for name, _ in group["params"]}


def layouts(groups: list[dict[str, Any]]) -> dict[str, MatrixLayout]:
    return {
        name: layout
        for group in groups
        for (name, _), layout in zip(group["params"], group["layouts"], strict=True)
        if layout is not None
    }


class Plain(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.conv = nn.Conv1d(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.score = nn.Linear(16, 1)
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_torch_model(tied: bool) -> None:
    groups = parameter_groups(Plain(tied), lr=0.01)
    muon, adamw, bare = ("muon", 0.1), ("adamw", 0.1), ("adamw", 0.0)
    expected = {
        "embedding.weight": adamw,
        "attention.in_proj_weight": muon,
        "attention.in_proj_bias": bare,
        "attention.bias_k": bare,
        "attention.bias_v": bare,
        "attention.out_proj.weight": muon,
        "attention.out_proj.bias": bare,
        "conv.weight": bare,
        "conv.bias": bare,
        "norm.weight": adamw,
        "norm.bias": bare,
        "up.weight": muon,
        "up.bias": bare,
        "score.weight": adamw,
        "score.bias": bare,
    }
    assert placed(groups) == (expected if tied else expected | {"lm_head.weight": adamw})
    assert layouts(groups) == {"attention.in_proj_weight": MatrixLayout(row_groups=(8, 8, 8), is_fused=True)}
    MuonClip(groups)


def test_an_embedding_tied_to_a_linear_layer_met_first_stays_an_embedding() -> None:
    model = nn.ModuleDict({"decode": nn.Linear(8, 11, bias=False), "embedding": nn.Embedding(11, 8)})
    model["decode"].weight = model["embedding"].weight
    groups = parameter_groups(model, lr=0.01)
    assert placed(groups) == {"embedding.weight": ("adamw", 0.1)}


class Stack(nn.Module):
    """One layer of each kind of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.kda = KimiDeltaAttention(KDAConfig(num_heads=2, head_dim=8), 16)
        self.mla = MultiHeadLatentAttention(
            MLAConfig(num_heads=2, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8, q_rank=8), 16
        )
        self.gqa = GroupedQueryAttention(GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8), 16)
        self.moe = MoE(MoEConfig(num_experts=4, top_k=2, d_expert=6), 16)
        self.norm = RMSNorm(16, 1e-5)


def test_the_layers_of_this_library() -> None:
    model = Stack()
    groups = parameter_groups(model, lr=0.01)
    kinds = placed(groups)
    assert set(kinds) == {name for name, _ in model.named_parameters()}
    assert kinds["kda.A_log"] == kinds["kda.dt_bias"] == kinds["kda.conv.weight"] == ("adamw", 0.0)
    norms = [name for name in kinds if "norm" in name]
    assert len(norms) >= 4
    assert {kinds[name] for name in norms} == {("adamw", 0.1)}
    others = set(kinds) - set(norms) - {"kda.A_log", "kda.dt_bias", "kda.conv.weight"}
    assert {kinds[name] for name in others} == {("muon", 0.1)}
    assert {"mla.q_b_proj.weight", "mla.kv_b_proj.weight", "moe.w_gate_up", "moe.w_down"} <= set(layouts(groups))
    assert len(qk_clip_specs(model)) == 2
    optimizer = MuonClip(groups, attention=qk_clip_specs(model))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(optimizer.clip_stats) == 2


def test_which_roles_decay_can_be_chosen() -> None:
    kinds = placed(parameter_groups(Stack(), lr=0.01, weight_decay=0.2, decayed=("matrix",)))
    assert kinds["norm.weight"] == ("adamw", 0.0)
    assert kinds["gqa.q_proj.weight"] == ("muon", 0.2)
    kinds = placed(parameter_groups(Plain(False), lr=0.01, decayed=("bias", "conv", "scalar")))
    assert kinds["conv.weight"] == kinds["up.bias"] == ("adamw", 0.1)
    assert kinds["up.weight"] == ("muon", 0.0)


def test_overrides_and_a_learning_rate_of_its_own() -> None:
    groups = parameter_groups(Plain(False), lr=0.02, adamw_lr=0.004, overrides={r"^up\.": "adamw", "lm_head": "muon"})
    kinds = placed(groups)
    assert kinds["up.weight"] == ("adamw", 0.1)
    assert kinds["lm_head.weight"] == ("muon", 0.1)
    rates = {(group["kind"], group["lr"], group["lr_scale"]) for group in groups}
    assert rates == {("muon", 0.02, 1.0), ("adamw", 0.004, 0.2)}


def test_frozen_parameters_are_left_out() -> None:
    model = Plain(False)
    model.up.requires_grad_(False)
    assert not any(name.startswith("up.") for name in placed(parameter_groups(model, lr=0.01)))


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mystery = nn.Parameter(torch.zeros(3, 4))
        self.gain = nn.Parameter(torch.zeros(3))


class Declared(Unknown):
    def __init__(self, layout: str = "mystery", adamw: str = "table") -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(5, 4))
        self._names = layout, adamw

    def logical_matrices(self) -> dict[str, MatrixLayout]:
        return {self._names[0]: MatrixLayout(row_groups=(3,))}

    def adamw_parameters(self) -> set[str]:
        return {self._names[1]}


def test_parameters_without_a_rule_are_all_named() -> None:
    model = nn.ModuleDict({"a": Unknown(), "b": Unknown()})
    with pytest.raises(ValueError, match=r"a\.mystery \(3, 4\), b\.mystery \(3, 4\)"):
        parameter_groups(model, lr=0.01)


def test_overrides_also_place_parameters_without_a_rule() -> None:
    kinds = placed(parameter_groups(Unknown(), lr=0.01, overrides={"mystery": "muon"}))
    assert kinds == {"mystery": ("muon", 0.1), "gain": ("adamw", 0.0)}


def test_declarations_place_parameters() -> None:
    groups = parameter_groups(nn.ModuleDict({"x": Declared()}), lr=0.01)
    assert placed(groups) == {"x.mystery": ("muon", 0.1), "x.table": ("adamw", 0.1), "x.gain": ("adamw", 0.0)}
    with pytest.raises(ValueError, match=r"declare parameters that do not exist: \['x\.mistery'\]"):
        parameter_groups(nn.ModuleDict({"x": Declared(layout="mistery")}), lr=0.01)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"overrides \['nothing'\] match no trainable parameter"):
        parameter_groups(Plain(False), lr=0.01, overrides={"nothing": "adamw"})
    with pytest.raises(ValueError, match="must be 'muon' or 'adamw', got 'sgd'"):
        parameter_groups(Plain(False), lr=0.01, overrides={"up": "sgd"})
    with pytest.raises(ValueError, match=r"decayed must be among .*\['weights'\]"):
        parameter_groups(Plain(False), lr=0.01, decayed=("weights",))
    with pytest.raises(ValueError, match="lr must be positive"):
        parameter_groups(Plain(False), lr=0.0, adamw_lr=0.1)


def test_building_from_a_config() -> None:
    model = Stack()
    config = OptimizerConfig(lr=0.01, adamw_lr=0.002, weight_decay=0.05, decayed=("matrix",), tau=30.0, momentum=0.9)
    optimizer = build_optimizer(model, config)
    by_kind = {group["kind"]: group for group in optimizer.param_groups}
    assert by_kind["muon"]["momentum"] == 0.9
    assert (by_kind["muon"]["lr"], by_kind["adamw"]["lr"]) == (0.01, 0.002)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.gqa.max_logits.fill_(60.0)
    optimizer.step()
    assert [stats.min_gamma for stats in optimizer.clip_stats] == [1.0, 0.5]
    adamw = build_optimizer(Stack(), OptimizerConfig(kind="adamw", qk_clip=False))
    assert {group["kind"] for group in adamw.param_groups} == {"adamw"}
    for parameter in adamw.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    assert adamw.clip_stats == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("adamw_lr", -1.0),
        ("adamw_lr", 0.0),
        ("weight_decay", -1.0),
        ("momentum", 1.0),
        ("betas", (0.9, 1.0)),
        ("alpha", 2.0),
        ("tau", 0.0),
        ("kind", "sgd"),
        ("mla_split", "row"),
        ("gqa_mode", "mean"),
        ("ns_dtype", "int8"),
        ("decayed", ("weights",)),
        ("update_rms", 0.0),
        ("adamw_eps", -1.0),
        ("ns_coefficients", "quintic"),
        ("ns_steps", 0),
    ],
)
def test_bad_config_values_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field.removeprefix("ns_")):
        OptimizerConfig(**{field: value})
