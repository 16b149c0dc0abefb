"""A recorded run again: replayed from its journal alone, or forked at an event to go on differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perilune.agents.client import RecordedTurn, ReplayClient, RetryPolicy
from perilune.agents.config import (
    AgentLimits,
    BudgetConfig,
    ContextConfig,
    Extensions,
    GroupConfig,
    SwarmConfig,
)
from perilune.agents.endpoint import Endpoint
from perilune.agents.journal import Event, Journal, JournalError, find_run, load_events, remove_run
from perilune.agents.messages import Message, Reply, Sampling, Usage
from perilune.agents.result import check_payload
from perilune.agents.state import RunState
from perilune.agents.swarm import RunResult, Swarm, SwarmRun
from perilune.agents.tools.base import Tool, ToolContext, ToolOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What became of a replay."""

    turns: int
    """Recorded turns, with those that failed."""
    tool_results: int
    result: RunResult


async def replay_run(journal: Path, run_id: str | None, copy: Path) -> Replay:
    """Run a recorded run's logic again: models and tools answer from the journal.

    Args:
        journal: where it is recorded.
        run_id: the run; None for the newest.
        copy: journal of the replay.

    Raises:
        JournalError: the recording cannot be read, or somebody outside had a part in the run (steered it, canceled an
            agent, was asked), or the clock had, which a replay cannot repeat.
        Divergence: a request is not the recorded one; both are in it.
    """
    found = find_run(journal, run_id)
    events = load_events(journal, found.run_id)
    state = RunState.fold(found.run_id, events)
    check_payload(journal, state)
    _check_repeatable(journal, events)
    turns, results = recorded_turns(events), recorded_results(events)
    point = Endpoint(client=ReplayClient(turns), model=state.model, retry=RetryPolicy(attempts=1))
    swarm = Swarm(
        endpoint=point,
        models={name: replace(point, model=model) for name, model in state.setup.get("models", {}).items()},
        config=_config_of_replay(state, events),
        tools=_recorded_tools(events, results),
    )
    run = await swarm.start(state.task, copy, run_id=found.run_id)
    notes = {e.payload["call"]: e.payload.get("note", "") for e in events if e.type == "tool_finished"}
    run.repeat(notes, recorded_deliveries(found.run_id, events))
    result = await run.result()
    if run.divergence is not None:
        raise run.divergence
    if (result.status, result.answer) != (state.status, state.answer):
        raise JournalError(f"{journal}: the replay ends with {result.status}, the recorded run with {state.status}")
    return Replay(turns=sum(map(len, turns.values())), tool_results=len(results), result=result)


def fork_run(journal: Path, run_id: str | None, seq: int, new_id: str) -> None:
    """Copy a run's events up to a number into a new run of the same journal, to be resumed with another model or tools.

    Raises:
        JournalError: there is no such run or event, there are hashes in place of what was said, or there is a run of
            the new name; nothing of the copy is left.
    """
    found = find_run(journal, run_id)
    events = load_events(journal, found.run_id, limit=seq)
    check_payload(journal, RunState.fold(found.run_id, events[:1]))
    if not 1 <= seq <= found.events:
        raise JournalError(f"{journal}: run {found.run_id} has events 1 to {found.events}, no {seq}")
    if any(event.type == "run_finished" for event in events):
        raise JournalError(f"{journal}: event {seq} is the end of run {found.run_id}; fork at an earlier one")
    log = Journal(journal, new_id)
    try:
        log.register(found.task, found.model)
    except BaseException:
        log.close()
        raise
    try:
        for event in events:
            log.copy(event)
    finally:
        log.close()
        if log.seq < len(events) or log.error is not None:
            _take_away(journal, new_id)
    if log.error is not None:
        raise log.error


async def resume_fork(
    swarm: Swarm, journal: Path, run_id: str | None, seq: int, new_id: str, *, allow_changes: bool = False
) -> SwarmRun:
    """Fork a run and go on with the new one; if it cannot go on, the copy is taken away again.

    Args:
        swarm: its model, tools and settings are those from here on.
        journal: where the run is recorded.
        run_id: the run; None for the newest.
        seq: number of the last event that both have.
        new_id: name of the new run.
        allow_changes: as for `Swarm.resume`.

    Raises:
        JournalError: there is no such run or event, or there is a run of the new name.
    """
    fork_run(journal, run_id, seq, new_id)
    try:
        return await swarm.resume(journal, run_id=new_id, allow_changes=allow_changes)
    except BaseException:
        _take_away(journal, new_id)
        raise


def _take_away(journal: Path, run_id: str) -> None:
    with suppress(JournalError):  # what went wrong before is what is told
        remove_run(journal, run_id)


def recorded_turns(events: Sequence[Event]) -> dict[tuple[str, int], list[RecordedTurn]]:
    """Return every turn that was answered or failed, by agent and number; those that were lost are not there."""
    asked: dict[tuple[str, int], Mapping[str, Any]] = {}
    turns: dict[tuple[str, int], list[RecordedTurn]] = {}
    for event in events:
        key = (event.agent, event.payload.get("turn", 0))
        if event.type == "turn_started":
            asked[key] = event.payload
        elif event.type in ("turn_finished", "turn_summarised", "turn_failed"):
            turns.setdefault(key, []).append(_recorded_turn(asked[key], event))
    return turns


