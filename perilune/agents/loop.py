"""One agent, turn after turn: asks its model, has the calls run, and stops at an answer or at a limit.

Nothing is kept here between turns: what to do next follows from the agent's state, which is why a run that was killed
goes on from its journal by the same code.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, replace
from typing import Any, Protocol

from perilune.agents.agent_state import ROOT, AgentState, Status
from perilune.agents.budget import BudgetExceeded, Quantity, Reservation
from perilune.agents.client.base import EndpointError
from perilune.agents.client.replay import Divergence
from perilune.agents.client.retry import ask
from perilune.agents.config import ContextPolicy
from perilune.agents.endpoint import Endpoint
from perilune.agents.journal import JournalError
from perilune.agents.limiter import Place
from perilune.agents.messages import ChatRequest, Message, Reply, Usage, with_unique_ids
from perilune.agents.runtime import Runtime

logger = logging.getLogger(__name__)

LAST_WORDS = "Stop here: {why}. Tools are no longer available. Answer now from what you have."
ASK_FOR_MORE = "Your last message is all that the caller sees. Write it out: what you found, in full, with the facts."
SUMMARISE = (
    "The history is about to be dropped to save space. Write down all that is needed to go on: the task, what is done, "
    "what was found, with names and numbers, and what is left to do."
)
_WHY: dict[Status, str] = {
    "max_steps": "the limit of turns is reached",
    "max_tool_calls": "the limit of tool calls is reached",
    "max_critical_steps": "the limit of steps on the critical path is reached",
    "budget": "the budget is used up",
    "stuck": "the same call was made again and again",
}
_STUCK_AFTER = 12
_MOST_OVERFLOWS = 8
"""In a row: a history that still does not fit then never will."""
_DEFAULT_MAX_TOKENS = 4_096
"""What is reserved of an answer whose length is not limited."""
_LAST_WORDS_TOKENS = 1_024
"""What is kept for last words, and for what the turn before adds to their prompt, if that is not known to be more."""


class BackgroundWork(Protocol):
    """Sub-agents that work while an agent goes on; `Background` is one."""

    def of(self, agent: AgentState) -> AbstractAsyncContextManager[None]:
        """Hold an agent's: none is left at work at the end."""
        ...

    def pending(self, agent: AgentState) -> Sequence[AgentState]:
        """Return those whose results the agent has not read."""
        ...

    async def settle(self, agent: AgentState) -> None:
        """Wait for all of an agent's."""
        ...

    async def deliver(self, agent: AgentState) -> None:
        """Let the agent's next turn read what has come."""
        ...


class AgentWork(Protocol):
    """What goes on beside an agent's turns; `Calls` is one."""

    @property
    def background(self) -> BackgroundWork:
        """Its sub-agents in the background."""
        ...

    def tools(self, agent: AgentState) -> Sequence[dict[str, Any]]:
        """Return what an agent's model is offered."""
        ...

    async def run(self, agent: AgentState) -> None:
        """Have the open calls of its last turn run."""
        ...


async def drive(runtime: Runtime, agent: AgentState, work: AgentWork) -> None:
    """Take an agent from where it stands to its end.

    Args:
        runtime: the run.
        agent: any agent that has not ended.
        work: says what its model is offered, has its calls run, and looks after its sub-agents.
    """
    try:
        async with asyncio.timeout(None) as scope, work.background.of(agent):
            turn = _Turns(runtime, agent, scope, work)
            while agent.status is None:
                if agent.calls:
                    await work.run(agent)
                elif agent.messages[-1].role == "assistant":
                    await turn.conclude()
                else:
                    await turn.take()
    except TimeoutError:
        runtime.finish(agent, "timeout", error=f"took more than {runtime.limits_of(agent).timeout_s:g} s")
    except EndpointError as error:
        if error.fault == "context_overflow":
            runtime.finish(agent, "context_overflow", error=str(error))
        elif agent.id == ROOT:
            raise  # the endpoint may be back tomorrow: the run is stopped, to be resumed
        else:
            runtime.finish(agent, "error", error=str(error))
    except JournalError:
        raise
    except Divergence as error:
        runtime.divergence = runtime.divergence or error
        runtime.finish(agent, "error", error=str(error))
    except Exception as error:  # whatever it is, the parent and the other agents go on
        runtime.journal.check()
        logger.exception("agent %s failed", agent.id)
        runtime.finish(agent, "error", error=f"{type(error).__name__}: {error}")


