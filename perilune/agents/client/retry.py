"""Asks until there is an answer, or no hope of one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace

from perilune.agents.client.base import ChatClient, EndpointError
from perilune.agents.client.latency import unit
from perilune.agents.messages import ChatRequest, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how long to try."""

    base_s: float = 1.0
    """Longest wait after the first attempt; it doubles with each."""
    cap_s: float = 60.0
    """Longest wait, if the server does not ask for a longer one."""
    attempts: int = 6
    total_s: float = 600.0
    """For all attempts and waits of a call; not for places in flight, which may take as long as they take."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be >= 1, got {self.attempts}")
        if min(self.base_s, self.cap_s) < 0 or self.total_s <= 0:
            raise ValueError("base_s and cap_s must be >= 0, and total_s above 0")


OnRetry = Callable[[int, EndpointError, float], None]
"""Told of an attempt that failed (counted from 1), why, and the seconds until the next."""


async def ask(
    client: ChatClient,
    request: ChatRequest,
    policy: RetryPolicy = RetryPolicy(),
    *,
    admit: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
    on_retry: OnRetry | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    now: Callable[[], float] = time.monotonic,
    rng: Callable[[], float] | None = None,
) -> Reply:
    """Return the answer of the first attempt that has one.

    After attempt k, from 0, the wait is min(cap_s, base_s 2^k) U(0.5, 1), and at least what the server asks for. An
    answer that ends for a tool call and holds none is asked for once more, in one piece.

    Args:
        client: is asked.
        request: what is asked.
        policy: how often and how long.
        admit: holds a place for an attempt, when there is one.
        on_retry: told of every attempt that another will follow; the last one's error is raised.
        sleep: lets time pass.
        now: seconds of the clock that `sleep` moves.
        rng: a number in [0, 1) a call, for U; None: a function of agent, turn and attempt, so that runs repeat.

    Raises:
        EndpointError: there is no answer, and trying again is useless or takes too long; its text says how often it
            was tried.
    """
    start, lost_call = now(), False
    for attempt in range(policy.attempts):
        error = None
        try:
            asked = now()
            async with admit():
                start += now() - asked
                async with asyncio.timeout(policy.total_s - (now() - start)):
                    return await client.chat(request)
        except EndpointError as caught:
            error = caught
        except TimeoutError:
            text = f"no answer within {policy.total_s:g} s"
            raise _final(EndpointError(text, fault="timeout"), attempt + 1) from None
        draw = unit(0, "retry", request.agent_id, request.turn, attempt) if rng is None else rng()
        wait = max(min(policy.cap_s, policy.base_s * 2**attempt) * (0.5 + 0.5 * draw), error.retry_after_s or 0.0)
        is_last = attempt + 1 == policy.attempts or now() - start + wait >= policy.total_s
        is_lost_call = error.fault == "empty" and error.finish_reason == "tool_calls"
        if is_last or not error.is_retryable or (is_lost_call and lost_call):
            raise _final(error, attempt + 1)
        if is_lost_call:
            lost_call, request = True, replace(request, stream=False)
        if on_retry is not None:
            on_retry(attempt + 1, error, wait)
        await sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _final(error: EndpointError, attempts: int) -> EndpointError:
    """Return the error of the last attempt, with their number if there were several."""
    if attempts == 1:
        return error
    last = EndpointError(
        f"{error}; gave up after {attempts} attempts",
        fault=error.fault,
        status=error.status,
        retry_after_s=error.retry_after_s,
        finish_reason=error.finish_reason,
        usage=error.usage,
    )
    last.__cause__ = error
    return last