def _recorded_turn(asked: Mapping[str, Any], event: Event) -> RecordedTurn:
    payload, usage = event.payload, event.payload.get("usage")
    turn = RecordedTurn(request_hash=asked["hash"], max_tokens=asked.get("max_tokens"))
    used = None if usage is None else Usage(**usage)
    if event.type == "turn_failed":
        return replace(turn, fault=payload["fault"], error=payload["error"], usage=used)
    reply = Reply(
        message=Message.from_dict(payload["message"]),
        finish_reason=payload["finish_reason"],
        usage=used or Usage(),
        model=payload["model"],
        first_token_s=payload["first_token_s"],
        total_s=payload["total_s"],
    )
    return replace(turn, reply=reply)


def recorded_results(events: Sequence[Event]) -> dict[str, ToolOutput]:
    """Return what every call of a tool came to, by its key."""
    return {
        event.payload["call"]: ToolOutput(
            text=event.payload["text"],
            is_error=event.payload["is_error"],
            images=tuple(event.payload.get("images") or ()),
        )
        for event in events
        if event.type == "tool_finished"
    }


def recorded_deliveries(run_id: str, events: Sequence[Event]) -> dict[tuple[str, int, int], list[str]]:
    """Return, by agent, turn and compactions before, the sub-agents in the background whose results came there."""
    state, found = RunState(run_id), dict[tuple[str, int, int], list[str]]()
    for event in events:
        if event.type == "result_delivered":
            agent = state.agents[event.agent]
            found.setdefault((agent.id, agent.turns, agent.compactions), []).append(event.payload["child"])
        state.apply(event)
    return found


def config_of(tree: Mapping[str, Any]) -> SwarmConfig:
    """Return the settings that a journal recorded."""
    own = {**tree, "redact": ()}  # its events are without what was redacted
    for name in ("orchestrator", "subagent"):
        limits = dict(own[name])
        own[name] = AgentLimits(**{**limits, "context": ContextConfig(**limits["context"])})
    sampling = dict(own["sampling"])
    own["sampling"] = Sampling(**{**sampling, "stop": tuple(sampling["stop"])})
    own["extensions"] = Extensions(**own.get("extensions", {}))
    own["budget"], own["group"] = BudgetConfig(**own["budget"]), GroupConfig(**own["group"])
    return SwarmConfig(**own)


def _config_of_replay(state: RunState, events: Sequence[Event]) -> SwarmConfig:
    """The recorded settings; without budgets that were not met, as answers that come at once reserve more at a time."""
    config = replace(config_of(state.config), allow_unknown_cost=True)
    return config if any(map(_met_budget, events)) else replace(config, budget=BudgetConfig(tool_calls=None))


def _met_budget(event: Event) -> bool:
    return event.type in ("last_words", "agent_finished") and event.payload["status"] == "budget"


_OUTSIDE = {
    "steered": "the run was steered",
    "approval_requested": "the run asked for consent",
    "question_asked": "the run asked a person",
    "tool_changed": "a tool was described anew",
}


def _check_repeatable(journal: Path, events: Sequence[Event]) -> None:
    if not events or events[-1].type != "run_finished":
        raise JournalError(f"{journal}: the run has not ended; resume it first")
    has_team = any(event.type == "agent_spawned" and event.payload["parent"] is not None for event in events)
    has_clock = events[0].payload["config"]["budget"]["wall_s"] is not None
    for event in events:
        why = _unrepeatable(event, events[0].payload["model"])
        if why is None and _met_budget(event) and (has_team or has_clock):
            why = f"agent {event.agent} met a budget {'that agents share' if has_team else 'with a limit of time'}"
        if why is not None:
            raise JournalError(f"{journal}: {why} (event {event.seq}); it cannot be replayed")


def _unrepeatable(event: Event, model: str) -> str | None:
    if event.type == "run_resumed" and event.payload.get("model", model) != model:
        return f"the run went on with {event.payload['model']} in place of {model}"
    if event.type == "agent_finished" and event.payload["status"] in ("cancelled", "timeout"):
        how = "was canceled" if event.payload["status"] == "cancelled" else "ran out of time"
        return f"agent {event.agent} {how}"
    return _OUTSIDE.get(event.type)


def _recorded_tools(events: Sequence[Event], results: Mapping[str, ToolOutput]) -> list[Tool]:
    """The tools as models were offered them, answering from the journal."""

    async def answer(arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        del arguments
        return results[context.call_id]

    offered = events[0].payload["tools"]
    return [
        Tool(
            name=tool["function"]["name"],
            description=tool["function"]["description"],
            parameters=tool["function"]["parameters"],
            run=answer,
            effect="pure",
            max_result_chars=1 << 30,
        )
        for tool in offered
    ]
