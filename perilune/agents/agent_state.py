"""An agent's conversation, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from perilune.agents.context import is_one_of
from perilune.agents.messages import Message, ToolCall, Usage
from perilune.agents.stints import Stint

Status = Literal[
    "completed",
    "max_steps",
    "max_tool_calls",
    "max_critical_steps",
    "budget",
    "timeout",
    "cancelled",
    "error",
    "context_overflow",
    "stuck",
]
"""How an agent ended."""

ROOT = "root"


@dataclass(slots=True)
class CallState:
    """A call of an agent's last turn."""

    key: str
    """Unique in the run: agent, turn and place."""
    index: int
    call: ToolCall
    effect: str | None = None
    """Of the tool, once it was started."""
    started: int = 0
    """Number of the event `tool_started`; 0 before."""
    finished: int = 0
    result: Message | None = None
    progress: tuple[float, float | None] | None = None
    """How far it is, and what the whole would be, as the tool says."""


@dataclass(slots=True)
class AgentState:
    """A conversation, and where it stands."""

    id: str
    parent: str | None
    profile: str
    depth: int
    spawned: int
    """Number of the event."""
    messages: list[Message]
    model: str | None = None
    """Name in the pool of the model that it asks; None: the run's own."""
    stint: Stint | None = None
    """What it does, or did last, for its parent."""
    prompts: list[Message] = field(default_factory=list)
    """Tasks that it was given after its history began."""
    is_fork: bool = False
    """Whether its history began with a copy of its parent's."""
    active_s: float = 0.0
    """Seconds of earlier stints that count for its limit of time."""
    turns: int = 0
    """Finished turns, which are its steps."""
    tool_calls: int = 0
    admitted_calls: int = 0
    """Calls of the last turn that may run; those after them are refused."""
    run_calls: int = 0
    """Calls of all turns that could run."""
    was_cut: bool = False
    """Whether the last answer ended at its limit of tokens."""
    cancel_reason: str | None = None
    """Why it was told to end, if it was."""
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = 0.0
    """None where a call had no known price."""
    calls: dict[str, CallState] = field(default_factory=dict)
    """Calls of the last turn, until each has its result."""
    open_turn: int = 0
    """Number of the event of a turn that began and did not end; 0 without."""
    attempts: int = 0
    """Attempts at the open turn that failed."""
    last: int = 0
    """Number of its last event, the cause of its next."""
    children: list[str] = field(default_factory=list)
    given: list[Stint] = field(default_factory=list)
    """What those do, or did, for it."""
    steers: list[str] = field(default_factory=list)
    """What people said while results were awaited."""
    repeated: tuple[str, int] = ("", 0)
    """The calls of the last turn that made any, each once, and how many such turns in a row made the same."""
    last_words: Status | None = None
    """The limit that it met; its next turn is its last."""
    was_asked_for_more: bool = False
    is_running: bool = False
    """Whether it has a place among those that run."""
    compactions: int = 0
    overflows: int = 0
    """Requests in a row that were too long for the model."""
    context_tokens: int = 0
    """Tokens of the last request and its answer, as the server counted them."""
    added_tokens: int = 0
    """An estimate of those that have come since."""
    status: Status | None = None
    result: str = ""
    error: str | None = None

    @property
    def call(self) -> str | None:
        """The parent's call that it answers."""
        return None if self.stint is None else self.stint.call

    @property
    def groups(self) -> dict[int, list[str]]:
        """By turn, the sub-agents to which it gave something to do."""
        found: dict[int, list[str]] = {}
        for stint in self.given:
            found.setdefault(stint.turn, []).append(stint.agent)
        return found

    @property
    def answer(self) -> str:
        """The last text that it wrote, of its latest task."""
        for message in reversed(self.messages):
            if message.role == "assistant" and message.content:
                return message.content
            if is_one_of(message, self.prompts[-1:]):
                break
        return ""
