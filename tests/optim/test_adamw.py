"""AdamW inside Muon against torch's AdamW."""

import pytest
import torch
from torch import nn

from perilune.optim import Muon


def make_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (5,), (), (2, 3, 4), (0, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-7)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_equals_torch_adamw_also_when_gradients_come_and_go(
    dtype: torch.dtype, tolerance: float, weight_decay: float
) -> None:
    ours, theirs = make_parameters(dtype), make_parameters(dtype)
    optimizer = Muon(ours, 3e-2, kind="adamw", weight_decay=weight_decay, betas=(0.9, 0.95), adamw_eps=1e-8)
    reference = torch.optim.AdamW(theirs, 3e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=generator, dtype=torch.float64).to(dtype) * 10.0 ** (step % 5 - 3)
            a.grad = b.grad = None if (step + index) % 3 == 0 else gradient
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_torch_adamw_state_is_taken_over() -> None:
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    reference = torch.optim.AdamW(theirs, 1e-2, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.2)
    optimizer = Muon(ours, 5e-3, kind="adamw")
    for parameter in theirs:
        parameter.grad = torch.ones_like(parameter)
    reference.step()
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    optimizer.load_state_dict(reference.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["adamw_eps"], group["weight_decay"]) == (1e-2, (0.8, 0.9), 1e-5, 0.2)
    for a, b in zip(ours, theirs, strict=True):
        a.grad, b.grad = torch.full_like(a, 0.5), torch.full_like(b, 0.5)
    optimizer.step()
    reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=2e-7)
