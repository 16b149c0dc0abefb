"""Inputs of the fused head and a comparison of backends, for the tests on a CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops import linear_logprobs
from perilune.seeding import make_generator
from tests.helpers import assert_close


def make_inputs(
    num_tokens: int, vocab: int = 11, d: int = 6, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden vectors, output matrix, targets; logits have a spread of sqrt(d)."""
    generator = make_generator(0, "loss", num_tokens, vocab)
    hidden = torch.randn(num_tokens, d, generator=generator, dtype=torch.float64).to(device, dtype)
    weight = torch.randn(vocab, d, generator=generator, dtype=torch.float64).to(device, dtype)
    targets = torch.randint(vocab, (num_tokens,), generator=generator).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def run_with_gradients(backend: str, inputs: tuple[Tensor, Tensor, Tensor], **options) -> dict[str, Tensor]:
    """Log-probabilities, entropies and gradients of `backend`, by name."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in inputs[:2])
    logprobs, entropy = linear_logprobs(hidden, weight, inputs[2], return_entropy=True, backend=backend, **options)
    direction = torch.randn(logprobs.shape, generator=make_generator(1, "direction"), dtype=torch.float64)
    gradients = torch.autograd.grad(logprobs, (hidden, weight), direction.to(logprobs))
    return {"logprobs": logprobs.detach(), "entropy": entropy, "dhidden": gradients[0], "dweight": gradients[1]}


def compare(
    sizes: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], *, device: str = "cpu",
    autocast: bool = False, temperature: float = 1.0, chunk_size: int | None = None,
) -> None:  # fmt: skip
    """Assert that `triton` agrees with the reference on `[T, V, d]`, hidden and weight in `dtypes`.

    Values to float32 whatever the inputs are; gradients to what they or their operands are rounded to.
    """
    hidden, weight, targets = make_inputs(*sizes, device=device)
    # A trained head: logits of order 10 at most
    given = hidden.detach().to(dtypes[0]), (weight.detach() * 2 / sizes[2] ** 0.5).to(dtypes[1]), targets
    wide = given[0].double(), given[1].double(), targets
    want = run_with_gradients("reference", wide, temperature=temperature)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        got = run_with_gradients("triton", given, temperature=temperature, chunk_size=chunk_size)
    is_half = autocast or dtypes != (torch.float32, torch.float32)
    # bfloat16 parts leave 2^-17 of each product out
    ratios = {"logprobs": 1e-5, "entropy": 1e-5} | dict.fromkeys(("dhidden", "dweight"), 1e-2 if is_half else 1e-5)
    for name, reference in want.items():
        assert got[name].dtype == (dtypes["dw" in name] if name.startswith("d") else torch.float32), name
        assert_close(f"{name} of {sizes}, {dtypes}", reference, got[name].double(), ratios[name], floor=1e-6)
