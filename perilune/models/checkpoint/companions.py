"""The files beside a checkpoint's weights that go with it where it is converted: tokenizer, its code, chat templates.

All of them are data here. Some releases bring code for their tokenizer, which others run if their users trust it; it is
copied byte for byte, and what it imports is found by parsing it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perilune.errors import CheckpointError
from perilune.strict_json import parse_json

TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that are copied as they are."""
TEMPLATES_FOLDER = "additional_chat_templates"
COMPANION_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,99}}|{TEMPLATES_FOLDER}/[A-Za-z0-9_-]{{1,99}}\.jinja")
"""Names that a file beside the weights may have."""

_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,95}")
_MAX_BYTES = 1 << 28


def read_companions(directory: Path) -> dict[str, bytes]:
    """Return the tokenizer files of a model directory by name, with the code that its tokenizer_config.json names.

    Raises:
        CheckpointError: a file cannot be read, or is too large to be one of a tokenizer.
    """
    files: dict[str, bytes] = {}
    for name in TOKENIZER_NAMES:
        if (directory / name).is_file():
            files[name] = _read(directory / name)
    for path in sorted((directory / TEMPLATES_FOLDER).glob("*.jinja")):
        name = f"{TEMPLATES_FOLDER}/{path.name}"
        if COMPANION_NAME.fullmatch(name) and path.is_file():
            files[name] = _read(path)
    waiting = [module for module, _ in tokenizer_code(files)]
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in files and (directory / name).is_file():
            files[name] = _read(directory / name)
            waiting += _imports(files[name])
    return files


def tokenizer_code(files: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Return module and class of every class in the directory itself that tokenizer_config.json tells others to load.

    Args:
        files: contents by name.
    """
    try:
        config = parse_json(files.get("tokenizer_config.json", b"{}"), where="tokenizer_config.json")
    except CheckpointError:
        return []  # it is copied as it is
    found: list[tuple[str, str]] = []
    for reference in _texts(config.get("auto_map") if isinstance(config, dict) else None):
        # a reference with a repository, as `owner/name--module.Class`, is no file of the directory
        module, dot, class_name = reference.partition(".")
        if dot and _MODULE.fullmatch(module) and _MODULE.fullmatch(class_name):
            found.append((module, class_name))
    return found


def _texts(value: Any) -> Iterator[str]:
    """All texts in JSON: the form of `auto_map` has changed, from a text to a pair to an object of either."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _imports(code: bytes) -> list[str]:
    """Return the modules without a dot that code imports; which of them are files beside it is not known here."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # of another version of the language, perhaps
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level <= 1:
            names += [node.module] if node.module is not None else [alias.name for alias in node.names]
    return [name for name in names if _MODULE.fullmatch(name)]


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: has more than {_MAX_BYTES} bytes, which is no file of a tokenizer")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
