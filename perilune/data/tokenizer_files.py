"""The JSON files beside a tokenizer: which tokens start, end and pad, and what an exported model carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perilune.errors import DataError

TOKENIZER_CONFIG = "tokenizer_config.json"
PLAIN_TOKEN = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
"""How added tokens of a `tokenizer.json` are found in text: as they are spelled."""
MAX_JSON_BYTES = 256 * 2**20
"""A larger file is none that a tokenizer comes with."""

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_USUAL_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "[EOT]")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; `{}` if there is no file.

    Raises:
        DataError: the file cannot be read, is too large, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token`, `eos_token` and their kind as `tokenizer_config.json` has them: strings, or objects."""
    found: dict[str, str] = {}
    for key in _NAMED:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            found[key] = text
    return found


def bos_processor(token: str, index: int) -> dict[str, Any]:
    """Return the `post_processor` of a `tokenizer.json` that puts one token before a text."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def find_stop_ids(directory: Path, special_ids: Mapping[str, int]) -> tuple[int, ...]:
    """Return all ids that end an answer: what the files name, and the usual ends of a turn that the vocabulary has.

    Models are released with an end of documents in one file and the end of a turn in another; an answer ends at both.

    Args:
        directory: with `generation_config.json`, `config.json` and `tokenizer_config.json`, any of them missing.
        special_ids: of the vocabulary, by name.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_json(directory / name).get("eos_token_id")
        found += [index for index in (value if isinstance(value, list) else [value]) if isinstance(index, int)]
    end = named_tokens(read_json(directory / TOKENIZER_CONFIG)).get("eos_token")
    found += [special_ids[end]] if end is not None and end in special_ids else []
    return tuple(dict.fromkeys((*found, *usual_stop_ids(special_ids))))


def usual_stop_ids(special_ids: Mapping[str, int]) -> tuple[int, ...]:
    """Return the ids of what ends turns and documents in most vocabularies, so far as this one has them."""
    return tuple(special_ids[name] for name in _USUAL_ENDS if name in special_ids)
