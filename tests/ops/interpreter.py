"""Runs a module of cases in Triton's interpreter, in a process of its own: kernels are bound when they are imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

patient = pytest.mark.timeout(300)
"""Mark of tests that interpret: half a minute of a core, and more of a busy one."""


def assert_equal_in_the_interpreter(module: str, *sections: str) -> None:
    """Skip without Triton; otherwise run `python -m tests.ops.{module} SECTIONS`, which has to end with "equal"."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.ops.{module}", *sections],
        # one thread: those that wait for others burn the time of the other test workers
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.stdout == "equal\n", done.stderr[-3000:]
