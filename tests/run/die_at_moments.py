"""Runs the command line again and again in child processes that die at given moments; run by test_kills.py.

    python die_at_moments.py MOMENT... -- ARGUMENT...

A moment is POINT:STAGE:STEP:SIGNAL; the child sends itself the signal right after it reached the point. What the last
child does is not disturbed. For each child a line of JSON: how it ended, and whether its metrics end in a whole line.
"""

import json
import os
import signal
import sys
from pathlib import Path

# Not used here, but by every child: a fork is faster than an import.
import matplotlib.figure  # noqa: F401
import reasoning_gym  # noqa: F401
import torch._dynamo  # noqa: F401

import perilune.report.sections  # noqa: F401
import perilune.rl.curation as curation
from perilune.cli import main as command_line
from perilune.report import MetricsLog
from perilune.run import RunDirectory

POINTS = {
    "log": (MetricsLog, "log", lambda log, step, values, stage="": (stage, step)),
    "samples": (RunDirectory, "write_samples", lambda directory, stage, samples: (stage, 0)),
    "part": (curation, "_write_part", lambda path, key, records: (path.parent.name, int(path.stem[-5:]))),
}
"""Name to a function, where it is, and how to read (stage, step) off its arguments."""


def die_after(point: str, stage: str, step: int, signum: int) -> None:
    """Have this process signaled when it has passed a point."""
    owner, name, place_of = POINTS[point]
    original = getattr(owner, name)

    def passed(*arguments, **options):
        original(*arguments, **options)
        if place_of(*arguments, **options) == (stage, step):
            os.kill(os.getpid(), signum)

    setattr(owner, name, passed)


def run_child(moment: str | None, arguments: list[str]) -> int:
    """Return a child's exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if moment is not None:
        point, stage, step, name = moment.split(":")
        die_after(point, stage, int(step), signal.Signals[name])
    sys.argv = ["perilune", *arguments]
    command_line()
    raise AssertionError("the command line always exits")


def main() -> None:
    border = sys.argv.index("--")
    moments, arguments = sys.argv[1:border], sys.argv[border + 1 :]
    metrics = Path(arguments[arguments.index("--run-dir") + 1]) / "metrics.jsonl"
    for moment in (*moments, None):
        status = run_child(moment, arguments)
        report = {"moment": moment, "status": status, "is_whole": metrics.read_bytes().endswith(b"\n")}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
