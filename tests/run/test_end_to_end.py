"""The smoke recipe through a real process, and each command on a finished run."""

import json
import os
import resource
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from perilune.models import PRESETS, cache_bytes, parameter_counts
from tests.run.tiny_run import STAGES, computed_results, fingerprint

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "recipes" / "smoke.toml"


def perilune(*arguments) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the command line as a process; returns it and the processor seconds it took."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "perilune.cli", *map(str, arguments)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_smoke_recipe_runs_end_to_end_and_a_second_call_only_skips(tmp_path):
    pytest.importorskip("reasoning_gym", reason="the tasks extra is not installed")
    stages = tomllib.loads(SMOKE.read_text())["stages"]
    first, first_s = perilune("run", SMOKE, "--run-dir", tmp_path)
    assert first.returncode == 0, first.stderr
    assert f"Report: {tmp_path / 'report.html'}" in first.stdout
    results = computed_results(tmp_path)
    assert results.keys() == stages.keys()
    assert {name: result["kind"] for name, result in results.items()} == {
        name: stage["kind"] for name, stage in stages.items()
    }
    page = (tmp_path / "report.html").read_text()
    for stage in stages:
        assert f">{stage}<" in page, f"the report does not mention {stage}"
        assert stage in first.stdout
    made = fingerprint(tmp_path)
    second, second_s = perilune("run", SMOKE, "--run-dir", tmp_path)
    assert second.returncode == 0, second.stderr
    assert [line for line in second.stderr.splitlines() if "complete, skipped" in line] == [
        f"{stage}: complete, skipped" for stage in stages
    ]
    assert {name for name, digest in fingerprint(tmp_path).items() if made[name] != digest} <= {
        "report.html",
        "machine.json",
    }
    assert second_s < first_s


def test_every_kind_of_stage_leaves_its_result_and_its_place_in_the_report(finished):
    results = computed_results(finished)
    assert results.keys() == STAGES.keys()
    page = (finished / "report.html").read_text()
    assert all(f">{stage}<" in page for stage in STAGES)
    for name, result in results.items():
        makes_model = name != "curate"
        assert (result["checkpoint"] is not None) == makes_model
        assert (finished / "checkpoints" / name).is_dir() == makes_model
        assert (finished / "samples" / f"{name}.jsonl").is_file() == makes_model
    assert results["rl"]["start_from"] == "sft"
    assert results["merge"]["start_from"] == "rl"


def test_a_prompt_is_answered(cli, finished):
    before = fingerprint(finished)
    arguments = ("chat", finished, "--prompt", "Count the 1 bits of 12.", "--stage", "sft", "--temperature", "0")
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert out.strip().isdigit()
    assert cli(*arguments)[1] == out
    assert fingerprint(finished) == before


def test_evaluation_gives_the_numbers_of_the_run_again(cli, finished):
    before = fingerprint(finished)
    code, out, err = cli("eval", finished, "--stage", "sft", "--json", "--quiet")
    assert (code, err) == (0, "")
    again, known = json.loads(out), computed_results(finished)["sft"]
    assert [again[name] for name in ("stage", "bits_per_byte", "tasks")] == [
        known[name] for name in ("stage", "bits_per_byte", "tasks")
    ]
    assert fingerprint(finished) == before


def test_evaluation_takes_the_last_model_and_as_many_problems_as_wanted(cli, finished):
    code, out, _ = cli("eval", finished, "--count", "5", "--json", "--quiet")
    result = json.loads(out)
    assert code == 0
    assert result["stage"] == "prefer"
    assert result["tasks"]["count_bits"]["count"] == 5


def test_the_report_is_rewritten_from_the_files_alone(cli, finished_copy):
    page = (finished_copy / "report.html").read_text()
    (finished_copy / "report.html").write_text("old")
    assert cli("report", finished_copy) == (0, f"{finished_copy / 'report.html'}\n", "")
    again = (finished_copy / "report.html").read_text()
    assert again.count("<svg") == page.count("<svg") > 3
    assert all(f">{stage}<" in again for stage in STAGES)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_described_by_its_own_counts(cli, preset):
    code, out, _ = cli("info", preset, "--context", "4096", "--json")
    numbers = json.loads(out)
    counts, cache = parameter_counts(PRESETS[preset]), cache_bytes(PRESETS[preset])
    assert code == 0
    assert numbers["parameters"] == asdict(counts)["total"]
    assert numbers["active_parameters"] == counts.active
    assert numbers["embedding_parameters"] == counts.embedding
    assert numbers["cache_bytes_per_token"] == cache.per_token
    assert numbers["cache_bytes_at_context"] == cache.per_sequence + 4096 * cache.per_token
