"""A journal that is not written: its run leaves nothing, and cannot be resumed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perilune.agents.journal.events import Event
from perilune.agents.journal.payloads import redacted
from perilune.agents.journal.schema import JournalError


class UnkeptJournal:
    """Numbers events as `Journal` does, and has them for as long as the run is there."""

    def __init__(self, run_id: str, *, redact: Sequence[str] = ()) -> None:
        """Prepare.

        Args:
            run_id: the run.
            redact: as for `Journal`.
        """
        self.run_id, self.owner = run_id, "this process"
        self.error: JournalError | None = None
        """Always None: what is not written cannot fail."""
        self.on_error: Callable[[JournalError], None] | None = None
        """Never called."""
        self._redact = [re.compile(pattern) for pattern in redact]
        self._events: list[Event] = []

    @property
    def seq(self) -> int:
        """Number of the last event."""
        return len(self._events)

    def load(self) -> list[Event]:
        """Return the events so far."""
        return list(self._events)

    def append(self, type_: str, agent: str, payload: Mapping[str, Any], cause: int = 0) -> Event:
        """See `Journal.append`."""
        event = Event(
            seq=self.seq + 1,
            type=type_,
            agent=agent,
            cause=cause,
            wall=time.time(),
            at=time.monotonic(),
            payload=redacted(payload, self._redact) if self._redact else payload,
        )
        self._events.append(event)
        return event

    def register(self, task: str, model: str) -> None:
        """There is no list of runs that it would be in."""

    async def commit(self) -> None:
        """Nothing survives this program's end, whoever waits for it."""

    def check(self) -> None:
        """Nothing is broken."""

    def set_running(self, model: str) -> None:
        """See `register`."""

    def set_status(self, status: str) -> None:
        """See `register`."""

    def close(self) -> None:
        """Nothing is open."""
