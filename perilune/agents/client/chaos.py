"""Disturbs any client: faults at given rates, each a function of a seed, the agent, its turn and the attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields, replace

from perilune.agents.client.base import ChatClient, EndpointError
from perilune.agents.client.latency import unit
from perilune.agents.messages import ChatRequest, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosRates:
    """Share of the attempts that meet each fault; an attempt meets one at most."""

    rate_limit: float = 0.0
    """429 with a Retry-After."""
    server: float = 0.0
    """500, 502, 503 or 504."""
    truncated: float = 0.0
    """The stream ends early; the model was asked."""
    malformed_arguments: float = 0.0
    """A good answer, but for the arguments of its tool calls, which are cut in the middle."""
    slow: float = 0.0
    """The answer comes late."""
    dropped: float = 0.0
    """The connection is lost before an answer, after the model was asked."""

    def __post_init__(self) -> None:
        rates = {each.name: getattr(self, each.name) for each in fields(self)}
        wrong = [f"{name}={rate}" for name, rate in rates.items() if not 0 <= rate <= 1]
        if wrong or sum(rates.values()) > 1 + 1e-9:
            raise ValueError(f"rates must lie in [0, 1], and their sum too; got {', '.join(wrong) or rates}")


class ChaosClient:
    """Asks a client, and disturbs what it says."""

    def __init__(
        self,
        client: ChatClient,
        rates: ChaosRates,
        *,
        seed: int = 0,
        retry_after_s: float = 1.0,
        slow_s: float = 5.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Prepare.

        Args:
            client: is asked.
            rates: of the faults.
            seed: of the draws.
            retry_after_s: what a 429 asks to wait.
            slow_s: how late a slow answer is.
            sleep: lets time pass.
        """
        self._client, self._seed = client, seed
        self._retry_after_s, self._slow_s, self._sleep = retry_after_s, slow_s, sleep
        self._shares = [
            (rates.rate_limit, "rate_limit"),
            (rates.server, "server"),
            (rates.truncated, "truncated"),
            (rates.malformed_arguments, "malformed_arguments"),
            (rates.slow, "slow"),
            (rates.dropped, "dropped"),
        ]
        self._attempts: dict[str, tuple[int, int]] = {}
        self.counts: dict[str, int] = {name: 0 for _, name in self._shares}
        """How often each fault struck."""

    async def chat(self, request: ChatRequest) -> Reply:
        """Return the client's answer, unless a fault strikes.

        Raises:
            EndpointError: the client's, or a fault.
        """
        attempt = self._attempt(request)
        fault = self._draw(request, attempt)
        if fault:
            self.counts[fault] += 1
        if fault == "rate_limit":
            raise EndpointError("chaos: 429", fault="rate_limit", status=429, retry_after_s=self._retry_after_s)
        if fault == "server":
            status = (500, 502, 503, 504)[attempt % 4]
            raise EndpointError(f"chaos: {status}", fault="overload" if status == 503 else "server", status=status)
        if fault == "slow":
            await self._sleep(self._slow_s)
        reply = await self._client.chat(request)
        if fault == "truncated":
            raise EndpointError("chaos: the stream broke off", fault="truncated", usage=reply.usage)
        if fault == "dropped":
            raise EndpointError("chaos: the connection was lost", fault="connection", usage=reply.usage)
        return _with_broken_arguments(reply) if fault == "malformed_arguments" else reply

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()

    def _attempt(self, request: ChatRequest) -> int:
        """Count the attempts of an agent's turn, from 0; an agent has one turn at a time."""
        turn, attempt = self._attempts.get(request.agent_id, (-1, 0))
        attempt = attempt + 1 if turn == request.turn else 0
        self._attempts[request.agent_id] = (request.turn, attempt)
        return attempt

    def _draw(self, request: ChatRequest, attempt: int) -> str | None:
        left = unit(self._seed, "chaos", request.agent_id, request.turn, attempt)
        for share, name in self._shares:
            left -= share
            if left < 0:
                return name
        return None


def _with_broken_arguments(reply: Reply) -> Reply:
    """Cut arguments: the beginning of a JSON object is never JSON."""
    calls = tuple(
        replace(call, arguments=call.arguments.strip()[: len(call.arguments.strip()) // 2] or "{")
        for call in reply.message.tool_calls
    )
    return replace(reply, message=replace(reply.message, tool_calls=calls))
