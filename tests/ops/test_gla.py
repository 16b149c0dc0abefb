"""Additive linear attention: the chunkwise path against the recurrence."""

import pytest
import torch
from torch import Tensor

from perilune.ops.gla import gla, gla_step
from perilune.ops.layout import SequenceLayout

LENGTHS = [(1,), (16,), (17,), (53,), (5, 0, 33, 1, 16), (0, 0), ()]


def make_inputs(lengths: tuple[int, ...], heads: int, groups: int, gate: str, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(sum(lengths) + heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    total, value_heads, key_dim, value_dim = sum(lengths), heads * groups, 6, 5
    decay = {"slow": 0.05, "mixed": 3.0, "strong": 100.0, "head": 1.0}[gate]
    g = -decay * torch.rand(total, value_heads, 1 if gate == "head" else key_dim, generator=generator, dtype=dtype)
    tensors = [
        normal(total, heads, key_dim),
        normal(total, heads, key_dim),
        normal(total, value_heads, value_dim),
        g,
        torch.rand(total, value_heads, generator=generator, dtype=dtype),
        normal(len(lengths), value_heads, key_dim, value_dim),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("groups", "gate"), [(1, "slow"), (2, "mixed"), (1, "strong"), (2, "head")])
def test_chunkwise_equals_recurrence_in_values_and_gradients(lengths, groups, gate):
    *inputs, state = make_inputs(lengths, 2, groups, gate)
    layout = SequenceLayout.from_lengths(lengths)
    results = []
    for backend in ("reference", "torch"):
        o, final = gla(*inputs, layout, scale=0.7, initial_state=state, chunk_size=16, backend=backend)
        generator = torch.Generator().manual_seed(0)
        loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (o, final))
        results.append([o, final, *torch.autograd.grad(loss, [*inputs, state], materialize_grads=True)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", ["mixed", "head"])
def test_gradcheck(gate):
    *inputs, state = make_inputs((18, 0, 3), 1, 1, gate)
    layout = SequenceLayout.from_lengths((18, 0, 3))
    assert torch.autograd.gradcheck(lambda *x: gla(*x[:5], layout, initial_state=x[5], chunk_size=16), [*inputs, state])


@pytest.mark.parametrize("gate", ["strong", "head"])
def test_float32_stays_close(gate):
    *inputs, state = make_inputs((200,), 2, 1, gate)
    layout = SequenceLayout.from_lengths((200,))
    expected, _ = gla(*inputs, layout, initial_state=state, backend="reference")
    found, _ = gla(*[x.float() for x in inputs], layout, initial_state=state.float())
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_steps_equal_recurrence():
    *inputs, state = make_inputs((7,), 2, 2, "mixed")
    expected, final = gla(*inputs, SequenceLayout.from_lengths((7,)), initial_state=state, backend="reference")
    for t in range(7):
        o, state = gla_step(*[x[t : t + 1] for x in inputs], state)
        torch.testing.assert_close(o[0], expected[t])
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 20}, "chunk_size must be one of"),
        ({"backend": "cuda"}, "backend must be"),
        ({"initial_state": torch.zeros(2, 2, 6, 5)}, "initial_state holds 2 states for 1 sequences"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    *inputs, _ = make_inputs((4,), 2, 1, "slow")
    with pytest.raises(ValueError, match=message):
        gla(*inputs, SequenceLayout.from_lengths((4,)), **change)
