"""The Triton kernels of KDA on a GPU, against the chunkwise backend in float64 and against themselves."""

import pytest
import torch

from perilune.ops import SequenceLayout, kda
from tests.ops.kda_cases import Case, as_dtype, outputs_and_gradients
from tests.ops.kda_triton_cases import relative_errors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LIMITS = {
    "o": 5e-3, "final_state": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dinitial_state": 8e-3, "dg": 2e-2,
    "dbeta": 2e-2, "ddt_bias": 8e-3, "dA_log": 2e-2,
}  # fmt: skip
WIDE = {"key_dim": 128, "value_dim": 128, "chunk_size": 64}
CASES = [
    *(Case(raw=True, lengths=lengths, **WIDE) for lengths in ((1,), (15,), (64,), (65,), (1024,), (300, 0, 1, 467))),
    Case(raw=True, lengths=(500, 17), **{**WIDE, "key_dim": 64, "value_dim": 64}),
    Case(raw=True, lengths=(130, 5), **{**WIDE, "key_dim": 100, "value_dim": 60}),
    Case(raw=True, lengths=(500,), groups=2, lower_bound=-5.0, **WIDE),
    Case(raw=True, lengths=(129,), **{**WIDE, "chunk_size": 32}),
    *(
        Case(lengths=(200,), gate=gate, keys=keys, **WIDE)
        for gate, keys in (("init", "identical"), ("masks_and_init", "random"), ("hundred", "repeated"))
    ),
]


def on_gpu(case, dtype=torch.bfloat16, seed=0):
    """Leaf tensors in `dtype`, states and gate parameters in float32."""
    kept = ("initial_state", "A_log", "dt_bias")
    made = {name: (x.detach().float() if name in kept else x.detach().to(dtype)) for name, x in
            case.tensors(seed=seed).items()}  # fmt: skip
    return {name: x.cuda().requires_grad_() for name, x in made.items()}


def options(case):
    return {**case.options(), "cu_seqlens": SequenceLayout.from_lengths(case.lengths, "cuda")}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("save_states", [False, True])
def test_values_and_gradients_stay_within_the_limits(case, save_states):
    tensors = on_gpu(case)
    found = outputs_and_gradients(case, tensors, **options(case), backend="triton", save_states=save_states)
    wanted = outputs_and_gradients(case, as_dtype(tensors, torch.float64), **options(case), backend="torch")
    errors = relative_errors(found, wanted)
    wrong = {name: error for name, error in errors.items() if not error < LIMITS[name] and wanted[name].norm() > 1e-6}
    assert not wrong, errors


MAIN = Case(raw=True, lengths=(300, 0, 1, 467), **WIDE)


def test_repeats_are_equal_to_the_last_bit():
    tensors = on_gpu(MAIN)
    once, again = (outputs_and_gradients(MAIN, tensors, **options(MAIN), backend="triton") for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_neighbors_in_a_pack_change_no_bit():
    tensors = {name: x.detach() for name, x in on_gpu(MAIN).items()}
    whole = kda(**tensors, **options(MAIN), backend="triton")[0]
    alone = {name: x[:, -467:] if name in ("q", "k", "v", "g", "beta") else x for name, x in tensors.items()}
    alone["initial_state"] = tensors["initial_state"][-1:]
    layout = SequenceLayout.from_lengths([467], "cuda")
    assert torch.equal(kda(**alone, **{**options(MAIN), "cu_seqlens": layout}, backend="triton")[0], whole[:, -467:])


def test_edits_after_a_token_change_no_bit_before_it():
    tensors, cut = {name: x.detach() for name, x in on_gpu(MAIN).items()}, 150
    other = {name: x.detach() for name, x in on_gpu(MAIN, seed=3).items()}
    edited = {
        name: torch.cat((x[:, :cut], other[name][:, cut:]), 1) if name in ("q", "k", "v", "g", "beta") else x
        for name, x in tensors.items()
    }
    before, after = (kda(**x, **options(MAIN), backend="triton")[0] for x in (tensors, edited))
    assert torch.equal(before[:, :cut], after[:, :cut])


def test_a_split_at_a_chunk_with_the_state_carried_changes_no_bit():
    case = Case(raw=True, lengths=(256,), **WIDE)
    tensors = {name: x.detach() for name, x in on_gpu(case).items()}
    whole, final = kda(**tensors, **options(case), backend="triton")
    layout, state, parts = SequenceLayout.from_lengths([128], "cuda"), tensors["initial_state"], []
    for part in (slice(0, 128), slice(128, 256)):
        piece = {name: x[:, part] if name in ("q", "k", "v", "g", "beta") else x for name, x in tensors.items()}
        piece["initial_state"] = state
        o, state = kda(**piece, **{**options(case), "cu_seqlens": layout}, backend="triton")
        parts.append(o)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, final)


@pytest.mark.parametrize("host_knows", [True, False])
def test_it_can_be_captured_in_a_graph(host_knows):
    tensors = {name: x.detach() for name, x in on_gpu(MAIN).items()}
    arguments = options(MAIN)
    if not host_knows:
        arguments["cu_seqlens"] = arguments["cu_seqlens"].cu_seqlens
    expected = kda(**tensors, **arguments, backend="triton")[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = kda(**tensors, **arguments, backend="triton")[0]
    graph.replay()
    assert torch.equal(o, expected)


def test_offsets_beyond_32_bits():
    heads, tokens = 32, 540_000
    layout = SequenceLayout.from_lengths([tokens - 300, 300], "cuda")
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    tensors = {name: draw(1, tokens, heads, 128) for name in ("q", "k", "v", "g")}
    tensors["beta"] = draw(1, tokens, heads)
    switches = {"gate_in_kernel": True, "qk_l2norm_in_kernel": True, "beta_sigmoid_in_kernel": True}
    switches["A_log"] = torch.zeros(heads, device="cuda")
    with torch.no_grad():
        far = kda(**tensors, **switches, cu_seqlens=layout, backend="triton")[0][:, -300:]
        near = kda(**{name: x[:, -300:].contiguous() for name, x in tensors.items()}, **switches, backend="triton")[0]
    assert torch.equal(far, near)
