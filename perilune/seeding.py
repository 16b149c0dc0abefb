"""Random streams by purpose.

Every consumer of randomness derives its own seed from the run's seed and a name, so that adding a consumer never
shifts the draws of another, and a draw depends on (seed, purpose) alone and not on what was drawn before.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed that is a hash of `seed` and `purpose`.

    >>> derive_seed(0, "data", 3) == derive_seed(0, "data", 3)
    True
    >>> derive_seed(0, "data", 3) == derive_seed(0, "data", 4)
    False
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def make_generator(seed: int, *purpose: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a torch generator on `device`, seeded with `derive_seed(seed, *purpose)`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *purpose))
