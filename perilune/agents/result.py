"""What came of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perilune.agents.journal import JournalError, find_run, load_events
from perilune.agents.messages import Usage
from perilune.agents.state import ROOT, RunState

HASHED = "hashed"
"""What `payload` of a run's first event says where the journal holds hashes in place of what was said."""


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
    """What did not end in time after it was canceled."""


def result_of(state: RunState, *, stopped_by: str | None = None, leaked: Sequence[str] = ()) -> RunResult:
    """Return what came of a run.

    Args:
        state: what its events add up to.
        stopped_by: what stopped it, if it was not on purpose.
        leaked: what did not end in time.
    """
    root = state.agents.get(ROOT)
    return RunResult(
        run_id=state.run_id,
        status=state.status or "stopped",
        answer=state.answer or ("" if root is None else root.answer),
        error=state.error or stopped_by,
        usage=state.usage,
        cost_usd=state.cost_usd,
        steps=sum(agent.turns for agent in state.agents.values()),
        critical_steps=0 if root is None else state.critical_steps(),
        tool_calls=state.tool_calls,
        subagents=state.subagents,
        wall_s=state.elapsed_s,
        leaked=tuple(leaked),
    )


def recorded_result(journal: Path, run_id: str | None = None) -> RunResult | None:
    """Return what came of a run that has ended, from its journal alone; None if it has not.

    Args:
        journal: the file.
        run_id: the run; None for the newest.

    Raises:
        JournalError: the journal cannot be read, has no such run, or hashes in place of what was said.
    """
    found = find_run(journal, run_id).run_id
    state = RunState.fold(found, load_events(journal, found))
    check_payload(journal, state)
    return None if state.status is None else result_of(state)


def check_payload(journal: Path, state: RunState) -> None:
    """Check that a journal holds what was said in a run.

    Raises:
        JournalError: it holds hashes of it.
    """
    if state.setup.get("payload") == HASHED:
        raise JournalError(
            f"{journal}: run {state.run_id} was begun without its payload (--no-payload): there are hashes in place of "
            "what was said, so that it can be neither resumed nor replayed nor forked"
        )
