"""A model on a GPU, as training runs it, against itself in float64."""

import logging

import pytest
import torch

from perilune.models import ModelConfig, build_model, hybrid_layers
from perilune.nn import KDAConfig, MLAConfig
from perilune.ops import kda, linear_cross_entropy
from perilune.ops.backends import _note_once
from perilune.ops.layout import SequenceLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = ModelConfig(
    vocab_size=512,
    d_model=256,
    layers=hybrid_layers(4),
    d_ff=512,
    kda=KDAConfig(num_heads=2, head_dim=128),
    mla=MLAConfig(num_heads=2, kv_rank=64, nope_dim=64, rope_dim=32, value_dim=64),
)


def loss_and_gradients(model, tokens, layout, autocast):
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(model.hidden(tokens, layout), model.output_weight, tokens.roll(-1))
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in model.named_parameters()}


def test_training_in_bfloat16_follows_float64(caplog):
    """Layers, loss and gradients with every fused kernel; no call falls back to a slower backend."""
    layout = SequenceLayout.from_lengths((300, 0, 1, 211), "cuda")
    tokens = torch.randint(0, 512, (512,), generator=torch.Generator().manual_seed(0)).cuda()
    ours, exact = build_model(CONFIG, seed=0, device="cuda"), build_model(CONFIG, seed=0, device="cuda").double()
    _note_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="perilune"):
        loss, grads = loss_and_gradients(ours, tokens, layout, autocast=True)
    assert not caplog.messages
    wanted_loss, wanted = loss_and_gradients(exact, tokens, layout, autocast=False)
    torch.testing.assert_close(loss.double(), wanted_loss, atol=0, rtol=2e-3)
    norm = torch.stack([x.double().norm() for x in wanted.values()]).norm()
    distance = torch.stack([(grads[name].double() - x).norm() for name, x in wanted.items()]).norm()
    assert distance < 3e-2 * norm
    for name, x in wanted.items():
        error = (grads[name].double() - x).norm()
        assert error < 0.1 * x.norm() + 1e-3 * norm, (name, float(error / x.norm()))


def test_a_call_that_falls_back_says_so(caplog):
    q, v = (torch.randn(1, 20, 1, width, device="cuda").bfloat16() for width in (128, 60))
    beta = torch.rand(1, 20, 1, device="cuda").bfloat16()
    _note_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="perilune"):
        for _ in range(2):
            kda(q, q, v, -q.abs(), beta, qk_l2norm_in_kernel=True)
    (message,) = caplog.messages
    assert message.startswith("kda runs on the slower backend 'triton': 'cuda' takes K of (64, 128)")
