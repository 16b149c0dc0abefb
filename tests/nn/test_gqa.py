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
    q, k, v = (proj(x).view(8, -1, config.head_dim) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
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
