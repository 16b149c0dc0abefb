"""What is told of a model's routing is what its layers read."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from perilune.models import ModelConfig, build_model, moba_recalls, moba_routings
from perilune.nn import GQAConfig, MoBAConfig
from perilune.nn import moba as layer_module
from perilune.ops import SequenceLayout, moba_route
from perilune.ops.moba.recall import router_recall

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


@torch.no_grad()  # with gradients attention is another one, which rounds otherwise
def test_recalls_are_of_what_each_layer_mixes(monkeypatch):
    """Of several sequences and some of their queries, for layers with full attention too, which read on as they did."""
    model = build_model(replace(CONFIG, moba=replace(MOBA, moba_key_conv=3)), seed=0).eval()
    tokens = torch.randint(64, (100,), generator=torch.Generator().manual_seed(0))
    layout, queries = SequenceLayout.from_lengths([61, 39]), torch.arange(100) % 2 == 0
    mixed = {}

    def spy(layer, attend, q, k, *rest):
        mixed[layer] = (q, k)
        return attend(q, k, *rest)

    for layer, block in enumerate(model.blocks()):
        if layer != 1:
            monkeypatch.setattr(block.mixer, "_attend", partial(spy, layer, block.mixer._attend))
    expected = model.hidden(tokens, layout)
    found = moba_recalls(model, tokens, layout, ("mean", "recent"), queries)
    assert list(found) == [0, 2, 3]
    assert torch.equal(model.hidden(tokens, layout), expected)
    for layer, rules in found.items():
        assert list(rules) == ["mean", "recent"]
        for policy, recall in rules.items():
            routing = moba_route(*mixed[layer], block_size=8, topk=3, cu_seqlens_q=layout, policy=policy)
            assert recall == router_recall(*mixed[layer], routing, queries)
            assert recall.queries == 19 + 7  # of the even tokens, those behind the first 24 of a sequence
    assert not any(block._forward_pre_hooks for block in model.modules()), "nothing is left behind"
