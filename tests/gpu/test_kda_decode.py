"""The one-launch serving step on a GPU, against the float64 reference."""

import pytest
import torch

from perilune.nn import KDAConfig, KimiDeltaAttention, initialize
from perilune.ops import SequenceLayout, kda_decode
from perilune.ops.kda_decode.cuda import DIMS
from tests.ops.kda_decode_cases import GATES, copied, errors, make_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [
    (3, 1, 2, 2, 16, 16), (4, 3, 2, 4, 64, 64), (3, 8, 4, 4, 128, 128), (3, 1, 8, 8, 128, 128), (2, 5, 1, 1, 24, 20),
    (1, 1, 1, 4, 128, 64), (257, 1, 2, 2, 64, 64),
]  # fmt: skip


def skip_if_not_taken(backend, shape):
    if backend == "cuda" and not {*shape[4:]} <= {*DIMS}:
        pytest.skip(f"backend 'cuda' takes K and V of {DIMS}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES)
def test_float32_and_bfloat16_against_the_reference(shape, gate, backend):
    skip_if_not_taken(backend, shape)
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)):
        inputs = make_inputs(*shape, dtype=dtype, device="cuda", gated=shape[1] != 3)
        if shape[0] > 1:
            inputs["slots"][-1] = -1
        found = errors(inputs, backend, **gate)
        assert found["o"] < limit
        assert max(found["states"], found["conv_states"]) < 2e-6


def test_what_the_kernel_does_not_take_goes_to_the_other_ops():
    assert max(errors(copied(make_inputs(2, 1, 1, 1, 16, 16, device="cuda"), torch.float64), "auto").values()) < 1e-12
    assert max(errors(make_inputs(2, 1, 1, 1, 16, 16, device="cuda"), "auto").values()) < 2e-6


def test_extreme_gates_stay_finite(backend):
    inputs = make_inputs(4, 2, 2, 2, 128, 128, device="cuda")
    inputs["g"][0], inputs["g"][1] = 200.0, -200.0
    inputs["beta"][2], inputs["beta"][3] = 60.0, -60.0
    assert max(errors(inputs, backend).values()) < 2e-6


def test_repeats_and_neighbors_do_not_change_a_bit(backend):
    inputs = make_inputs(64, 1, 8, 8, 128, 128, dtype=torch.bfloat16, device="cuda")
    once, again = copied(inputs), copied(inputs)
    o = kda_decode(**once, backend=backend)
    assert torch.equal(o, kda_decode(**again, backend=backend))
    assert torch.equal(once["states"], again["states"])
    alone = copied(inputs)
    rows = {name: x[7:8] if name in ("qkv", "g", "beta", "z", "slots") else x for name, x in alone.items()}
    assert torch.equal(kda_decode(**rows, backend=backend)[0], o[7])


def test_other_slots_keep_every_bit_and_skipped_ones_give_zeros(backend):
    inputs = make_inputs(16, 2, 2, 4, 64, 64, dtype=torch.bfloat16, device="cuda")
    inputs["slots"][3] = -1
    ours = copied(inputs)
    o = kda_decode(**ours, backend=backend)
    assert not o[3].any()
    used = {slot for slot in inputs["slots"].tolist() if slot >= 0}
    for slot in range(18):
        same = torch.equal(ours["states"][slot], inputs["states"][slot])
        assert same == (slot not in used)


@pytest.mark.parametrize("shape", [(9, 8, 4, 4, 128, 128), (5, 2, 1, 2, 64, 64), (9, 5, 2, 2, 24, 20)])
@pytest.mark.parametrize("taps", [2, 4, 7])
def test_states_after_the_tokens_that_are_kept(shape, taps, backend):
    skip_if_not_taken(backend, shape)
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)):
        inputs = make_inputs(*shape, taps=taps, dtype=dtype, device="cuda", kept=True)
        inputs["slots"][3] = -1
        found = errors(inputs, backend)
        assert found["o"] < limit
        assert max(found["states"], found["conv_states"]) < 2e-6


