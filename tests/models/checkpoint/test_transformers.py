"""What we write, transformers loads and computes the same; what it writes, we do."""

from dataclasses import replace

import pytest
import torch

from perilune.models import Details, load, read_config, save
from tests.models.checkpoint.tiny import CONFIGS, assert_same_model, logits, some_tokens, tiny_model, untied

transformers = pytest.importorskip("transformers")
# Released checkpoints have `rope_scaling`, about whose name transformers warns.
pytestmark = pytest.mark.filterwarnings("ignore")

every_family = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Each model, the directory it was written to, and transformers' reading of it, made once."""
    made = {}

    def make(name):
        if name not in made:
            model, path = tiny_model(CONFIGS[name]), tmp_path_factory.mktemp("written") / name
            save(model, path, max_shard_bytes=30_000)
            theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, dtype=torch.float32
            )
            made[name] = model, path, theirs.eval(), info
        return made[name]

    return make


@every_family
def test_transformers_loads_what_we_write_and_computes_the_same_logits(written, name):
    model, path, theirs, info = written(name)
    assert {kind: names for kind, names in info.items() if names} == {}
    tokens = some_tokens()
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(load(path), tokens), expected, rtol=0, atol=2e-5)


@every_family
def test_greedy_generation_is_the_same(written, name):
    model, _, theirs, _ = written(name)
    prompt = some_tokens(7)
    with torch.no_grad():
        expected = theirs.generate(prompt[None], max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)[
            0, 7:
        ]
        cache, tokens, found = model.new_cache(1), prompt, []
        for _ in range(64):
            out = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32), cache)
            tokens = out[-1:].argmax(-1)
            found.append(int(tokens))
    assert found == expected.tolist()


@every_family
def test_we_load_what_transformers_writes(written, name, tmp_path):
    model, _, theirs, _ = written(name)
    with torch.no_grad():
        for parameter in theirs.parameters():  # not what was written
            parameter.mul_(1.01)
    theirs.save_pretrained(tmp_path)
    loaded, tokens = load(tmp_path), some_tokens()
    assert loaded.config == model.config
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        for parameter in theirs.parameters():
            parameter.div_(1.01)
    torch.testing.assert_close(logits(loaded, tokens), expected, rtol=0, atol=2e-5)


def test_a_tied_output_matrix_of_kimi_linear_is_written_whole(tmp_path):
    model = tiny_model(replace(CONFIGS["kimi_linear-sparse"], tie_embeddings=True))
    save(model, tmp_path / "m")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert {kind: names for kind, names in info.items() if names} == {}
    loaded, tokens = load(tmp_path / "m"), some_tokens()
    assert_same_model(loaded, untied(model))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=2e-5)


def test_low_rank_queries_of_kimi_linear_are_read_though_not_written(tmp_path):
    save(tiny_model(CONFIGS["kimi_linear-sparse"]), tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m", q_lora_rank=12)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "ranked")
    loaded, tokens = load(tmp_path / "ranked"), some_tokens()
    assert loaded.config.mla.q_rank == 12
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded, tokens), theirs(tokens[None]).logits[0], rtol=0, atol=2e-5)


def test_transformers_reads_the_ids_and_the_longest_context(tmp_path):
    details = Details(max_positions=99, bos_id=1, eos_ids=(2, 3), pad_id=4, generation={"eos_token_id": 3, "top_k": 5})
    save(tiny_model(CONFIGS["llama"]), tmp_path / "m", details=details)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert (config.max_position_embeddings, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        99,
        1,
        [2, 3],
        4,
    )
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "m")
    assert (generation.eos_token_id, generation.top_k) == (3, 5)


def test_a_model_in_bfloat16_keeps_its_scalars_in_float32(tmp_path):
    save(tiny_model(CONFIGS["kimi_linear"]), tmp_path / "m", dtype=torch.bfloat16)
    loaded = load(tmp_path / "m")
    dtypes = {name.rsplit(".", 1)[-1]: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"A_log", "dt_bias", "router_bias"}
    assert read_config(tmp_path / "m") == CONFIGS["kimi_linear"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert theirs.dtype == torch.bfloat16
