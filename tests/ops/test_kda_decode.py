"""The serving step of a KDA layer: backends against the float64 reference, the pools, and the layer itself."""

import os
import subprocess
import sys

import pytest
import torch

from perilune.errors import BackendError
from perilune.nn import KDAConfig, KimiDeltaAttention, initialize
from perilune.ops import SequenceLayout
from perilune.ops.kda_decode import kda_decode
from tests.ops.kda_decode_cases import GATES, copied, errors, make_inputs

SHAPES = [(3, 1, 2, 2, 16, 16), (3, 3, 2, 4, 16, 32), (2, 8, 1, 1, 24, 20), (1, 1, 3, 3, 8, 8)]

INTERPRETED = """
import sys, torch
from tests.ops.kda_decode_cases import GATES, errors, make_inputs
for shape in ((3, 1, 2, 2, 16, 16), (3, 3, 2, 4, 16, 32), (2, 5, 1, 1, 24, 20)):
    for gate in GATES:
        inputs = make_inputs(*shape, gated=shape[1] != 3)
        inputs["slots"][-1] = -1
        found = errors(inputs, "triton", **gate)
        assert max(found.values()) < 1e-6, (shape, gate, found)
print("equal")
"""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES)
def test_torch_equals_the_reference(shape, gate):
    inputs = make_inputs(*shape, gated=shape[1] != 3)
    assert max(errors(inputs, "torch", **gate).values()) < 2e-6


def test_float64_is_not_rounded_on_the_way():
    inputs = copied(make_inputs(3, 2, 2, 4, 16, 16), torch.float64)
    assert max(errors(inputs, "auto").values()) < 1e-12


def test_the_triton_kernel_equals_the_reference_in_its_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr[-2000:]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_other_slots_and_skipped_sequences_are_untouched(backend):
    inputs = make_inputs(4, 2, 2, 2, 16, 16)
    inputs["slots"][1] = -1
    ours = copied(inputs)
    o = kda_decode(**ours, backend=backend)
    used = {slot for slot in inputs["slots"].tolist() if slot >= 0}
    for name in ("states", "conv_states"):
        for slot in range(6):
            assert torch.equal(ours[name][slot], inputs[name][slot]) == (slot not in used)
    assert not o[1].any()
    assert all(row.any() for place, row in enumerate(o) if place != 1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_several_tokens_at_once_are_one_after_the_other(backend):
    inputs = make_inputs(2, 5, 1, 2, 16, 16)
    whole, steps = copied(inputs), copied(inputs)
    expected = kda_decode(**whole, backend=backend)
    for token in range(5):
        part = {name: x[:, token : token + 1] if name in ("qkv", "g", "beta", "z") else x for name, x in steps.items()}
        torch.testing.assert_close(kda_decode(**part, backend=backend)[:, 0], expected[:, token])
    torch.testing.assert_close(steps["states"], whole["states"])
    torch.testing.assert_close(steps["conv_states"], whole["conv_states"])


def test_it_is_what_the_layer_does_in_a_step():
    layer = KimiDeltaAttention(KDAConfig(num_heads=2, head_dim=16), 32)
    initialize(layer, seed=0)
    cache = layer.new_cache(3, "cpu", torch.float32)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer(torch.cat((x, x, x)), SequenceLayout.from_lengths([3, 3, 3]), cache)
        conv, state = cache["conv"].clone(), cache["state"].transpose(2, 3).contiguous()
        expected = layer(x, SequenceLayout.from_lengths([1, 1, 1]), cache)
        qkv, raw, beta, z = layer._project(x)
        o = kda_decode(
            qkv[:, None], raw[:, None], beta[:, None], z.view(3, 1, 2, 16), conv, state,
            conv_weight=layer.conv.weight, norm_weight=layer.o_norm.weight, A_log=layer.A_log, dt_bias=layer.dt_bias,
            norm_eps=layer.config.norm_eps,
        )  # fmt: skip
        torch.testing.assert_close(layer.o_proj(o[:, 0].flatten(1)), expected)
    torch.testing.assert_close(state.transpose(2, 3), cache["state"])
    torch.testing.assert_close(conv, cache["conv"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": torch.zeros(3, 9, 96)}, "1 to 8 tokens a sequence, got L=9"),
        ({"qkv": torch.zeros(3, 1, 95)}, "width 95, which is not 2 H K"),
        ({"beta": torch.zeros(3, 1, 3)}, r"beta must have shape \[3, 1, 2\]"),
        ({"slots": torch.zeros(3)}, "slots must be int32 or int64"),
        ({"states": torch.zeros(5, 2, 16, 32)[..., ::2]}, "states is updated in place and must be contiguous"),
        ({"lower_bound": -6.0}, "lower_bound must be in"),
        ({"conv_weight": torch.zeros(96, 1)}, "W >= 2"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        kda_decode(**{**make_inputs(3, 1, 2, 2, 16, 16), **change})


def test_backends_that_cannot_serve_say_why(monkeypatch):
    inputs = make_inputs(1, 1, 1, 1, 8, 8)
    with pytest.raises(BackendError, match="must be 'auto', 'triton', 'torch' or 'reference', got 'cuda'"):
        kda_decode(**inputs, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=r"takes float32, got torch\.float64|needs the package triton"):
        kda_decode(**copied(inputs, torch.float64), backend="triton")
