import json
import math

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perilune.data import MIN_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer, bits_per_byte, train_tokenizer
from perilune.errors import DataError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def shared() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog. " * 20, "1 + 2 = 3\n"], 290)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(text=texts)
@example(text="")
@example(text="你好 안녕 👩‍👩‍👧 \x00\x1f \u200d\r\n\t<|im_end|>[BOS]")
def test_decode_undoes_encode_and_bytes_are_exact(text: str) -> None:
    tokenizer = _ROUND_TRIP
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.count_bytes(tokens) == len(text.encode())
    assert not set(tokens) & set(tokenizer.special_ids.values())


_ROUND_TRIP = train_tokenizer(["words and more words, 你好 and 1234\n" * 10], 280)


def test_digits_stand_alone(shared: Tokenizer) -> None:
    tokenizer = train_tokenizer(["1234 2024 2024 2024 1999 " * 100, "ab " * 50], MIN_VOCAB_SIZE + 2)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2024")] == ["2", "0", "2", "4"]


def test_specials_are_parsed_only_on_request(shared: Tokenizer) -> None:
    text = "a<think>b</think><|im_end|>"
    assert shared.decode(shared.encode(text)) == text
    assert shared.special_id("<think>") not in shared.encode(text)
    parsed = shared.encode(text, parse_specials=True)
    wanted = [shared.special_id(name) for name in ("<think>", "</think>", "<|im_end|>")]
    assert [token for token in parsed if token in shared.special_ids.values()] == wanted
    assert shared.decode(parsed) == text
    assert shared.decode(parsed, skip_specials=True) == "ab"
    assert shared.count_bytes(parsed) == 2


def test_batch_encoding_equals_single(shared: Tokenizer) -> None:
    inputs = ["the fox", "", "<think>1", "dog\n\n dog"]
    assert shared.encode_batch(inputs) == [shared.encode(text) for text in inputs]
    assert shared.encode_batch(inputs, parse_specials=True)[2][0] == shared.special_id("<think>")


def test_special_ids_are_the_last_ones_in_order(shared: Tokenizer) -> None:
    assert [shared.special_id(name) for name in SPECIAL_TOKENS] == list(range(280, 290))
    assert (shared.bos_id, shared.eos_id, shared.pad_id, shared.end_id) == (280, 281, 282, 283)
    with pytest.raises(ValueError, match="not a special token"):
        shared.special_id("<|user|>")


def test_training_is_deterministic(small_corpus) -> None:
    first, second = (train_tokenizer(small_corpus.train, 400).to_json() for _ in range(2))
    assert first == second


def test_merges_shorten_text(tokenizer: Tokenizer, small_corpus) -> None:
    text = small_corpus.held_out[0]
    assert len(text.encode()) > 1.2 * len(tokenizer.encode(text))


def test_smallest_vocabulary_is_bytes() -> None:
    tokenizer = train_tokenizer([], MIN_VOCAB_SIZE)
    assert tokenizer.vocab_size == MIN_VOCAB_SIZE
    assert len(tokenizer.encode("é")) == 2


@pytest.mark.parametrize(("texts", "size", "words"), [([], 265, "at least 266"), (["ab"], 300, "needs more text")])
def test_impossible_vocabulary_is_refused(texts: list[str], size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train_tokenizer(texts, size)


def test_lone_surrogate_is_refused(shared: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        shared.encode("ab\ud800")


def test_long_text_without_spaces_round_trips(shared: Tokenizer) -> None:
    text = "é" * 45_000 + "\n" + "a" * 30_000
    assert shared.decode(shared.encode(text)) == text


def test_save_and_load_round_trip(shared: Tokenizer, tmp_path) -> None:
    shared.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = "the lazy fox 42 <think>"
    assert loaded.encode(text) == shared.encode(text)
    assert loaded.special_ids == shared.special_ids
    assert loaded.to_json() == shared.to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_saved_file_reads_in_the_tokenizers_library(shared: Tokenizer, tmp_path) -> None:
    shared.save(tmp_path / "t.json")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert other.encode("the fox<think>").ids == shared.encode("the fox<think>", parse_specials=True)
    assert other.decode(shared.encode("the quick fox é")) == "the quick fox é"


def _without_think(text: str) -> str:
    tree = json.loads(text)
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "<think>"]
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:100], "not a tokenizer"),
        (lambda text: "{}", "not a tokenizer"),
        (_without_think, "<think>"),
        (lambda text: "\x00\xff", "not a tokenizer"),
    ],
)
def test_broken_file_is_named_and_refused(shared: Tokenizer, tmp_path, change, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(change(shared.to_json()))
    with pytest.raises(DataError, match=words) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"absent\.json: cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "absent.json")


def test_bits_per_byte_of_uniform_bytes_is_eight() -> None:
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="num_bytes must be positive"):
        bits_per_byte(1.0, 0)
