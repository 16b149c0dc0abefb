"""Weights on disk: dialects, shards, quantized tensors, and everything that may be wrong with them."""

import itertools
import json
import logging
import re
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from perilune.errors import CheckpointError
from perilune.models import build_model, load, read_config, save
from perilune.models.checkpoint.opening import open_checkpoint
from perilune.models.checkpoint.problems import grouped
from perilune.tensorreader import TensorFile
from tests.models.checkpoint.tiny import (
    CONFIGS,
    assert_same_model,
    edit_tensors,
    logits,
    some_tokens,
)


@pytest.mark.parametrize("format", ["hf", "perilune"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_bit_by_bit(models, tmp_path, name, format):
    save(models[name], tmp_path / "m", format, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded = load(tmp_path / "m")
    assert_same_model(loaded, models[name])
    assert loaded.config == models[name].config
    assert not loaded.training
    buffers = {name.rsplit(".", 1)[-1]: buffer for name, buffer in loaded.named_buffers()}
    assert torch.isneginf(buffers["max_logits"]).all()
    assert not buffers.get("expert_load", torch.zeros(1)).any()


def test_dtype_and_device_of_a_loaded_model(written):
    path = written("kimi_linear")
    half = load(path, dtype=torch.bfloat16)
    assert half.embed_tokens.weight.dtype == torch.bfloat16
    assert half.blocks()[0].mixer.A_log.dtype == torch.float32
    assert load(path, dtype=torch.float64).embed_tokens.weight.dtype == torch.float64
    assert load(path, device="meta").embed_tokens.weight.is_meta


def rename(tensors, *pairs):
    for old, new in pairs:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def forget_gate(tensors):
    names = ("A_log", "dt_bias", "f_a_proj", "f_b_proj")
    return rename(tensors, *[(f".{name}", f".forget_gate.{name}") for name in names])


def fused_conv(tensors):
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{prefix}{part}_conv1d.weight") for part in "qkv"]
        tensors[f"{prefix}conv1d.weight"] = torch.cat(parts)
    return tensors


def stacked_experts(tensors):
    for layer in range(1, 4):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts."
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{expert}.{name}.weight") for expert in range(8)])
            for name in ("w1", "w3", "w2")
        )
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    return tensors


def flat_scalars(tensors):
    return {
        name: tensor.flatten() if "A_log" in name else tensor[:, 0] if "conv1d" in name else tensor
        for name, tensor in tensors.items()
    }


DIALECTS = {
    "forget gate": forget_gate,
    "fused convolution": fused_conv,
    "stacked experts": stacked_experts,
    "experts named as others": lambda t: rename(
        t, (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."), ("block_sparse_moe", "mlp")
    ),
    "dense layer named as experts": lambda t: rename(t, ("layers.0.mlp", "layers.0.block_sparse_moe")),
    "low-rank gates of the operator library": lambda t: rename(
        t,
        (".f_a_proj.", ".f_proj.0."),
        (".f_b_proj.", ".f_proj.1."),
        (".g_a_proj.", ".g_proj.0."),
        (".g_b_proj.", ".g_proj.1."),
    ),
    "scalars without empty axes": flat_scalars,
    "positions of older exporters": lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
}


@pytest.mark.parametrize("change", DIALECTS.values(), ids=DIALECTS.keys())
def test_dialects_of_kimi_linear_are_read(models, written, change):
    path = written("kimi_linear")
    before = load_file(path / "model.safetensors").keys()
    edit_tensors(path, change)
    assert load_file(path / "model.safetensors").keys() != before or change is flat_scalars
    assert_same_model(load(path), models["kimi_linear"])


def test_the_operator_library_s_gate_has_a_bias(models, written):
    path = written("kimi_linear")
    biases = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    def change(tensors):
        for layer in range(3):
            tensors[f"model.layers.{layer}.self_attn.g_proj.1.bias"] = biases[layer]
        return rename(tensors, (".g_a_proj.", ".g_proj.0."), (".g_b_proj.", ".g_proj.1."))

    edit_tensors(path, change)
    loaded = load(path)
    assert loaded.config.kda.output_gate_bias
    for block, bias in zip(loaded.blocks(), biases, strict=False):
        assert torch.equal(block.mixer.g_b_proj.bias, bias)
    assert (logits(loaded, some_tokens()) - logits(models["kimi_linear"], some_tokens())).abs().max() > 1e-3


def test_extra_layers_are_left_out_with_one_warning(models, written, caplog):
    path = written("deepseek_v3")
    edit_tensors(
        path,
        lambda t: {**t, "model.layers.2.eh_proj.weight": torch.ones(2), "model.layers.2.enorm.weight": torch.ones(2)},
    )
    with caplog.at_level(logging.WARNING, logger="perilune"):
        assert_same_model(load(path), models["deepseek_v3"])
    assert [record.getMessage()[:33] for record in caplog.records] == ["2 tensors behind layer 1 are left"]


@pytest.mark.parametrize(("name", "layer"), [("llama", 2), ("deepseek_v3", 3)])
def test_other_extra_layers_are_unexpected(written, name, layer):
    path = written(name)
    edit_tensors(path, lambda t: {**t, f"model.layers.{layer}.input_layernorm.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=rf"unexpected:\n.*layers\.{layer}\.input_layernorm"):
        load(path)


def test_a_tied_output_matrix_may_be_stored_again(models, written):
    path = written("llama")
    edit_tensors(path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert_same_model(load(path), models["llama"])


def test_everything_that_does_not_fit_is_told_at_once(written):
    path = written("kimi_linear")

    def change(tensors):
        for expert in range(8):
            del tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"]
            del tensors[f"model.layers.2.block_sparse_moe.experts.{expert}.w2.weight"]
            del tensors[f"model.layers.3.block_sparse_moe.experts.{expert}.w2.weight"]
        del tensors["model.layers.1.block_sparse_moe.experts.5.w3.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(5, 7)
        tensors["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(5, 7)
        tensors["surprise"] = torch.zeros(1)

    edit_tensors(path, change)
    with pytest.raises(CheckpointError) as refused:
        load(path)
    first, *lines = str(refused.value).splitlines()
    assert first.endswith("do not fit its config.json: 25 missing, 1 unexpected, 2 of another shape")
    assert lines == [
        "missing:",
        "  model.layers.1.block_sparse_moe.experts.{0-7}.w1.weight (8 tensors)",
        "  model.layers.1.block_sparse_moe.experts.5.w3.weight",
        "  model.layers.{2-3}.block_sparse_moe.experts.{0-7}.w2.weight (16 tensors)",
        "unexpected:",
        "  surprise",
        "of another shape:",
        "  model.layers.{0,2}.self_attn.q_proj.weight has [5, 7], expected [32, 32] (2 tensors)",
    ]


@given(
    st.lists(
        st.builds(
            "{}layers.{}.experts.{}.{}".format,
            st.sampled_from(["", "m."]),
            st.integers(0, 5),
            st.sampled_from(["0", "1", "2", "007", "x"]),
            st.sampled_from(["w", "3", "w has [1]", "w\0: 0.1.2"]),
        ),
        unique=True,
    )
)
def test_grouped_lines_stand_for_every_line_once(lines):
    told = grouped(lines)
    counts = [re.search(r" \((\d+) tensors\)$", line) for line in told]
    assert sum(int(count[1]) if count else 1 for count in counts) == len(lines)
    found = []
    for line, count in zip(told, counts, strict=True):
        text = line[: count.start()] if count else line
        ranges = [spelled(part) for part in re.findall(r"\{([-\d,]+)\}", text)]
        frame = re.sub(r"\{[-\d,]+\}", "{}", text)
        found += [frame.format(*numbers) for numbers in itertools.product(*ranges)]
    assert sorted(found) == sorted(lines)


def spelled(text):
    runs = [[int(end) for end in run.split("-")] for run in text.split(",")]
    return [number for run in runs for number in range(run[0], run[-1] + 1)]


def test_two_names_for_one_tensor_are_refused(written):
    path = written("kimi_linear")
    edit_tensors(path, lambda t: {**t, "model.layers.0.self_attn.forget_gate.A_log": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="the same as"):
        load(path)


def test_pickles_are_refused(written, tmp_path):
    path = written("llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: a pickle file can run code and is never opened"):
        load(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        load(path)
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file; name the directory"):
        load(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="is no model directory"):
        read_config(tmp_path / "nothing")


def test_a_forged_index_is_refused(models, tmp_path):
    path = tmp_path / "m"
    save(models["llama"], path, max_shard_bytes=20_000)
    index = path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    first = sorted(set(good.values()))[0]
    outside = shutil.copy(path / first, tmp_path / "outside.safetensors")
    cases = {
        "not allowed": {**good, "model.norm.weight": f"../{outside.name}"},
        "1 tensors are not in the files that it names\n  more in model-00001": {**good, "more": first},
        "missing or unreadable": {**good, "model.norm.weight": "other.safetensors"},
        "must be an object of tensor names": [],
    }
    for message, weight_map in cases.items():
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            load(path)


def test_links_of_a_download_cache_are_followed(models, written, tmp_path):
    path = written("llama")
    (tmp_path / "snapshot").mkdir()
    for file in path.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert_same_model(load(tmp_path / "snapshot"), models["llama"])


@pytest.fixture(scope="module")
def opened(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("opened")
    save(models["kimi_linear"], path / "linear")
    save(models["qwen2"], path / "qwen")
    with open_checkpoint(path / "linear") as linear, open_checkpoint(path / "qwen") as qwen:
        yield {"kimi_linear": linear, "qwen2": qwen}


@given(st.data())
def test_any_run_of_elements_is_the_model_s(models, opened, data):
    name = data.draw(st.sampled_from(["kimi_linear", "qwen2"]))
    state = models[name].state_dict()
    ours = data.draw(st.sampled_from(sorted(state)))
    flat = state[ours].flatten()
    start = data.draw(st.integers(0, len(flat) - 1))
    count = data.draw(st.integers(1, len(flat) - start))
    assert torch.equal(opened[name].read(ours, start, count), flat[start : start + count])


def test_a_tensor_file_is_read_in_parts(tmp_path):
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert {name: entry.shape for name, entry in file.entries.items()} == {"a": (3, 4), "b": (5,), "empty": (0, 3)}
        assert torch.equal(file.read("a"), tensors["a"])
        assert torch.equal(file.read("a", 5, 3), torch.tensor([5.0, 6.0, 7.0]))
        assert file.read("b", 5, 0).shape == (0,)
        assert file.read("empty").shape == (0, 3)
        for start, count in ((-1, 2), (4, 2), (0, 6), (1, None)):
            with pytest.raises(ValueError, match="b has 5 elements"):
                file.read("b", start, count)


def test_loading_does_not_draw_weights(written, monkeypatch):
    path = written("llama")
    monkeypatch.setattr(torch, "randn", None)
    assert load(path).config == build_model(CONFIGS["llama"], seed=0, device="meta").config
