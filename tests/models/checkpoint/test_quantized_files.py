"""Quantized checkpoints: what is written as FP8, and FP8 and INT4 read for the numbers that they stand for."""

import json

import pytest
import torch
from safetensors.torch import load_file

from perilune.errors import CheckpointError
from perilune.models import load, save
from perilune.models.checkpoint.quantization import dequantize_fp8, quantize_fp8
from tests.models.checkpoint.released import INT4
from tests.models.checkpoint.test_quantization import pack
from tests.models.checkpoint.tiny import edit_json, edit_tensors, logits, some_tokens


def linear_weights(tensors):
    skipped = ("embed", "lm_head", "norm", "mlp.gate.")
    return [name for name, tensor in tensors.items() if tensor.ndim == 2 and not any(part in name for part in skipped)]


def test_fp8_is_written_and_read(models, tmp_path):
    save(models["deepseek_v3"], tmp_path / "m", dtype=torch.bfloat16, quantize="fp8")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    save(models["deepseek_v3"], tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    quantized = linear_weights(plain)
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in quantized
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn} == set(quantized)
    assert stored.keys() == plain.keys() | {f"{name}_scale_inv" for name in quantized}
    for name in quantized:
        expected, scale = quantize_fp8(plain[name])
        assert torch.equal(stored[name].view(torch.uint8), expected.view(torch.uint8)), name
        assert torch.equal(stored[f"{name}_scale_inv"], scale), name
    assert json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["weight_block_size"] == [
        128,
        128,
    ]
    loaded = load(tmp_path / "m", dtype=torch.float32)
    assert load(tmp_path / "m").embed_tokens.weight.dtype == torch.bfloat16
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    expected = dequantize_fp8(stored[name], stored[f"{name}_scale_inv"])
    assert torch.equal(loaded.blocks()[1].ffn.w_down[3], expected)


def test_fp8_leaves_layers_of_a_row_a_head_alone(models, tmp_path):
    save(models["kimi_linear"], tmp_path / "m", quantize="fp8")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    told = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert told == [f"model.layers.{layer}.self_attn.b_proj" for layer in range(3)]
    for name in told:
        assert stored[f"{name}.weight"].dtype == torch.float32
        assert f"{name}.weight_scale_inv" not in stored
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    beta = load(tmp_path / "m").blocks()[0].mixer.b_proj.weight
    assert torch.equal(beta, models["kimi_linear"].blocks()[0].mixer.b_proj.weight)


def test_other_fp8_blocks_are_read(models, written):
    path = written("deepseek_v3")

    def change(tensors):
        for name in linear_weights(tensors):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8(tensors[name], (5, 7))

    edit_tensors(path, change)
    edit_json(path / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [5, 7]})
    found, expected = logits(load(path), some_tokens()), logits(models["deepseek_v3"], some_tokens())
    assert (found - expected).norm() / expected.norm() < 0.2


def test_fp8_without_fitting_scales_is_refused_by_name(models, tmp_path):
    save(models["moonlight"], tmp_path / "m", quantize="fp8")

    def change(tensors):
        del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
        tensors["model.layers.1.self_attn.o_proj.weight_scale_inv"] = torch.ones(2, 3)

    edit_tensors(tmp_path / "m", change)
    with pytest.raises(CheckpointError) as refused:
        load(tmp_path / "m")
    assert "model.layers.0.self_attn.o_proj.weight: FP8 without its weight_scale_inv" in str(refused.value)
    assert "model.layers.1.self_attn.o_proj.weight_scale_inv: shape (2, 3), expected (1, 1)" in str(refused.value)


def test_int4_experts_are_read(models, written):
    path, numbers = written("deepseek_v3"), {}

    def change(tensors):
        generator = torch.Generator().manual_seed(0)
        for name in [name for name in tensors if ".experts." in name]:
            rows, columns = tensors.pop(name).shape
            stem = name.removesuffix(".weight")
            numbers[name] = torch.randint(-8, 8, (rows, columns), generator=generator)
            tensors[f"{stem}.weight_packed"] = pack(numbers[name])
            tensors[f"{stem}.weight_scale"] = torch.full((rows, 1), 0.5, dtype=torch.bfloat16)
            tensors[f"{stem}.weight_shape"] = torch.tensor([rows, columns])

    edit_tensors(path, change)
    edit_json(path / "config.json", quantization_config=INT4)
    loaded = load(path)
    for layer, block in enumerate(loaded.blocks()):
        names = [f"model.layers.{layer}.mlp.experts.5.{part}_proj.weight" for part in ("gate", "up", "down")]
        gate, up, down = (numbers[name] * 0.5 for name in names)
        assert torch.equal(block.ffn.w_gate_up[5], torch.cat([gate, up]))
        assert torch.equal(block.ffn.w_down[5], down)
    edit_tensors(path, lambda t: {n: x for n, x in t.items() if not n.endswith("experts.5.up_proj.weight_scale")})
    with pytest.raises(CheckpointError, match=r"experts.5.up_proj.weight_packed: without its weight_scale"):
        load(path)
    weights = {**INT4["config_groups"]["group_0"]["weights"], "symmetric": False}
    edit_json(path / "config.json", quantization_config={**INT4, "config_groups": {"group_0": {"weights": weights}}})
    with pytest.raises(CheckpointError, match="symmetric must be True"):
        load(path)
