"""What a text that is to be continued begins with: as transformers encodes it, with the same files."""

import json

import pytest

from perilune.data import ChatTemplate, HFTokenizer, load_tokenizer, tokenizer_files, train_tokenizer
from perilune.data.gguf_text import gguf_tokenizer
from perilune.data.tokenizer_files import bos_processor
from perilune.errors import DataError
from tests.data.small_tokenizers import TEXTS, byte_level, kimi, pieces

BYTES, PIECES = json.loads(byte_level()), json.loads(pieces())
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
START = bos_processor("<|im_start|>", 1)
BOTH_ENDS = {
    **START,
    "single": [*START["single"], {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
    "special_tokens": {
        **START["special_tokens"],
        "<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]},
    },
}
CASES = {
    "none": (BYTES, None, ()),
    "bytes only": (BYTES, BYTE_LEVEL, ()),
    "llama 2": (PIECES, bos_processor("<s>", 1), (1,)),
    "llama 3": (BYTES, {"type": "Sequence", "processors": [BYTE_LEVEL, START]}, (1,)),
    "both ends": (BYTES, BOTH_ENDS, (1,)),
    "roberta": (
        BYTES,
        {"type": "RobertaProcessing", "sep": ["<|im_end|>", 2], "cls": ["<|im_start|>", 1], "trim_offsets": True,
         "add_prefix_space": False},
        (1,),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "processor", "expected"), CASES.values(), ids=CASES)
def test_prefixes_are_those_of_transformers(tmp_path, tree, processor, expected):
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_text(json.dumps({**tree, "post_processor": processor}))
    # a flag that transformers passes over where there is a tokenizer.json
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config if tree is PIECES or processor is None else {}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.prefix_ids == expected
    for text in (*TEXTS, " Hi", ""):
        ids = [*ours.prefix_ids, *ours.encode(text)]
        assert ids == theirs.encode(text)[: len(ids)]
        assert ids[len(expected) :] == theirs.encode(text, add_special_tokens=False)


def test_our_own_models_begin_as_their_documents_did(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(TEXTS, 280)
    assert tokenizer.prefix_ids == (tokenizer.bos_id,)
    for name, content in tokenizer_files(tokenizer, ChatTemplate.perilune()).items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXTS[0]) == [*tokenizer.prefix_ids, *tokenizer.encode(TEXTS[0])]
    turns = [{"role": "user", "content": "the cat"}]
    assert theirs.apply_chat_template(turns)["input_ids"].count(tokenizer.bos_id) == 1
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_kimis_models_begin_with_the_text():
    assert kimi().prefix_ids == ()


@pytest.mark.parametrize(
    ("pre", "told", "expected"),
    [("gpt-2", None, ()), ("gpt-2", True, (1,)), ("llama-bpe", None, (1,)), ("llama-bpe", False, ())],
)
def test_gguf_files_say_it_or_are_read_as_llama_cpp_reads_them(pre, told, expected):
    metadata = gguf_metadata(pre) | ({} if told is None else {"tokenizer.ggml.add_bos_token": told})
    assert gguf_tokenizer(metadata, "x.gguf").prefix_ids == expected
    assert HFTokenizer(gguf_tokenizer(metadata, "x.gguf").to_json()).prefix_ids == expected  # what exports carry


def gguf_metadata(pre):
    vocab = {**BYTES["model"]["vocab"], **{token["content"]: token["id"] for token in BYTES["added_tokens"]}}
    kinds = {token["id"]: 3 for token in BYTES["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.token_type": [kinds.get(index, 1) for index in range(len(vocab))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in BYTES["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
    }


def test_prefixes_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="add_bos_token must be true or false, got 1"):
        gguf_tokenizer(gguf_metadata("gpt-2") | {"tokenizer.ggml.add_bos_token": 1}, "x.gguf")
    for processor, message in ((bos_processor("<s>", 5000), r"adds \(5000,\)"), ({"type": "Odd"}, "post_processor: ")):
        with pytest.raises(ValueError, match=message):
            HFTokenizer(json.dumps({**BYTES, "post_processor": processor}))
