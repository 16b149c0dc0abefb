"""What the tests of ops share."""

from collections.abc import Mapping, Sequence

import pytest

from perilune.ops.cuda import Argument, CudaKernel
from perilune.ops.cuda.launch import INCLUDE
from tests.ops.cuda_emulator import run_emulated


@pytest.fixture(params=[False, True], ids=["", "last threads first"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run here, in both orders of threads."""

    def launch(
        kernel: CudaKernel, grid: int, shared_bytes: int, arguments: Sequence[Argument], defines: Mapping[str, object]
    ) -> None:
        run_emulated(
            kernel.source, kernel.name, grid, kernel.threads, shared_bytes, arguments, defines, INCLUDE,
            backwards=request.param,
        )  # fmt: skip

    monkeypatch.setattr(CudaKernel, "launch", launch)
