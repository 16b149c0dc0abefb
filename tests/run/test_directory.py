import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from perilune.errors import DataError, PeriluneError, RecipeError
from perilune.report import Sample, StageResult
from perilune.run import lock
from perilune.run.directory import RunDirectory

TREE = {"name": "x", "threads": 2, "stages": {"rl": {"lr": 0.1, "betas": (0.9, 0.95), "budget_s": None}}}

HOLDER = textwrap.dedent(
    """
    import importlib.util, sys, time
    from pathlib import Path
    # The module alone: its package would import torch, which takes seconds.
    spec = importlib.util.spec_from_file_location("lock", sys.argv[1])
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    with lock.directory_lock(Path(sys.argv[2])):
        print("held", flush=True)
        time.sleep(60)
    """
)


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(lock.__file__), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_the_resolved_recipe_is_written_first(tmp_path):
    directory = RunDirectory(tmp_path / "a" / "run")
    directory.prepare(TREE)
    assert directory.read_tree() == {"name": "x", "threads": 2, "stages": {"rl": {"lr": 0.1, "betas": [0.9, 0.95]}}}


def test_the_same_recipe_may_go_on_and_another_may_not(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.prepare(TREE)
    directory.prepare({**TREE, "threads": 1})
    directory.prepare({**TREE, "stages": {"rl": {**TREE["stages"]["rl"], "train": {"eval_interval_s": 5.0}}}})
    directory.prepare(TREE)
    (tmp_path / "data" / "corpus.json").write_text("{}")
    other = {**TREE, "seed": 3, "stages": {"rl": {"lr": 0.2, "betas": (0.9, 0.95)}}}
    with pytest.raises(RecipeError, match=r"stages\.rl\.lr was 0\.1 and is now 0\.2; seed was absent and is now 3"):
        directory.prepare(other)
    assert directory.read_tree()["stages"]["rl"]["lr"] == 0.1


@pytest.mark.parametrize("made", ["data/x.npz", "results/rl.json", "checkpoints/rl", "tokenizer.json"])
def test_a_run_that_made_nothing_gives_way_to_another(tmp_path, made):
    directory = RunDirectory(tmp_path)
    directory.prepare({**TREE, "seed": 3})
    (tmp_path / "metrics.jsonl").write_text("")
    directory.prepare(TREE)
    assert "seed" not in directory.read_tree()
    (tmp_path / made).write_text("")
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        directory.prepare({**TREE, "seed": 3})


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.prepare(TREE)
    (tmp_path / "results" / ".rl.json.abc.tmp").write_text("half")
    (tmp_path / ".recipe.toml.abc.tmp").write_text("half")
    directory.prepare(TREE)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_result_marks_a_stage_complete(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.prepare(TREE)
    assert not directory.is_complete("rl")
    with pytest.raises(DataError, match="stage 'rl' is not complete"):
        directory.read_result("rl")
    directory.write_result(StageResult(stage="rl", kind="rl", time_s=1.0))
    directory.write_samples("rl", [Sample(task="t", prompt="p", response="r")])
    assert directory.is_complete("rl")
    assert directory.read_result("rl").time_s == 1.0
    assert directory.samples("rl").is_file()


@pytest.mark.parametrize("content", [None, "= nonsense", b"\xff"])
def test_what_is_no_run_directory_is_refused(tmp_path, content):
    directory = RunDirectory(tmp_path)
    if isinstance(content, str):
        directory.recipe.write_text(content)
    elif content is not None:
        directory.recipe.write_bytes(content)
    with pytest.raises(DataError, match=r"recipe\.toml"):
        directory.read_tree()


def test_a_path_that_cannot_be_a_directory_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PeriluneError, match=r"cannot use .* as a run directory"), RunDirectory(path).lock():
            pass
        with pytest.raises(PeriluneError, match="cannot use"):
            RunDirectory(path).prepare(TREE)


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, holder):
    message = rf"in use by pid {holder.pid} on .* since .*--run-dir"
    with pytest.raises(PeriluneError, match=message), RunDirectory(tmp_path).lock():
        pytest.fail("two holders")


def test_the_lock_of_a_killed_run_is_taken_over_and_told(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with RunDirectory(tmp_path).lock() as left_behind:
        assert left_behind is not None
        assert f"pid {holder.pid}" in left_behind
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    with RunDirectory(tmp_path).lock() as left_behind:
        assert left_behind is None


def test_a_lock_file_with_nonsense_does_not_stop_a_run(tmp_path):
    (tmp_path / ".lock").write_text("[1, 2")
    started = time.monotonic()
    with RunDirectory(tmp_path).lock() as left_behind:
        assert left_behind is None
    assert time.monotonic() - started < 5
