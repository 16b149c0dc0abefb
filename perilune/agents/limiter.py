"""One endpoint's limits, shared by all agents and runs that use it: calls at a time, calls and tokens a minute.

How many calls may be in flight is found out: one more after as many successes in a row as there may be, 0.7 times as
many when the server says that it is too much (additive increase, multiplicative decrease). Who waits is served in the
order of a fair queue: orchestrators first, and then every agent as often as every other.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from perilune.agents.client.limits import RateLimits
from perilune.agents.config import LimiterConfig


class Place(Protocol):
    """A place in flight."""

    @property
    def queued_s(self) -> float:
        """Seconds that it was waited for."""
        ...

    def settle(self, tokens: float) -> None:
        """Correct what was taken for the call's tokens."""
        ...


class Admissions(Protocol):
    """Who lets calls through; `Limiter` does."""

    def admit(self, agent: str, tokens: float = 0.0, *, is_urgent: bool = False) -> AbstractAsyncContextManager[Place]:
        """See `Limiter.admit`."""
        ...

    def succeeded(self) -> None:
        """See `Limiter.succeeded`."""
        ...

    def refused(self, retry_after_s: float | None = None) -> None:
        """See `Limiter.refused`."""
        ...


@dataclass(slots=True)
class Admission:
    """A place in flight; `settle` says how many tokens it took."""

    queued_s: float
    """Seconds that it was waited for."""
    _bucket: _Bucket | None
    _reserved: float

    def settle(self, tokens: float) -> None:
        """Correct what was taken for the call's tokens."""
        if self._bucket is not None:
            self._bucket.give(self._reserved - tokens)
            self._reserved = tokens


