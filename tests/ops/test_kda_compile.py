"""KDA under `torch.compile`: one whole graph, the same numbers and gradients as without."""

import pytest
import torch

from perilune.ops import SequenceLayout, kda
from perilune.ops.kda.custom_op import kda_backward_operator, kda_operator

GATED = {"gate_in_kernel": True, "qk_l2norm_in_kernel": True, "beta_sigmoid_in_kernel": True}


def operands(batch, length, *, heads=1, value_heads=2, dim=16, sequences=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    tokens = (batch, length)
    return {
        "q": draw(*tokens, heads, dim),
        "k": draw(*tokens, heads, dim),
        "v": draw(*tokens, value_heads, dim),
        "g": draw(*tokens, value_heads, dim),
        "beta": draw(*tokens, value_heads),
        "A_log": draw(value_heads),
        "dt_bias": draw(value_heads, dim),
        "initial_state": draw(sequences or batch, value_heads, dim, dim),
    }


def compiled(**options):
    torch.compiler.reset()
    return torch.compile(lambda tensors: kda(**tensors, **options), backend="aot_eager", fullgraph=True)


def gradients(outputs, tensors):
    loss = sum((x * x).sum() for x in outputs[:2] if x is not None)
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(tensors.values(), found, strict=True)]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"batch": 2, "length": 37}, {"output_final_state": True}),
        ({"batch": 2, "length": 37}, {}),
        ({"batch": 1, "length": 20, "value_heads": 3}, {"output_final_state": True, "state_v_first": True}),
        ({"batch": 1, "length": 0}, {"output_final_state": True}),
        ({"batch": 1, "length": 45, "sequences": 4}, {"output_final_state": True, "cu_seqlens": [0, 17, 17, 18, 45]}),
        ({"batch": 1, "length": 45, "sequences": 2}, {"output_final_state": True, "cu_seqlens": [0, 5, 40]}),
        ({"batch": 1, "length": 45, "sequences": 2}, {"cu_seqlens": SequenceLayout.from_lengths([5, 40])}),
    ],
)
def test_compiled_equals_eager_in_outputs_and_gradients(shape, options):
    if isinstance(options.get("cu_seqlens"), list):
        options = {**options, "cu_seqlens": torch.tensor(options["cu_seqlens"], dtype=torch.int32)}
    options = {**GATED, "chunk_size": 16, **options}
    tensors = operands(**shape)
    eager, whole = kda(**tensors, **options), compiled(**options)(tensors)
    for ours, theirs in zip(whole, eager, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for ours, theirs in zip(gradients(whole, tensors), gradients(eager, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_compiled_plain_operands_need_no_gate_parameters():
    tensors = operands(2, 19)
    plain = {name: tensors[name] for name in ("q", "k", "v")}
    plain |= {"g": -tensors["g"].detach().abs(), "beta": tensors["beta"].detach().sigmoid()}
    eager, whole = kda(**plain, chunk_size=16), compiled(chunk_size=16)(plain)
    torch.testing.assert_close(whole[0], eager[0], rtol=0, atol=0)
    three = {name: plain[name] for name in ("q", "k", "v")}
    for ours, theirs in zip(gradients(whole, three), gradients(eager, three), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 17, 40])])
def test_compiled_chunk_states_are_those_of_eager(cu_seqlens):
    options = {**GATED, "chunk_size": 16, "return_chunk_states": True, "cu_seqlens": cu_seqlens}
    tensors = operands(1, 40, sequences=1 if cu_seqlens is None else 2)
    eager, whole = kda(**tensors, **options), compiled(**options)(tensors)
    assert len(whole) == 3
    torch.testing.assert_close(whole[2], eager[2], rtol=0, atol=0)


def test_a_wrong_partition_is_named_when_compiled_too():
    tensors = operands(1, 40, sequences=2)
    with pytest.raises(ValueError, match="past q's T=40 tokens"):
        compiled(**GATED, cu_seqlens=torch.tensor([0, 17, 41]))(tensors)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 3, 20], dtype=torch.int32)])
def test_operators_pass_the_librarys_own_checks(cu_seqlens):
    tensors = operands(1, 20, sequences=2)
    packed = [tensors[name].detach().flatten(0, 1).requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    rest = [tensors[name] for name in ("A_log", "dt_bias", "initial_state")]
    switches = (0.25, None, True, True, True, False, 16)
    torch.library.opcheck(kda_operator, (*packed, *rest, cu_seqlens, *switches, False, "torch"))
    with torch.no_grad():
        grads = (torch.ones_like(packed[2]), torch.ones_like(rest[2]))
        torch.library.opcheck(kda_backward_operator, (*grads, *packed, *rest, cu_seqlens, *switches, "torch"))
