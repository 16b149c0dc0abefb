from __future__ import annotations

import asyncio

import pytest

from perilune.agents.client.limits import RateLimits
from perilune.agents.config import LimiterConfig
from perilune.agents.limiter import Limiter


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


async def _settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def _hold(limiter: Limiter, agent: str, order: list[str], release: asyncio.Event, urgent: bool = False) -> None:
    async with limiter.admit(agent, is_urgent=urgent):
        order.append(agent)
        await release.wait()


def test_no_more_are_in_flight_than_the_window_and_all_get_through() -> None:
    async def check() -> None:
        limiter = Limiter(LimiterConfig(start=3, most=3))

        async def call(agent: str) -> None:
            async with limiter.admit(agent):
                assert limiter.in_flight <= 3
                await asyncio.sleep(0)

        await asyncio.gather(*(call(f"a{i % 7}") for i in range(50)))
        assert (limiter.in_flight, limiter.waiting, limiter.peak) == (0, 0, 3)

    asyncio.run(check())


def test_agents_take_turns_and_urgent_ones_go_first() -> None:
    async def check() -> None:
        limiter, order, release = Limiter(LimiterConfig(start=1, most=1)), list[str](), asyncio.Event()
        first = asyncio.create_task(_hold(limiter, "first", order, release))
        await _settled()
        tasks = [asyncio.create_task(_hold(limiter, "chatty", order, release)) for _ in range(3)]
        tasks += [asyncio.create_task(_hold(limiter, name, order, release)) for name in ("b", "c")]
        tasks.append(asyncio.create_task(_hold(limiter, "root", order, release, urgent=True)))
        await _settled()
        assert limiter.waiting == 6
        release.set()
        await asyncio.gather(first, *tasks)
        assert order == ["first", "root", "chatty", "b", "c", "chatty", "chatty"]

    asyncio.run(check())


def test_who_asked_while_nobody_waited_is_not_put_behind_those_who_come_later() -> None:
    async def check() -> None:
        limiter, order, release = Limiter(LimiterConfig(start=1, most=1)), list[str](), asyncio.Event()
        for _ in range(50):
            async with limiter.admit("old"):
                pass
        first = asyncio.create_task(_hold(limiter, "first", order, release))
        await _settled()
        tasks = [asyncio.create_task(_hold(limiter, name, order, release)) for name in ("new", "old", "new", "new")]
        await _settled()
        release.set()
        await asyncio.gather(first, *tasks)
        assert order.index("old") <= 2

    asyncio.run(check())


def test_the_window_grows_with_successes_and_shrinks_with_refusals() -> None:
    async def check() -> None:
        clock = Clock()
        limiter = Limiter(LimiterConfig(start=8, most=10), now=clock)
        for _ in range(8):
            limiter.succeeded()
        assert limiter.window == 9
        limiter.refused()
        assert limiter.window == 6
        limiter.refused()  # within two seconds of the first
        assert limiter.window == 6
        clock.time += 2.0
        for expected in (4, 2, 1, 1):
            limiter.refused()
            assert limiter.window == expected
            clock.time += 2.0
        clock.time += 178.0
        async with limiter.admit("a"):
            assert limiter.window == 2
        clock.time += 60.0
        async with limiter.admit("a"):
            assert limiter.window == 4
        clock.time += 1e6
        async with limiter.admit("a"):
            assert limiter.window == 10

    asyncio.run(check())


def test_nothing_is_admitted_for_as_long_as_the_server_asks() -> None:
    async def check() -> None:
        limiter = Limiter()
        limiter.refused(retry_after_s=0.05)
        began = asyncio.get_running_loop().time()
        async with limiter.admit("a") as place:
            assert asyncio.get_running_loop().time() - began >= 0.045
            assert place.queued_s >= 0.045

    asyncio.run(check())


def test_calls_and_tokens_a_minute() -> None:
    async def check() -> None:
        clock = Clock()
        limiter = Limiter(LimiterConfig(requests_per_minute=3, tokens_per_minute=1000), now=clock)
        for tokens in (300, 300, 300):
            async with limiter.admit("a", tokens) as place:
                place.settle(100)
        assert limiter._delay(100) == pytest.approx(20.0)  # the fourth call waits for a third of a minute
        clock.time += 20.0
        assert limiter._delay(100) == 0
        async with limiter.admit("a", 900):
            pass
        clock.time += 20.0
        assert limiter._delay(500) > 0
        clock.time += 60.0
        assert limiter._delay(50_000) == 0  # more than a minute's tokens: when the bucket is full
        assert limiter._delay(0) == 0

    asyncio.run(check())


def test_who_is_cancelled_while_waiting_or_just_admitted_holds_nothing() -> None:
    async def check() -> None:
        limiter, release = Limiter(LimiterConfig(start=1, most=1)), asyncio.Event()
        holder = asyncio.create_task(_hold(limiter, "a", [], release))
        await _settled()
        waiting = [asyncio.create_task(_hold(limiter, name, [], asyncio.Event())) for name in "bcd"]
        await _settled()
        waiting[0].cancel()
        await _settled()
        assert limiter.waiting == 2
        release.set()
        await holder
        waiting[1].cancel()  # admitted by now, perhaps not yet awake
        await _settled()
        assert limiter.in_flight == 1
        waiting[2].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (limiter.in_flight, limiter.waiting) == (0, 0)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0}, "start must be in"),
        ({"start": 9, "most": 8}, "start must be in"),
        ({"requests_per_minute": 0.0}, "requests_per_minute must be"),
        ({"shrink": 1.0}, "shrink must be in"),
        ({"recovery_interval_s": 0.0}, "recovery_interval_s must be finite and > 0, got 0"),
        ({"recovery_s": -1.0}, "recovery_s must be"),
        ({"shrink_interval_s": float("nan")}, "shrink_interval_s must be"),
    ],
)
def test_impossible_limits_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LimiterConfig(**settings)  # pyright: ignore[reportArgumentType]


def test_what_a_server_states_is_kept_to_unless_the_config_says_otherwise() -> None:
    async def check() -> None:
        clock = Clock()
        limiter = Limiter(LimiterConfig(tokens_per_minute=1000), now=clock)
        limiter.learn(RateLimits(requests=2, tokens=5))
        for _ in range(2):
            async with limiter.admit("a", 400):
                pass
        third = asyncio.create_task(limiter.admit("a").__aenter__())
        await _settled()
        assert limiter.waiting == 1
        clock.time += 30
        limiter.learn(RateLimits(requests=2))  # the same again gives nothing back
        limiter.succeeded()
        await asyncio.wait_for(third, 1)

    asyncio.run(check())


def test_a_stated_limit_that_changes_keeps_what_was_taken() -> None:
    async def check() -> None:
        limiter = Limiter(now=Clock())
        limiter.learn(RateLimits(tokens=100))
        async with limiter.admit("a", 80) as place:
            limiter.learn(RateLimits(tokens=200))
            place.settle(150)
        late = asyncio.create_task(limiter.admit("a", 60).__aenter__())
        async with limiter.admit("b", 50, is_urgent=True):
            await _settled()
            assert not late.done()
        late.cancel()

    asyncio.run(check())
