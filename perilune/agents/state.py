"""What a run's events add up to. A live run and a resumed one have the same state, as both only ever apply events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from perilune.agents.agent_state import ROOT, AgentState, CallState
from perilune.agents.context import discard_all, hide_tool_results, summarised
from perilune.agents.journal import Event
from perilune.agents.messages import Message, ToolCall, Usage, estimate_tokens, text_of
from perilune.agents.stints import Stint, critical_steps, critical_steps_of, steps_until
from perilune.agents.tools.validation import read_json

_NOT_ENDED = "[you were stopped before this call ended; its outcome is unknown]"


@dataclass(slots=True)
class RunState:
    """A run."""

    run_id: str
    task: str = ""
    model: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    setup: Mapping[str, Any] = field(default_factory=dict)
    """What the run was last driven with: tools, rules and recipe, beside model and config."""
    agents: dict[str, AgentState] = field(default_factory=dict)
    profiles: dict[str, str] = field(default_factory=dict)
    """System prompts by name."""
    consents: list[Mapping[str, Any]] = field(default_factory=list)
    """Requests for consent and their resolutions, in order."""
    lapsed: set[str] = field(default_factory=set)
    """Requests whose agents ended before anybody answered."""
    questions: dict[str, str] = field(default_factory=dict)
    """Questions to people by call, until they are answered or nobody waits for it any more."""
    answers: dict[str, str] = field(default_factory=dict)
    """What people answered, by call."""
    warnings: set[tuple[str, str]] = field(default_factory=set)
    """Owners and quantities of budgets of which a warning was given."""
    llm_calls: int = 0
    """Attempts at answers."""
    elapsed_s: float = 0.0
    """Seconds that the run was driven, over all its starts."""
    status: str | None = None
    answer: str = ""
    error: str | None = None
    seq: int = 0
    _started_at: float = 0.0
    _elapsed_before: float = 0.0

    @classmethod
    def fold(cls, run_id: str, events: Iterable[Event]) -> RunState:
        """Return what events add up to."""
        state = cls(run_id)
        for event in events:
            state.apply(event)
        return state

    @property
    def approvals(self) -> dict[str, Mapping[str, Any]]:
        """Requests for consent that nobody has answered, of agents that still wait for it, by id."""
        answered = {entry["id"] for entry in self.consents if "name" not in entry}
        asked = [entry for entry in self.consents if "name" in entry and entry["id"] not in answered]
        return {entry["id"]: entry for entry in asked if entry["id"] not in self.lapsed}

    @property
    def root(self) -> AgentState:
        """The agent that has the task."""
        return self.agents[ROOT]

    @property
    def subagents(self) -> int:
        """How many were started."""
        return len(self.agents) - (ROOT in self.agents)

    @property
    def usage(self) -> Usage:
        """Tokens of all agents."""
        return sum((agent.usage for agent in self.agents.values()), Usage())

    @property
    def cost_usd(self) -> float | None:
        """Of all agents; None where some call had no known price."""
        costs = [agent.cost_usd for agent in self.agents.values()]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    @property
    def tool_calls(self) -> int:
        """Of all agents."""
        return sum(agent.tool_calls for agent in self.agents.values())

    def critical_steps(self, agent_id: str = ROOT) -> int:
        """Return the steps that had to be taken one after another; see `stints.critical_steps`."""
        agents = self.agents
        return critical_steps(agent_id, lambda name: agents[name].turns, lambda name: agents[name].given)

    def critical_steps_so_far(self, agent_id: str) -> int:
        """Return the steps that had to be taken one after another to where an agent is, its callers' among them."""
        agent, agents = self.agents[agent_id], self.agents
        if agent.stint is None:
            return self.critical_steps(agent_id)
        own = critical_steps_of(agent.stint, lambda name: agents[name].turns, lambda name: agents[name].given)
        return self._steps_before(agent) + own

    def _steps_before(self, agent: AgentState) -> int:
        """Those before an agent was given what it works on."""
        if agent.stint is None or agent.parent is None:
            return 0
        agents, parent = self.agents, self.agents[agent.parent]
        begin = 0 if parent.stint is None else parent.stint.begin
        turns, given = (lambda name: agents[name].turns), (lambda name: agents[name].given)
        return self._steps_before(parent) + steps_until(parent.id, begin, agent.stint.turn, turns, given)

    def apply(self, event: Event) -> None:
        """Take an event in; those of unknown types change nothing."""
        self.seq = event.seq
        if event.type in ("run_started", "run_resumed"):
            self._elapsed_before, self._started_at = self.elapsed_s, event.at
        self.elapsed_s = self._elapsed_before + event.at - self._started_at
        if event.type in _OF_RUN:
            _OF_RUN[event.type](self, event.payload)
            return
        if event.type == "agent_spawned":
            self._spawn(event)
            return
        agent = self.agents.get(event.agent)
        if agent is None:
            return
        if event.type != "tool_progress":  # it makes nothing possible
            agent.last = event.seq
        if event.type == "tool_finished":
            self.questions.pop(event.payload["call"], None)
        elif event.type == "agent_finished":
            for call in agent.calls:
                self.questions.pop(call, None)
            self.lapsed |= {name for name, entry in self.approvals.items() if entry["agent"] == agent.id}
        if event.type == "agent_resumed":
            self._resume(agent, event)
        elif event.type == "result_delivered":
            self._return(agent, event)
        elif event.type in _OF_AGENT:
            _OF_AGENT[event.type](agent, event)
        if event.type in _ATTEMPTS and event.payload.get("fault") != "budget":  # then nobody was asked
            self.llm_calls += 1

    def _spawn(self, event: Event) -> None:
        payload = event.payload
        agent = AgentState(
            id=event.agent,
            parent=payload["parent"],
            profile=payload["profile"],
            depth=payload["depth"],
            spawned=event.seq,
            messages=[Message.from_dict(message) for message in payload["messages"]],
            model=payload.get("model"),
            last=event.seq,
        )
        self.agents[event.agent] = agent
        if agent.parent is not None:
            parent = self.agents[agent.parent]
            parent.children.append(agent.id)
            if "fork" in payload:
                agent.prompts, agent.is_fork = agent.messages, True
                agent.messages = [*parent.messages[: payload["fork"]], *agent.messages]
            self._give(parent, agent, payload)
        agent.added_tokens = estimate_tokens(text_of(agent.messages))

    def _resume(self, agent: AgentState, event: Event) -> None:
        """Have an agent that has ended go on with another task."""
        assert agent.parent is not None
        agent.status, agent.result, agent.error, agent.last_words = None, "", None, None
        agent.was_asked_for_more, agent.repeated, agent.overflows = False, ("", 0), 0
        prompt = Message(role="user", content=event.payload["text"])
        agent.prompts = [*agent.prompts, prompt]
        _say(agent, prompt)
        self._give(self.agents[agent.parent], agent, event.payload)

    def _give(self, parent: AgentState, agent: AgentState, payload: Mapping[str, Any]) -> None:
        agent.stint = Stint(
            agent=agent.id,
            call=payload["call"],
            turn=parent.turns - 1,
            begin=agent.turns,
            item=payload.get("item"),
            is_background=payload.get("background", False),
        )
        parent.given.append(agent.stint)

    def _return(self, agent: AgentState, event: Event) -> None:
        """Let an agent read what a sub-agent in the background came to."""
        stint = self.agents[event.payload["child"]].stint
        if stint is not None:
            stint.back = agent.turns
        _say(agent, Message(role="user", content=event.payload["text"]))


