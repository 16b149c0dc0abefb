"""A stage that was stopped or killed and started again gives the numbers of one that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from perilune.errors import CheckpointError
from perilune.report import MetricsLog, read_metrics
from perilune.train import CheckpointStore, Interrupted, lm_loss, module_tensors, optimizer_state, train
from tests.train.tiny import Faulty, Recorder, context_for, make_config, make_model, make_source, run

ROOT = Path(__file__).parents[2]


class StopAfter:
    """Asks to stop after so many polls."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def assert_same_state(left, right) -> None:
    (left_model, left_optimizer, left_result), (right_model, right_optimizer, right_result) = left, right
    expected = module_tensors(right_model)
    for name, tensor in module_tensors(left_model).items():
        assert torch.equal(tensor, expected[name]), name
    left_tensors, left_skeleton = optimizer_state(left_optimizer)
    right_tensors, right_skeleton = optimizer_state(right_optimizer)
    assert left_skeleton == right_skeleton
    for name, tensor in left_tensors.items():
        assert torch.equal(tensor, right_tensors[name]), name
    for name in ("steps", "tokens", "skipped_steps", "loss", "evaluation"):
        assert getattr(left_result, name) == getattr(right_result, name), name


def deterministic(recorder: Recorder) -> list[tuple[int, dict[str, object]]]:
    measured = {"tokens_per_s", "flop_utilization"}
    return [
        (step, {name: repr(value) for name, value in values.items() if name not in measured})
        for _, step, values in recorder.lines
    ]


def evaluate(model) -> dict[str, float]:
    return {"validation_loss": float(lm_loss(model, make_source().batch(50, 0))[0])}


def test_stopped_at_every_step_equals_uninterrupted(tmp_path: Path) -> None:
    config = make_config(steps=5, eval_interval=2, micro_batches=2)
    whole_metrics = Recorder()
    whole = run(config, context_for(metrics=whole_metrics, evaluate=evaluate))
    metrics = Recorder()
    for step in range(1, 5):
        with pytest.raises(Interrupted):
            run(config, context_for(tmp_path, metrics=metrics, evaluate=evaluate, should_stop=StopAfter(1)))
        assert CheckpointStore(tmp_path).latest() == step
    resumed = run(config, context_for(tmp_path, metrics=metrics, evaluate=evaluate))
    assert_same_state(resumed, whole)
    assert deterministic(metrics) == deterministic(whole_metrics)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_stopped_after_some_steps_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    config = make_config(steps=6)
    with pytest.raises(Interrupted):
        run(config, context_for(tmp_path, should_stop=StopAfter(stop)))
    assert_same_state(run(config, context_for(tmp_path)), run(config))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_optimizer_resumes(tmp_path: Path, kind: str) -> None:
    from perilune.optim import OptimizerConfig, build_optimizer

    config = make_config(steps=4, optimizer=OptimizerConfig(kind=kind, lr=1e-2, qk_clip=False))

    def once(context):
        model, _ = make_model()
        optimizer = build_optimizer(model, config.optimizer)
        return model, optimizer, train(model, optimizer, make_source(), lm_loss, config, context)

    with pytest.raises(Interrupted):
        once(context_for(tmp_path, should_stop=StopAfter(2)))
    assert_same_state(once(context_for(tmp_path)), once(None))


def test_bad_steps_are_counted_across_a_resume(tmp_path: Path) -> None:
    config = make_config(steps=6, max_bad_steps=2)
    with pytest.raises(Interrupted):
        run(config, context_for(tmp_path, should_stop=StopAfter(3)), loss=Faulty({2}))
    with pytest.raises(Exception, match="2 bad steps in a row"):
        run(config, context_for(tmp_path), loss=Faulty({0}))


def test_a_complete_stage_does_nothing_more(tmp_path: Path) -> None:
    calls: list[int] = []
    config = make_config(steps=3)
    first = run(config, context_for(tmp_path, evaluate=lambda model: {"validation_loss": 1.5}))
    source = make_source()
    source.batch = lambda step, micro: calls.append(step)
    metrics = Recorder()
    again = run(config, context_for(tmp_path, metrics=metrics, evaluate=lambda model: calls.append(1)), source=source)
    assert calls == []
    assert metrics.lines == []
    assert_same_state(again, first)
    assert again[2].evaluation == {"validation_loss": 1.5}


def test_more_steps_continue_a_complete_stage(tmp_path: Path) -> None:
    run(make_config(steps=3), context_for(tmp_path))
    _, _, result = run(make_config(steps=5), context_for(tmp_path))
    assert result.steps == 5


