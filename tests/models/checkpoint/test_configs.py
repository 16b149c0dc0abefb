"""Configurations: what is read of the released ones, what is written, what is refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from perilune.errors import CheckpointError
from perilune.models import PRESETS, Details, build_model, parameter_counts, read_config, read_details, save
from perilune.models.checkpoint import deepseek_v3, kimi_linear
from perilune.models.checkpoint.mapping import tensor_shapes
from perilune.nn import GQAConfig, KDAConfig, MoBAConfig, MoEConfig, RopeConfig
from tests.models.checkpoint.released import KIMI_K2, KIMI_LINEAR_48B, MOONLIGHT
from tests.models.checkpoint.tiny import CONFIGS, GQA, MLA, MOBA, ROTATED, edit_json, tiny_model

RELEASED = {"kimi-linear-48b-a3b": KIMI_LINEAR_48B, "moonlight-16b-a3b": MOONLIGHT, "kimi-k2": KIMI_K2}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def read(tmp_path):
    def read_tree(tree):
        (tmp_path / "config.json").write_text(json.dumps(tree))
        return read_config(tmp_path)

    return read_tree


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_are_the_presets(read, name):
    assert read(RELEASED[name]) == PRESETS[name]


def test_released_sizes():
    def count(name):
        return sum(torch.Size(shape).numel() for shape in tensor_shapes(PRESETS[name]).values())

    assert count("kimi-k2") == 1_026_408_232_448
    assert count("moonlight-16b-a3b") / 1e9 == pytest.approx(15.960, abs=5e-4)
    parts = 20 * 39_514_272 + 7 * 29_114_880 + 26 * (1_819_607_040 + 256)  # KDA, MLA, experts with their biases
    assert count("kimi-linear-48b-a3b") == parts + 3 * 2304 * 9216 + 2304 * (2 * 163840 + 2 * 27 + 1)
    assert parameter_counts(PRESETS["moonlight-16b-a3b"]).active_without_embedding / 1e9 == pytest.approx(
        2.244, abs=5e-4
    )


def test_released_tensors_have_their_names_and_shapes():
    def shapes(released, preset):
        return {p.name: p.shape for binding in released.bindings(PRESETS[preset]) for p in binding.pieces}

    linear = shapes(kimi_linear, "kimi-linear-48b-a3b")
    layer = "model.layers.0.self_attn."
    expected = {
        "model.layers.0.mlp.gate_proj.weight": (9216, 2304),
        "model.layers.1.block_sparse_moe.experts.255.w2.weight": (2304, 1024),
        "model.layers.1.block_sparse_moe.gate.e_score_correction_bias": (256,),
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": (576, 2304),
        "model.layers.3.self_attn.kv_b_proj.weight": (8192, 512),
        "model.layers.26.self_attn.q_proj.weight": (6144, 2304),
        layer + "q_proj.weight": (4096, 2304),
        layer + "k_conv1d.weight": (4096, 1, 4),
        layer + "A_log": (1, 1, 32, 1),
        layer + "dt_bias": (4096,),
        layer + "f_b_proj.weight": (4096, 128),
        "lm_head.weight": (163840, 2304),
    }
    assert {name: linear[name] for name in expected} == expected
    assert len(linear) == 3 + 27 * 2 + 20 * 15 + 7 * 5 + 3 + 26 * (2 + 3 * 256 + 3)
    small = replace(PRESETS["kimi-k2"], layers=("mla",) * 2)
    k2 = {p.name: p.shape for binding in deepseek_v3.bindings(small) for p in binding.pieces}
    assert k2["model.layers.1.mlp.experts.383.gate_proj.weight"] == (2048, 7168)
    assert k2["model.layers.1.mlp.gate.weight"] == (384, 7168)
    assert k2["model.layers.0.self_attn.q_b_proj.weight"] == (64 * 192, 1536)


def test_what_is_read_is_written_back(read, tmp_path):
    for tree in (KIMI_LINEAR_48B, KIMI_K2, MOONLIGHT):
        config = read(tree)
        released = kimi_linear if tree is KIMI_LINEAR_48B else deepseek_v3
        written = released.write(config, read_details(tmp_path))
        assert read(written) == config
        assert written["model_type"] == tree["model_type"]
        shared = written.keys() & tree.keys() - {"rope_scaling"}
        assert {key: written[key] for key in shared} == {key: tree[key] for key in shared}
        needed = tree.keys() - {"aux_loss_alpha", "seq_aux", "quantization_config", "dtype", "torch_dtype"}
        needed -= {"rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id"}
        assert needed <= written.keys()


def served_layers(tree):
    """Mixer and feed-forward of each layer as the servers' `KimiLinearForCausalLM` build them, with what they assert.

    Written from reading models/kimi_linear.py and configs/kimi_linear.py of vLLM and SGLang, and vLLM's layers/kda.py.
    """
    linear = tree["linear_attn_config"]
    assert tree["architectures"] == ["KimiLinearForCausalLM"]
    assert tree["model_type"] == "kimi_linear"
    assert tree["hidden_act"] == "silu"
    assert tree["tie_word_embeddings"] is False  # else vLLM skips lm_head.weight, which it does not tie
    assert tree.get("moe_router_activation_func", "sigmoid") == "sigmoid"
    assert min(tree["max_position_embeddings"], tree["model_max_length"]) >= 1  # the smaller one holds
    assert 2 <= linear["short_conv_kernel_size"] <= 4
    layers = []
    for layer in range(tree["num_hidden_layers"]):
        if layer + 1 in linear["kda_layers"]:
            mixer = ("kda", linear["num_heads"], linear["head_dim"])
        else:
            assert layer + 1 in linear["full_attn_layers"]
            assert tree["mla_use_nope"] is True
            assert tree["q_lora_rank"] is None
            mixer = ("mla", tree["num_attention_heads"], *[tree[name] for name in LATENT_FIELDS])
        is_moe = tree.get("num_experts") is not None and layer >= tree["first_k_dense_replace"]
        if is_moe and layer % tree["moe_layer_freq"] == 0:
            assert tree["use_grouped_topk"] is True
            assert tree["num_shared_experts"] >= 1
            layers.append((mixer, tuple(tree[name] for name in EXPERT_FIELDS)))
        else:
            layers.append((mixer, tree["intermediate_size"]))
    return layers


LATENT_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
EXPERT_FIELDS = ("num_experts", "num_experts_per_token", "moe_intermediate_size", "num_expert_group", "topk_group")


def test_servers_find_what_they_ask_of_a_kimi_linear_config(tmp_path):
    details = Details(max_positions=77)
    save(tiny_model(CONFIGS["kimi_linear"]), tmp_path / "m", details=details)
    tree = json.loads((tmp_path / "m" / "config.json").read_text())
    kda, mla, experts = ("kda", 2, 16), ("mla", 2, 16, 8, 4, 8), (8, 2, 24, 1, 1)
    assert served_layers(tree) == [(kda, 48), (kda, experts), (kda, experts), (mla, experts)]
    assert (tree["bos_token_id"], tree["eos_token_id"], tree["pad_token_id"]) == (None, None, None)
    assert (tree["dtype"], tree["max_position_embeddings"], tree["model_max_length"]) == ("float32", 77, 77)
    assert served_layers(KIMI_LINEAR_48B | {"max_position_embeddings": 1}) == served_layers(
        kimi_linear.write(PRESETS["kimi-linear-48b-a3b"], details)
    )


def test_aliases_of_fields_are_read(read):
    tree = copy.deepcopy(KIMI_LINEAR_48B)
    renamed = {
        "num_experts_per_token": "num_experts_per_tok",
        "num_shared_experts": "n_shared_experts",
        "moe_renormalize": "norm_topk_prob",
        "num_expert_group": "n_group",
        "num_experts": "num_local_experts",
    }
    for name, alias in renamed.items():
        tree[alias] = tree.pop(name)
    linear = tree.pop("linear_attn_config")
    tree["layer_types"] = [
        "full_attention" if layer + 1 in linear["full_attn_layers"] else "linear_attention" for layer in range(27)
    ]
    tree |= {"linear_num_heads": 32, "linear_head_dim": 128, "linear_conv_kernel_dim": 4}
    del tree["first_k_dense_replace"]
    tree["mlp_layer_types"] = ["dense"] + ["sparse"] * 26
    assert read(tree) == PRESETS["kimi-linear-48b-a3b"]


def test_extensions_of_later_relatives_are_read(read):
    tree = copy.deepcopy(KIMI_LINEAR_48B)
    tree["linear_attn_config"] |= {"gate_lower_bound": -5.0, "use_full_rank_gate": True}
    tree |= {"mla_use_output_gate": True, "q_lora_rank": 64, "mla_use_nope": False}
    config = read(tree)
    assert (config.kda.gate_lower_bound, config.kda.full_rank_gate) == (-5.0, True)
    assert (config.mla.output_gate, config.mla.q_rank, config.mla.use_rope) == (True, 64, True)
    tree["linear_attn_config"]["gate_lower_bound"] = -9.0
    with pytest.raises(CheckpointError, match=r"config.json: gate_lower_bound must be in \[-5, 0\)"):
        read(tree)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_both_names_of_the_kind_of_scaling_are_read(read, key):
    scaling = {key: "yarn", "factor": 4, "attention_factor": 1.5, "original_max_position_embeddings": 64}
    rope = read({**LLAMA, "rope_scaling": scaling}).gqa.rope
    assert (rope.scaling, rope.factor, rope.original_max_positions) == ("yarn", 4.0, 64)
    assert rope.temperature(rope.mscale) == pytest.approx(1.5)
    newer = {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}
    assert read({**LLAMA, "rope_parameters": newer}).gqa.rope == RopeConfig(theta=5.0, scaling="linear", factor=2.0)


BAD = [
    (KIMI_LINEAR_48B, {"linear_attn_config": None}, "linear_attn_config is missing"),
    (KIMI_LINEAR_48B, {"kda_layers": [1, 2]}, r"kda_layers and full_attn_layers must be every layer once"),
    (KIMI_LINEAR_48B, {"full_attn_layers": [4, 8, 12, 16, 20, 24, 26, 27]}, r"twice \[26\]"),
    (KIMI_LINEAR_48B, {"full_attn_layers": [0]}, "full_attn_layers must be layers counted from 1 to 27"),
    (KIMI_LINEAR_48B, {"layer_types": ["linear_attention"] * 27}, "layer_types must be as linear_attn_config"),
    (KIMI_LINEAR_48B, {"kda_layers": "all"}, "kda_layers must be a list of integers"),
    (KIMI_LINEAR_48B, {"num_experts_per_token": 300}, "num_experts_per_tok must be <= the 256 experts"),
    (KIMI_LINEAR_48B, {"n_group": 7, "num_expert_group": 7}, "n_group must be a divisor"),
    (KIMI_LINEAR_48B, {"n_group": 2}, "n_group and num_expert_group mean the same but differ"),
    (KIMI_LINEAR_48B, {"short_conv_kernel_size": 0}, "short_conv_kernel_size must be an integer >= 1"),
    (KIMI_LINEAR_48B, {"moe_router_activation_func": "softmax"}, "moe_router_activation_func must be 'sigmoid'"),
    (KIMI_LINEAR_48B, {"mlp_layer_types": ["sparse"] * 26 + ["dense"]}, "mlp_layer_types must be dense layers first"),
    (KIMI_K2, {"kv_lora_rank": None}, "kv_lora_rank is missing"),
    (KIMI_K2, {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid', got 'softmax'"),
    (KIMI_K2, {"topk_method": "greedy"}, "topk_method must be 'noaux_tc'"),
    (KIMI_K2, {"num_key_value_heads": 8}, "num_key_value_heads must be 64"),
    (KIMI_K2, {"hidden_size": "wide"}, "hidden_size must be an integer >= 1, got 'wide'"),
    (KIMI_K2, {"vocab_size": True}, "vocab_size must be an integer"),
    (KIMI_K2, {"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
    (KIMI_K2, {"rope_theta": "big"}, "rope_theta must be a number"),
    (KIMI_K2, {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type must be default, linear, llama3 or yarn"),
    (KIMI_K2, {"rope_scaling": [1]}, "rope_scaling must be an object"),
    (KIMI_K2, {"quantization_config": {"quant_method": "awq"}}, "quant_method must be fp8 or compressed-tensors"),
    (KIMI_K2, {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size must be two sizes"),
    (KIMI_K2, {"rope_interleave": False}, "rope_interleave must be True"),
    (KIMI_K2, {"model_type": "gpt2"}, "model_type must be one of kimi_linear, deepseek_v3, kimi_k2, llama"),
    (LLAMA, {"attention_bias": True}, "attention_bias must be False"),
    (LLAMA, {"num_attention_heads": 5}, "num_attention_heads must be a divisor of hidden_size 32"),
    (LLAMA, {"model_type": "mistral", "sliding_window": 4096}, "sliding_window must be null"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings must be given"),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5}},
        "attention_factor must be at least 1",
    ),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate must be True"),
]


@pytest.mark.parametrize(("tree", "changes", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_configurations_are_refused_by_the_field_s_name(read, tree, changes, message):
    bad = copy.deepcopy(tree)
    inner = bad.get("linear_attn_config") or {}
    for key, value in changes.items():
        (inner if key in inner else bad)[key] = value
    with pytest.raises(CheckpointError, match=message):
        read(bad)


KDA = CONFIGS["kimi_linear"].kda
UNWRITABLE = {
    "moba key convolution": (replace(MOBA, moba=replace(MOBA.moba, moba_key_conv=3)), "keys have no convolution"),
    "mixed kinds": (
        replace(CONFIGS["kimi_linear"], layers=("kda", "gqa"), gqa=GQAConfig(**GQA)),
        "no released format has layers gqa and kda",
    ),
    "no rotation": (replace(CONFIGS["llama"], gqa=GQAConfig(**GQA, use_rope=False)), "queries and keys are rotated"),
    "bias and norm": (replace(CONFIGS["llama"], gqa=GQAConfig(**GQA, qkv_bias=True, qk_norm=True)), "either biases or"),
    "bounded": (replace(CONFIGS["kimi_linear"], kda=replace(KDA, gate_lower_bound=-5.0)), "decay is not bounded"),
    "full-rank gate": (replace(CONFIGS["kimi_linear"], kda=replace(KDA, full_rank_gate=True)), "rank of a head"),
    "no convolution": (replace(CONFIGS["kimi_linear"], kda=replace(KDA, conv_size=0)), "2 to 4 taps"),
    "long convolution": (replace(CONFIGS["kimi_linear"], kda=replace(KDA, conv_size=5)), "2 to 4 taps"),
    "ranked queries": (
        replace(CONFIGS["kimi_linear"], mla=replace(CONFIGS["kimi_linear"].mla, q_rank=8)),
        r"queries have no rank \(q_rank\), which vLLM and SGLang do not read",
    ),
    "head gate": (replace(CONFIGS["kimi_linear"], kda=replace(KDA, gate="head")), "decay per channel"),
    "grouped values": (replace(CONFIGS["kimi_linear"], kda=replace(KDA, num_value_heads=4)), "as many value heads"),
    "rotated hybrid": (replace(CONFIGS["kimi_linear"], mla=ROTATED), "latent attention has no rotation"),
    "biased weights": (
        replace(CONFIGS["moonlight"], moe=MoEConfig(num_experts=8, top_k=2, d_expert=8, weight_includes_bias=True)),
        "do not include the router's bias",
    ),
    "no shared expert": (
        replace(CONFIGS["moonlight"], moe=MoEConfig(num_experts=8, top_k=2, d_expert=8, num_shared_experts=0)),
        "at least one shared expert",
    ),
    "groups of one": (
        replace(CONFIGS["moonlight"], moe=MoEConfig(num_experts=4, top_k=1, d_expert=8, num_groups=4, topk_groups=2)),
        "a group has two experts or more",
    ),
    "latent norm": (
        replace(CONFIGS["moonlight"], mla=replace(ROTATED, kv_norm_eps=1e-5)),
        "norms of latents have eps 1e-06",
    ),
    "gqa and moe": (replace(CONFIGS["llama"], moe=MoEConfig(num_experts=2, top_k=1, d_expert=8)), "layers are dense"),
}


@pytest.mark.parametrize(("config", "message"), UNWRITABLE.values(), ids=UNWRITABLE.keys())
def test_what_a_format_cannot_express_is_refused_and_ours_keeps_it(tmp_path, config, message):
    model = build_model(config, seed=0)
    with pytest.raises(CheckpointError, match=message) as refused:
        save(model, tmp_path / "m")
    assert "the format perilune keeps everything" in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    save(model, tmp_path / "m", "perilune")
    assert read_config(tmp_path / "m") == config


def test_our_format_keeps_every_setting(tmp_path):
    config = replace(
        MOBA,
        layers=("kda", "mla", "gqa", "moba"),
        kda=KDAConfig(num_heads=2, head_dim=8, gate_lower_bound=-3.0, chunk_size=16, output_gate="swish"),
        mla=replace(ROTATED, output_gate=True),
        gqa=GQAConfig(**GQA, rope=RopeConfig(scaling="llama3", factor=2.0)),
        moba=MoBAConfig(**GQA, moba_chunk_size=8, moba_topk=2, moba_policy="minmax"),
        moba_layers=(3,),
    )
    details = Details(model_type="x", max_positions=5, eos_ids=(1, 2), generation={"temperature": 0.5})
    save(build_model(config, seed=0), tmp_path / "m", "perilune", details=details)
    assert (read_config(tmp_path / "m"), read_details(tmp_path / "m")) == (config, details)
    assert MLA["num_heads"] == config.mla.num_heads


def test_a_forged_config_of_ours_is_refused(tmp_path):
    path = tmp_path / "m" / "config.json"
    save(build_model(CONFIGS["llama"], seed=0), path.parent, "perilune")
    good = json.loads(path.read_text())
    forged = [
        ({"format_version": 2}, "has format_version 2; this version of perilune reads 1"),
        ({"more": 1}, "must have exactly the keys"),
        ({"model": {**good["model"], "widht": 1}}, "model has no key 'widht'"),
        ({"model": {**good["model"], "d_model": "32"}}, "model.d_model must be int"),
        ({"model": {**good["model"], "d_model": 0}}, "model: d_model must be > 0"),
        ({"model": {**good["model"], "layers": "gqa"}}, "model.layers must be"),
        (
            {"model": {**good["model"], "gqa": {**good["model"]["gqa"], "qkv_bias": 1}}},
            "model.gqa.qkv_bias must be bool",
        ),
        ({"model": {**good["model"], "gqa": {"head_dim": 8}}}, "model.gqa.num_heads is missing"),
        ({"model": {**good["model"], "gqa": []}}, "model.gqa must be an object"),
        ({"model": {**good["model"], "moba_layers": "some"}}, "model.moba_layers must be Literal"),
    ]
    for changes, message in forged:
        path.write_text(json.dumps(good))
        edit_json(path, **changes)
        with pytest.raises(CheckpointError, match=message):
            read_config(path.parent)
