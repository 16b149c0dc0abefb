import json
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perilune.data import HFTokenizer, KimiTokenizer, Tokenizer, load_tokenizer
from perilune.data.kimi_tokenizer import split_long
from perilune.errors import DataError
from tests.data.small_tokenizers import KIMI, byte_level, kimi, kimi_ranks, pieces, write_kimi

needs_kimi = pytest.mark.skipif(not KIMI.exists(), reason="shared/data/kimi_tokenizer is not here")
NAMES = ("<|im_end|>", "<|im_start|>", "</s>", "[BOS]", "<think>")
texts = st.lists(
    st.sampled_from([*NAMES, "<|im_", "Hi the", " ", "\n", "月", "é", "12 345"]) | st.text(max_size=8)
).map("".join)

HF_TOKENIZERS = {
    "bytes": byte_level(),
    "bytes, words looked up whole": byte_level(ignore_merges=True),
    "bytes, more tokens": byte_level(plain=("<think>", "    ", "[INST]")),
    "pieces": pieces(),
    "pieces, a space before everything": pieces("normalizer"),
}


@pytest.fixture(scope="module", params=HF_TOKENIZERS)
def hf(request):
    from transformers import PreTrainedTokenizerFast

    text = HF_TOKENIZERS[request.param]
    ours = HFTokenizer(text)
    import tokenizers

    return ours, PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(text))


@given(texts)
def test_a_file_of_transformers_gives_its_ids(hf, text):
    ours, theirs = hf
    assert ours.encode(text, parse_specials=True) == theirs.encode(text, add_special_tokens=False)


@given(texts)
def test_names_in_text_stay_text(hf, text):
    ours, _ = hf
    tokens = ours.encode(text)
    assert not set(tokens) & set(ours.special_ids.values())
    decoded = ours.decode(tokens)
    assert text in (decoded, decoded.removeprefix(" "))
    assert b"".join(ours.decode_bytes([token]) for token in tokens) == ours.decode_bytes(tokens)


def test_added_tokens_that_are_text_count_and_markers_do_not():
    ours = HFTokenizer(HF_TOKENIZERS["bytes, more tokens"])
    assert set(ours.special_ids) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "[INST]"}
    spaces = ours.encode("a    b")
    assert ours.decode_bytes(spaces) == b"a    b"
    assert len(spaces) == 3
    assert ours.vocab_size > max(ours.special_ids.values())


def test_skipping_specials_keeps_what_a_parser_reads():
    ours = HFTokenizer(HF_TOKENIZERS["bytes, more tokens"])
    tokens = ours.encode("<|im_start|><think>a<|im_end|>", parse_specials=True)
    assert ours.decode(tokens, skip_specials=True) == "<think>a"
    assert ours.decode(tokens) == "<|im_start|><think>a<|im_end|>"
    theirs = kimi()
    tokens = theirs.encode("<|im_user|><|tool_call_begin|>a<|im_end|>", parse_specials=True)
    assert theirs.decode(tokens, skip_specials=True) == "<|tool_call_begin|>a"


@given(texts)
def test_kimis_tokenizer_gives_text_back(text):
    tokenizer = kimi()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert max(tokens, default=0) < tokenizer.special_ids["[BOS]"]
    assert tokenizer.decode(tokenizer.encode(text, parse_specials=True)) == text


def test_kimis_special_tokens_stand_behind_the_ranks():
    tokenizer, base = kimi(), len(kimi_ranks())
    assert tokenizer.vocab_size == base + 256
    assert tokenizer.special_ids["<|im_middle|>"] == base + 17
    assert tokenizer.special_ids[f"<|reserved_token_{base + 5}|>"] == base + 5
    assert tokenizer.stop_ids == (base + 2, base + 1, base + 9)
    with pytest.raises(ValueError, match=f"token id {base + 256} is not within the vocabulary of {base + 256}"):
        tokenizer.decode_bytes([base + 256])


def slow_split(text, chunk, longest):
    """A character at a time."""
    for start in range(0, len(text), chunk):
        piece, run = "", 0
        for letter in text[start : start + chunk]:
            run = run + 1 if piece and letter.isspace() == piece[-1].isspace() else 1
            if run > longest:
                yield piece
                piece, run = "", 1
            piece += letter
        yield piece


@given(st.text(alphabet="ab \n", max_size=60))
@example("a" * 12 + " " * 13 + "b")
def test_long_texts_are_split_as_the_slow_way_splits_them(text):
    import re

    from perilune.data import kimi_tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kimi_tokenizer, "_CHUNK_CHARS", 20)
        patch.setattr(kimi_tokenizer, "_RUN_CHARS", 4)
        patch.setattr(kimi_tokenizer, "_LONG_RUN", re.compile(r"\S{5,}|\s{5,}"))
        assert list(split_long(text)) == list(slow_split(text, 20, 4))


