"""The Triton kernels of KDA in their interpreter, and what the front door says where they cannot run."""

import os
import subprocess
import sys

import pytest
import torch

from perilune.errors import BackendError
from perilune.ops import kda, kda_backend
from tests.ops.kda_cases import Case, as_dtype

pytest.importorskip("triton", reason="triton is not installed")


def test_the_kernels_equal_the_reference_in_their_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.kda_triton_cases"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "equal\n", done.stderr[-3000:]


def test_tensors_that_the_kernels_do_not_take_are_refused_with_the_reason(monkeypatch):
    case, wide = Case(), Case(key_dim=300)
    with pytest.raises(BackendError, match="needs tensors on a GPU, got cpu"):
        kda(**as_dtype(case.tensors(), torch.float32), **case.options(), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=r"takes float32, bfloat16 and float16, got torch\.float64; use 'torch'"):
        kda(**case.tensors(), **case.options(), backend="triton")
    with pytest.raises(BackendError, match="K and V up to 256, got K=300"):
        kda(**as_dtype(wide.tensors(), torch.float32), **wide.options(), backend="triton")


def test_auto_is_the_chunkwise_backend_on_a_cpu():
    x = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16)
    assert kda_backend(x, x) == "torch"
