"""The durable log of runs: what happened, in order, in one SQLite file that survives `kill -9`.

events      one event
store       writing: one thread, commits in groups, a chain of hashes, a lease
payloads    what of an event is written; unkept: a journal that is not
reading     runs and events, as they are written or long after; whether the chain holds
"""

from perilune.agents.journal.events import Event
from perilune.agents.journal.reading import (
    RunSummary,
    find_run,
    list_runs,
    load_events,
    read_blob,
    verify_chain,
)
from perilune.agents.journal.store import Journal, JournalError, remove_run
from perilune.agents.journal.unkept import UnkeptJournal

__all__ = [
    "Event",
    "Journal",
    "JournalError",
    "RunSummary",
    "UnkeptJournal",
    "find_run",
    "list_runs",
    "load_events",
    "read_blob",
    "remove_run",
    "verify_chain",
]