def result_text(payload: Mapping[str, Any]) -> str:
    """Return what a model reads of an event `tool_finished`: the tool's text, and what it is told beside it."""
    note = payload.get("note")
    return f"{payload['text']}\n\n{note}" if note else payload["text"]


def call_key(agent_id: str, turn: int, index: int) -> str:
    """Return the name of a call: unique in a run, and the same again when the run is resumed."""
    return f"{agent_id}:{turn}:{index}"


def agent_of_call(key: str) -> str:
    """Return whose call has a name that `call_key` gave."""
    return key.rsplit(":", 2)[0]


def _run_started(state: RunState, payload: Mapping[str, Any]) -> None:
    state.task, state.model, state.config = payload["task"], payload["model"], payload["config"]
    state.setup = payload


def _run_resumed(state: RunState, payload: Mapping[str, Any]) -> None:
    state.model = payload.get("model", state.model)
    if "rules" in payload:
        if payload["rules"] != state.setup.get("rules"):
            state.consents = []  # they name rules by their places
        state.setup = payload
    for agent in state.agents.values():
        agent.is_running = False


def _run_finished(state: RunState, payload: Mapping[str, Any]) -> None:
    state.status, state.answer, state.error = payload["status"], payload["answer"], payload.get("error")


def _profile_created(state: RunState, payload: Mapping[str, Any]) -> None:
    state.profiles[payload["name"]] = payload["system_prompt"]