def test_runs_are_cut_at_25_000_and_texts_at_400_000():
    assert [len(part) for part in split_long("a" * 25_000 + " ")] == [25_001]
    assert [len(part) for part in split_long("a" * 50_001)] == [25_000, 25_000, 1]
    assert [len(part) for part in split_long("a " * 200_001)] == [400_000, 2]


@needs_kimi
def test_the_released_tokenizer():
    tokenizer = load_tokenizer(KIMI)
    assert isinstance(tokenizer, KimiTokenizer)
    assert tokenizer.vocab_size == 163840
    assert tokenizer.encode("Hello, world!") == [19180, 11, 2695, 0]
    turn = "<|im_user|>user<|im_middle|>Hi<|im_end|>"
    assert tokenizer.encode(turn, parse_specials=True) == [163587, 2482, 163601, 18699, 163586]
    assert tokenizer.decode(tokenizer.encode(turn)) == turn
    assert max(tokenizer.encode(turn)) < 163584
    assert set(tokenizer.stop_ids) == {163585, 163586, 163593}
    assert tokenizer.bos_id == 163584
    ids = tokenizer.special_ids
    assert [
        ids[f"<|tool_call{name}|>"]
        for name in ("s_section_begin", "s_section_end", "_begin", "_argument_begin", "_end")
    ] == [*range(163595, 163600)]
    assert (ids["[UNK]"], ids["[PAD]"], ids["<|reserved_token_163589|>"]) == (163838, 163839, 163589)
    assert tokenizer.decode([163606, 163595, 163587], skip_specials=True) == "<think><|tool_calls_section_begin|>"


def test_a_directory_tells_which_tokenizer_it_has(tmp_path, tokenizer):
    ours, theirs, kimis = (tmp_path / name for name in ("ours", "theirs", "kimis"))
    for path in (ours, theirs, kimis):
        path.mkdir()
    tokenizer.save(ours)
    assert isinstance(load_tokenizer(ours), Tokenizer)
    (theirs / "tokenizer.json").write_text(byte_level())
    (theirs / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|endoftext|>"})
    )
    (theirs / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 0]}))
    found = load_tokenizer(theirs)
    assert isinstance(found, HFTokenizer)
    assert (found.bos_id, found.stop_ids) == (1, (5, 0, 2))
    base = len(kimi_ranks())
    named = {
        str(base + 2): {"content": "<|im_end|>", "special": True},
        str(base + 3): {"content": "<a>", "special": False},
    }
    write_kimi(kimis, config={"added_tokens_decoder": named, "tokenizer_class": "TikTokenTokenizer"})
    shutil.copy(theirs / "tokenizer.json", kimis)
    found = load_tokenizer(kimis)
    assert isinstance(found, KimiTokenizer)
    assert found.stop_ids == (base + 2,)
    assert found.decode([base + 3, base + 2], skip_specials=True) == "<a>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer: neither tokenizer.json nor tiktoken.model"),
        ({"tokenizer.model": ""}, "a SentencePiece model; save it as tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json: not JSON"),
        ({"tokenizer.json": "[]"}, "expected a JSON object, got list"),
        ({"tokenizer.json": "{}"}, 'it has no "model"'),
        ({"tokenizer.json": '{"model": {}, "added_tokens": [{"content": "a", "id": -1}]}'}, "'a' has no id"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {}}}'}, "not a tokenizer.json: "),
        ({"tokenizer_config.json": "x", "tokenizer.json": "{}"}, "tokenizer_config.json: not JSON"),
        ({"tiktoken.model": "YQ== 0\nYQ== 1"}, "1 byte strings stand there twice"),
        ({"tiktoken.model": "YQ== 0\n!! 1"}, "line 2: expected base64 and a rank, got b'!! 1'"),
        ({"tiktoken.model": "YQ== 7"}, "rank 7 of b'a' is not within 0 ... 0"),
        ({"tiktoken.model": "YQ== 0"}, "lacks 255 of the 256 bytes"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_wordpiece_is_refused():
    model = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": ""}
    with pytest.raises(ValueError, match="kind 'WordPiece' is not supported"):
        HFTokenizer(json.dumps({"model": {**model, "max_input_chars_per_word": 9}}))


@pytest.mark.parametrize("tokenizer_of", [kimi, lambda: HFTokenizer(byte_level())])
def test_a_lone_surrogate_is_refused(tokenizer_of):
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer_of().encode("a\ud800")


def test_a_name_that_the_vocabulary_looks_up_as_a_word_stays_text():
    ours = HFTokenizer(byte_level(specials=("Hello",), ignore_merges=True))
    assert ours.encode("Hello", parse_specials=True) == [ours.special_ids["Hello"]]
    assert ours.special_ids["Hello"] not in ours.encode("Hello")
    assert ours.decode(ours.encode("Hello")) == "Hello"
