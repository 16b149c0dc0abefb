"""Drawing tokens so that a request's randomness is its own.

Each draw uses one uniform number that is a hash of (seed, sample, position): nothing is drawn from a shared stream,
so a response does not depend on which other responses are in the batch, or when they joined it. What a row draws is
likewise computed from that row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.engine.distribution import TokenDistribution, Truncation


def _signed(value: int) -> int:
    """Read a 64-bit pattern as the two's complement number that torch's int64 holds."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; int64's own shift would copy the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The SplitMix64 output function, elementwise on 64-bit patterns held in int64 (arithmetic wraps around).

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), figure 17.
    """
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def sample_keys(seeds: Tensor, samples: Tensor) -> Tensor:
    """Hash each row's seed and sample index `[N]` int64 to the key `[N]` that its draws derive from."""
    return splitmix64(splitmix64(seeds) ^ splitmix64(samples * _GOLDEN))


def counter_uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """One uniform number in [0, 1) per row.

    Args:
        keys: `[N]` int64 from `sample_keys`.
        positions: `[N]` int64, index of the token to draw within its response.

    Returns:
        `[N]` float64 with 52 random bits, so that the product with a total stays strictly below that total.
    """
    bits = splitmix64(keys ^ splitmix64(positions * _GOLDEN))
    return _shift_right(bits, 12).to(torch.float64) * 2.0**-52


def sample_tokens(
    logits: Tensor, temperature: Tensor, uniforms: Tensor, truncation: Truncation | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row and give its log-probability.

    Args:
        logits: `[N, V]`, any float dtype; computed in float32.
        temperature: `[N]` float32; 0 takes the most likely token and reports log softmax of the plain logits.
        uniforms: `[N]` float64 in [0, 1).
        truncation: None when no row truncates.

    Returns:
        tokens `[N]` int64 and logprobs `[N]` float32 under softmax(logits / temperature), before truncation.
    """
    distribution = TokenDistribution(logits, temperature)
    tokens = distribution.draw(uniforms, truncation)
    return tokens, distribution.logprobs(tokens)
