from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import perilune.agents.client

ROOT = Path(__file__).parents[3]
OPTIONAL = ("aiohttp", "orjson", "openai", "jsonschema")


def test_everything_imports_without_optional_packages():
    package = Path(perilune.agents.client.__file__).parent
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(package.rglob("[a-z]*.py"))]
    assert len(names) > 15
    code = (
        f"import importlib, sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
