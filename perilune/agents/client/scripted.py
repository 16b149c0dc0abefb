"""A client whose model is a Python function: for tests, demonstrations and measurements without an endpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from perilune.agents.client.base import EndpointError
from perilune.agents.client.body import estimate_usage
from perilune.agents.client.latency import Clock, LatencyModel, ScaledClock
from perilune.agents.messages import ChatRequest, Message, Reply, with_unique_ids

Policy = Callable[[ChatRequest], Message | Reply | EndpointError]
"""Answers a request; it should look at nothing else, or runs do not repeat. An error may be returned or raised."""


class ScriptedClient:
    """Asks a policy."""

    def __init__(self, policy: Policy, latency: LatencyModel | None = None, clock: Clock | None = None) -> None:
        """Prepare.

        Args:
            policy: answers.
            latency: says how long that takes, by agent and turn; None: no time.
            clock: on which it takes that long; None: the real one.
        """
        self._policy, self._latency, self._clock = policy, latency, clock or ScaledClock()

    async def chat(self, request: ChatRequest) -> Reply:
        """Return the policy's answer when its time is over.

        Raises:
            EndpointError: the policy's.
        """
        reply = answer(self._policy, request)
        first = total = 0.0
        if self._latency is not None:
            first, total = self._latency.delays(reply.usage.completion_tokens, request.agent_id, request.turn)
        await self._clock.sleep(total)
        return replace(reply, first_token_s=first, total_s=total)

    async def close(self) -> None:
        """Nothing is open."""


def answer(policy: Policy, request: ChatRequest) -> Reply:
    """Return a policy's answer as a reply that took no time, with usage by estimate if it gives none.

    Raises:
        EndpointError: the policy's.
    """
    said = policy(request)
    if isinstance(said, EndpointError):
        raise said
    if isinstance(said, Reply):
        return said
    message = with_unique_ids(said)
    return Reply(
        message=message,
        finish_reason="tool_calls" if message.tool_calls else "stop",
        usage=estimate_usage(request, (message,)),
        model=request.model,
        first_token_s=0.0,
        total_s=0.0,
    )
