import json

import pytest

from perilune.errors import DataError
from perilune.report import (
    Sample,
    StageResult,
    TaskScore,
    read_result,
    read_samples,
    summary_rows,
    summary_table,
    task_table,
    write_result,
    write_samples,
)

RESULT = StageResult(
    stage="rl",
    kind="rl",
    time_s=61.0,
    tokens=1000,
    tokens_per_s=9000.0,
    bits_per_byte=1.84,
    compressors={"gzip": 2.79},
    tasks={"sum": TaskScore(greedy=0.5, sampled=0.25, response_tokens=10, count=8), "spell": TaskScore(greedy=1.0)},
    numbers={"kept": 3.0},
    checkpoint="checkpoints/rl",
)


def test_a_result_survives_the_round_trip(tmp_path):
    write_result(tmp_path / "rl.json", RESULT)
    assert read_result(tmp_path / "rl.json") == RESULT


def test_accuracy_is_the_mean_over_the_tasks_that_have_it():
    assert RESULT.accuracy == TaskScore(greedy=0.75, sampled=0.25, response_tokens=10, count=8)
    assert StageResult(stage="a", kind="b").accuracy is None


@pytest.mark.parametrize("damage", ["{", "[]", '{"format_version": 1}', '{"format_version": 2, "stage": "x"}'])
def test_a_damaged_result_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "rl.json"
    path.write_text(damage)
    with pytest.raises(DataError, match=r"rl\.json"):
        read_result(path)


def test_an_impossible_score_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"greedy must be in \[0, 1\], got 1.5"):
        TaskScore(greedy=1.5)
    path = tmp_path / "rl.json"
    write_result(path, RESULT)
    tree = json.loads(path.read_text())
    tree["tasks"]["sum"]["sampled"] = -1
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="sampled"):
        read_result(path)


def test_samples_survive_the_round_trip_line_separators_included(tmp_path):
    samples = [Sample(task="t", prompt="a\u2028b\nc", response="\x85\r\n\u2029 é", answer="4", reward=1.0, tokens=3)]
    write_samples(tmp_path / "s.jsonl", samples)
    assert read_samples(tmp_path / "s.jsonl") == samples


def test_a_lone_surrogate_does_not_break_the_file(tmp_path):
    write_samples(tmp_path / "s.jsonl", [Sample(task="t", prompt="p", response="\ud800x")])
    assert read_samples(tmp_path / "s.jsonl")[0].response == "?x"


def test_a_damaged_sample_is_named(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"task": "t", "prompt": "p", "response": "r"}\n{"task": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        read_samples(path)


def test_the_summary_shows_dashes_for_what_is_missing():
    rows = summary_rows([RESULT, StageResult(stage="curate", kind="curate", time_s=2)])
    assert rows[0] == ("rl", "1 m 01 s", "9000", "1.840", "75.0 %", "25.0 %", "10.0")
    assert rows[1] == ("curate", "2.0 s", "-", "-", "-", "-", "-")


def test_terminal_tables_hold_the_numbers():
    from rich.console import Console

    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(summary_table([RESULT]))
        console.print(task_table(RESULT))
        text = console.export_text()
    assert "gzip 2.790" in text
    assert "9000" in text
    assert "spell" in text
    assert "100.0 %" in text
