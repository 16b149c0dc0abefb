"""Grouped-query attention against its equations."""

import pytest
import torch

from perilune.nn import Rotary, rotate
from tests.nn.helpers import CONFIGS, make_mixer, packed_input


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("gqa")])
def test_layer_equals_equations(name):
    mixer = make_mixer(name)
    config = mixer.config
    x, layout = packed_input((8,))
    with torch.no_grad():
        for norm in (mixer.q_norm, mixer.k_norm) if config.qk_norm else ():
            norm.weight.copy_(torch.linspace(0.5, 1.5, config.head_dim))
    p = dict(mixer.named_parameters())
    q, k, v = (
        (x @ p[f"{n}_proj.weight"].T + p.get(f"{n}_proj.bias", 0)).view(8, -1, config.head_dim) for n in ("q", "k", "v")
    )
    assert ("q_proj.bias" in p) == config.qkv_bias
    if config.qk_norm:
        q, k = (
            t / torch.sqrt((t**2).mean(-1, keepdim=True) + config.qk_norm_eps) * p[f"{n}_norm.weight"]
            for t, n in ((q, "q"), (k, "k"))
        )
    if config.use_rope:
        rotary = Rotary.build(config.head_dim, config.rope)
        q, k = (rotate(t, rotary.turns(torch.arange(8), t.dtype)) for t in (q, k))
    group = config.num_heads // config.kv_heads
    heads, largest = [], []
    for h in range(config.num_heads):
        logits = q[:, h] @ k[:, h // group].T * config.head_dim**-0.5
        logits = logits.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
        heads.append(torch.softmax(logits, -1) @ v[:, h // group])
        largest.append(logits.max().detach())
    expected = torch.stack(heads, 1).flatten(1) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x, layout), expected)
    torch.testing.assert_close(mixer.max_logits, torch.stack(largest))


@pytest.mark.parametrize("name", ["gqa-bias", "gqa-qk-norm"])
def test_logits_that_do_not_scale_with_the_weights_are_not_clipped(name):
    assert make_mixer(name).qk_clip_spec() is None
    assert make_mixer("gqa").qk_clip_spec() is not None
