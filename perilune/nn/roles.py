"""What a layer tells the optimizer about its parameters.

Muon orthogonalizes logical matrices. A stored tensor may be a stack of them (experts) or may interleave several along
its rows (gate and up; the component matrices of latent attention), and the Newton-Schulz result of a concatenation is
not the concatenation of the results. A layer therefore declares how its tensors split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from perilune.nn.qk_clip import QKClipSpec

MatrixSplit = Literal["component", "head", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixLayout:
    """How a stored tensor `[R, C]`, or a stack `[E, R, C]`, is made of logical matrices.

    The R rows are `num_periods` repetitions of the same sequence of row groups. `kv_b_proj` of latent attention is
    `MatrixLayout(row_groups=(nope_dim, value_dim), num_periods=num_heads)`; a fused gate and up projection is
    `MatrixLayout(row_groups=(d_ff, d_ff), is_fused=True)`; a plain stack is `MatrixLayout(row_groups=(R,))`.

    >>> import torch
    >>> layout = MatrixLayout(row_groups=(2, 1), num_periods=4)
    >>> [tuple(part.shape) for part in layout.split(torch.zeros(12, 5), "component")]
    [(8, 5), (4, 5)]
    >>> [tuple(part.shape) for part in layout.split(torch.zeros(12, 5), "head")]
    [(4, 3, 5)]

    Source: Kimi K2 (2507.20534), section 2.1, and Moonlight (2502.16982), section 2.2 and appendix A.
    """

    row_groups: tuple[int, ...]
    """Rows of each group within one period, in stored order."""
    num_periods: int = 1
    """How often the sequence of groups repeats along the rows; the number of heads where rows are laid out by head."""
    is_fused: bool = False
    """Whether the groups are unrelated projections stored together, which are separated whatever split is asked."""

    def __post_init__(self) -> None:
        if not self.row_groups or any(rows < 1 for rows in self.row_groups):
            raise ValueError(f"row_groups must be one or more sizes >= 1, got {self.row_groups}")
        if self.num_periods < 1:
            raise ValueError(f"num_periods must be >= 1, got {self.num_periods}")

    @property
    def num_rows(self) -> int:
        """R, the rows of the stored tensor."""
        return sum(self.row_groups) * self.num_periods

    def split(self, tensor: Tensor, split: MatrixSplit) -> list[Tensor]:
        """Separate a stored tensor (a weight, its gradient or its momentum) into logical matrices.

        Args:
            tensor: `[R, C]` or `[E, R, C]`.
            split: `component`: one matrix per row group, over all periods; `head`: one matrix per period;
                `none`: the tensor as it is stored. A fused layout is always split by component.

        Returns:
            Tensors `[..., A, C]`; every leading index is one logical matrix. `merge` undoes it.

        Raises:
            ValueError: the tensor does not have R rows or `split` is unknown.
        """
        self._check(tensor, split)
        stack, columns = tensor.shape[:-2], tensor.shape[-1]
        periods = tensor.reshape(*stack, self.num_periods, sum(self.row_groups), columns)
        if self.is_fused or split == "component":
            groups = periods.split(list(self.row_groups), dim=-2)
            return [group.reshape(*stack, -1, columns) for group in groups]
        return [periods] if split == "head" and self.num_periods > 1 else [tensor]

    def merge(self, parts: Sequence[Tensor], split: MatrixSplit) -> Tensor:
        """Put logical matrices back into the stored tensor; the inverse of `split`.

        Args:
            parts: what `split` returned, or tensors of those shapes.
            split: the same as given to `split`.

        Returns:
            `[R, C]` or `[E, R, C]`.

        Raises:
            ValueError: the parts do not add up to R rows or `split` is unknown.
        """
        columns = parts[0].shape[-1]
        if self.is_fused or split == "component":
            stack = parts[0].shape[:-2]
            groups = [part.reshape(*stack, self.num_periods, -1, columns) for part in parts]
            merged = torch.cat(groups, dim=-2).reshape(*stack, -1, columns)
        elif split == "head" and self.num_periods > 1:
            merged = parts[0].reshape(*parts[0].shape[:-3], -1, columns)
        else:
            merged = parts[0]
        self._check(merged, split)
        return merged

    def _check(self, tensor: Tensor, split: MatrixSplit) -> None:
        if split not in get_args(MatrixSplit):
            raise ValueError(f"split must be one of {get_args(MatrixSplit)}, got {split!r}")
        if tensor.ndim not in (2, 3) or tensor.shape[-2] != self.num_rows:
            raise ValueError(
                f"a tensor of layout {self.row_groups} x {self.num_periods} must be [{self.num_rows}, C] or "
                f"[E, {self.num_rows}, C], got {tuple(tensor.shape)}"
            )


@runtime_checkable
class DeclaresMatrices(Protocol):
    """A module some of whose own or nested parameters are several logical matrices."""

    def logical_matrices(self) -> dict[str, MatrixLayout]:
        """Layouts by parameter name relative to the module; 2-D weights not named are one matrix each."""
        ...


@runtime_checkable
class DeclaresAdamW(Protocol):
    """A module with parameters that Muon must not touch though their shape would allow it."""

    def adamw_parameters(self) -> set[str]:
        """Parameter names relative to the module."""
        ...


@runtime_checkable
class DeclaresQKClip(Protocol):
    """A token mixer."""

    def qk_clip_spec(self) -> QKClipSpec | None:
        """Which rows QK-Clip scales, or None if the mixer has no softmax logits."""
        ...
