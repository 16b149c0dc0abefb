"""A run that is killed in every kind of stage and started again gives what an undisturbed one gives, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run.tiny_run import computed_files, computed_metrics, computed_results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]

MOMENTS = {
    # The line of a step is written before its checkpoint, so each of these loses a step.
    "log:pretrain:3:SIGKILL": -9,
    "samples:pretrain:0:SIGKILL": -9,
    "log:sft:11:SIGKILL": -9,
    "part:curate:0:SIGTERM": 143,
    "part:curate:1:SIGKILL": -9,
    "log:rl:2:SIGKILL": -9,
    "log:rl:3:SIGTERM": 143,
    "log:shorter:2:SIGKILL": -9,
    "samples:merge:0:SIGKILL": -9,
    "log:reject:3:SIGKILL": -9,
    "log:prefer:3:SIGKILL": -9,
}
"""Where to die, and how the process ends then."""


@pytest.fixture(scope="module")
def disturbed(finished, tmp_path_factory):
    """Directory of a run that died at every one of the moments, and how its processes ended."""
    directory = tmp_path_factory.mktemp("disturbed") / "run"
    script = Path(__file__).with_name("die_at_moments.py")
    recipe = finished.parent / "tiny.toml"
    arguments = [*MOMENTS, "--", "run", recipe, "--run-dir", directory, "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"moment"')]
    return directory, [json.loads(line) for line in lines], done.stderr


def test_each_process_ends_as_its_signal_asks_and_leaves_whole_lines(disturbed):
    _, children, errors = disturbed
    assert {child["moment"]: child["status"] for child in children} == {**MOMENTS, None: 0}
    assert all(child["is_whole"] for child in children)
    assert errors.count("stopped by SIGTERM; the same command resumes") == 2
    assert "Traceback" not in errors


def test_weights_data_and_transcripts_are_those_of_the_undisturbed_run(disturbed, finished):
    expected = computed_files(finished)
    assert computed_files(disturbed[0]) == expected
    weights = {name: digest for name, digest in expected.items() if name.endswith("model.safetensors")}
    assert {name.split("/")[1] for name in weights} == {
        "pretrain", "sft", "rl", "shorter", "merge", "reject", "prefer",
    }  # fmt: skip
    last = {name.split("/")[1]: digest for name, digest in sorted(weights.items())}
    assert len(set(last.values())) == len(last), "a stage that changes nothing would resume to anything"


def test_metrics_and_results_are_those_of_the_undisturbed_run(disturbed, finished):
    assert computed_metrics(disturbed[0]) == computed_metrics(finished)
    assert computed_results(disturbed[0]) == computed_results(finished)
    assert (disturbed[0] / "recipe.toml").read_bytes() == (finished / "recipe.toml").read_bytes()


def test_nothing_half_written_is_left(disturbed):
    directory = disturbed[0]
    assert not [path for path in directory.rglob("*") if path.suffix in (".tmp", ".replaced")]
    assert (directory / ".lock").read_text() == ""
