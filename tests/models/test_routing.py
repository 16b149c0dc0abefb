"""What is told of a model's routing is what its layers read."""

from dataclasses import replace

import pytest
import torch

from perilune.models import ModelConfig, build_model, moba_routings
from perilune.nn import GQAConfig, MoBAConfig
from perilune.nn import moba as layer_module

MOBA = MoBAConfig(num_heads=4, num_kv_heads=2, head_dim=8, moba_chunk_size=8, moba_topk=3)
CONFIG = ModelConfig(
    vocab_size=64,
    d_model=32,
    layers=("moba", "gqa", "moba", "moba"),
    d_ff=32,
    gqa=GQAConfig(num_heads=2, head_dim=8),
    moba=MOBA,
    moba_full_last_n=1,
    init_range=0.3,
)


@pytest.mark.parametrize(
    "changes",
    [{}, {"moba_key_conv": 3}, {"moba_gate_dtype": "float32"}, {"moba_policy": "minmax"}, {"moba_policy": "random"}],
    ids=str,
)
def test_it_is_what_the_layers_read(monkeypatch, changes):
    model = build_model(replace(CONFIG, moba=replace(MOBA, **changes)), seed=0).eval().bfloat16()
    tokens = torch.randint(64, (61,), generator=torch.Generator().manual_seed(0))
    read = []
    attend = layer_module.moba_attention

    def spy(*args, **kwargs):
        read.append(attend(*args, **kwargs, return_routing=True)[1])
        return attend(*args, **kwargs)

    monkeypatch.setattr(layer_module, "moba_attention", spy)
    found = moba_routings(model, tokens)
    assert list(found) == [0, 2]
    for routing, blocks in zip(found.values(), read, strict=True):
        assert torch.equal(routing.blocks(), blocks)
    assert not any(block._forward_pre_hooks for block in model.modules()), "nothing is left behind"


def test_a_model_without_moba_has_none():
    model = build_model(replace(CONFIG, layers=("gqa",), moba=None, moba_full_last_n=0), seed=0).eval()
    assert moba_routings(model, torch.arange(5)) == {}
