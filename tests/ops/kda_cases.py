"""Inputs for the tests of KDA, from harmless to hostile, and one way to run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from perilune.ops import SequenceLayout, kda

Make = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _masks(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.where(_uniform(shape, generator) < 0.2, -1000.0, 0.0)


GATES: dict[str, Make] = {
    "zero": lambda shape, _: torch.zeros(shape, dtype=torch.float64),
    "tiny": lambda shape, generator: -1e-4 * _uniform(shape, generator),
    "init": lambda shape, generator: -1.6 * _uniform(shape, generator),
    "saturated": lambda shape, _: torch.full(shape, -5.0, dtype=torch.float64),
    "borderline": lambda shape, generator: -8 * _uniform(shape, generator),
    "spiky": lambda shape, generator: -80 * _uniform(shape, generator) ** 6,
    "hundred": lambda shape, _: torch.full(shape, -100.0, dtype=torch.float64),
    "masks": _masks,
    "masks_and_init": lambda shape, generator: _masks(shape, generator) - 0.3 * _uniform(shape, generator),
}

KEYS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda k: k,
    "identical": lambda k: k[:1].expand_as(k).clone(),
    "correlated": lambda k: k[:1] + 0.3 * k,
    "repeated": lambda k: k[torch.arange(len(k)) // 5],
    "some_zero": lambda k: k * (torch.arange(len(k)) % 3 > 0)[:, None, None],
}


@dataclass(frozen=True, kw_only=True)
class Case:
    lengths: tuple[int, ...] = (37,)
    heads: int = 2
    groups: int = 1
    key_dim: int = 16
    value_dim: int = 8
    gate: str = "init"
    beta: float | None = None
    keys: str = "random"
    chunk_size: int = 16
    scale: float | None = None
    state: bool = True
    raw: bool = False
    lower_bound: float | None = None
    switches: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Leaf tensors by argument name; raw ones for the in-kernel switches."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        total, value_heads = sum(self.lengths), self.heads * self.groups
        made = {
            "q": normal(total, self.heads, self.key_dim),
            "k": KEYS[self.keys](normal(total, self.heads, self.key_dim)),
            "v": normal(total, value_heads, self.value_dim),
            "g": GATES[self.gate]((total, value_heads, self.key_dim), generator),
            "beta": normal(total, value_heads),
        }
        if self.raw:
            made["g"] = normal(total, value_heads, self.key_dim) * 3
            made["A_log"] = normal(value_heads)
            made["dt_bias"] = normal(value_heads, self.key_dim)
        else:
            made["k"] = made["k"] * (made["k"].square().sum(-1, keepdim=True) + 1e-6).rsqrt()
            made["beta"] = made["beta"].sigmoid() if self.beta is None else torch.full_like(made["beta"], self.beta)
        made = {name: x[None] if name in ("q", "k", "v", "g", "beta") else x for name, x in made.items()}
        if self.state:
            made["initial_state"] = normal(len(self.lengths), value_heads, self.key_dim, self.value_dim)
        return {name: x.to(dtype).requires_grad_() for name, x in made.items()}

    def options(self) -> dict[str, Any]:
        raw = {"gate_in_kernel": True, "qk_l2norm_in_kernel": True, "beta_sigmoid_in_kernel": True}
        return {
            "cu_seqlens": SequenceLayout.from_lengths(self.lengths),
            "chunk_size": self.chunk_size,
            "scale": self.scale,
            "output_final_state": True,
            "lower_bound": self.lower_bound,
            **(raw if self.raw else {}),
            **self.switches,
        }


def outputs_and_gradients(case: Case, tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """Run KDA, pull back fixed random gradients of the outputs and the final state, and name everything."""
    o, final_state = kda(**tensors, **{**case.options(), **changes})[:2]
    assert final_state is not None
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, final_state)]
    grads = torch.autograd.grad((o, final_state), list(tensors.values()), seeds)
    named = {f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}
    return {"o": o.detach(), "final_state": final_state.detach(), **named}


def as_dtype(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