class Limiter:
    """See the module."""

    def __init__(self, config: LimiterConfig | None = None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._config, self._now = config or LimiterConfig(), now
        self.window = self._config.start
        """Calls that may be in flight."""
        self.in_flight = 0
        self.peak = 0
        """Most calls that ever were."""
        started = now()
        self._requests = _bucket(self._config.requests_per_minute, started)
        self._tokens = _bucket(self._config.tokens_per_minute, started)
        self._frozen_until = -math.inf
        self._last_cut = self._last_refusal = self._last_growth = -math.inf
        self._successes = 0
        self._queue: list[_Waiting] = []
        self._clock = 0.0
        self._tags: dict[str, float] = {}
        self._arrivals = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many calls are queued."""
        return sum(not entry.future.done() for entry in self._queue)

    @asynccontextmanager
    async def admit(self, agent: str, tokens: float = 0.0, *, is_urgent: bool = False) -> AsyncIterator[Admission]:
        """Wait for a place, hold it for the block.

        Args:
            agent: who asks; agents take turns.
            tokens: estimate of what the call will take; more than a minute's are admitted when the bucket is full.
            is_urgent: before all that are not.
        """
        began = self._now()
        await self._enter(agent, tokens, is_urgent)
        try:
            yield Admission(self._now() - began, self._tokens, tokens)
        finally:
            self.in_flight -= 1
            self._wake()

    def succeeded(self) -> None:
        """Tell that a call was answered."""
        self._successes += 1
        if self._successes >= self.window:
            self._successes = 0
            self.window = min(self._config.most, self.window + 1)
        self._wake()

    def refused(self, retry_after_s: float | None = None) -> None:
        """Tell that the server had too much; admit nothing for as long as it asks."""
        now = self._now()
        self._successes, self._last_refusal = 0, now
        if now - self._last_cut >= self._config.shrink_interval_s:
            self._last_cut = now
            self.window = max(1, math.floor(self.window * self._config.shrink))
        if retry_after_s:
            self._frozen_until = max(self._frozen_until, now + retry_after_s)

    def learn(self, limits: RateLimits) -> None:
        """Keep to what a server says of its key, as calls and tokens a minute; a limit of the config stands."""
        now, config = self._now(), self._config
        if config.requests_per_minute is None and limits.requests:
            self._requests = self._requests or _Bucket(limits.requests, limits.requests, now)
            self._requests.resize(limits.requests, now)
        if config.tokens_per_minute is None and limits.tokens:
            self._tokens = self._tokens or _Bucket(limits.tokens, limits.tokens, now)
            self._tokens.resize(limits.tokens, now)

    async def _enter(self, agent: str, tokens: float, is_urgent: bool) -> None:
        if not self._queue and self._delay(tokens) <= 0 and self.in_flight < self._window():
            self._clock = max(self._clock, self._tag(agent))
            self._take(tokens)
            return
        entry = self._enqueue(agent, tokens, is_urgent)
        self._wake()
        try:
            await entry.future
        except asyncio.CancelledError:
            if entry.future.done() and not entry.future.cancelled():  # admitted, and canceled at that moment
                self.in_flight -= 1
            self._wake()
            raise

    def _enqueue(self, agent: str, tokens: float, is_urgent: bool) -> _Waiting:
        self._arrivals += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = _Waiting((0 if is_urgent else 1, self._tag(agent), self._arrivals), tokens, future)
        heapq.heappush(self._queue, entry)
        return entry

    def _tag(self, agent: str) -> float:
        """Return an agent's turn in the fair queue: one after its last, and none for what it did not ask for."""
        tag = self._tags[agent] = max(self._clock, self._tags.get(agent, -1.0) + 1.0)
        if len(self._tags) > 4096:  # whose last turn is over begins like one who is new
            self._tags = {name: other for name, other in self._tags.items() if other >= self._clock}
        return tag

    def _take(self, tokens: float) -> None:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        for bucket, amount in ((self._requests, 1.0), (self._tokens, tokens)):
            if bucket is not None:
                bucket.take(amount, self._now())

    def _wake(self) -> None:
        """Admit who can be, and come back when the next can."""
        while self._queue:
            if self._queue[0].future.done():
                heapq.heappop(self._queue)
                continue
            if self.in_flight >= self._window():
                break
            delay = self._delay(self._queue[0].tokens)
            if delay > 0:
                self._come_back(delay)
                break
            entry = heapq.heappop(self._queue)
            self._clock = max(self._clock, entry.order[1])
            self._take(entry.tokens)
            entry.future.set_result(None)

    def _come_back(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay, self._wake)

    def _window(self) -> int:
        now, config = self._now(), self._config
        if self._last_refusal > -math.inf and now - self._last_refusal >= config.recovery_s:
            since = max(self._last_growth, self._last_refusal + config.recovery_s - config.recovery_interval_s)
            steps = int((now - since) // config.recovery_interval_s)
            if steps:
                self.window = min(config.most, self.window + steps)
                self._last_growth = since + steps * config.recovery_interval_s
        return self.window

    def _delay(self, tokens: float) -> float:
        """Seconds until a call of so many tokens may go, places in flight apart."""
        now = self._now()
        waits = [self._frozen_until - now]
        if self._requests is not None:
            waits.append(self._requests.wait(1.0, now))
        if self._tokens is not None:
            waits.append(self._tokens.wait(tokens, now))
        return max(waits)


@dataclass(slots=True, order=True)
class _Waiting:
    order: tuple[int, float, int]
    tokens: float = field(compare=False)
    future: asyncio.Future[None] = field(compare=False)


@dataclass(slots=True)
class _Bucket:
    """Fills at a rate, up to a minute's worth."""

    size: float
    level: float
    at: float

    def wait(self, amount: float, now: float) -> float:
        missing = min(amount, self.size) - self._filled(now)
        return max(0.0, missing) * 60.0 / self.size if missing > 1e-9 else 0.0

    def take(self, amount: float, now: float) -> None:
        self.level, self.at = self._filled(now) - amount, now

    def give(self, amount: float) -> None:
        self.level = min(self.size, self.level + amount)

    def resize(self, size: float, now: float) -> None:
        """Fill at another rate from now on; what was taken stays taken."""
        if size != self.size:
            taken = self.size - self._filled(now)
            self.size, self.level, self.at = size, size - taken, now

    def _filled(self, now: float) -> float:
        return min(self.size, self.level + (now - self.at) * self.size / 60.0)


def _bucket(per_minute: float | None, now: float) -> _Bucket | None:
    return None if per_minute is None else _Bucket(per_minute, per_minute, now)