def test_a_broken_newest_checkpoint_falls_back_and_still_gives_the_same(tmp_path: Path, caplog) -> None:
    config = make_config(steps=6, checkpoint_interval=2)
    with pytest.raises(Interrupted):
        run(config, context_for(tmp_path, should_stop=StopAfter(4)))
    weights = tmp_path / "step-000004" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(bytes(content))
    metrics = Recorder()
    with caplog.at_level("WARNING"):
        resumed = run(config, context_for(tmp_path, metrics=metrics))
    assert "checksum differs" in caplog.text
    assert "using the checkpoint of step 2 instead" in caplog.text
    assert [step for step, _ in metrics.series("loss")] == [3, 4, 5, 6]
    assert_same_state(resumed, run(config))


def test_nothing_but_broken_checkpoints_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(make_config(), context_for(tmp_path, should_stop=StopAfter(1)))
    (tmp_path / "step-000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint among 1"):
        run(make_config(), context_for(tmp_path))


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    run(make_config(steps=1), context_for(tmp_path, config_hash="aaa"))
    with pytest.raises(CheckpointError, match="was written with configuration aaa, this is bbb"):
        run(make_config(steps=1), context_for(tmp_path, config_hash="bbb"))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    model, _ = make_model()
    CheckpointStore(tmp_path).save(1, {"model": module_tensors(model), "optimizer": {}}, {})
    with pytest.raises(CheckpointError, match=r"state\.json lacks 'optimizer'"):
        run(make_config(), context_for(tmp_path))


def test_another_number_of_threads_is_mentioned(tmp_path: Path, caplog) -> None:
    with pytest.raises(Interrupted):
        run(make_config(), context_for(tmp_path, should_stop=StopAfter(1)))
    torch.set_num_threads(2)
    with caplog.at_level("WARNING"):
        run(make_config(steps=2), context_for(tmp_path))
    assert "resuming with 2 threads what 1 began" in caplog.text


def test_the_budget_counts_time_before_the_interruption(tmp_path: Path) -> None:
    now = [0.0]
    source = make_source()
    original = source.batch

    def batch(step: int, micro: int):
        now[0] += 1.0
        return original(step, micro)

    source.batch = batch
    config = make_config(steps=100, budget_s=5.0)
    with pytest.raises(Interrupted):
        run(config, context_for(tmp_path, should_stop=StopAfter(3), clock=lambda: now[0]), source=source)
    now[0] = 5000.0
    _, _, result = run(config, context_for(tmp_path, clock=lambda: now[0]), source=source)
    assert result.steps == 5
    assert result.elapsed_s == 5.0


def test_metrics_of_lost_steps_are_dropped(tmp_path: Path) -> None:
    config = make_config(steps=4, checkpoint_interval=2)
    metrics = Recorder()
    metrics.log(7, {"loss": 1.0}, stage="other")
    with pytest.raises(RuntimeError, match="killed"):
        run(config, context_for(tmp_path, metrics=metrics), loss=_dies_at(3))
    assert [step for step, _ in metrics.series("loss")] == [7, 1, 2, 3]
    run(config, context_for(tmp_path, metrics=metrics))
    assert [step for step, _ in metrics.series("loss")] == [7, 1, 2, 3, 4]


def test_a_stage_that_never_saved_starts_its_metrics_anew(tmp_path: Path) -> None:
    metrics = Recorder()
    with pytest.raises(RuntimeError, match="killed"):
        run(make_config(), context_for(tmp_path, metrics=metrics), loss=_dies_at(2))
    run(make_config(), context_for(tmp_path, metrics=metrics))
    assert [step for step, _ in metrics.series("loss")] == [1, 2, 3, 4, 5, 6]


def _dies_at(call: int):
    calls = [0]

    def loss(model, batch):
        calls[0] += 1
        if calls[0] > call:
            raise RuntimeError("killed")
        return lm_loss(model, batch)

    return loss


def start(directory: Path, step_s: float) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("train_in_subprocess.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, str(script), str(directory), str(step_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    for line in process.stdout:
        if int(line) >= step:
            return
    raise AssertionError(process.stderr.read())


def finish_and_compare(directory: Path) -> None:
    config = make_config(steps=12, checkpoint_interval=2)
    with MetricsLog(directory / "metrics.jsonl") as metrics:
        resumed = run(config, context_for(directory / "checkpoints", metrics=metrics))
    recorder = Recorder()
    assert_same_state(resumed, run(config, context_for(metrics=recorder)))
    records = [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record.values]
    assert [(record.step, record.values["loss"]) for record in records] == recorder.series("loss")


def test_killed_for_real_equals_uninterrupted(tmp_path: Path) -> None:
    process = start(tmp_path, 0.02)
    wait_for_step(process, 7)
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    finish_and_compare(tmp_path)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_finish_the_step_save_and_exit_cleanly(tmp_path: Path, signum: int, code: int) -> None:
    process = start(tmp_path, 0.2)
    wait_for_step(process, 3)
    started = time.monotonic()
    process.send_signal(signum)
    children = psutil.Process(process.pid).children(recursive=True)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert time.monotonic() - started < 10
    assert not children
    assert "the same command resumes" in errors
    assert CheckpointStore(tmp_path / "checkpoints").latest() == 4
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    finish_and_compare(tmp_path)
