"""Muon's equations over lists of tensors: momentum, orthogonalization of logical matrices, and the RMS scale.

Logical matrices of one shape, from whichever tensors, go through one batched Newton-Schulz call: a model has a
hundred matrices but only a handful of shapes.
"""

# pyright: reportPrivateImportUsage=false
# torch documents its foreach functions under these names.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perilune.nn.roles import MatrixLayout, MatrixSplit
from perilune.ops.newton_schulz import Coefficients, newton_schulz, resolve_coefficients


@dataclass(frozen=True, slots=True, kw_only=True)
class Orthogonalizer:
    """How an update is cut into logical matrices and orthogonalized."""

    split: MatrixSplit = "component"
    """Split of tensors that hold several matrices: see `MatrixLayout.split`."""
    update_rms: float = 0.2
    """RMS that the scale aims at; 0.2 is that of an AdamW update."""
    steps: int | None = None
    """Newton-Schulz steps; None: 5, or as many as `coefficients` lists."""
    coefficients: Coefficients = "jordan"
    """Newton-Schulz coefficients: a preset, one triple, or one triple per step."""
    eps: float = 1e-7
    """Added to the Frobenius norm."""
    dtype: torch.dtype | None = None
    """Dtype of the iteration; None: float32 on a CPU, bfloat16 on a GPU."""
    max_batch: int | None = None
    """At most so many matrices in one Newton-Schulz call, to cap memory; None: all of a shape."""

    def __post_init__(self) -> None:
        resolve_coefficients(self.coefficients, self.steps)
        for name, value in {"update_rms": self.update_rms, "eps": self.eps}.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.max_batch is not None and self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1 or None, got {self.max_batch}")

    def __call__(self, updates: Sequence[Tensor], layouts: Sequence[MatrixLayout | None]) -> list[Tensor]:
        """Return `update_rms * sqrt(max(A, B)) * NS(U)` for every logical matrix, put back into the stored shapes.

        Args:
            updates: U, each `[A, B]` or `[E, A, B]`; left as they are.
            layouts: of each update; None: every `[A, B]` is one matrix.
        """
        parts = [
            [update] if layout is None else layout.split(update, self.split)
            for update, layout in zip(updates, layouts, strict=True)
        ]
        flat = self._orthogonalize_all([part for group in parts for part in group])
        results: list[Tensor] = []
        position = 0
        for group, layout in zip(parts, layouts, strict=True):
            mine = flat[position : position + len(group)]
            position += len(group)
            results.append(mine[0] if layout is None else layout.merge(mine, self.split))
        return results

    def _orthogonalize_all(self, parts: list[Tensor]) -> list[Tensor]:
        """Orthogonalize stacks `[..., A, B]`, batching those of one shape, whichever way they lie."""
        buckets: dict[tuple[object, ...], list[int]] = {}
        for index, part in enumerate(parts):
            key = (*sorted(part.shape[-2:]), part.device, part.dtype)
            buckets.setdefault(key, []).append(index)
        results = list(parts)
        for indices in buckets.values():
            wide = [_lay_wide(parts[index]) for index in indices]
            stacks = [part.reshape(-1, *part.shape[-2:]) for part in wide]
            solved = self._orthogonalize_stack(torch.cat(stacks)).split([stack.shape[0] for stack in stacks])
            for index, part, matrices in zip(indices, wide, solved, strict=True):
                result = matrices.reshape(part.shape)
                results[index] = result if result.shape == parts[index].shape else result.mT
        return results

    def _orthogonalize_stack(self, stack: Tensor) -> Tensor:
        """Orthogonalize and scale `[n, A, B]`, at most `max_batch` matrices at a time."""
        chunks = stack.split(self.max_batch or max(1, stack.shape[0]))
        solved = [
            newton_schulz(chunk, steps=self.steps, coefficients=self.coefficients, eps=self.eps, dtype=self.dtype)
            for chunk in chunks
        ]
        scale = rms_scale(stack.shape[-2], stack.shape[-1], self.update_rms)
        return (solved[0] if len(solved) == 1 else torch.cat(solved)).mul_(scale)


def momentum_update(momenta: list[Tensor], gradients: list[Tensor], mu: float, nesterov: bool) -> list[Tensor]:
    """M = mu M + G in place, and return U = G + mu M (Nesterov) or U = M.

    Source: Moonlight, section 2.1 with footnote 1; Kimi K2, Algorithm 1, line 3 (without Nesterov).
    """
    torch._foreach_mul_(momenta, mu)
    torch._foreach_add_(momenta, gradients)
    if not nesterov:
        return list(momenta)
    return list(torch._foreach_add(gradients, momenta, alpha=mu))


def rms_scale(rows: int, columns: int, update_rms: float = 0.2) -> float:
    """0.2 sqrt(max(A, B)): gives an orthonormal `[A, B]` matrix the RMS of an AdamW update.

    Source: Moonlight, eq. 4 and Lemma 1.
    """
    return update_rms * math.sqrt(max(rows, columns))


def muon_update_(weights: list[Tensor], directions: list[Tensor], *, learning_rate: float, weight_decay: float) -> None:
    """W = (1 - eta lambda) W - eta 0.2 sqrt(max(A, B)) O in place; `directions` carry the scale already.

    The decay takes the learning rate as it is, not adjusted to the shape.

    Source: Moonlight, eq. 4.
    """
    torch._foreach_mul_(weights, 1 - learning_rate * weight_decay)
    torch._foreach_add_(weights, directions, alpha=-learning_rate)


def _lay_wide(part: Tensor) -> Tensor:
    """Transpose tall matrices, which Newton-Schulz commutes with."""
    return part.mT if part.shape[-2] > part.shape[-1] else part
