from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.agents.journal import Journal, JournalError, find_run, list_runs, load_events, remove_run, verify_chain
from perilune.agents.journal.schema import VERSION, with_blobs, without_blobs
from perilune.agents.journal.tailing import Tail

KEYS = st.text(max_size=3) | st.just("$blob")


def _journal(path: Path, run_id: str = "r", count: int = 0) -> Journal:
    journal = Journal(path, run_id)
    if not journal.seq:
        journal.register("count", "m")
    for number in range(count):
        journal.append("step", "root", {"number": number}, cause=number)
    return journal


def test_events_come_back_in_order_with_all_they_say(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    long = "ü" * 9000
    payloads = [{"text": "a"}, {"text": long, "list": [long, {"deep": long}]}, {"text": "\ud800 alone", "n": None}]

    async def write() -> None:
        journal = _journal(path)
        for payload in payloads:
            journal.append("said", "root/1", payload, cause=7)
        await journal.commit()
        assert len(load_events(path)) == 3  # a reader sees what is committed while the writer is at work
        journal.set_status("completed")
        journal.close()

    asyncio.run(write())
    events = load_events(path, "r")
    assert [event.payload for event in events] == payloads
    assert [(e.seq, e.type, e.agent, e.cause) for e in events] == [(i, "said", "root/1", 7) for i in (1, 2, 3)]
    assert [event.seq for event in load_events(path, after=1, limit=1)] == [2]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM blobs").fetchone() == (1,)
    (run,) = list_runs(path)
    assert (run.run_id, run.task, run.model, run.status, run.events) == ("r", "count", "m", "completed", 3)
    assert verify_chain(path) == 3


@given(st.recursive(st.none() | st.integers(-5, 5) | st.text(max_size=5) | st.just("x" * 1500),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
                    max_leaves=8))  # fmt: skip
@settings(deadline=None)
def test_blobs_stand_for_long_texts_and_nothing_else(value: object) -> None:
    blobs: dict[str, bytes] = {}
    small = with_blobs(value, blobs)
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE blobs(sha256 TEXT PRIMARY KEY, bytes BLOB)")
    connection.executemany("INSERT INTO blobs VALUES (?, ?)", blobs.items())
    assert without_blobs(small, connection) == value
    connection.close()
    assert len(blobs) <= 1


def test_a_second_run_in_a_file_and_a_run_opened_again_go_on_where_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    for run in ("a", "b"):
        _journal(path, run, 2).close()
    journal = _journal(path, "a")
    assert journal.append("step", "root", {}).seq == 3
    journal.close()
    assert [verify_chain(path, run) for run in ("a", "b")] == [3, 2]
    assert [run.run_id for run in list_runs(path)] == ["a", "b"]
    again = Journal(path, "a")
    with pytest.raises(JournalError, match="there is a run a already; resume it"):
        again.register("count", "m")
    again.close()


def test_a_run_is_found_by_a_beginning_that_no_other_has(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    for run in ("3f2a9c", "3f7", "3f7b", "b1"):
        _journal(path, run, 1).close()
    assert [find_run(path, name).run_id for name in ("3f2", "3f7", "3f7b", "b", None)] == [
        "3f2a9c",
        "3f7",
        "3f7b",
        "b1",
        "b1",
    ]
    for name, message in (
        ("3f", "several runs begin with '3f'; there are: 3f2a9c, 3f7, 3f7b$"),
        ("x", "no run x;"),
        ("", "several runs begin with"),
    ):
        with pytest.raises(JournalError, match=message):
            find_run(path, name)
    with Tail(path, "3f2") as tail:
        assert tail.run_id == "3f2a9c"


def test_a_run_is_taken_out_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    for run in ("a", "b"):
        _journal(path, run, 2).close()
    holder = Journal(path, "a")
    with pytest.raises(JournalError, match="is driven by"):
        remove_run(path, "a")
    holder.close()
    remove_run(path, "a")
    assert [run.run_id for run in list_runs(path)] == ["b"]
    assert verify_chain(path) == 2
    _journal(path, "a", 1).close()
    assert verify_chain(path, "a") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE events SET payload = '{\"number\":9}' WHERE seq = 2", "event 2 of run r was changed"),
        ("UPDATE events SET agent = 'x' WHERE seq = 3", "event 3 of run r was changed"),
        ("DELETE FROM events WHERE seq = 2", "lacks event 2"),
        ("UPDATE events SET seq = seq + 10 WHERE seq = 3", "lacks event 3"),
        ("DELETE FROM events WHERE seq > 2", "run r lacks its last events: 2 of 5 are there"),
        ("DELETE FROM events", "run r lacks its last events: 0 of 5 are there"),
        ("DELETE FROM heads", "event 5 is not its last"),
        ("UPDATE blobs SET bytes = CAST('forged' AS BLOB)", r"a\.db: blob \w+\.\.\. was changed .*\(event 5\)"),
        ("DELETE FROM blobs", r"a\.db: lacks blob \w+\.\.\. \(event 5\)"),
    ],
)
def test_what_was_changed_afterwards_is_found(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "a.db"
    journal = _journal(path, count=4)
    journal.append("said", "root", {"text": "y" * 9000})
    journal.close()
    assert verify_chain(path) == 5
    with sqlite3.connect(path) as connection:
        connection.execute(change)
    connection.close()
    with pytest.raises(JournalError, match=message):
        verify_chain(path)


def test_a_changed_text_is_not_read_and_a_shortened_run_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    journal = _journal(path)
    journal.append("said", "root", {"text": "y" * 9000})
    journal.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE blobs SET bytes = CAST('forged' AS BLOB)")
    with pytest.raises(JournalError, match="was changed after it was written"):
        load_events(path)
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM events")
    for _ in range(2):  # no lease is left behind
        with pytest.raises(JournalError, match="lacks its last events: 0 of 1"):
            Journal(path, "r")
    connection.close()


def test_what_looks_like_a_reference_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    journal = _journal(path)
    payloads = [
        {"schema": {"properties": {"$blob": {"type": "string"}}}},
        {"schema": {"$blob": "x"}, "text": "long" * 9000},
        {"$blob": ["x" * 2000]},
        {"a": {"$blob": {"$blob": [{"$blob": "no", "b": 1}]}}},
    ]
    for payload in payloads:
        journal.append("said", "root", payload)
    journal.close()
    assert [event.payload for event in load_events(path)] == payloads
    assert verify_chain(path) == 4


def test_a_journal_of_the_first_schema_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    _journal(path, count=3).close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE heads")
        connection.execute("PRAGMA user_version=1")
    connection.close()
    assert verify_chain(path) == 3
    _journal(path, "other", 1).close()
    assert verify_chain(path, "r") == 3
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM events WHERE run_id = 'r' AND seq = 3")
    connection.close()
    with pytest.raises(JournalError, match="lacks its last events"):
        verify_chain(path, "r")


def test_a_run_is_checked_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    journal = _journal(path, count=1)
    found, seen = [verify_chain(path)], list[int]()

    def write() -> None:
        for number in range(500):
            journal.append("step", "root", {"number": number})
            time.sleep(0)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        seen.append(verify_chain(path))
    writer.join()
    journal.close()
    assert found[0] <= seen[0] <= seen[-1] <= verify_chain(path) == 501


def test_a_run_has_one_driver(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    journal = _journal(path)
    with pytest.raises(JournalError, match=f"run r is driven by process {os.getpid()} of"):
        Journal(path, "r")
    _journal(path, "other").close()
    journal.close()
    Journal(path, "r").close()


def test_the_lease_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    code = (
        "import sys, time, pathlib\nfrom perilune.agents.journal import Journal\n"
        "j = Journal(pathlib.Path(sys.argv[1]), 'r'); j.register('t', 'm'); j.append('step', 'root', {})\n"
        "import asyncio; asyncio.run(j.commit()); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    with pytest.raises(JournalError, match=f"driven by process {child.pid}"):
        Journal(path, "r")
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    journal = Journal(path, "r")
    assert journal.seq == 1
    journal.close()


def test_what_was_committed_survives_a_kill_and_what_is_left_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    code = (
        "import asyncio, sys, pathlib\nfrom perilune.agents.journal import Journal\n"
        "async def main():\n"
        "    j = Journal(pathlib.Path(sys.argv[1]), 'r'); j.register('t', 'm')\n"
        "    while True:\n"
        "        for _ in range(7): j.append('step', 'root', {'text': 'x' * 3000})\n"
        "        await j.commit(); print(j.seq, flush=True)\n"
        "asyncio.run(main())"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(5):
        committed = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().split("\n")
    child.stdout.close()
    child.wait()
    committed = max([committed, *(int(line) for line in rest[:-1])])
    assert verify_chain(path) >= committed


def test_a_full_disk_stops_the_run_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def write() -> list[JournalError]:
        journal, told = _journal(path), list[JournalError]()
        journal.on_error = told.append
        journal._connection.execute("PRAGMA max_page_count=20")  # as a full disk would
        for _ in range(50):
            journal.append("step", "root", {"text": os.urandom(3000).hex()})
        with pytest.raises(JournalError, match=r"a\.db: database or disk is full"):
            await journal.commit()
        with pytest.raises(JournalError, match="full"):
            journal.append("step", "root", {})
        with pytest.raises(JournalError, match="full"):
            await journal.commit()
        journal.close()
        return told

    assert len(asyncio.run(write())) == 1
    verify_chain(path)


def test_files_that_are_no_journals_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no such journal"):
        load_events(tmp_path / "none.db")
    with pytest.raises(JournalError, match="its directory does not exist"):
        Journal(tmp_path / "no" / "a.db", "r")
    (tmp_path / "text.db").write_text("this is no database, and long enough to be looked at" * 20)
    for act in (lambda: load_events(tmp_path / "text.db"), lambda: Journal(tmp_path / "text.db", "r")):
        with pytest.raises(JournalError, match=r"text\.db: file is not a database"):
            act()
    (tmp_path / "empty.db").touch()
    with pytest.raises(JournalError, match=r"empty\.db: has no runs"):
        load_events(tmp_path / "empty.db")
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE t(x)")
    connection.close()
    with pytest.raises(JournalError, match="no journal of a swarm"):
        load_events(tmp_path / "other.db")
    path = tmp_path / "new.db"
    _journal(path).close()
    with pytest.raises(JournalError, match="has no run x; there are: r"):
        load_events(path, "x")
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version={VERSION + 1}")
    connection.close()
    with pytest.raises(JournalError, match="written by a newer perilune"):
        load_events(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_journal_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    _journal(path).close()
    path.chmod(0o400)
    with pytest.raises(JournalError, match=r"readonly|unable to open"):
        Journal(path, "r")


def test_commits_are_in_groups(tmp_path: Path) -> None:
    """A hundred agents that each wait for the disk take few commits."""

    async def write() -> int:
        journal, said = _journal(tmp_path / "a.db"), list[str]()
        journal._connection.set_trace_callback(said.append)

        async def agent(name: str) -> None:
            for number in range(10):
                journal.append("step", name, {"number": number})
                await journal.commit()

        await asyncio.gather(*(agent(f"a{i}") for i in range(100)))
        journal.close()
        return said.count("COMMIT")

    assert 1 <= asyncio.run(write()) <= 100
    assert verify_chain(tmp_path / "a.db") == 1000
