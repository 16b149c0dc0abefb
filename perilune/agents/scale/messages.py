"""What a run and the tasks of its sub-agents say to each other. All of it can be pickled, which Ray does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from perilune.agents.budget import Quantity
from perilune.agents.client.base import ChatClient
from perilune.agents.client.retry import RetryPolicy
from perilune.agents.config import SwarmConfig
from perilune.agents.endpoint import Price
from perilune.agents.runtime import Order
from perilune.agents.state import AgentState
from perilune.agents.tools.base import Effect, Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteAgents:
    """How sub-agents run on a Ray cluster. Both functions must be ones that pickle knows: of a module, for instance."""

    client: Callable[[], ChatClient]
    """Makes what asks the model, in every task. Model, price, retries and limits are those of the swarm's endpoint."""
    tools: Callable[[], Sequence[Tool]] = tuple
    """Makes the tools, in every task: the same ones, by name and by effect, as the swarm has."""
    workers: int = 8
    """Sub-agents at a time, each in a process of its own; further ones wait."""
    cpus: float = 0.25
    """CPUs that Ray sets aside for each. Agents wait most of the time."""
    late_s: float = 5.0
    """Seconds that a task may take to end, beyond those of its tools, before its process is killed."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be >= 1, got {self.workers}")
        for name in ("cpus", "late_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A task: a sub-agent to be taken to its end."""

    task: str
    """Name of the task, never used again."""
    run_id: str
    agent_id: str
    agents: tuple[AgentState, ...]
    """It, and those that it had started."""
    profiles: Mapping[str, str]
    config: SwarmConfig
    limits: Mapping[Quantity, float]
    """What it may use."""
    seq: int
    """Number of the run's last event."""
    elapsed_s: float
    """Seconds that the run was driven."""
    model: str
    price: Price | None
    retry: RetryPolicy
    client: Callable[[], ChatClient]
    tools: Callable[[], Sequence[Tool]]
    effects: Mapping[str, Effect]
    """Of the swarm's tools, by name."""
    needs_consent: bool
    """Whether the run is asked about each call."""
    is_interactive: bool


Kind = Literal[
    "event",  # seq, type, agent, payload, cause
    "artifact",  # content, name
    "released",  # key of an admission, tokens or None
    "succeeded",  # None
    "refused",  # seconds to wait or None
    "abandoned",  # a call
]
Wish = Literal[
    "commit",  # None; answered when all that was said is on the disk
    "admit",  # key, who, tokens; answered with the seconds that were waited
    "consent",  # name, arguments, agent, call; answered with whether and why not
    "question",  # call, text; answered with what a person says
    "fetch",  # id of an artifact; answered with its content, or None
    "end",  # None; the task is over
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What a task says."""

    number: int | None
    """Messages are taken in in this order, as an actor may swap them; None: at once."""
    said: Sequence[tuple[Kind, Any]] = ()
    used: Mapping[Quantity, float]
    """What the sub-agent has used since the task began."""
    wish: tuple[Wish, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """What a run says."""

    order: Order
    agent_id: str
    text: str
