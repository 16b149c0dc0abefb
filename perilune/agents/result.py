"""What came of a run."""

from __future__ import annotations

from dataclasses import dataclass

from perilune.agents.messages import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended."""

    run_id: str
    status: str
    """Of the orchestrator; stopped: it can be resumed; log_error: the journal could not be written any more."""
    answer: str
    error: str | None
    usage: Usage
    cost_usd: float | None
    """None where some call had no known price."""
    steps: int
    """Turns of all agents."""
    critical_steps: int
    tool_calls: int
    subagents: int
    wall_s: float
    """Seconds that the run was driven, over all its starts."""
    leaked: tuple[str, ...] = ()
    """What did not end in time after it was cancelled."""
