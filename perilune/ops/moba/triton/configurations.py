"""Tile sizes, warps and stages of the kernels, as measured on Hopper; nothing is tuned at run time."""

from __future__ import annotations

SMALL_SHARED = 160_000
"""Bytes of shared memory of a block below which tiles are halved."""


def configuration(kernel: str, *, element_bytes: int, width: int, block_size: int, shared_bytes: int) -> dict[str, int]:
    """How a kernel is launched.

    Args:
        kernel: its name.
        element_bytes: bytes of an element of q, k and v.
        width: channels of a head, rounded up to a power of two.
        block_size: B.
        shared_bytes: shared memory that a block of threads may have.

    Returns:
        BM rows and BN keys of a tile, STAGES of loads under way, and `num_warps`.
    """
    keys = max(16, 1 << (block_size - 1).bit_length())
    if element_bytes == 4:
        return {"BM": 32, "BN": min(32, keys), "STAGES": 1, "num_warps": 4}
    rows, most, stages, warps = _HALF[kernel][block_size > 128]
    if width > 128:
        rows, most, stages, warps = 64, 64, 1, 8
    if shared_bytes < SMALL_SHARED:
        rows, most, stages = min(rows, 64), min(most, 64), min(stages, 2)
    return {"BM": rows, "BN": min(most, keys), "STAGES": stages, "num_warps": warps}


_HALF = {
    "attend_block": ((64, 128, 3, 4), (64, 128, 3, 4)),
    "attend_rows": ((128, 64, 3, 8), (128, 64, 3, 8)),
    "attend_own": ((64, 64, 2, 4), (128, 64, 3, 8)),
    "query_gradient_of_choices": ((64, 128, 1, 4), (64, 128, 2, 8)),
    "query_gradient_of_own": ((64, 64, 2, 4), (64, 64, 2, 8)),
    "key_value_gradient": ((64, 128, 1, 8), (64, 128, 1, 8)),
}
"""Rows, most keys, stages and warps for 16-bit inputs, in blocks of up to 128 tokens and in larger ones."""
