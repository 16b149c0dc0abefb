"""Typed settings of a swarm. Everything is checked before a model is asked anything."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from perilune.agents.messages import Sampling
from perilune.checks import require, require_at_least, require_choice

ContextPolicy = Literal["none", "hide_tool_results", "discard_all", "summarise"]
GroupKind = Literal["all", "quorum", "deadline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextConfig:
    """What happens to a history that grows too long."""

    policy: ContextPolicy = "none"
    """none: an agent whose history does not fit has failed; hide_tool_results: results before the last round give way
    to a placeholder; discard_all: the agent begins again from its task; summarise: the model writes down the state."""
    max_tokens: int = 256_000
    """Tokens that the model can read."""
    threshold: float = 0.8
    """Share of `max_tokens` from which the policy acts, in (0, 1]."""

    def __post_init__(self) -> None:
        require_choice("policy", self.policy, ContextPolicy)
        require_at_least(1, max_tokens=self.max_tokens)
        require(0 < self.threshold <= 1, "threshold", "in (0, 1]", self.threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLimits:
    """What one agent may do. At a limit it is asked once, without tools, to answer from what it has."""

    max_steps: int | None = None
    """Turns."""
    max_tool_calls: int | None = 100
    """Calls; calls that are wrong count too."""
    timeout_s: float | None = None
    """Seconds from its first admitted call to a model."""
    usd: float | None = None
    """Money, by the price table; this and tokens with what those use that it starts."""
    tokens_in: int | None = None
    """Tokens of prompts."""
    tokens_out: int | None = None
    """Tokens of completions."""
    context: ContextConfig = field(default_factory=ContextConfig)
    """Its history."""

    def __post_init__(self) -> None:
        for name, value in {"max_steps": self.max_steps, "max_tool_calls": self.max_tool_calls}.items():
            require(value is None or value >= 1, name, ">= 1", value)
        for name in ("timeout_s", "usd", "tokens_in", "tokens_out"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, "> 0", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """What a run may use, over all its agents; None: any amount."""

    usd: float | None = None
    """Money, by the price table."""
    tokens_in: int | None = None
    """Tokens of prompts."""
    tokens_out: int | None = None
    """Tokens of completions."""
    llm_calls: int | None = None
    """Attempts at an answer, with those that failed."""
    tool_calls: int | None = 5_000
    """Calls of tools."""
    wall_s: float | None = None
    """Seconds."""

    def __post_init__(self) -> None:
        for name in ("usd", "tokens_in", "tokens_out", "llm_calls", "tool_calls", "wall_s"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, "> 0", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """When the sub-agents of one turn are done."""

    kind: GroupKind = "all"
    """all: when each is; quorum: when `quorum` are; deadline: after `deadline_s`. Those that are late are canceled."""
    quorum: int = 1
    """How many must be done."""
    deadline_s: float = 600.0
    """Seconds from the group's start."""

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, GroupKind)
        require_at_least(1, quorum=self.quorum)
        require(0 < self.deadline_s < math.inf, "deadline_s", "> 0", self.deadline_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extensions:
    """What an orchestrator may do with sub-agents beyond the paper's two tools; its model sees only what is on."""

    resume: bool = False
    """Give another task to a sub-agent that has ended: it goes on with all that it knows."""
    swarm_map: bool = False
    """Give one task, with a blank, to a sub-agent for each of 2 to 300 items, in one call."""
    fork: bool = False
    """Have a sub-agent begin with a copy of its caller's history."""
    background: bool = False
    """Go on while a sub-agent works; its result comes before a later turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimiterConfig:
    """What an endpoint stands."""

    start: int = 8
    """Calls at a time to begin with."""
    most: int = 256
    """Calls at a time at most."""
    requests_per_minute: float | None = None
    """None: any number."""
    tokens_per_minute: float | None = None
    """Prompt and completion together."""
    shrink: float = 0.7
    """Factor of the calls at a time after a refusal."""
    shrink_interval_s: float = 2.0
    """Least seconds between two such cuts."""
    recovery_s: float = 180.0
    """Seconds without a refusal after which the window grows by itself."""
    recovery_interval_s: float = 30.0
    """Seconds for one more, then."""

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.most:
            raise ValueError(f"start must be in [1, most], got {self.start} with most = {self.most}")
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink must be in (0, 1), got {self.shrink}")
        for name in ("shrink_interval_s", "recovery_s"):
            require(0 <= getattr(self, name) < math.inf, name, "finite and >= 0", getattr(self, name))
        interval = self.recovery_interval_s
        require(0 < interval < math.inf, "recovery_interval_s", "finite and > 0", interval)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmConfig:
    """How a swarm runs."""

    orchestrator: AgentLimits = field(default_factory=AgentLimits)
    """Limits of the agent that has the task. Each sub-agent takes one of its calls: more than 99 need more than the
    default of `max_tool_calls`, which is the paper's."""
    subagent: AgentLimits = field(default_factory=AgentLimits)
    """Limits of each that it starts."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Limits of the run."""
    sampling: Sampling = field(default_factory=Sampling)
    """How models are asked."""
    group: GroupConfig = field(default_factory=GroupConfig)
    """When a group of sub-agents is done."""
    extensions: Extensions = field(default_factory=Extensions)
    """What else may be done with sub-agents; all of it is off unless it is switched on."""
    max_agents_total: int = 300
    """Sub-agents of a run; further ones are refused. See `orchestrator.max_tool_calls`, which may end it before."""
    max_agents_running: int = 100
    """Sub-agents at a time; further ones wait."""
    max_depth: int = 1
    """How deep sub-agents may start others; 0: a single agent without sub-agents."""
    max_profiles: int = 100
    """Profiles that the orchestrator may register."""
    max_critical_steps: int | None = None
    """Steps of the orchestrator and of the slowest sub-agent of each stage, as the paper counts them."""
    max_calls_per_turn: int = 64
    """Calls of one turn that are run; the others are refused."""
    result_chars: int = 8_000
    """Most characters of a sub-agent's answer that the orchestrator sees."""
    min_summary_chars: int = 0
    """Shorter answers are asked once for more; 0: never."""
    grace_s: float = 5.0
    """Seconds that a canceled agent or tool has to end."""
    system_prompt: str | None = None
    """The orchestrator's; without it perilune's own."""
    redact: tuple[str, ...] = ()
    """Regular expressions. What they match is never written to the journal, nor used by the run: it becomes ***. Files
    that tools write are not looked at."""
    allow_unknown_cost: bool = False
    """Whether a budget in money is accepted for a model without a known price; its calls then cost nothing."""

    @property
    def limits_money(self) -> bool:
        """Whether the run or an agent has a budget in money."""
        return any(limits.usd is not None for limits in (self.budget, self.orchestrator, self.subagent))

    def __post_init__(self) -> None:
        require_at_least(1, max_agents_total=self.max_agents_total, max_agents_running=self.max_agents_running)
        require_at_least(0, max_depth=self.max_depth, min_summary_chars=self.min_summary_chars)
        require_at_least(1, max_profiles=self.max_profiles, max_calls_per_turn=self.max_calls_per_turn)
        require_at_least(1, result_chars=self.result_chars)
        require(0 <= self.grace_s < math.inf, "grace_s", "finite and >= 0", self.grace_s)
        most = self.max_agents_total
        require(self.max_agents_running <= most, "max_agents_running", f"<= max_agents_total ({most})",
                 self.max_agents_running)  # fmt: skip
        for pattern in self.redact:
            _regular(pattern)
        critical = self.max_critical_steps
        require(critical is None or critical >= 1, "max_critical_steps", ">= 1", critical)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What is shown."""

    seed: int = 0
    """Of the task and of the latencies."""
    rows: int = 64
    """Rows of the table that is asked for."""
    median_s: float = 1.5
    """Median seconds of a call to the model."""
    sigma: float = 0.5
    """Standard deviation of the logarithm of that."""
    speed: float = 10.0
    """How much faster than real time the model's clock runs."""
    concurrency: int = 32
    """Calls to the model at a time, of the swarm."""
    rows_per_agent: int = 4
    """Rows that a sub-agent is given."""
    calls_per_turn: int = 1
    """Most calls a turn of an agent that works alone and of a sub-agent."""
    noise: bool = False
    """Whether pages are misread now and then, more often the more of them an agent has read."""
    ray: bool = False
    """Whether sub-agents are Ray tasks on a local cluster."""
    max_critical_steps: int | None = None
    """Critical steps after which either arm answers with what it has; None for as many as it likes."""

    def __post_init__(self) -> None:
        for name, value in {"median_s": self.median_s, "speed": self.speed}.items():
            require(0 < value < math.inf, name, "> 0", value)
        require_at_least(1, concurrency=self.concurrency, rows_per_agent=self.rows_per_agent)
        require_at_least(1, calls_per_turn=self.calls_per_turn)
        if self.max_critical_steps is not None:
            require_at_least(1, max_critical_steps=self.max_critical_steps)
        require(8 <= self.rows <= 64, "rows", "in [8, 64]", self.rows)


def _regular(pattern: str) -> None:
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"redact: {pattern!r} is no regular expression: {error}") from error
    require(found.search("") is None, "a pattern of redact", "one that does not match an empty text", pattern)
