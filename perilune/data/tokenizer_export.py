"""What an exported model carries so that other programs find its tokenizer and its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers.models import BPE

from perilune.data.chat_template import TEMPLATE_FILE, ChatTemplate
from perilune.data.hf_tokenizer import HFTokenizer
from perilune.data.kimi_tokenizer import MODEL_FILE, SPLIT_PATTERN, KimiTokenizer
from perilune.data.token_text import printable_to_byte
from perilune.data.tokenizer import Tokenizer, split_backend
from perilune.data.tokenizer_files import PLAIN_TOKEN, TOKENIZER_CONFIG, bos_processor


def tokenizer_files(tokenizer: Tokenizer | HFTokenizer, template: ChatTemplate | None) -> dict[str, bytes]:
    """Return the files of a tokenizer as transformers, vLLM and SGLang read them, by name.

    `tokenizer.json`, `tokenizer_config.json` and, with a template, `chat_template.jinja`. Kimi's tokenizer has files of
    its own, which are copied; see `without_missing_code`.

    Args:
        tokenizer: of the model.
        template: of the model; its default one is written.
    """
    text = tokenizer.to_json()
    if isinstance(tokenizer, Tokenizer):
        named = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
        text = json.dumps({**json.loads(text), "post_processor": bos_processor("[BOS]", tokenizer.bos_id)}, indent=2)
    else:
        named = dict(template.special_tokens) if template is not None else {}
        by_id = {index: name for name, index in tokenizer.special_ids.items()}
        if tokenizer.bos_id is not None:
            named["bos_token"] = by_id[tokenizer.bos_id]
    config = {**named, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {
        "tokenizer.json": text.encode(),
        TOKENIZER_CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    if template is not None:
        files[TEMPLATE_FILE] = template.source.encode()
    return files


def without_missing_code(
    files: Mapping[str, bytes], directory: Path, named: Iterable[tuple[str, str]]
) -> dict[str, bytes]:
    """Return a directory's tokenizer files so that nothing in them names code that is not there.

    Kimi's releases name a class (`auto_map`) that is lost where only data files were downloaded. transformers then
    refuses to read the tokenizer, or, if the name is simply removed, splits text by a pattern of its own and gives
    other ids. So the names go, and a `tokenizer.json` with Kimi's pattern comes.

    Args:
        files: contents by name.
        directory: where they are from.
        named: modules and classes that they name, as `perilune.models.checkpoint.companions` finds them.

    Raises:
        DataError: `tiktoken.model` is damaged, or tiktoken is not installed.
    """
    missing = {(module, name) for module, name in named if f"{module}.py" not in files}
    if not missing:
        return dict(files)
    config = json.loads(files[TOKENIZER_CONFIG])
    references = {f"{module}.{name}" for module, name in missing}
    if (auto_map := _without(config.pop("auto_map"), references)) is not None:
        config["auto_map"] = auto_map
    found = {**files, TOKENIZER_CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
    if MODEL_FILE in files and "tokenizer.json" not in files:
        found["tokenizer.json"] = kimi_tokenizer_json(KimiTokenizer.load(directory)).encode()
    return found


def kimi_tokenizer_json(tokenizer: KimiTokenizer) -> str:
    """Return the `tokenizer.json` that encodes as Kimi's tokenizer does.

    One difference remains: text that goes on for more than 25,000 characters without, or with nothing but, white space
    is not cut there.

    Every way to put a token together from two others is a merge, and merges come in the order of ranks: what tiktoken
    does without a list of merges.
    """
    to_character = {byte: character for character, byte in printable_to_byte().items()}
    ranked = tokenizer.ranked_bytes
    texts = ["".join(to_character[byte] for byte in raw) for raw in ranked]
    vocab = {text: rank for rank, text in enumerate(texts)}
    merges: list[tuple[str, str]] = []
    for text in texts:
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    added = [
        {"id": index, "content": name, "special": index in tokenizer.hidden_ids, **PLAIN_TOKEN}
        for name, index in sorted(tokenizer.special_ids.items(), key=lambda item: item[1])
    ]
    tree: dict[str, Any] = json.loads(split_backend(BPE(), SPLIT_PATTERN).to_str())
    tree["added_tokens"] = added
    tree["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": True}
    return json.dumps(tree, ensure_ascii=False)


def _without(auto_map: Any, references: set[str]) -> Any:
    """Return JSON without some texts, and without what is left empty; None if nothing is left."""
    if isinstance(auto_map, dict):
        kept = {key: item for key, value in auto_map.items() if (item := _without(value, references)) is not None}
        return kept or None
    if isinstance(auto_map, list):
        # a pair is the slow class and the fast one, either of them null
        items = [_without(item, references) for item in auto_map]
        return items if any(item is not None for item in items) else None
    return None if auto_map in references else auto_map
