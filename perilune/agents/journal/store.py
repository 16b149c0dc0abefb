"""Writing a run's journal: events are numbered at once, and committed in groups by a thread of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import re
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perilune.agents.journal.events import Event
from perilune.agents.journal.payloads import hashed, redacted
from perilune.agents.journal.reading import load_events
from perilune.agents.journal.schema import JournalError, chained, check_head, connect, is_plain, with_blobs

__all__ = ["Journal", "JournalError", "Synchronous"]

Synchronous = Literal["normal", "full"]
"""normal: what is committed survives `kill -9`; full: it survives a loss of power too, and takes 30 times as long."""

_LEASE_S = 30.0
_GROUP_S = 0.02
_GROUP_EVENTS = 512


@dataclass(frozen=True, slots=True)
class _Row:
    row: tuple[Any, ...]
    blobs: dict[str, bytes]


class _Stop:
    """Ends the writer."""


class _Flush:
    """Asks the writer to commit now."""


class Journal:
    """One run's journal, open for writing; use it from one event loop."""

    def __init__(
        self,
        path: Path,
        run_id: str,
        *,
        synchronous: Synchronous = "normal",
        redact: Sequence[str] = (),
        keeps_payload: bool = True,
    ) -> None:
        """Open the file and take the run's lease.

        Args:
            path: the file; made where there is none.
            run_id: the run that is written.
            synchronous: what a commit survives.
            redact: regular expressions; what they match in a payload becomes ***.
            keeps_payload: whether texts are written, rather than their hashes alone.

        Raises:
            JournalError: the file cannot be written, or another process drives the run; the message names it.
        """
        self.path, self.run_id = path, run_id
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.seq: int
        """Number of the last event."""
        self._redact, self._keeps_payload = [re.compile(pattern) for pattern in redact], keeps_payload
        self.error: JournalError | None = None
        self.on_error: Callable[[JournalError], None] | None = None
        """Called in the event loop when nothing can be written any more."""
        self._connection = connect(path, is_reader=False)
        try:
            self._connection.execute(f"PRAGMA synchronous={'FULL' if synchronous == 'full' else 'NORMAL'}")
            self._take_lease()
            last = self._connection.execute(
                "SELECT seq, hash FROM events WHERE run_id = ? ORDER BY seq DESC LIMIT 1", (run_id,)
            ).fetchone()
            self.seq, self._hash = (0, b"") if last is None else (int(last[0]), bytes(last[1]))
            check_head(self._connection, path, run_id, self.seq, self._hash)
        except sqlite3.Error as error:
            self._release()
            raise JournalError(f"{path}: {error}") from error
        except BaseException:
            self._release()
            raise
        self._committed = self.seq
        self._queue: queue.SimpleQueue[_Row | _Flush | _Stop] = queue.SimpleQueue()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_flushing = False
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._write, name=f"journal {path.name}", daemon=True)
        self._thread.start()

    def register(self, task: str, model: str) -> None:
        """Note that the run exists; before its first event.

        Raises:
            JournalError: the file cannot be written, or there is such a run.
        """
        task = redacted(task, self._redact)
        row = (self.run_id, time.time(), task if self._keeps_payload else hashed(task), model)
        try:
            self._connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?, 'running')", row)
        except sqlite3.IntegrityError as error:
            raise JournalError(f"{self.path}: there is a run {self.run_id} already; resume it") from error
        except sqlite3.Error as error:
            raise JournalError(f"{self.path}: {error}") from error

    def append(self, type_: str, agent: str, payload: Mapping[str, Any], cause: int = 0) -> Event:
        """Number an event; it is on its way to the disk when this returns, and there after `commit`.

        What the event says is what is written, without what is to be redacted; or its hashes are.

        Raises:
            JournalError: the journal broke before.
        """
        self.check()
        payload = redacted(payload, self._redact) if self._redact else payload
        event = Event(
            seq=self.seq + 1,
            type=type_,
            agent=agent,
            cause=cause,
            wall=time.time(),
            at=time.monotonic(),
            payload=payload,
        )
        self._put(event)
        return event

    def copy(self, event: Event) -> None:
        """Append another run's event as it is, with its times; its number must be the next.

        Raises:
            JournalError: the journal broke before.
            ValueError: the number is another.
        """
        if event.seq != self.seq + 1:
            raise ValueError(f"the next event must be {self.seq + 1}, got {event.seq}")
        self._put(event)

    def _put(self, event: Event) -> None:
        if self.error is not None:
            raise self.error
        self.seq = event.seq
        blobs: dict[str, bytes] = {}
        payload = event.payload if self._keeps_payload else hashed(event.payload)
        content = _dumps(payload)
        if not is_plain(content):
            content = _dumps(with_blobs(dict(payload), blobs))
        row = (event.seq, event.type, event.agent, event.cause, event.wall, event.at, content)
        self._queue.put(_Row(row, blobs))

    def load(self) -> list[Event]:
        """Return the run's events, as they are on the disk.

        Raises:
            JournalError: they cannot be read.
        """
        return load_events(self.path, self.run_id)

    async def commit(self) -> None:
        """Wait until every event so far is on the disk.

        Raises:
            JournalError: it cannot be.
        """
        self._loop = asyncio.get_running_loop()  # before the look at `error`, or its coming could be missed
        self.check()
        if self._committed >= self.seq:
            return
        future = self._loop.create_future()
        self._waiting.append((self.seq, future))
        if not self._is_flushing:
            self._is_flushing = True
            self._queue.put(_Flush())
        await future

    def check(self) -> None:
        """Raise if the journal is broken.

        Raises:
            JournalError: it is; one of its own for each who asks, as many agents raise it.
        """
        if self.error is not None:
            raise JournalError(str(self.error))

    def set_running(self, model: str) -> None:
        """Note that the run goes on, with this model; what counts are its events."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute(
                "UPDATE runs SET status = 'running', model = ? WHERE run_id = ?", (model, self.run_id)
            )

    def set_status(self, status: str) -> None:
        """Note how the run stands, for lists of runs; what counts are its events."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("UPDATE runs SET status = ? WHERE run_id = ?", (status, self.run_id))

    def close(self) -> None:
        """Write what is left and give the lease back; nothing is raised, `error` tells."""
        self._queue.put(_Stop())
        self._thread.join()
        self._release()

    def _release(self) -> None:
        """Give the lease back, if it is ours, and close the file."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("DELETE FROM leases WHERE run_id = ? AND owner = ?", (self.run_id, self.owner))
        self._connection.close()

    def _take_lease(self) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            row = connection.execute("SELECT owner, expires FROM leases WHERE run_id = ?", (self.run_id,)).fetchone()
            if row is not None and row[1] > time.time() and _is_alive(row[0]):
                host, pid, _ = row[0].rsplit(":", 2)
                raise JournalError(
                    f"{self.path}: run {self.run_id} is driven by process {pid} of {host}; stop that first"
                )
            connection.execute(
                "INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", (self.run_id, self.owner, time.time() + _LEASE_S)
            )
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise

    def _write(self) -> None:
        """Commit what comes, a group at a time: what is asked for at once, the rest within 20 ms."""
        group: list[_Row] = []
        deadline = 0.0
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()) if group else _LEASE_S / 3)
            except queue.Empty:
                item = None
            if isinstance(item, _Row):
                if not group:
                    deadline = time.monotonic() + _GROUP_S
                group.append(item)
                if len(group) < _GROUP_EVENTS:
                    continue
            if not self._commit_group(group):
                return
            group = []
            if isinstance(item, _Flush):
                self._tell()
            if isinstance(item, _Stop):
                self._tell()
                return

    def _commit_group(self, group: list[_Row]) -> bool:
        """Write a group and renew the lease; return whether the journal still works."""
        now = time.monotonic()
        if not group and now - self._renewed < _LEASE_S / 3:
            return True
        connection, rows = self._connection, []
        hash_ = self._hash
        for item in group:
            hash_ = chained(hash_, self.run_id, item.row)
            rows.append((self.run_id, *item.row, hash_))
        try:
            connection.execute("BEGIN IMMEDIATE")
            for item in group:
                if item.blobs:
                    connection.executemany("INSERT OR IGNORE INTO blobs VALUES (?, ?)", item.blobs.items())
            connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            if group:
                head = (self.run_id, group[-1].row[0], hash_)
                connection.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", head)
            if now - self._renewed >= _LEASE_S / 3:
                self._renew(connection)
            connection.execute("COMMIT")
        except (sqlite3.Error, JournalError) as error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            self.error = error if isinstance(error, JournalError) else JournalError(f"{self.path}: {error}")
            self._tell()
            return False
        self._hash = hash_
        if group:
            self._committed = group[-1].row[0]
        return True

    def _renew(self, connection: sqlite3.Connection) -> None:
        found = connection.execute(
            "UPDATE leases SET expires = ? WHERE run_id = ? AND owner = ?",
            (time.time() + _LEASE_S, self.run_id, self.owner),
        )
        if not found.rowcount:
            raise JournalError(f"{self.path}: another process took over run {self.run_id}")
        self._renewed = time.monotonic()

    def _tell(self) -> None:
        """Let the event loop know, from the writer's thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._resolve)

    def _resolve(self) -> None:
        self._is_flushing = False
        waiting, self._waiting = self._waiting, []
        for seq, future in waiting:
            if future.done():
                continue
            if seq <= self._committed:
                future.set_result(None)
            elif self.error is not None:
                future.set_exception(JournalError(str(self.error)))
            else:
                self._waiting.append((seq, future))
        if self._waiting:
            self._is_flushing = True
            self._queue.put(_Flush())
        if self.error is not None and self.on_error is not None:
            on_error, self.on_error = self.on_error, None
            on_error(self.error)


def remove_run(path: Path, run_id: str) -> None:
    """Take a run out of a journal; texts that are kept apart stay, as others may share them.

    Raises:
        JournalError: the file cannot be written, or a process drives the run.
    """
    log = Journal(path, run_id)  # takes the lease
    log.close()
    connection = connect(path, is_reader=False)
    try:
        connection.execute("BEGIN IMMEDIATE")
        for table in ("events", "heads", "runs"):
            connection.execute(f"DELETE FROM {table} WHERE run_id = ?", (run_id,))
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise JournalError(f"{path}: {error}") from error
    finally:
        connection.close()


def _is_alive(owner: str) -> bool:
    """Whether a lease's process may still be there: of another machine it is not known."""
    host, pid, _ = owner.rsplit(":", 2)
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _dumps(value: Any) -> str:
    try:
        import orjson

        return orjson.dumps(value).decode()
    except (ImportError, TypeError):  # TypeError: lone surrogates, which JSON as ASCII can hold
        return json.dumps(value, separators=(",", ":"))
