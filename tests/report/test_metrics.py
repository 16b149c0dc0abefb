import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import DataError
from perilune.report import MetricsLog, read_metrics, series


def test_what_is_logged_is_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(0, {"loss": 2.5, "max_logits": [1.0, 2.0], "expert_load": [[0.5, 0.5], [1.0, 0.0]]}, stage="pretrain")
        log.log(1, {"train/loss": 2.0})
    first, second = read_metrics(path)
    assert (first.stage, first.step) == ("pretrain", 0)
    assert first.values == {"loss": 2.5, "max_logits": [1.0, 2.0], "expert_load": [[0.5, 0.5], [1.0, 0.0]]}
    assert (second.stage, second.values) == ("", {"train/loss": 2.0})
    assert read_metrics(path, stage="pretrain") == [first]


def test_every_line_is_standard_json_even_with_nan_and_infinity(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(0, {"loss": math.nan, "a/b": math.inf, "max_logits": [1.0, -math.inf], "load": [[math.nan, 1.0]]})

    def refuse(constant):
        raise AssertionError(constant)

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    values = read_metrics(path)[0].values
    assert math.isnan(values["loss"])
    assert values["a/b"] == math.inf
    assert values["max_logits"] == [1.0, -math.inf]
    assert math.isnan(values["load"][0][0])


NUMBERS = st.floats(allow_nan=False) | st.integers(-(10**9), 10**9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.text(min_size=1), st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3), max_leaves=5), max_size=4
    )
)
def test_any_names_and_shapes_survive_the_round_trip(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(3, values, stage="s")
    assert read_metrics(path)[0].values == values


def test_a_half_written_last_line_is_dropped_and_logging_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(0, {"loss": 1.0})
    with path.open("ab") as file:
        file.write(b'{"stage":"","step":1,"val')
    assert [record.step for record in read_metrics(path)] == [0]
    with MetricsLog(path) as log:
        log.log(1, {"loss": 0.5})
    assert series(read_metrics(path), "loss") == ([0, 1], [1.0, 0.5])


def test_rewind_drops_only_the_later_lines_of_that_stage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for stage in ("pretrain", "sft"):
            for step in range(5):
                log.log(step, {"loss": float(step)}, stage=stage)
        assert log.rewind("sft", 2) == 2
        assert log.rewind("sft", 2) == 0
        log.log(3, {"loss": 30.0}, stage="sft")
    assert series(read_metrics(path, "pretrain"), "loss")[0] == [0, 1, 2, 3, 4]
    assert series(read_metrics(path, "sft"), "loss") == ([0, 1, 2, 3], [0.0, 1.0, 2.0, 30.0])


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    whole, resumed = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    with MetricsLog(whole) as log:
        for step in range(6):
            log.log(step, {"loss": 1 / (step + 1)}, stage="s")
    with MetricsLog(resumed) as log:
        for step in range(4):
            log.log(step, {"loss": 1 / (step + 1)}, stage="s")
    with MetricsLog(resumed) as log:
        log.rewind("s", 1)
        for step in range(2, 6):
            log.log(step, {"loss": 1 / (step + 1)}, stage="s")
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("content", ['{"schema": "other/9"}\n', "[1]\n", "nonsense\n"])
def test_a_file_that_is_no_log_is_refused(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="line 1"):
        MetricsLog(path)
    assert path.read_text() == content


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(0, {"loss": 1.0})
    with path.open("ab") as file:
        file.write(b'{"stage":"x"}\n')
    with pytest.raises(DataError, match="line 3"):
        read_metrics(path)
