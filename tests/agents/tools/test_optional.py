import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OPTIONAL = ("aiohttp", "orjson", "jsonschema", "referencing", "mcp", "httpx2", "pydantic_monty")
MODULES = sorted(path.stem for path in (ROOT / "perilune/agents/tools").glob("*.py") if path.stem != "__init__")


def without_packages(code):
    """Run code where no optional package can be imported."""
    block = f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, timeout=30, cwd=ROOT, check=False
    )


def test_all_modules_import_without_optional_packages():
    done = without_packages("".join(f"import perilune.agents.tools.{name}\n" for name in MODULES))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("from perilune.agents.tools.python import python_tool; python_tool()", "perilune[agents]"),
        ("from perilune.agents.tools.fetch import fetch_tools; fetch_tools()", "perilune[agents]"),
        (
            "from perilune.agents.tools.registry import ToolRegistry\n"
            "from perilune.agents.tools.artifacts import artifact_tool; ToolRegistry([artifact_tool()])",
            "perilune[agents]",
        ),
        (
            "import asyncio; from perilune.agents.tools.mcp import McpTools; asyncio.run(McpTools.connect([]))",
            "perilune[mcp]",
        ),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(code, said):
    done = without_packages(code)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "ToolError: this tool needs the optional package" in last
    assert f"pip install '{said}'" in last
