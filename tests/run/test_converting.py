"""What a run trained, written for others."""

import json

import pytest
import torch

from perilune.data import PERILUNE_TEMPLATE
from perilune.errors import DataError
from perilune.models import load, read_details
from perilune.run import convert_model, load_model, load_served
from tests.models.checkpoint.tiny import assert_same_model, untied


@pytest.mark.parametrize("to", ["hf", "perilune"])
def test_a_run_s_model_is_written(finished, tmp_path, cli, to):
    code, out, err = cli("convert", finished, tmp_path / "m", "--to", to)
    assert (code, out.strip()) == (0, str(tmp_path / "m")), err
    loaded = load_model(finished)
    assert_same_model(load(tmp_path / "m"), untied(loaded.model) if to == "hf" else loaded.model)
    written = json.loads(load_served(tmp_path / "m").tokenizer.to_json())
    assert written.pop("post_processor")["single"][0]["SpecialToken"]["id"] == "[BOS]"
    assert written | {"post_processor": None} == json.loads(loaded.tokenizer.to_json())
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == PERILUNE_TEMPLATE
    details = read_details(tmp_path / "m")
    assert details.eos_ids == (loaded.tokenizer.end_id, loaded.tokenizer.eos_id)
    assert (details.bos_id, details.pad_id) == (loaded.tokenizer.bos_id, loaded.tokenizer.pad_id)


def test_a_stage_of_a_run_is_written_in_a_dtype(finished, tmp_path):
    convert_model(finished, tmp_path / "m", dtype="bfloat16", stage="pretrain")
    assert_same_model(load(tmp_path / "m"), untied(load_model(finished, "pretrain").model.to(torch.bfloat16)))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(DataError, match="stages with a model"):
        convert_model(finished, tmp_path / "n", stage="nothing")