class _Turns:
    """Turns of one agent."""

    def __init__(self, runtime: Runtime, agent: AgentState, scope: asyncio.Timeout, work: AgentWork) -> None:
        self._runtime, self._agent, self._scope, self._work = runtime, agent, scope, work
        self._background, self._point = work.background, runtime.endpoint_of(agent)
        self._limits = runtime.limits_of(agent)

    async def take(self) -> None:
        """Take the next turn, or the last."""
        agent, runtime = self._agent, self._runtime
        if agent.last_words is None:
            met = self._met_limit()
            if met is not None:
                await self._ask_for_last_words(met)
            else:
                await self._background.deliver(agent)
        try:
            if agent.last_words is None and self._is_too_long():
                await self._compact(self._limits.context.policy)
            reply = await self._ask(self._work.tools(agent) if agent.last_words is None else ())
        except BudgetExceeded as error:
            if agent.last_words is None:
                await self._ask_for_last_words("budget")
            else:
                runtime.finish(agent, "budget", error=str(error))
            return
        except EndpointError as error:
            if error.fault != "context_overflow" or self._limits.context.policy == "none":
                raise
            if agent.overflows > _MOST_OVERFLOWS:
                raise
            await self._compact(self._policy_of_overflow())
            return
        if reply.message.tool_calls:
            await runtime.journal.commit()  # before the calls run

    async def conclude(self) -> None:
        """End the agent with what it said without a call, or ask it for more; first it hears of all that it started."""
        agent, runtime = self._agent, self._runtime
        text = agent.messages[-1].content
        if agent.last_words is None and self._background.pending(agent):
            await self._background.settle(agent)
            await self._background.deliver(agent)
            if agent.messages[-1].role != "assistant":
                return
        cut = "the last answer was cut off at its limit of tokens" if agent.was_cut else None
        if agent.last_words is not None:
            runtime.finish(agent, agent.last_words, error=cut)
        elif self._should_say_more(text):
            runtime.emit("asked_for_more", agent.id, {"text": ASK_FOR_MORE})
        else:
            runtime.finish(agent, "completed", error=cut)

    def _met_limit(self) -> Status | None:
        agent, runtime, limits = self._agent, self._runtime, self._limits
        if limits.max_steps is not None and agent.turns >= limits.max_steps:
            return "max_steps"
        if limits.max_tool_calls is not None and agent.tool_calls >= limits.max_tool_calls:
            return "max_tool_calls"
        most = runtime.config.max_critical_steps
        # a sub-agent leaves a step to whoever has to make an answer of what it says
        if most is not None and runtime.state.critical_steps_so_far(agent.id) >= most - (agent.id != ROOT):
            return "max_critical_steps"
        wall_s = runtime.config.budget.wall_s
        if wall_s is not None and runtime.elapsed_s >= 0.95 * wall_s:
            return "budget"
        return "stuck" if agent.repeated[1] >= _STUCK_AFTER else None

    async def _ask_for_last_words(self, status: Status) -> None:
        """Tell an agent to answer now, with all that comes from its sub-agents."""
        await self._background.settle(self._agent)
        await self._background.deliver(self._agent)
        text = LAST_WORDS.format(why=_WHY[status])
        self._runtime.emit("last_words", self._agent.id, {"status": status, "text": text})

    def _should_say_more(self, text: str) -> bool:
        agent, least = self._agent, self._runtime.config.min_summary_chars
        return agent.id != ROOT and not agent.was_asked_for_more and len(text) < least

    def _is_too_long(self) -> bool:
        context = self._limits.context
        return context.policy != "none" and self._context_tokens() > context.threshold * context.max_tokens

    def _context_tokens(self) -> int:
        return self._agent.context_tokens + self._agent.added_tokens

    def _policy_of_overflow(self) -> ContextPolicy:
        """What makes room at once: a summary would have to be asked for with the history that does not fit."""
        policy = self._limits.context.policy
        if policy == "summarise":
            return "hide_tool_results" if self._agent.overflows % 2 else "discard_all"
        return policy

    async def _compact(self, policy: ContextPolicy) -> None:
        agent, summary = self._agent, None
        if policy == "summarise":
            reply = await self._ask((), extra=Message(role="user", content=SUMMARISE), is_summary=True)
            summary = reply.message.content
        self._runtime.emit("context_compacted", agent.id, {"policy": policy, "summary": summary})

    async def _ask(
        self, tools: Sequence[dict[str, Any]], *, extra: Message | None = None, is_summary: bool = False
    ) -> Reply:
        """Ask the model once, with all attempts that it takes, and write it down."""
        runtime, agent = self._runtime, self._agent
        messages = [*agent.messages, extra] if extra is not None else agent.messages
        request = self._request(messages, tools)
        reservation = self._reserve(request)
        asked = {"turn": agent.turns, "hash": runtime.hasher.hash(request), "max_tokens": request.sampling.max_tokens}
        runtime.emit("turn_started", agent.id, asked)
        attempt = _Attempts(runtime, agent, self._scope, self._limits.timeout_s, self._context_tokens())
        reply: Reply | None = None
        try:
            answered = reply = await ask(
                attempt,
                request,
                self._point.retry,
                admit=attempt.admit,
                on_retry=attempt.note,
                sleep=runtime.sleep,
                now=runtime.now,
            )
        except EndpointError as error:
            payload = {
                "turn": agent.turns,
                "fault": error.fault,
                "error": str(error),
                **_spent(self._point, error.usage),
            }
            runtime.emit("turn_failed", agent.id, payload)
            raise
        except BudgetExceeded as error:
            runtime.emit("turn_failed", agent.id, {"turn": agent.turns, "fault": "budget", "error": str(error)})
            raise
        finally:
            self._settle(reservation, reply, attempt)
        self._write_down(answered, attempt, is_summary, is_last=not tools)
        return answered

    def _admit(self, calls: int) -> int:
        """Take a turn's calls from the budget; return how many of them may run, by all limits."""
        runtime, agent, limits = self._runtime, self._agent, self._limits
        budget = runtime.budget_of(agent)
        allowed = min(calls, runtime.config.max_calls_per_turn)
        if limits.max_tool_calls is not None:
            allowed = min(allowed, max(0, limits.max_tool_calls - agent.tool_calls))
        allowed = int(min(allowed, budget.left("tool_calls")))
        budget.spend({"tool_calls": allowed})
        return allowed

    def _request(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> ChatRequest:
        runtime, agent = self._runtime, self._agent
        sampling, budget = runtime.config.sampling, runtime.budget_of(agent)
        most = _DEFAULT_MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens
        is_last, price = agent.last_words is not None, self._point.price
        spare = min(_LAST_WORDS_TOKENS, budget.left("tokens_out") / 4)
        allowed = budget.clipped("tokens_out", most, is_last=is_last, spare=spare)
        if is_last and price is not None and price.completion > 0:  # a short answer is more than none
            money = budget.left("usd") - self._context_tokens() * price.prompt / 1e6
            allowed = min(allowed, money / price.completion * 1e6)
        if allowed < most:
            sampling = replace(sampling, max_tokens=max(1, int(allowed)))
        return ChatRequest(
            model=self._point.model,
            messages=tuple(messages),
            tools=tools,
            sampling=sampling,
            agent_id=agent.id,
            turn=agent.turns,
        )

    def _reserve(self, request: ChatRequest) -> Reservation:
        budget, prompt = self._runtime.budget_of(self._agent), self._context_tokens()
        wanted = request.sampling.max_tokens
        completion = _DEFAULT_MAX_TOKENS if wanted is None else wanted
        amounts = self._amounts(prompt, completion)
        if self._agent.last_words is not None:
            return budget.reserve(amounts, is_last=True)
        # An agent that would have nothing left to tell what it found with tells it now.
        grown = max(_LAST_WORDS_TOKENS, self._agent.added_tokens if self._agent.context_tokens else 0)
        spare = self._amounts(prompt + grown, min(_LAST_WORDS_TOKENS, completion))
        del spare["tokens_out"]  # kept by `_request`
        return budget.reserve(amounts, spare=spare)

    def _amounts(self, prompt: int, completion: int) -> dict[Quantity, float]:
        """The most that a turn takes."""
        price = self._point.price
        amounts: dict[Quantity, float] = {"tokens_in": prompt, "tokens_out": completion, "llm_calls": 1}
        if price is not None:
            amounts["usd"] = (prompt * price.prompt + completion * price.completion) / 1e6
        return amounts

    def _settle(self, reservation: Reservation, reply: Reply | None, attempts: _Attempts) -> None:
        usage, price = attempts.lost if reply is None else attempts.lost + reply.usage, self._point.price
        used: dict[Quantity, float] = {
            "llm_calls": min(1, attempts.count),
            "tokens_in": usage.prompt_tokens,
            "tokens_out": usage.completion_tokens,
        }
        if price is not None:
            used["usd"] = price.of(usage)
        reservation.settle(used)

    def _write_down(self, reply: Reply, attempts: _Attempts, is_summary: bool, is_last: bool) -> None:
        runtime, agent = self._runtime, self._agent
        message = with_unique_ids(reply.message)
        dropped = len(message.tool_calls) if is_last else 0
        if dropped:
            message = replace(message, tool_calls=())
        payload = {
            "turn": agent.turns,
            "message": message.to_dict(),
            "finish_reason": reply.finish_reason,
            **_spent(self._point, reply.usage),
            "model": reply.model,
            "queued_s": attempts.queued_s,
            "first_token_s": reply.first_token_s,
            "total_s": reply.total_s,
        }
        if dropped:
            payload["dropped_calls"] = dropped
        if message.tool_calls:
            payload["admitted_calls"] = self._admit(len(message.tool_calls))
        runtime.emit("turn_summarised" if is_summary else "turn_finished", agent.id, payload)


class _Attempts:
    """A client that waits for its place before each attempt, and counts."""

    def __init__(
        self, runtime: Runtime, agent: AgentState, scope: asyncio.Timeout, timeout_s: float | None, tokens: int
    ) -> None:
        self._runtime, self._agent, self._scope, self._timeout_s = runtime, agent, scope, timeout_s
        self._tokens = tokens
        self._point, self._admissions = runtime.endpoint_of(agent), runtime.admissions_of(agent)
        self.queued_s, self.count, self.lost = 0.0, 0, Usage()
        self._place: Place | None = None

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """Wait for a place in flight, and hold it."""
        who = f"{self._runtime.state.run_id}/{self._agent.id}"
        async with self._admissions.admit(who, self._tokens, is_urgent=self._agent.id == ROOT) as place:
            self.queued_s += place.queued_s
            if self.count:  # the turn's reservation is of one attempt
                budget, is_last = self._runtime.budget_of(self._agent), self._agent.last_words is not None
                spare: dict[Quantity, float] = {"llm_calls": 0 if is_last else 1}
                budget.reserve({"llm_calls": 1}, is_last=is_last, spare=spare).settle({"llm_calls": 1})
            self.count += 1
            if self._timeout_s is not None and self._scope.when() is None:
                left_s = max(0.0, self._timeout_s - self._agent.active_s)
                self._scope.reschedule(asyncio.get_running_loop().time() + left_s)
                self._runtime.began[self._agent.id] = self._runtime.now()
            self._place = place
            yield

    async def chat(self, request: ChatRequest) -> Reply:
        """See `ChatClient`."""
        place = self._place
        assert place is not None
        try:
            reply = await self._point.client.chat(request)
        except EndpointError as error:
            if error.fault in ("rate_limit", "overload"):
                self._admissions.refused(error.retry_after_s)
            if error.usage is not None:
                self.lost += error.usage
            raise
        self._admissions.succeeded()
        place.settle(reply.usage.total_tokens)
        return reply

    async def close(self) -> None:
        """Nothing of its own is open."""

    def note(self, attempt: int, error: EndpointError, wait_s: float) -> None:
        """Write down that an attempt failed and that another follows."""
        payload = {
            "turn": self._agent.turns,
            "attempt": attempt,
            "fault": error.fault,
            "status": error.status,
            "error": str(error),
            "wait_s": wait_s,
            **_spent(self._point, error.usage),
        }
        self._runtime.emit("turn_retry", self._agent.id, payload)


def _spent(point: Endpoint, usage: Usage | None) -> dict[str, Any]:
    if usage is None:
        return {}
    price = point.price
    return {"usage": asdict(usage), "cost_usd": None if price is None else price.of(usage)}