def test_a_draft_that_is_not_kept_leaves_every_bit(backend):
    inputs = make_inputs(16, 4, 2, 4, 64, 64, dtype=torch.bfloat16, device="cuda")
    nothing, everything, plain = ({**copied(inputs), "keep": keep} for keep in (_keep(0), _keep(4), None))
    outputs = [kda_decode(**each, backend=backend) for each in (nothing, everything, plain)]
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[2])
    for pool in ("states", "conv_states"):
        assert torch.equal(nothing[pool], inputs[pool])
        torch.testing.assert_close(everything[pool], plain[pool])


def _keep(tokens):
    return torch.full((16,), tokens, dtype=torch.int32, device="cuda")


def test_without_slots_sequence_i_owns_slot_i(backend):
    inputs = {**make_inputs(8, 2, 4, 4, 128, 128, device="cuda"), "slots": torch.arange(8, device="cuda")}
    named, in_order = copied(inputs), {**copied(inputs), "slots": None}
    torch.testing.assert_close(kda_decode(**in_order, backend=backend), kda_decode(**named, backend=backend))
    torch.testing.assert_close(in_order["states"], named["states"])
    assert torch.equal(in_order["states"][8:], inputs["states"][8:])


@pytest.mark.parametrize("draft", [1, 4])
def test_the_layer_decodes_through_it_as_it_prefills(draft):
    config = KDAConfig(num_heads=4, head_dim=64, num_value_heads=8)
    layer = initialize(KimiDeltaAttention(config, 128), seed=0, init_range=0.1).cuda()
    x = torch.randn(3, 24, 128, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        expected = layer(x.flatten(0, 1), SequenceLayout.from_lengths([24] * 3, "cuda")).view(3, 24, 128)
        cache = layer.new_cache(3, "cuda", torch.float32)
        layer(x[:, :12].flatten(0, 1), SequenceLayout.from_lengths([12] * 3, "cuda"), cache)
        piece = SequenceLayout.from_lengths([draft] * 3, "cuda")
        parts = [layer(part.flatten(0, 1), piece, cache).view(3, draft, 128) for part in x[:, 12:].split(draft, 1)]
    assert (torch.cat(parts, 1) - expected[:, 12:]).norm() < 1e-3 * expected[:, 12:].norm()


def test_it_can_be_captured_in_a_graph(backend):
    inputs = make_inputs(8, 1, 4, 4, 128, 128, dtype=torch.bfloat16, device="cuda")
    eager, captured = copied(inputs), copied(inputs)
    kda_decode(**copied(inputs), backend=backend)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = kda_decode(**captured, backend=backend)
    for name in ("states", "conv_states"):
        captured[name].copy_(inputs[name])
    for _ in range(3):
        expected = kda_decode(**eager, backend=backend)
        graph.replay()
        assert torch.equal(o, expected)
    assert torch.equal(captured["states"], eager["states"])


def test_pools_beyond_32_bit_offsets(backend):
    slots = 2**31 // (16 * 128 * 128) + 3
    inputs = make_inputs(2, 1, 16, 16, 128, 128, dtype=torch.bfloat16, device="cuda")
    pools = {
        "states": torch.zeros(slots, 16, 128, 128, device="cuda"),
        "conv_states": torch.zeros(slots, inputs["qkv"].shape[2], 3, dtype=torch.bfloat16, device="cuda"),
    }
    places = torch.tensor([slots - 1, 0], device="cuda")
    for name, pool in pools.items():
        pool[places] = inputs[name][inputs["slots"].long()]
    far = kda_decode(**{**inputs, **pools, "slots": places}, backend=backend)
    near = copied(inputs)
    assert torch.equal(far, kda_decode(**near, backend=backend))
    assert torch.equal(pools["states"][places], near["states"][inputs["slots"].long()])
    assert not pools["states"][1:-1].any()
