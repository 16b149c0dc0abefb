"""How long a model takes to answer: random, yet a function of a seed and of who asks, so that order does not matter."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol


def unit(seed: int, *key: str | int) -> float:
    """Return a number in [0, 1) that depends on the arguments alone, the same in every process."""
    digest = blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def lognormal(median: float, sigma: float, seed: int, *key: str | int) -> float:
    """Return a draw from a lognormal distribution that depends on the arguments alone.

    Args:
        median: of the distribution.
        sigma: standard deviation of the logarithm; 0 gives the median.
        seed: of all draws.
        key: of this draw.
    """
    # Box-Muller; 1 - u because the logarithm wants (0, 1].
    radius = math.sqrt(-2.0 * math.log(1.0 - unit(seed, "radius", *key)))
    return median * math.exp(sigma * radius * math.cos(math.tau * unit(seed, "angle", *key)))


class Clock(Protocol):
    """Tells the time and lets it pass."""

    def now(self) -> float:
        """Return seconds since some moment."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds of this clock."""
        ...


@dataclass(frozen=True, slots=True)
class ScaledClock:
    """The real clock, compressed."""

    time_scale: float = 1.0
    """Real seconds that one second of this clock takes: 0.01 makes it a hundred times faster."""

    def now(self) -> float:
        """Return seconds of this clock since some moment."""
        return time.perf_counter() / self.time_scale

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds of this clock."""
        await asyncio.sleep(seconds * self.time_scale)


class LatencyModel(Protocol):
    """Says how long an answer takes."""

    def delays(self, tokens: int, *key: str | int) -> tuple[float, float]:
        """Return the seconds to the first token and to the last, for an answer of so many tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Lognormal time to the first token, and lognormal time for each token."""

    first_s: float = 1.5
    """Median time to the first token."""
    per_token_s: float = 0.0
    """Median time for each token of the answer."""
    sigma: float = 0.5
    """Standard deviation of the logarithm of both."""
    seed: int = 0

    def delays(self, tokens: int, *key: str | int) -> tuple[float, float]:
        """Return the seconds to the first token and to the last, for an answer of so many tokens."""
        first = lognormal(self.first_s, self.sigma, self.seed, "first", *key)
        if not self.per_token_s:
            return first, first
        return first, first + tokens * lognormal(self.per_token_s, self.sigma, self.seed, "token", *key)
