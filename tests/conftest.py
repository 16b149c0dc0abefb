"""Settings of the whole test suite; this file is loaded before any test imports torch."""

from __future__ import annotations

import os
import sys
import tempfile

import pytest

# Waiting OpenMP threads spin by default, which is ruinous when test workers share the cores.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from hypothesis import settings

settings.register_profile("perilune", derandomize=True, max_examples=25, deadline=None)
settings.load_profile("perilune")


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among the workers of pytest-xdist, and a folder for what they compile."""
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if workers is None:
        folder = tempfile.TemporaryDirectory(prefix="perilune-tests-")
        os.environ["PERILUNE_TEST_FOLDER"] = folder.name
        config.add_cleanup(folder.cleanup)
        return
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))


@pytest.fixture
def cli(monkeypatch, capfd):
    """Call the command line in this process; returns exit code, stdout, stderr."""
    from perilune.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["perilune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call
