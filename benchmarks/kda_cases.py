"""Shapes, gates, limits and inputs of the KDA benchmark."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from perilune.ops.layout import SequenceLayout
from perilune.seeding import make_generator

SHAPES = (
    "1x8192x16", "1x8192x32", "1x8192x64", "1x8192x96", "2x16384x16", "1x4096x16", "1x32768x32",
    "1300,547,2048,963,271,3063@32", "8x1024@32",
)  # fmt: skip
QUICK = ("1x8192x16", "1x8192x96", "1300,547,2048,963,271,3063@32")
GATES = ("fast", "slow")
DIRECTIONS = ("forward", "training")
OURS, UNBOUNDED, FLA, FLA_OUTSIDE, CUDNN = "perilune", "perilune softplus", "fla", "fla gate-out", "cudnn"
LIMITS = {"o": 5e-3, "q": 8e-3, "k": 8e-3, "v": 8e-3, "g": 2e-2, "beta": 2e-2, "A_log": 2e-2, "dt_bias": 8e-3}
"""Relative rms error allowed in bfloat16: the output, and the gradient of each input."""
BYTES = {"forward": 1282, "training": 1282 + 2308}
"""Least traffic per token and head at K = V = 128; the backward reads and writes as much as it must, recomputing."""
FLOPS = {"forward": 166.6e3, "training": 166.6e3 + 442e3}
CHECK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Case:
    """A shape and a gate."""

    shape: str
    gate: str
    lengths: tuple[int, ...]
    heads: int
    is_packed: bool
    dim: int = 128

    @classmethod
    def parse(cls, shape: str, gate: str, dim: int) -> Case:
        """Read `BxTxH` (a batch) or `T1,T2,...@H` or `NxT@H` (packed).

        Raises:
            ValueError: it is neither.
        """
        try:
            listed, _, packed_heads = shape.partition("@")
            parts = [int(x) for x in listed.replace(",", "x").split("x")]
            if not packed_heads:
                batch, length, heads = parts
                lengths = (length,) * batch
            else:
                heads = int(packed_heads)
                lengths = tuple(parts) if "x" not in listed else (parts[1],) * parts[0]
            if (
                not lengths
                or min((heads, *lengths)) < 1
                or ("x" in listed and len(parts) != (2 if packed_heads else 3))
            ):
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(f"shape {shape!r} is not BxTxH, NxT@H or T1,T2,...@H in positive numbers") from None
        return cls(shape, gate, lengths, heads, bool(packed_heads), dim)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def shortened(self) -> Case:
        """About CHECK_TOKENS tokens of the same kind, for gradients."""
        length = CHECK_TOKENS // len(self.lengths)
        uneven = 16 if self.is_packed else 0
        return replace(self, lengths=tuple(min(full, length + uneven * i) for i, full in enumerate(self.lengths)))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of the operator, raw: before l2norm, gate and sigmoid."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor
    dt_bias: Tensor
    do: Tensor
    lower_bound: float | None
    layout: SequenceLayout | None
    cu_seqlens: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """What has a gradient."""
        return {name: getattr(self, name) for name in LIMITS if name != "o"}

    def of_heads(self, count: int) -> Inputs:
        sliced = {name: getattr(self, name)[:, :, :count] for name in ("q", "k", "v", "g", "beta", "do")}
        return replace(self, **sliced, A_log=self.A_log[:count], dt_bias=self.dt_bias[:count])

    def exact(self) -> Inputs:
        return replace(self, **{name: x.double() for name, x in self.tensors().items()}, do=self.do.double())

    def leaves(self) -> Inputs:
        return replace(self, **{name: x.detach().requires_grad_() for name, x in self.tensors().items()})


def make_inputs(case: Case, device: str) -> Inputs:
    generator = make_generator(0, "kda", case.shape, case.gate, device=device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    batch, length = (1, case.tokens) if case.is_packed else (len(case.lengths), case.lengths[0])
    heads, dim, is_fast = case.heads, case.dim, case.gate == "fast"
    q, k, v, do = (draw(batch, length, heads, dim).bfloat16() for _ in range(4))
    dt = (uniform(heads, dim) * 2 - 3).mul(torch.tensor(10.0).log()).exp()
    layout = SequenceLayout.from_lengths(case.lengths, device) if case.is_packed else None
    bounds = torch.tensor([0, *accumulate(case.lengths)], device=device) if case.is_packed else None
    return Inputs(
        q=q,
        k=k,
        v=v,
        g=(draw(batch, length, heads, dim) * (1.0 if is_fast else 0.1)).bfloat16(),
        beta=draw(batch, length, heads).bfloat16(),
        A_log=torch.zeros(heads, device=device) if is_fast else (1 + 15 * uniform(heads)).log(),
        dt_bias=0.1 * draw(heads, dim) if is_fast else dt + torch.log(-torch.expm1(-dt)),
        do=do,
        lower_bound=-5.0 if is_fast else None,
        layout=layout,
        cu_seqlens=bounds,
    )
