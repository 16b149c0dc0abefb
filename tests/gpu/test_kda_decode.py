"""The one-launch serving step on a GPU, against the float64 reference."""

import pytest
import torch

from perilune.ops import kda_decode
from tests.ops.kda_decode_cases import GATES, copied, errors, make_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [
    (3, 1, 2, 2, 16, 16), (4, 3, 2, 4, 64, 64), (3, 8, 4, 4, 128, 128), (3, 1, 8, 8, 128, 128), (2, 5, 1, 1, 24, 20),
    (1, 1, 1, 4, 128, 64), (257, 1, 2, 2, 64, 64),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES)
def test_float32_and_bfloat16_against_the_reference(shape, gate):
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)):
        inputs = make_inputs(*shape, dtype=dtype, device="cuda", gated=shape[1] != 3)
        if shape[0] > 1:
            inputs["slots"][-1] = -1
        found = errors(inputs, "triton", **gate)
        assert found["o"] < limit
        assert max(found["states"], found["conv_states"]) < 2e-6


def test_what_the_kernel_does_not_take_goes_to_the_other_ops():
    assert max(errors(copied(make_inputs(2, 1, 1, 1, 16, 16, device="cuda"), torch.float64), "auto").values()) < 1e-12


def test_extreme_gates_stay_finite():
    inputs = make_inputs(4, 2, 2, 2, 128, 128, device="cuda")
    inputs["g"][0], inputs["g"][1] = 200.0, -200.0
    inputs["beta"][2], inputs["beta"][3] = 60.0, -60.0
    assert max(errors(inputs, "triton").values()) < 2e-6


def test_repeats_and_neighbors_do_not_change_a_bit():
    inputs = make_inputs(64, 1, 8, 8, 128, 128, dtype=torch.bfloat16, device="cuda")
    once, again = copied(inputs), copied(inputs)
    o = kda_decode(**once)
    assert torch.equal(o, kda_decode(**again))
    assert torch.equal(once["states"], again["states"])
    alone = copied(inputs)
    rows = {name: x[7:8] if name in ("qkv", "g", "beta", "z", "slots") else x for name, x in alone.items()}
    assert torch.equal(kda_decode(**rows)[0], o[7])


def test_other_slots_keep_every_bit_and_skipped_ones_give_zeros():
    inputs = make_inputs(16, 2, 2, 4, 64, 64, dtype=torch.bfloat16, device="cuda")
    inputs["slots"][3] = -1
    ours = copied(inputs)
    o = kda_decode(**ours)
    assert not o[3].any()
    used = {slot for slot in inputs["slots"].tolist() if slot >= 0}
    for slot in range(18):
        same = torch.equal(ours["states"][slot], inputs["states"][slot])
        assert same == (slot not in used)


def test_it_can_be_captured_in_a_graph():
    inputs = make_inputs(8, 1, 4, 4, 128, 128, dtype=torch.bfloat16, device="cuda")
    eager, captured = copied(inputs), copied(inputs)
    kda_decode(**copied(inputs))  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = kda_decode(**captured)
    for name in ("states", "conv_states"):
        captured[name].copy_(inputs[name])
    for _ in range(3):
        expected = kda_decode(**eager)
        graph.replay()
        assert torch.equal(o, expected)
    assert torch.equal(captured["states"], eager["states"])


def test_pools_beyond_32_bit_offsets():
    slots = 2**31 // (16 * 128 * 128) + 3
    inputs = make_inputs(2, 1, 16, 16, 128, 128, dtype=torch.bfloat16, device="cuda")
    pools = {
        "states": torch.zeros(slots, 16, 128, 128, device="cuda"),
        "conv_states": torch.zeros(slots, inputs["qkv"].shape[2], 3, dtype=torch.bfloat16, device="cuda"),
    }
    places = torch.tensor([slots - 1, 0], device="cuda")
    for name, pool in pools.items():
        pool[places] = inputs[name][inputs["slots"].long()]
    far = kda_decode(**{**inputs, **pools, "slots": places})
    near = copied(inputs)
    assert torch.equal(far, kda_decode(**near))
    assert torch.equal(pools["states"][places], near["states"][inputs["slots"].long()])
    assert not pools["states"][1:-1].any()
