"""GGUF files against transformers, against the files they are made of, and damaged ones."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perilune import models
from perilune.data import gguf_template, gguf_tokenizer
from perilune.errors import CheckpointError, DataError
from perilune.models import GGUFFile
from perilune.models.checkpoint.gguf_header import read_header
from perilune.nn import RopeConfig
from perilune.nn.rope import inverse_frequencies
from tests.models.gguf_files import reference, write, write_with_text

TOKENS = torch.arange(3, 23)
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
CASES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path, case):
    architecture, more = CASES[case]
    theirs = reference(architecture, **ROPE, **more)
    path = write(tmp_path / "m.gguf", theirs, architecture)
    with torch.inference_mode():
        expected = theirs(TOKENS[None]).logits[0]
        found = models.load(path)(TOKENS, torch.tensor([0, len(TOKENS)], dtype=torch.int32))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_quantized_weights_are_what_the_original_reader_says(tmp_path, kind):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    path = write(tmp_path / "m.gguf", reference("qwen2"), "qwen2", kind=kind)
    file = GGUFFile(path)
    assert file.main_dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    for tensor in GGUFReader(path).tensors:
        if tensor.name == "blk.1.attn_q.weight":
            expected = dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(file.read("model.layers.1.self_attn.q_proj.weight").numpy(), expected)
    assert models.load(path).embed_tokens.weight.dtype == file.main_dtype


def test_scaled_rotations_are_read(tmp_path):
    theirs = reference("llama")
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write(tmp_path / "m.gguf", theirs, "llama", keys=keys)
    assert models.read_config(path).gqa.rope == RopeConfig(theta=50000.0, scaling="linear", factor=4.0)
    llama3 = RopeConfig(
        theta=50000.0, scaling="llama3", factor=8.0, original_max_positions=8192, beta_fast=4.0, beta_slow=1.0
    )
    plain = inverse_frequencies(32, RopeConfig(theta=50000.0))
    divisors = torch.tensor(plain) / torch.tensor(inverse_frequencies(32, llama3))
    path = write(tmp_path / "n.gguf", theirs, "llama", tensors={"rope_freqs.weight": divisors})
    assert models.read_config(path).gqa.rope == llama3
    path = write(tmp_path / "o.gguf", theirs, "llama", tensors={"rope_freqs.weight": divisors**2})
    with pytest.raises(CheckpointError, match="are not those of Llama 3"):
        models.read_config(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_with_text(path)


def test_the_tokenizer_of_a_file_is_the_one_it_was_made_of(tiny):
    path, original = tiny
    metadata = GGUFFile(path).metadata
    tokenizer, template = gguf_tokenizer(metadata, "x"), gguf_template(metadata, "x")
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (1, (2, 0))
    for text in ("Hello world, <think>the cat<|im_end|>", "  x\n\n12"):
        for parse in (False, True):
            assert tokenizer.encode(text, parse_specials=parse) == original.encode(text, parse_specials=parse)
    assert template.render([{"content": "a"}]) == "<|im_start|>a<|im_end|>"
    assert template.render([], tools=[{}]) == "tools"
    assert gguf_template({}, "x") is None


def test_a_file_converts_to_hugging_faces_layout(tiny, tmp_path):
    models.convert(tiny[0], tmp_path / "out")
    ours, theirs = models.load(tiny[0]).state_dict(), models.load(tmp_path / "out").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "model must be gpt2"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre must be one of gpt-2, .*, got 'tekken'"),
        ({"tokenizer.ggml.tokens": None}, "tokens must be a list of texts, got NoneType"),
        ({"tokenizer.ggml.merges": [1]}, "merges must be a list of texts"),
        ({"tokenizer.ggml.token_type": [1]}, "one entry for each of"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "bos_token_id is 1000000, of"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "holds 1 texts twice"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "the tokenizer cannot be built"),
    ],
)
def test_tokenizers_that_cannot_be_are_refused(tiny, keys, message):
    with pytest.raises(DataError, match=message):
        gguf_tokenizer({**GGUFFile(tiny[0]).metadata, **keys}, "x")


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("gemma", {}, "general.architecture must be one of llama, qwen2, qwen3, got 'gemma'"),
        ("llama", {"llama.expert_count": 8}, "mixtures of experts are not read from GGUF"),
        ("llama", {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "got 'longrope'"),
        ("llama", {"llama.rope.dimension_count": 4}, "rope.dimension_count is 4; such models are computed with"),
        ("llama", {"llama.attention.sliding_window": 512}, r"sliding_window is 512; .* with 0"),
        ("llama", {"llama.rope.scale_linear": 2.0}, r"scale_linear is 2\.0"),
    ],
)
def test_models_that_perilune_does_not_have_are_refused(tmp_path, architecture, keys, message):
    path = write(tmp_path / "m.gguf", reference("llama"), architecture, keys=keys)
    with pytest.raises(CheckpointError, match=message):
        models.load(path)


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    theirs = reference("llama")
    state = theirs.state_dict()
    del state["model.norm.weight"]
    theirs.state_dict = lambda: {**state, "blk.0.attn_rot.weight": torch.ones(32)}
    path = write(tmp_path / "m.gguf", theirs, "llama")
    data = path.read_bytes()
    path.write_bytes(data[:-200])
    with pytest.raises(CheckpointError) as caught:
        models.load(path)
    for part in ("model.norm.weight", "blk.0.attn_rot.weight", "the file ends before it does"):
        assert part in str(caught.value)


@given(st.data())
def test_a_damaged_file_is_refused_or_read(tiny, data):
    content = bytearray(tiny[0].read_bytes()[:12_000])
    header = read_header(memoryview(tiny[0].read_bytes()), "x")
    size = min(tensor.start for tensor in header.tensors)
    assert size < len(content)
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, size - 64))
        with pytest.raises(CheckpointError, match="x: "):
            read_header(memoryview(content)[:cut], "x")
    place = data.draw(st.integers(0, size - 1))
    content[place] = data.draw(st.integers(0, 255))
    with suppress(CheckpointError):
        read_header(memoryview(content), "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04", "not a GGUF file, it begins with b'PK"),
        (b"GGUF\x01\0\0\0" + bytes(16), "version must be 2 or 3"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "a count of"),
        (b"GGUF\x03\0\0\0" + bytes(16), "general.architecture must be one of llama, qwen2, qwen3, got None"),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        models.load(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        models.load(tmp_path / "n.gguf")
