"""The multigraph's Triton kernels in their interpreter, against the dense float64 oracle."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SECTIONS = ("norms", "widths", "segments", "nothing", "repetition", "cache")


@pytest.mark.parametrize("section", SECTIONS)
def test_the_kernels_equal_the_oracle_in_their_interpreter(section: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.multigraph_triton_cases", section],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr[-2000:]
