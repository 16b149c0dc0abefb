from importlib import metadata

import pytest
import torch

from perilune import models
from perilune.data import ChatTemplate, KimiTokenizer, encode_chat, load_tokenizer, tokenizer_files, train_tokenizer
from perilune.engine import Engine
from perilune.errors import DataError
from perilune.models import GGUFFile
from perilune.run import KNOWN_MODELS, ChatSession, convert_model, find_model, load_served, open_chat, read_text_parts
from tests.data.small_tokenizers import write_kimi
from tests.models.gguf_files import write_with_text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_with_text(path)
    return path


def test_a_file_a_directory_and_a_run_are_served(tiny, tmp_path):
    served = load_served(tiny)
    assert (served.title, served.details.max_positions) == ("tiny", 128)
    parts = read_text_parts(tiny)
    models.save(served.model, tmp_path / "hf", details=served.details, tokenizer_files=tokenizer_files(*parts))
    again = load_served(tmp_path / "hf", dtype=torch.float64)
    assert (again.title, again.details.max_positions) == ("hf", 128)
    assert again.model.embed_tokens.weight.dtype == torch.float64
    assert again.tokenizer.stop_ids == served.tokenizer.stop_ids
    assert again.template.render([{"content": "a"}]) == served.template.render([{"content": "a"}])
    with pytest.raises(DataError, match="is not a run directory, so it has no stage 'sft'"):
        load_served(tiny, stage="sft")
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="hf has no chat template"):
        open_chat(tmp_path / "hf", stage=None, temperature=0.0, max_tokens=1)


def test_a_file_is_converted_with_what_it_carries(tiny, tmp_path):
    convert_model(tiny, tmp_path / "out")
    before, after = load_served(tiny), load_served(tmp_path / "out")
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    assert after.template.source == before.template.source
    assert after.details.eos_ids == (2,)


def test_kimis_tokenizer_brings_its_template(tmp_path):
    tokenizer, template = read_text_parts(write_kimi(tmp_path))
    assert isinstance(tokenizer, KimiTokenizer)
    assert template.title == "kimi-k2-2025-07"


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tiny, tmp_path):
    served = load_served(tiny)
    models.save(served.model, tmp_path / "hf")
    write_kimi(tmp_path / "hf")
    with pytest.raises(DataError, match=r"the tokenizer has \d+ tokens, the model only \d+"):
        load_served(tmp_path / "hf")


def test_an_exported_tokenizer_is_the_same_for_transformers(tiny, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(["the cat sat on the mat " * 9], 270)
    turns = [{"role": "user", "content": "Hello 12"}]
    parts = {"gguf": read_text_parts(tiny), "own": (tokenizer, ChatTemplate.perilune())}
    for name, (ours, template) in parts.items():
        (tmp_path / name).mkdir()
        for file, content in tokenizer_files(ours, template).items():
            (tmp_path / name / file).write_bytes(content)
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] == encode_chat(
            ours, template, turns
        )
        assert theirs.bos_token_id == ours.bos_id
        assert type(load_tokenizer(tmp_path / name)) is type(ours)
        assert read_text_parts(tmp_path / name)[1].source == template.source


def test_names_of_models(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"is not a run directory.* known model: smollm2"):
        find_model("nothing")
    known = KNOWN_MODELS["smollm2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(KNOWN_MODELS, "smollm2", type(known)(distribution="no-such", file="x", install="pip install x"))
    with pytest.raises(DataError, match="smollm2 is not installed: pip install x"):
        find_model("smollm2")
    monkeypatch.setitem(KNOWN_MODELS, "smollm2", type(known)(distribution="torch", file="x", install="pip install x"))
    with pytest.raises(DataError, match="x is missing from the installed torch"):
        find_model("smollm2")
    (tmp_path / "smollm2").mkdir()
    with pytest.raises(DataError, match="smollm2 is not a run directory"):
        find_model("smollm2")


def is_installed(known):
    try:
        metadata.distribution(known.distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


SMOLLM2 = KNOWN_MODELS["smollm2"]
needs_smollm2 = pytest.mark.skipif(not is_installed(SMOLLM2), reason=f"needs {SMOLLM2.install}")


@pytest.fixture(scope="module")
def smollm2():
    return load_served("smollm2")


@needs_smollm2
def test_the_real_models_weights(smollm2):
    assert smollm2.title == "smollm2"
    assert sum(parameter.numel() for parameter in smollm2.model.parameters()) == 134_515_008
    file = GGUFFile(find_model("smollm2"))
    queries = file.read("model.layers.0.self_attn.q_proj.weight").double()
    assert queries.mean().item() == pytest.approx(0.00017850, abs=5e-9)
    assert queries.std(correction=0).item() == pytest.approx(0.28394607, abs=5e-9)
    assert smollm2.model.embed_tokens.weight.double().std(correction=0).item() == pytest.approx(0.13557820, abs=1e-8)


@needs_smollm2
def test_the_real_models_tokens_and_numbers(smollm2):
    tokenizer, model = smollm2.tokenizer, smollm2.model
    assert tokenizer.encode("<|im_start|>user\nHello 1234", parse_specials=True) == [
        *(1, 4093, 198, 19556, 216),
        *(33, 34, 35, 36),
    ]
    question = encode_chat(tokenizer, smollm2.template, [{"role": "user", "content": "What is the capital of France?"}])
    text = (
        "The quick brown fox jumps over the lazy dog. In mathematics, a prime number is a natural number greater than "
        "one that is not a product of two smaller natural numbers."
    )
    tokens = torch.tensor(tokenizer.encode(text))
    assert len(tokens) == 34
    bounds = torch.tensor([0, len(question), len(question) + 34], dtype=torch.int32)
    with torch.inference_mode():
        logprobs = model(torch.cat([torch.tensor(question), tokens]), bounds).log_softmax(-1)
    best = logprobs[len(question) - 1].topk(5)
    assert best.indices.tolist() == [504, 60, 15319, 2219, 7026]
    expected = torch.tensor([-1.88270, -1.96480, -2.26567, -2.80641, -2.89345])
    torch.testing.assert_close(best.values, expected, atol=2e-3, rtol=0)
    nll = logprobs[len(question) : -1].gather(1, tokens[1:, None]).sum().item()
    assert nll == pytest.approx(-83.406, abs=2e-3)
    chat = ChatSession(
        Engine(model), tokenizer, smollm2.template, title="", temperature=0.0, top_p=1.0, max_tokens=12, seed=0
    )
    assert "".join(chat.answer("What is the capital of France?")) == "The capital of France is Paris."
