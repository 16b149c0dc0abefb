"""Reading journals: lists of runs, their events, and whether anything was changed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from perilune.agents.journal.events import Event
from perilune.agents.journal.schema import COLUMNS, JournalError, chained, check_head, connect, event_of, fetch_blob


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run of a journal."""

    run_id: str
    created: float
    """Unix time in seconds."""
    task: str
    model: str
    status: str
    events: int


def list_runs(path: Path) -> list[RunSummary]:
    """Return the runs of a journal, the newest last.

    Raises:
        JournalError: it cannot be read.
    """
    with _reading(path) as connection:
        rows = connection.execute(
            "SELECT run_id, created, task, model, status, (SELECT count(*) FROM events e WHERE e.run_id = r.run_id)"
            " FROM runs r ORDER BY created, run_id"
        ).fetchall()
    return [
        RunSummary(run_id=run, created=created, task=task, model=model, status=status, events=events)
        for run, created, task, model, status, events in rows
    ]


def find_run(path: Path, run_id: str | None = None) -> RunSummary:
    """Return a run of a journal; the newest if none is named.

    Args:
        path: the journal.
        run_id: the run's name, or a beginning of it that no other run's has.

    Raises:
        JournalError: it cannot be read, or has no such run, or several; the message lists those there are.
    """
    runs = list_runs(path)
    if not runs:
        raise JournalError(f"{path}: has no runs")
    if run_id is None:
        return runs[-1]
    found = [run for run in runs if run.run_id == run_id] or [run for run in runs if run.run_id.startswith(run_id)]
    if run_id and len(found) == 1:
        return found[0]
    there = ", ".join(run.run_id for run in (found or runs)[-10:])
    what = f"several runs begin with {run_id!r}" if len(found) > 1 else f"has no run {run_id}"
    raise JournalError(f"{path}: {what}; there are: {there}")


def load_events(path: Path, run_id: str | None = None, *, after: int = 0, limit: int | None = None) -> list[Event]:
    """Return a run's events in order.

    Args:
        path: the journal.
        run_id: the run; None for the newest.
        after: events after this number only.
        limit: that many at most.

    Raises:
        JournalError: it cannot be read, or has no such run; the message lists those there are.
    """
    run = find_run(path, run_id).run_id
    with _reading(path) as connection:
        rows = connection.execute(
            f"SELECT {COLUMNS} FROM events WHERE run_id = ? AND seq > ? ORDER BY seq LIMIT ?",
            (run, after, -1 if limit is None else limit),
        ).fetchall()
        return [event_of(row, connection) for row in rows]


def read_blob(path: Path, name: str) -> bytes:
    """Return what a journal keeps under a SHA-256.

    Raises:
        JournalError: it cannot be read, or keeps nothing there.
    """
    with _reading(path) as connection:
        return fetch_blob(connection, name)


def verify_chain(path: Path, run_id: str | None = None) -> int:
    """Check that no event was changed, left out or put in, with the texts kept apart; return how many there are.

    It finds accidents and hasty edits. Whoever can write the file can also write it anew as a whole.

    Raises:
        JournalError: the message names the first event that does not fit.
    """
    run = find_run(path, run_id).run_id
    with _reading(path) as connection:
        connection.execute("BEGIN")  # a run that is written meanwhile is seen as of now
        before, expected = b"", 1
        for *row, hash_ in connection.execute(
            f"SELECT {COLUMNS}, hash FROM events WHERE run_id = ? ORDER BY seq", (run,)
        ):
            if row[0] != expected:
                raise JournalError(f"{path}: run {run} lacks event {expected}")
            before = chained(before, run, tuple(row))
            if before != bytes(hash_):
                raise JournalError(f"{path}: event {row[0]} of run {run} was changed after it was written")
            event_of(tuple(row), connection)
            expected += 1
        if int(connection.execute("PRAGMA user_version").fetchone()[0]) > 1:
            check_head(connection, path, run, expected - 1, before)
    return expected - 1


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    connection = connect(path, is_reader=True)
    try:
        yield connection
    except sqlite3.Error as error:
        raise JournalError(f"{path}: {error}") from error
    finally:
        connection.close()
