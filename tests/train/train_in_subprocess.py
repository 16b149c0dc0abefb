"""Trains the tiny stage into a directory, a line on stdout per step; run by test_resume.py, which kills it."""

import sys
import time
from pathlib import Path

from perilune.report import MetricsLog
from perilune.train import Interrupted, SignalWatch
from tests.train.tiny import context_for, make_config, make_source, run


def main(directory: Path, step_s: float) -> int:
    source = make_source()
    original = source.batch

    def batch(step: int, micro: int):
        print(step, flush=True)
        time.sleep(step_s)
        return original(step, micro)

    source.batch = batch
    with SignalWatch() as watch, MetricsLog(directory / "metrics.jsonl") as metrics:
        context = context_for(
            directory / "checkpoints", metrics=metrics, should_stop=watch.should_stop, stopped=watch.stopped
        )
        try:
            run(make_config(steps=12, checkpoint_interval=2), context, source=source)
        except Interrupted as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
