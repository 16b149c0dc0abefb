import subprocess
import sys

OPTIONAL = ["pydantic", "typer", "rich", "matplotlib", "jinja2", "reasoning_gym", "safetensors", "transformers"]


def test_data_and_tasks_import_without_optional_packages() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); import perilune.data, perilune.tasks"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
