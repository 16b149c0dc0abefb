"""Precision, the roof, and signals."""

import os
import signal
import threading

import pytest
import torch

from perilune.train import Interrupted, SignalWatch, choose_precision, matmul_rate, runtime

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_named_precision_is_taken(name: str, dtype: torch.dtype) -> None:
    assert choose_precision(name, CPU) == dtype


@pytest.mark.parametrize(("rate", "dtype"), [(2e9, torch.bfloat16), (1.1e9, torch.float32), (0.5e9, torch.float32)])
def test_auto_takes_bfloat16_where_it_is_much_faster_and_says_so(rate, dtype, monkeypatch, caplog) -> None:
    rates = {torch.float32: 1e9, torch.bfloat16: rate}
    monkeypatch.setattr(runtime, "matmul_rate", lambda dtype, device, duration_s: rates[dtype])
    with caplog.at_level("INFO"):
        assert choose_precision("auto", CPU) == dtype
    assert str(dtype).removeprefix("torch.") in caplog.text


def test_the_rate_counts_two_operations_per_product_term() -> None:
    ticks = iter([0.0, 0.0, 0.5, 1.0])
    assert matmul_rate(torch.float32, CPU, duration_s=1.0, size=8, clock=lambda: next(ticks)) == 2 * 8**3 * 2


def test_auto_runs_for_real() -> None:
    assert choose_precision("auto", CPU) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_asks_to_stop(signum: int, code: int) -> None:
    before = signal.getsignal(signum)
    with SignalWatch() as watch:
        assert not watch.should_stop()
        os.kill(os.getpid(), signum)
        assert watch.should_stop()
        assert watch.stopped().exit_code == code
        assert signal.Signals(signum).name in str(watch.stopped())
    assert signal.getsignal(signum) is before


def test_a_second_interrupt_acts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with SignalWatch() as watch:
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.should_stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_watch_nothing() -> None:
    seen: list[bool] = []

    def work() -> None:
        with SignalWatch() as watch:
            seen.append(watch.should_stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_an_interruption_without_a_signal_counts_as_ctrl_c() -> None:
    assert Interrupted().exit_code == 130
