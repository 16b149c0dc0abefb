import io
import logging
import sys

import pytest

from perilune.report import LineProgress, NullProgress, TerminalProgress, logs_as_notes, make_progress
from perilune.report.progress import format_amount, format_duration, format_number


def test_lines_show_amount_rate_remaining_time_and_numbers(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with LineProgress(stream, interval_s=10).task("pretrain", total=100) as task:
        for step in range(1, 51):
            now[0] += 1
            task.update(step, {"loss": 2.0 / step})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0] == "pretrain: 10/100 step  1 step/s  1 m 30 s left  loss 0.2"
    assert lines[-1].startswith("pretrain: 50/100 step")


def test_a_resumed_task_does_not_count_old_steps_in_its_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with LineProgress(stream, interval_s=0).task("sft", total=1000) as task:
        task.update(900)
        now[0] += 10
        task.update(910)
    assert "1 step/s" in stream.getvalue().splitlines()[1]


def test_the_remaining_time_of_a_resumed_share_counts_only_what_is_new(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with LineProgress(stream, interval_s=0).task("rl", total=1.0, unit="") as task:
        now[0] += 3
        task.update(0.8)
        now[0] += 10
        task.update(0.9)
    assert stream.getvalue().splitlines()[:2] == ["rl: 80%", "rl: 90%  10.0 s left"]


def test_log_records_are_notes_while_they_are_shown():
    stream, log = io.StringIO(), logging.getLogger("perilune.somewhere")
    with logs_as_notes(LineProgress(stream)):
        log.info("resuming at step %d", 3)
        log.warning("a step was skipped")
        log.debug("nobody wants this")
    log.info("nobody sees this")
    assert stream.getvalue() == "resuming at step 3\nwarning: a step was skipped\n"


def test_bars_show_numbers_as_plain_text():
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    progress.note("[bold]not markup[/bold]")
    with progress.task("[red]rl", total=4, unit="iteration") as task:
        task.update(2, {"reward": 0.5})
    assert "[bold]not markup[/bold]" in stream.getvalue()
    assert "[red]rl" in stream.getvalue()
    assert "2/4 iteration" in stream.getvalue()
    assert "reward 0.5" in stream.getvalue()


def test_quiet_progress_writes_nothing(capsys):
    for progress in (make_progress(quiet=True), NullProgress()):
        progress.note("x")
        with progress.task("y", total=2) as task:
            task.update(1, {"a": 1.0})
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_progress_goes_to_stderr_as_lines_when_that_is_no_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    make_progress().note("hello")
    assert stream.getvalue() == "hello\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (59.94, "59.9 s"), (60, "1 m 00 s"), (3599.9, "1 h 00 m"), (7320, "2 h 02 m")]
)
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1234.4, "1234"), (123456, "123 k"), (3.2e9, "3.2 G"), (-0.00123, "-0.00123")]
)
def test_numbers_read_well(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(("total", "unit", "text"), [(None, "step", "3 step"), (4.0, "", "75%"), (4.0, "it", "3/4 it")])
def test_amounts_read_well(total, unit, text):
    assert format_amount(3, total, unit) == text
