"""Shipped launch parameters: measured on an H100 (docs/kernels.md), fixed, so that no first call tunes for minutes."""

from dataclasses import dataclass

import torch
import triton

_SHARED_BYTES = 120_000
"""What three stages of a scan take at K = 128, but for Hopper's matrix units, which read theirs from shared memory too
and have plenty. Consumer GPUs have 101,376 bytes, and two stages take 59,904.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How the kernels are launched for one dtype and key dim."""

    operand_dtype: torch.dtype
    """Of matrix operands: bfloat16 for half-width inputs (float16 would overflow), else float32."""
    precision: str
    """Of matrix products with float32 operands."""
    prepare_keys: int
    """Key channels that the first kernel takes at once."""
    differentiate_keys: int
    """Key channels of a program of the last kernel."""
    differentiate_warps: int
    """Warps of a program of the last kernel; all others have 4."""
    scan_stages: int
    """Chunks whose operands are under way at once."""
    max_values: int
    """Most values of a slice of the scans."""

    def scan_values(self, walks: int, value_dim: int) -> int:
        """Values of a slice, few enough that `walks` (sequences times heads) fill the GPU; no bit depends on it."""
        block = min(self.max_values, max(16, triton.next_power_of_2(value_dim)))
        while block > 16 and walks * triton.cdiv(value_dim, block) < 128:
            block //= 2
        return block


def launch_config(dtype: torch.dtype, key_dim: int, shared_bytes: int) -> LaunchConfig:
    """Pick the parameters of a call.

    Args:
        dtype: of q.
        key_dim: K.
        shared_bytes: shared memory that a block can have.
    """
    if dtype == torch.float32:
        return LaunchConfig(
            operand_dtype=torch.float32,
            precision="ieee",
            prepare_keys=32,
            differentiate_keys=32,
            differentiate_warps=8,
            scan_stages=1,
            max_values=16,
        )
    return LaunchConfig(
        operand_dtype=torch.bfloat16,
        precision="tf32",
        prepare_keys=32,
        differentiate_keys=64,
        differentiate_warps=4,
        scan_stages=1 if key_dim > 128 else 2 if key_dim > 64 and shared_bytes < _SHARED_BYTES else 3,
        max_values=32,
    )
