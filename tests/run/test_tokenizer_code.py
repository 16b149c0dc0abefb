"""Tokenizers that come with code: it is carried and never run here, and exports without it are read by others."""

import json
import sys

import pytest

from perilune.data import ChatTemplate, load_tokenizer, without_missing_code
from perilune.models import convert, save
from perilune.models.checkpoint.companions import read_companions, tokenizer_code
from perilune.run import convert_model
from tests.data.small_tokenizers import KIMI, TEXTS, kimi_ranks, write_kimi
from tests.models.checkpoint.tiny import CONFIGS, edit_json, tiny_model

AUTO_MAP = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
CONFIG = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]", "auto_map": AUTO_MAP}
CODE = {
    "tokenization_kimi.py": """
from pathlib import Path
from transformers import PreTrainedTokenizer
from ._tool_declaration_ts import SHIFT

class TikTokenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}

    def __init__(self, vocab_file, **kwargs):
        self.size = Path(vocab_file).read_bytes().count(b"\\n")
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return self.size

    def get_vocab(self):
        return {chr(SHIFT + i): i for i in range(self.size)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) - SHIFT
""",
    "_tool_declaration_ts.py": "try:\n    from .deeper import SHIFT\nexcept ImportError:\n    import deeper\n",
    "deeper.py": "import json\nSHIFT = 32\n",
    "unrelated.py": "raise SystemExit('this was run')\n",
}
TEMPLATES = {"chat_template.jinja": "a{{ messages }}", "additional_chat_templates/tool_use.jinja": "b{{ tools }}"}


def mended(directory):
    files = read_companions(directory)
    return without_missing_code(files, directory, tokenizer_code(files))


@pytest.fixture
def source(tmp_path):
    save(tiny_model(CONFIGS["kimi_linear"]), tmp_path / "source")
    return write_kimi(tmp_path / "source", config=CONFIG)


def add(directory, files):
    (directory / "additional_chat_templates").mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


@pytest.mark.parametrize("to", ["hf", "perilune"])
def test_code_that_is_named_is_copied_with_what_it_imports(source, tmp_path, to):
    add(source, {**CODE, **TEMPLATES, "additional_chat_templates/../escape.jinja": "c"})
    convert_model(source, tmp_path / "m", to)
    convert(source, tmp_path / "library", to)
    for target in (tmp_path / "m", tmp_path / "library"):
        for name in CODE.keys() - {"unrelated.py"} | TEMPLATES.keys() | {"tiktoken.model", "tokenizer_config.json"}:
            assert (target / name).read_bytes() == (source / name).read_bytes(), name
        assert not any((target / name).exists() for name in ("unrelated.py", "tokenizer.json", "escape.jinja"))
        template = ChatTemplate.load(target)
        assert [template.render([]), template.render([], tools=[1])] == ["a[]", "b[1]"]


def test_transformers_runs_the_code_that_was_copied(source, tmp_path, monkeypatch):
    from transformers import AutoTokenizer, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))  # to which transformers adds that folder
    add(source, CODE)
    convert_model(source, tmp_path / "m")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert type(theirs).__name__ == "TikTokenTokenizer"
    assert theirs.encode("!#") == [1, 3]


def test_without_the_code_transformers_finds_the_same_ids(source, tmp_path):
    from transformers import AutoTokenizer

    convert_model(source, tmp_path / "m")
    assert "auto_map" not in json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    for trusts in (True, False):
        theirs = AutoTokenizer.from_pretrained(tmp_path / "m", trust_remote_code=trusts)
        check_same_ids(load_tokenizer(tmp_path / "m"), theirs)


@pytest.mark.skipif(not KIMI.exists(), reason="shared/data/kimi_tokenizer is not here")
def test_the_real_tokenizer_without_its_code(tmp_path):
    from transformers import AutoTokenizer

    files = mended(KIMI)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "kimi_linear"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    check_same_ids(load_tokenizer(KIMI), theirs)
    assert theirs.encode("Hello, world!") == [19180, 11, 2695, 0]
    assert theirs.encode("<|im_user|>user<|im_middle|>Hi<|im_end|>") == [163587, 2482, 163601, 18699, 163586]


def check_same_ids(ours, theirs):
    mixed = ["월月亮 it's I'D 12345 ǅé\r\n\n x\u00a0y '\u017f\u0301", "<|im_user|>user<|im_middle|>\n", "  a\t  ", ""]
    for text in (*TEXTS, *mixed, "\x00\x1f\u2028 \U0001f319"):
        found = theirs.encode(text)
        assert found == ours.encode(text, parse_specials=True), text
        assert theirs.decode(found, clean_up_tokenization_spaces=False) == text
        skipped = theirs.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert skipped == ours.decode(found, skip_specials=True)
    assert theirs.convert_tokens_to_ids("<|im_end|>") == ours.special_ids["<|im_end|>"]


def test_only_what_is_missing_is_removed(source):
    hub = "moonshotai/Kimi-K2-Instruct--tokenization_kimi.TikTokenTokenizer"
    auto_map = {"AutoTokenizer": [hub, "gone.Fast"], "AutoProcessor": "also.Gone", "AutoModel": "kept.Model"}
    edit_json(source / "tokenizer_config.json", auto_map=auto_map)
    add(source, {"kept.py": "not python ("})
    files = mended(source)
    assert json.loads(files["tokenizer_config.json"])["auto_map"] == {
        "AutoTokenizer": [hub, None],
        "AutoModel": "kept.Model",
    }
    assert files["kept.py"] == b"not python ("
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["../outside.Class", "a/b.C", "x", 3, hub]})
    assert mended(source) == read_companions(source)
    (source / "tokenizer_config.json").write_text("not json")
    assert read_companions(source)["tokenizer_config.json"] == b"not json"


def test_a_merge_for_every_way_to_make_a_token(tmp_path):
    """`abc` can be made of `ab` and `c` only, or of `a` and `bc` only, as ranks say."""
    import tokenizers

    from perilune.data import KimiTokenizer
    from perilune.data.tokenizer_export import kimi_tokenizer_json

    for merges in ((b"ab", b"abc", b"bc"), (b"bc", b"abc", b"ab"), (b"ca", b"ab", b"cab", b"bca")):
        tokenizer = KimiTokenizer(kimi_ranks(merges))
        theirs = tokenizers.Tokenizer.from_str(kimi_tokenizer_json(tokenizer))
        for text in ("abc", "abcabc", "cabca", "bcab", "aabbcc", "abcab"):
            assert theirs.encode(text).ids == tokenizer.encode(text), (merges, text)
