"""Contracts over the whole package: what may be imported where, what a front door shows, and words that are banned."""

import ast
import importlib
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "perilune"
FILES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in FILES}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))

LOWER = ("ops", "nn", "integrations", "models", "optim", "data", "tasks", "engine", "train", "rl", "report")
BELOW_RUN = ("pydantic", "typer", "matplotlib", "jinja2", "tomli_w", "reasoning_gym", "transformers", "triton")
OPTIONAL = (
    "matplotlib",
    "jinja2",
    "reasoning_gym",
    "transformers",
    "triton",
    "psutil",
    "pytest",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "faiss",
    "llguidance",
    "polars",
    "textual",
    "opentelemetry",
    "orjson",
    "aiohttp",
    "ray",
    "tiktoken",
    "gguf",
)

BANNED = re.compile(
    r"torch\.load\(|torch\.save\(|^\s*(?:import|from) pickle\b|pickle\.loads?\(|shell=True|yaml\.load|make_block_ptr"
    r"|weights_only=False|allow_pickle=True"
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative(path):
    return str(path.relative_to(ROOT))


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100, check=False
    )


@pytest.mark.parametrize(
    ("blocked", "paths"),
    [
        (BELOW_RUN, [path for path in FILES if path.relative_to(PACKAGE).parts[0] in LOWER]),
        (OPTIONAL, [path for path in FILES if path.name != "__main__.py"]),
    ],
    ids=["lower layers without the upper ones' packages", "everything without optional packages"],
)
def test_every_module_imports_without_what_it_does_not_need(blocked, paths):
    names = [  # kernels are loaded by a front door at need
        module_name(path) for path in paths if "triton" not in (path.stem, path.parent.name)
    ]
    assert names
    done = run_python(
        f"import importlib, sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_quick_and_brings_no_torch():
    done = run_python(
        "import sys, time\nstart = time.process_time()\nimport perilune\n"
        "print(time.process_time() - start)\nassert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1


def test_a_swarm_brings_no_torch():
    done = run_python("import sys, perilune.agents\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_help_is_quick_and_brings_no_torch():
    done = run_python(
        "import sys, time\nsys.argv = ['perilune', '--help']\nfrom perilune.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy\n"
        "print('cpu', time.process_time())"
    )
    assert done.returncode == 0, done.stderr
    assert "chat" in done.stdout
    assert float(done.stdout.split()[-1]) < 0.6


def test_importing_has_no_effect_on_the_process():
    # torch's compiler writes TORCHINDUCTOR_CACHE_DIR when it is loaded; a process that has it hands it on to this one.
    done = run_python(
        "import logging, os, sys, threading, torch._dynamo\nbefore = dict(os.environ)\nimport perilune.run, torch\n"
        "assert dict(os.environ) == before\nassert not logging.getLogger().handlers\n"
        "assert threading.active_count() == 1\nassert torch.get_default_dtype() is torch.float32\n"
        "assert torch.get_float32_matmul_precision() == 'highest'"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES, ids=relative)
def test_the_front_door_names_what_it_shows_sorted(package):
    module = importlib.import_module(module_name(package / "__init__.py"))
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("perilune")
        for alias in node.names
    }
    names = list(vars(module).get("__all__", ()))
    if package.parent == PACKAGE:  # inside an op's folder the front door may use what it does not show
        assert imported <= set(names)
    assert all(name in vars(module) for name in names)
    order = sorted(names, key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name))
    assert names == order
    assert len(names) == len(set(names))


def test_no_banned_word():
    found = [
        f"{relative(path)}:{number}: {line}"
        for path in FILES
        for number, line in enumerate(TEXTS[path].splitlines(), 1)
        if BANNED.search(line)
    ]
    called = [
        f"{relative(path)}:{node.lineno}: {node.func.id}("
        for path in FILES
        if relative(path) != "perilune/agents/tools/sandbox/child.py"  # the one place that runs a model's code
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")
    ]
    assert found + called == []


def classes():
    return [(path, node) for path in FILES for node in ast.walk(TREES[path]) if isinstance(node, ast.ClassDef)]


def undocumented_fields(node):
    statements = [*node.body, None]
    return [
        f"{node.name}.{statement.target.id}"
        for statement, following in pairwise(statements)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not statement.target.id.startswith("_")
        and not (
            isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        )
    ]


def test_every_field_of_a_config_is_documented():
    configs = [node for path, node in classes() if path.name == "config.py" or node.name.endswith("Config")]
    assert configs
    assert [field for node in configs for field in undocumented_fields(node)] == []


def test_a_module_of_configs_does_not_postpone_annotations():
    modules = {path for path, node in classes() if node.name.endswith("Config")}
    assert [relative(path) for path in modules if "from __future__ import annotations" in TEXTS[path]] == []


def test_modules_and_functions_stay_readable():
    long = [f"{relative(path)}: {TEXTS[path].count(chr(10))}" for path in FILES if TEXTS[path].count("\n") > 500]
    long += [
        f"{relative(path)}: {node.name}: {_body_lines(node)}"
        for path in FILES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef) and _body_lines(node) > 60
    ]
    assert long == []


def _body_lines(node):
    """Lines of a function without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_every_recipe_loads_and_its_resolved_form_is_the_same_recipe(path, tmp_path):
    from perilune.run import dump_recipe, load, load_swarm

    def read(file):
        return load_swarm(file) if path.name == "swarm.toml" else load(file).recipe

    recipe = read(path)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(dump_recipe(recipe), encoding="utf-8")
    assert read(resolved) == recipe


def test_the_recipes_presets_survive_being_written_out():
    import tomllib

    from perilune.run import Recipe, build_recipe, dump_recipe, presets

    for name, tree in presets()["model"].items():
        settings = {
            "name": "x",
            "model": {"preset": name},
            "tokenizer": {"vocab_size": tree["vocab_size"]},
            "stages": {"p": {"kind": "pretrain", "train": {"steps": 1}}},
        }
        recipe = build_recipe(settings, Recipe, source="x", presets=presets())
        assert build_recipe(tomllib.loads(dump_recipe(recipe)), Recipe, source="x") == recipe, name