def _budget_warning(state: RunState, payload: Mapping[str, Any]) -> None:
    state.warnings.add((payload["owner"], payload["quantity"]))


def _consent(state: RunState, payload: Mapping[str, Any]) -> None:
    state.consents.append(payload)


def _question_asked(state: RunState, payload: Mapping[str, Any]) -> None:
    state.questions[payload["id"]] = payload["text"]


def _question_answered(state: RunState, payload: Mapping[str, Any]) -> None:
    state.questions.pop(payload["id"], None)
    state.answers[payload["id"]] = payload["text"]


_OF_RUN = {
    "run_started": _run_started,
    "run_resumed": _run_resumed,
    "run_finished": _run_finished,
    "profile_created": _profile_created,
    "budget_warning": _budget_warning,
    "approval_requested": _consent,
    "approval_resolved": _consent,
    "question_asked": _question_asked,
    "question_answered": _question_answered,
}


def _agent_started(agent: AgentState, event: Event) -> None:
    del event
    agent.is_running = True


def _turn_started(agent: AgentState, event: Event) -> None:
    agent.open_turn, agent.attempts = event.seq, 0


def _turn_retry(agent: AgentState, event: Event) -> None:
    agent.attempts += 1
    _pay(agent, event)


def _turn_over(agent: AgentState, event: Event) -> None:
    agent.open_turn = 0
    _pay(agent, event)


def _turn_failed(agent: AgentState, event: Event) -> None:
    _turn_over(agent, event)
    agent.overflows += event.payload.get("fault") == "context_overflow"
    _deliver(agent)


def _pay(agent: AgentState, event: Event) -> None:
    """Count what an attempt took, whether it was answered or not."""
    usage = event.payload.get("usage")
    if usage is not None:
        cost = event.payload["cost_usd"]
        agent.usage += Usage(**usage)
        agent.cost_usd = None if cost is None or agent.cost_usd is None else agent.cost_usd + cost


def _turn_summarised(agent: AgentState, event: Event) -> None:
    _turn_over(agent, event)
    agent.turns += 1


def _turn_finished(agent: AgentState, event: Event) -> None:
    message = Message.from_dict(event.payload["message"])
    for index, call in enumerate(message.tool_calls):
        key = call_key(agent.id, agent.turns, index)
        agent.calls[key] = CallState(key, index, call)
    _turn_summarised(agent, event)
    agent.tool_calls += len(message.tool_calls)
    agent.admitted_calls = event.payload.get("admitted_calls", len(message.tool_calls))
    agent.run_calls += agent.admitted_calls
    agent.was_cut = event.payload["finish_reason"] == "length"
    usage = event.payload["usage"]
    agent.context_tokens, agent.added_tokens = usage["prompt_tokens"] + usage["completion_tokens"], 0
    agent.messages.append(message)
    if not message.tool_calls:
        _deliver(agent)
    agent.overflows = 0
    if message.tool_calls:  # one turn is one repetition, however often it makes a call
        same = "\n".join(sorted({_canonical(call) for call in message.tool_calls}))
        agent.repeated = (same, agent.repeated[1] + 1 if same == agent.repeated[0] else 1)


