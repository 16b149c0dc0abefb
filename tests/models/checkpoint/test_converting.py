"""Conversions: the same model whatever the way, whole or not at all, through the command line too."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from perilune import models as library
from perilune import tensorfile
from perilune.errors import CheckpointError
from perilune.models import Details, convert, load, read_config, read_details, save
from tests.models.checkpoint.tiny import CONFIGS, MOBA, assert_same_model, edit_json, logits, some_tokens, tiny_model


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_same_file(models, tmp_path, name):
    save(models[name], tmp_path / "a", details=Details(max_positions=77, eos_ids=(5,)))
    convert(tmp_path / "a", tmp_path / "b", "perilune", max_shard_bytes=10_000)
    convert(tmp_path / "b", tmp_path / "c", "hf")
    assert_same_model(load(tmp_path / "b"), models[name])
    assert {path.name for path in (tmp_path / "c").iterdir()} == {path.name for path in (tmp_path / "a").iterdir()}
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "c" / path.name).read_bytes() == path.read_bytes(), path.name


def test_kimi_k2_stays_kimi_k2(models, tmp_path):
    save(models["deepseek_v3"], tmp_path / "a")
    edit_json(tmp_path / "a" / "config.json", model_type="kimi_k2")
    generation = {"eos_token_id": 3, "max_length": 9}
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(generation))
    convert(tmp_path / "a", tmp_path / "b", "perilune")
    convert(tmp_path / "b", tmp_path / "c")
    save(load(tmp_path / "c"), tmp_path / "d", details=read_details(tmp_path / "c"))
    for path in (tmp_path / "c", tmp_path / "d"):
        assert json.loads((path / "config.json").read_text())["model_type"] == "kimi_k2"
        assert json.loads((path / "generation_config.json").read_text()) == generation


def test_quantized_checkpoints_become_plain_and_quantized_again(models, tmp_path):
    save(models["moonlight"], tmp_path / "fp8", quantize="fp8")
    convert(tmp_path / "fp8", tmp_path / "plain")
    assert not any(t.dtype == torch.float8_e4m3fn for t in load_file(tmp_path / "plain" / "model.safetensors").values())
    convert(tmp_path / "plain", tmp_path / "again", quantize="fp8")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("fp8", "again"))
    for name, tensor in first.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def test_a_moba_model_is_written_as_what_its_weights_allow(tmp_path):
    model = tiny_model(MOBA)
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.config.layers == ("gqa", "gqa")
    library.set_attention_mode(model, "full")
    torch.testing.assert_close(logits(loaded, some_tokens()), logits(model, some_tokens()))
    tokens = torch.cat([some_tokens()] * 2)
    library.set_attention_mode(model, "moba")
    assert (logits(loaded, tokens) - logits(model, tokens)).abs().max() > 1e-3


def test_modes_of_block_attention_are_kept_in_our_format(tmp_path):
    model = tiny_model(MOBA)
    library.set_attention_mode(model, "full")
    save(model, tmp_path / "m", "perilune")
    assert library.attention_modes(load(tmp_path / "m")) == library.attention_modes(model)
    assert read_config(tmp_path / "m") == replace(MOBA, moba_layers=())


def test_tokenizer_files_are_copied_and_code_of_models_is_not(models, tmp_path):
    files = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}"}
    save(models["llama"], tmp_path / "a", tokenizer_files=files)
    (tmp_path / "a" / "modeling.py").write_text("print()")
    convert(tmp_path / "a", tmp_path / "b", "perilune")
    assert {name: (tmp_path / "b" / name).read_bytes() for name in files} == files
    assert not (tmp_path / "b" / "modeling.py").exists()
    for name in ("../x", "config.json", ".hidden", "model.safetensors", "a/b", "additional_chat_templates/../x.jinja"):
        with pytest.raises(ValueError, match="tokenizer_files must have plain names"):
            save(models["llama"], tmp_path / "c", tokenizer_files={name: b""})


def test_nothing_is_overwritten(models, tmp_path):
    (tmp_path / "empty").mkdir()
    save(models["llama"], tmp_path / "empty")
    before = {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    (tmp_path / "file").write_text("x")
    for target in ("empty", "file"):
        with pytest.raises(CheckpointError, match="is there already and is not overwritten"):
            save(models["qwen2"], tmp_path / target)
    assert {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()} == before


def test_a_stopped_conversion_leaves_nothing_and_can_be_started_again(models, tmp_path):
    save(models["llama"], tmp_path / "a")
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "a", tmp_path / "b", "perilune", max_shard_bytes=5000, on_bytes=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    (tmp_path / ".b.partial").mkdir()  # what a killed process leaves
    (tmp_path / ".b.partial" / "model.safetensors").write_bytes(b"half")
    seen.clear()
    convert(tmp_path / "a", tmp_path / "b", "perilune", on_bytes=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in load_file(tmp_path / "b" / "model.safetensors").values())
    assert_same_model(load(tmp_path / "b"), models["llama"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_full_disk_is_one_clear_error(models, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(tensorfile, "create_file", full)
    with pytest.raises(CheckpointError, match=r"m: cannot be written \(No space left on device\)"):
        save(models["llama"], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_pieces_that_do_not_make_a_tensor_are_refused(tmp_path):
    layout = {"a": torch.empty(4, device="meta")}
    with pytest.raises(ValueError, match="the pieces of a have 3 elements, the tensor 4"):
        tensorfile.stream_tensors(tmp_path / "x", layout, lambda _: [torch.zeros(3)])
    with pytest.raises(TypeError, match=r"a piece of a is torch.int64"):
        tensorfile.stream_tensors(tmp_path / "y", layout, lambda _: [torch.zeros(4, dtype=torch.int64)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx"}, "format must be 'hf' or 'perilune'"),
        ({"dtype": torch.int8}, "dtype must be a float dtype"),
        ({"quantize": "int4"}, "quantize must be 'fp8' or None"),
        ({"quantize": "fp8", "format": "perilune"}, "quantize must be None with format 'perilune'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be >= 1"),
    ],
)
def test_bad_options_are_refused(models, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        save(models["llama"], tmp_path / "m", **options)


def test_the_command_converts_and_explains(models, tmp_path, cli):
    save(models["qwen3"], tmp_path / "a")
    code, out, err = cli("convert", tmp_path / "a", tmp_path / "b", "--to", "perilune", "--dtype", "bfloat16")
    assert (code, out) == (0, f"{tmp_path / 'b'}\n"), err
    assert "convert" in err
    assert_same_model(load(tmp_path / "b"), load(tmp_path / "a", dtype=torch.bfloat16))
    code, _, err = cli("convert", tmp_path / "a", tmp_path / "b", "--quiet")
    assert code == 1
    assert "is there already and is not overwritten" in err
    code, _, err = cli("convert", tmp_path / "nothing", tmp_path / "c")
    assert code == 1
    assert "is no model directory" in err
    code, _, err = cli("convert", tmp_path / "a", tmp_path / "c", "--stage", "sft")
    assert code == 1
    assert "is not a run directory" in err
    assert cli("convert", tmp_path / "a", tmp_path / "c", "--to", "perilune", "--fp8")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_ctrl_c_ends_with_its_exit_code(models, tmp_path, cli, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    save(models["llama"], tmp_path / "a")
    monkeypatch.setattr(tensorfile, "create_file", stop)
    code, out, err = cli("convert", tmp_path / "a", tmp_path / "b", "--quiet")
    assert (code, out, err) == (130, "", "stopped; nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
