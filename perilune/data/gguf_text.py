"""The tokenizer and the chat template that a GGUF file carries in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from perilune.data.chat_template import ChatTemplate
from perilune.data.hf_tokenizer import HFTokenizer
from perilune.data.tokenizer_files import PLAIN_TOKEN, bos_processor, usual_stop_ids
from perilune.errors import DataError

_CONTROL, _USER_DEFINED = 3, 4
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NAMED_KEYS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}


def _words(numbers: str) -> str:
    r"""Llama 3's way to cut text into words, with `numbers` for runs of digits."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _byte_level(*before: dict[str, Any], use_regex: bool) -> dict[str, Any]:
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [*before, last]}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_GPT2 = _byte_level(use_regex=True)
_SINGLE_DIGITS = _byte_level({"type": "Digits", "individual_digits": True}, use_regex=True)
_LLAMA3 = _byte_level(_split(_words(r"\p{N}{1,3}")), use_regex=False)
_QWEN2 = _byte_level(_split(_words(r"\p{N}")), use_regex=False)
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
}
"""How text is cut into words, by the file's `tokenizer.ggml.pre`; a new name is one row."""


def gguf_tokenizer(metadata: Mapping[str, Any], where: str) -> HFTokenizer:
    """Return the tokenizer of a GGUF file.

    Args:
        metadata: of the file, by key.
        where: the file, for messages.

    Raises:
        DataError: it has none, or one of a kind that is not supported.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise DataError(f"{where}: tokenizer.ggml.model must be gpt2 (byte-level BPE), got {kind!r}")
    if pre not in PRE_TOKENIZERS:
        raise DataError(f"{where}: tokenizer.ggml.pre must be one of {', '.join(PRE_TOKENIZERS)}, got {pre!r}")
    tokens = _texts(metadata, "tokens", where)
    merges = [merge.split(" ", 1) for merge in _texts(metadata, "merges", where)]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise DataError(f"{where}: tokenizer.ggml.tokens holds {len(tokens) - len(vocab)} texts twice")
    named = _named(metadata, tokens, where)
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise DataError(f"{where}: tokenizer.ggml.token_type does not have one entry for each of {len(tokens)} tokens")
    added = [
        {"id": index, "content": token, "special": kinds[index] == _CONTROL, **PLAIN_TOKEN}
        for index, token in enumerate(tokens)
        if kinds[index] in (_CONTROL, _USER_DEFINED) and token
    ]
    tree = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": PRE_TOKENIZERS[pre] is _LLAMA3},
    }
    if _adds_bos(metadata, str(pre), where) and (bos := named.get("bos_token")) is not None:
        tree["post_processor"] = bos_processor(bos, vocab[bos])
    special_ids = {str(token["content"]): int(token["id"]) for token in added}
    ends = [metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS]
    stop_ids = (*(index for index in ends if isinstance(index, int)), *usual_stop_ids(special_ids))
    try:
        return HFTokenizer(
            json.dumps(tree),
            bos_token=named.get("bos_token"),
            stop_ids=tuple(dict.fromkeys(stop_ids)),
        )
    except ValueError as error:
        raise DataError(f"{where}: the tokenizer cannot be built: {error}") from error


def gguf_template(metadata: Mapping[str, Any], where: str) -> ChatTemplate | None:
    """Return the chat template of a GGUF file, or None if it has none.

    Raises:
        DataError: it is no template.
    """
    prefix = "tokenizer.chat_template"
    sources = {
        "default" if key == prefix else key.removeprefix(f"{prefix}."): text
        for key, text in metadata.items()
        if (key == prefix or key.startswith(f"{prefix}.")) and isinstance(text, str)
    }
    if not sources:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    return ChatTemplate(sources, special_tokens=_named(metadata, tokens, where), title=where)


def _adds_bos(metadata: Mapping[str, Any], pre: str, where: str) -> bool:
    """Whether texts begin with the token of the beginning; files that do not say are read as llama.cpp reads them."""
    told = metadata.get("tokenizer.ggml.add_bos_token", PRE_TOKENIZERS[pre] is _LLAMA3)
    if not isinstance(told, bool):
        raise DataError(f"{where}: tokenizer.ggml.add_bos_token must be true or false, got {told!r}")
    return told


def _texts(metadata: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: tokenizer.ggml.{name} must be a list of texts, got {type(value).__name__}")
    return value


def _named(metadata: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, key in _NAMED_KEYS.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise DataError(f"{where}: tokenizer.ggml.{key} is {index!r}, of {len(tokens)} tokens")
        found[name] = tokens[index]
    return found