def _tool_started(agent: AgentState, event: Event) -> None:
    call = agent.calls.get(event.payload["call"])
    if call is not None:
        call.started, call.effect = event.seq, event.payload["effect"]


def _tool_progress(agent: AgentState, event: Event) -> None:
    call = agent.calls.get(event.payload["call"])
    if call is not None:
        call.progress = (event.payload["done"], event.payload["total"])


def _tool_finished(agent: AgentState, event: Event) -> None:
    call = agent.calls.get(event.payload["call"])
    if call is None or call.result is not None:
        return
    text = result_text(event.payload)
    images = tuple(event.payload.get("images") or ())
    call.finished = event.seq
    call.result = Message(role="tool", content=text, tool_call_id=call.call.id, images=images)
    if all(other.result is not None for other in agent.calls.values()):
        for other in agent.calls.values():
            assert other.result is not None
            _say(agent, other.result)
        agent.calls = {}
        _deliver(agent)


def _steered(agent: AgentState, event: Event) -> None:
    agent.steers.append(event.payload["text"])
    if not agent.calls and not agent.open_turn:
        _deliver(agent)


def _deliver(agent: AgentState) -> None:
    """Let the next turn read what people said meanwhile."""
    for steer in agent.steers:
        _say(agent, Message(role="user", content=steer))
    agent.steers = []


def _cancel_requested(agent: AgentState, event: Event) -> None:
    agent.cancel_reason = event.payload["reason"]


def _last_words(agent: AgentState, event: Event) -> None:
    agent.last_words = event.payload["status"]
    _say(agent, Message(role="user", content=event.payload["text"]))


def _asked_for_more(agent: AgentState, event: Event) -> None:
    agent.was_asked_for_more = True
    _say(agent, Message(role="user", content=event.payload["text"]))


def _context_compacted(agent: AgentState, event: Event) -> None:
    match event.payload["policy"]:
        case "hide_tool_results":
            agent.messages = hide_tool_results(agent.messages)
        case "discard_all":
            agent.messages = discard_all(agent.messages, agent.compactions + 1, agent.prompts)
        case "summarise":
            agent.messages = summarised(agent.messages, event.payload["summary"], agent.prompts)
    agent.compactions += 1
    agent.context_tokens = 0
    agent.added_tokens = estimate_tokens(text_of(agent.messages))


def _agent_finished(agent: AgentState, event: Event) -> None:
    payload = event.payload
    agent.status, agent.result, agent.error = payload["status"], payload["result"], payload.get("error")
    if agent.calls:  # whoever goes on with this history must find a result of every call
        for call in agent.calls.values():
            _say(agent, call.result or Message(role="tool", content=_NOT_ENDED, tool_call_id=call.call.id))
    agent.is_running, agent.calls, agent.open_turn = False, {}, 0
    agent.active_s += payload.get("active_s", 0.0)
    if agent.stint is not None:
        agent.stint.end = agent.turns


_ATTEMPTS = frozenset(("turn_retry", "turn_finished", "turn_summarised", "turn_failed", "turn_lost"))
_OF_AGENT = {
    "agent_started": _agent_started,
    "turn_started": _turn_started,
    "turn_retry": _turn_retry,
    "turn_finished": _turn_finished,
    "turn_summarised": _turn_summarised,
    "turn_failed": _turn_failed,
    "turn_lost": _turn_failed,
    "tool_started": _tool_started,
    "tool_progress": _tool_progress,
    "tool_finished": _tool_finished,
    "steered": _steered,
    "cancel_requested": _cancel_requested,
    "last_words": _last_words,
    "asked_for_more": _asked_for_more,
    "context_compacted": _context_compacted,
    "agent_finished": _agent_finished,
}


def _say(agent: AgentState, message: Message) -> None:
    agent.messages.append(message)
    agent.added_tokens += estimate_tokens(message.content)


def _canonical(call: ToolCall) -> str:
    try:
        arguments = json.dumps(read_json(call.arguments), sort_keys=True)
    except ValueError:
        arguments = call.arguments
    return f"{call.name} {arguments}"
