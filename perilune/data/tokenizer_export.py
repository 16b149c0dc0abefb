"""What an exported model carries so that other programs find its tokenizer and its chat template."""

from __future__ import annotations

import json

from perilune.data.chat_template import TEMPLATE_FILE, ChatTemplate
from perilune.data.hf_tokenizer import HFTokenizer
from perilune.data.tokenizer import Tokenizer
from perilune.data.tokenizer_files import TOKENIZER_CONFIG, bos_processor


def tokenizer_files(tokenizer: Tokenizer | HFTokenizer, template: ChatTemplate | None) -> dict[str, bytes]:
    """Return the files of a tokenizer as transformers, vLLM and SGLang read them, by name.

    `tokenizer.json`, `tokenizer_config.json` and, with a template, `chat_template.jinja`. Kimi's tokenizer has files of
    its own, which are copied.

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
