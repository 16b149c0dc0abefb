"""The tables, and how large values and hashes are kept."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from perilune.agents.journal.events import Event
from perilune.errors import PeriluneError

VERSION = 2
"""`user_version` of files that this code writes; 1 had no `heads`."""
COLUMNS = "seq, type, agent, cause, wall, at, payload"
"""What `event_of` reads an event from."""
INLINE_BYTES = 8 * 1024
"""Events up to this size are kept as they are; of larger ones, long texts are kept once each as blobs."""
_BLOB_CHARS = 1024
_REFERENCE = "$blob"
"""{"$blob": "<sha256>"} stands for a text, {"$blob": [value]} for what was a dictionary with this one key before."""

_TABLES = """
CREATE TABLE IF NOT EXISTS runs(
    run_id TEXT PRIMARY KEY, created REAL NOT NULL, task TEXT NOT NULL, model TEXT NOT NULL, status TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS events(
    run_id TEXT NOT NULL, seq INTEGER NOT NULL, type TEXT NOT NULL, agent TEXT NOT NULL, cause INTEGER NOT NULL,
    wall REAL NOT NULL, at REAL NOT NULL, payload TEXT NOT NULL, hash BLOB NOT NULL, PRIMARY KEY(run_id, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS heads(run_id TEXT PRIMARY KEY, seq INTEGER NOT NULL, hash BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS blobs(sha256 TEXT PRIMARY KEY, bytes BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS leases(run_id TEXT PRIMARY KEY, owner TEXT NOT NULL, expires REAL NOT NULL) STRICT;
"""
_HEADS = """
INSERT OR IGNORE INTO heads SELECT run_id, seq, hash FROM events e
WHERE seq = (SELECT max(seq) FROM events WHERE run_id = e.run_id);
"""


class JournalError(PeriluneError):
    """A journal cannot be written or read; the text names the file and says why."""


def connect(path: Path, *, is_reader: bool) -> sqlite3.Connection:
    """Open a journal; a writer makes it where there is none.

    Raises:
        JournalError: it is not there, is no journal, or was written by newer code.
    """
    if is_reader and not path.is_file():
        raise JournalError(f"{path}: no such journal")
    if not path.parent.is_dir():
        raise JournalError(f"{path}: its directory does not exist")
    name = f"{path.absolute().as_uri()}?mode={'ro' if is_reader else 'rwc'}"
    try:
        connection = sqlite3.connect(name, uri=True, check_same_thread=False, isolation_level=None, timeout=10)
        try:
            _prepare(connection, path, is_reader)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise JournalError(f"{path}: {error}") from error
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, is_reader: bool) -> None:
    """Check what is in the file; a writer makes what is not."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        raise JournalError(f"{path}: written by a newer perilune (schema {version}, this one knows {VERSION})")
    if is_reader and version == 0:
        # A process that is killed when it has just made the file leaves it empty.
        is_empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        raise JournalError(f"{path}: {'has no runs' if is_empty else 'is a database, but no journal of a swarm'}")
    if is_reader:
        return
    connection.execute("PRAGMA journal_mode=WAL")
    if version < VERSION:
        connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} {_HEADS} PRAGMA user_version={VERSION}; COMMIT;")


def event_of(row: tuple[int, str, str, int, float, float, str], connection: sqlite3.Connection) -> Event:
    """Return an event from its `COLUMNS`.

    Raises:
        JournalError: a blob of it is not there, or is not what it was.
    """
    seq, type_, agent, cause, wall, at, payload = row
    try:
        found = without_blobs(json.loads(payload), connection)
    except JournalError as error:
        raise JournalError(f"{error} (event {seq})") from error
    return Event(seq=seq, type=type_, agent=agent, cause=cause, wall=wall, at=at, payload=found)


def is_plain(content: str) -> bool:
    """Whether a payload of this JSON is kept as it is: it is not large, and holds nothing like a reference."""
    return len(content) <= INLINE_BYTES and f'"{_REFERENCE}"' not in content


def with_blobs(value: Any, blobs: dict[str, bytes]) -> Any:
    """Return a copy of a payload in which long texts are references to `blobs`, which they are put into."""
    if isinstance(value, str):
        if len(value) < _BLOB_CHARS:
            return value
        content = value.encode("utf-8", "surrogatepass")
        name = hashlib.sha256(content).hexdigest()
        blobs[name] = content
        return {_REFERENCE: name}
    if isinstance(value, dict):
        inner = {key: with_blobs(item, blobs) for key, item in value.items()}
        return {_REFERENCE: [inner[_REFERENCE]]} if list(inner) == [_REFERENCE] else inner
    if isinstance(value, list | tuple):
        return [with_blobs(item, blobs) for item in value]
    return value


def without_blobs(value: Any, connection: sqlite3.Connection) -> Any:
    """Undo `with_blobs`."""
    if isinstance(value, dict):
        held = value[_REFERENCE] if list(value) == [_REFERENCE] else None
        if isinstance(held, str):
            return fetch_blob(connection, held).decode("utf-8", "surrogatepass")
        if isinstance(held, list) and len(held) == 1:
            return {_REFERENCE: without_blobs(held[0], connection)}
        return {key: without_blobs(item, connection) for key, item in value.items()}
    if isinstance(value, list):
        return [without_blobs(item, connection) for item in value]
    return value


def fetch_blob(connection: sqlite3.Connection, name: str) -> bytes:
    """Return a blob.

    Raises:
        JournalError: there is none of this name, or it is another than was written.
    """
    row = connection.execute("SELECT bytes FROM blobs WHERE sha256 = ?", (name,)).fetchone()
    if row is None:
        raise JournalError(f"{_file_of(connection)}: lacks blob {name[:12]}...")
    content = bytes(row[0])
    if hashlib.sha256(content).hexdigest() != name:
        raise JournalError(f"{_file_of(connection)}: blob {name[:12]}... was changed after it was written")
    return content


def check_head(connection: sqlite3.Connection, path: Path, run_id: str, seq: int, hash_: bytes) -> None:
    """Check that a run ends with the event that was written last.

    Args:
        connection: to the journal.
        path: the journal.
        run_id: the run.
        seq: number of its last event that is there; 0 without.
        hash_: of it.

    Raises:
        JournalError: events were taken away from its end, or put there.
    """
    row = connection.execute("SELECT seq, hash FROM heads WHERE run_id = ?", (run_id,)).fetchone()
    last, expected = (0, b"") if row is None else (int(row[0]), bytes(row[1]))
    if seq < last:
        raise JournalError(f"{path}: run {run_id} lacks its last events: {seq} of {last} are there")
    if (seq, hash_) != (last, expected):
        raise JournalError(f"{path}: run {run_id} was written to by something else: event {seq} is not its last")


def chained(before: bytes, run_id: str, row: tuple[Any, ...]) -> bytes:
    """Return the hash of an event's row (seq, type, agent, cause, wall, at, payload) and of all before it."""
    *fields, payload = row
    digest = hashlib.sha256(before)
    digest.update(repr((run_id, *fields)).encode())
    digest.update(payload.encode())
    return digest.digest()


def _file_of(connection: sqlite3.Connection) -> str:
    return str(connection.execute("PRAGMA database_list").fetchone()[2]) or "the journal"
