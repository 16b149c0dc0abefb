"""Following a journal that may still be written: one open connection, and only what is new each time."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from perilune.agents.journal.events import Event
from perilune.agents.journal.reading import find_run
from perilune.agents.journal.schema import COLUMNS, JournalError, connect, event_of


class Tail:
    """Reads a run's events as they come; for one thread at a time."""

    def __init__(self, path: Path, run_id: str | None = None, *, after: int = 0) -> None:
        """Open a journal.

        Args:
            path: the file.
            run_id: the run; None for the newest.
            after: number of the event after which to begin.

        Raises:
            JournalError: it cannot be read, or has no such run.
        """
        self.path, self.seq = path, after
        self._connection = connect(path, is_reader=True)
        try:
            self.run_id = self._resolved(run_id)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, limit: int | None = None) -> list[Event]:
        """Return the events that came since the last call, that many at most.

        Raises:
            JournalError: the file cannot be read any more.
        """
        found = self._select("seq > ?", (self.seq,), limit)
        if found:
            self.seq = found[-1].seq
        return found

    def of_agents(self, agents: Collection[str], *, after: int = 0) -> list[Event]:
        """Return the events of some agents alone, wherever `read` stands; "" for the run's own.

        Raises:
            JournalError: the file cannot be read any more.
        """
        marks = ", ".join("?" * len(agents))
        return self._select(f"agent IN ({marks}) AND seq > ?", (*agents, after), None)

    def is_driven(self) -> bool:
        """Whether a process has the run's lease, so that more may come.

        Raises:
            JournalError: the file cannot be read any more.
        """
        query = "SELECT 1 FROM leases WHERE run_id = ? AND expires > ?"
        return bool(self._rows(query, (self.run_id, time.time())))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _resolved(self, run_id: str | None) -> str:
        if run_id is not None and self._rows("SELECT 1 FROM runs WHERE run_id = ?", (run_id,)):
            return run_id
        return find_run(self.path, run_id).run_id

    def _rows(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise JournalError(f"{self.path}: {error}") from error

    def _select(self, condition: str, values: tuple[Any, ...], limit: int | None) -> list[Event]:
        query = f"SELECT {COLUMNS} FROM events WHERE run_id = ? AND {condition} ORDER BY seq LIMIT ?"
        rows = self._rows(query, (self.run_id, *values, -1 if limit is None else limit))
        return [event_of(row, self._connection) for row in rows]
