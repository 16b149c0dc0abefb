import ast
import inspect
import re
import sysconfig
from pathlib import Path

import pytest

from perilune.data import Corpus, EmbeddedCorpusConfig, FilesCorpusConfig, compression_baselines, load_corpus
from perilune.data.docstrings import prose_paragraphs, read_docstrings
from perilune.errors import DataError


def files(root: Path, **options) -> Corpus:
    return load_corpus(FilesCorpusConfig(**{"root": root, "held_out_fraction": 0.0} | options))


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def test_embedded_corpus_is_the_same_every_time(small_corpus: Corpus) -> None:
    again = load_corpus(EmbeddedCorpusConfig(packages=("jinja2", "fsspec"), held_out_fraction=0.1))
    assert again.fingerprint == small_corpus.fingerprint
    assert again.train == small_corpus.train
    other = load_corpus(EmbeddedCorpusConfig(packages=("jinja2",), held_out_fraction=0.1))
    assert other.fingerprint != small_corpus.fingerprint


def test_held_out_shares_no_text_with_train(small_corpus: Corpus) -> None:
    train = set().union(*(shingles(document) for document in small_corpus.train))
    assert len(small_corpus.held_out) > 5
    assert all(not shingles(document) & train for document in small_corpus.held_out)
    paragraphs = [
        line for part in (small_corpus.train, small_corpus.held_out) for text in part for line in text.split("\n")
    ]
    assert len(set(paragraphs)) == len(paragraphs)


def test_embedded_corpus_reads_like_prose(small_corpus: Corpus) -> None:
    text = "\n".join(small_corpus.train)
    assert small_corpus.train_bytes > 100_000
    assert ">>>" not in text
    assert sum(character.isalpha() or character.isspace() for character in text) > 0.93 * len(text)


def test_held_out_fraction_is_respected(small_corpus: Corpus) -> None:
    candidates = len(small_corpus.held_out) + small_corpus.dropped
    total = candidates + len(small_corpus.train)
    assert 0.04 < candidates / total < 0.18
    assert load_corpus(EmbeddedCorpusConfig(packages=("jinja2",), held_out_fraction=0.0)).held_out == ()


def test_training_text_can_be_capped() -> None:
    capped = load_corpus(EmbeddedCorpusConfig(packages=("jinja2",), max_train_bytes=20_000))
    whole = load_corpus(EmbeddedCorpusConfig(packages=("jinja2",)))
    assert 20_000 <= capped.train_bytes < 150_000
    assert capped.train == whole.train[: len(capped.train)]


def test_docstrings_agree_with_the_parser() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    found = set(read_docstrings("stdlib"))
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name in ("textwrap.py", "shutil.py", "json/decoder.py", "asyncio/tasks.py"):
        tree = ast.parse((root / name).read_text())
        literals = [
            inspect.cleandoc(text)
            for node in ast.walk(tree)
            if isinstance(node, nodes) and (text := ast.get_docstring(node)) and "\n\n" in text and "\\" not in text
        ]
        assert literals
        assert sum(text in found for text in literals) >= 0.9 * len(literals)


def test_prose_keeps_sentences_and_drops_the_rest() -> None:
    text = (
        "Return the number of elements that are held\n    in the container at this moment, or zero.\n\n"
        ">>> len([1, 2, 3]) and a long line that would otherwise be taken for a sentence.\n3\n\n"
        "x : int\n    The first of the parameters that this function takes from its caller.\n\n"
        "Short one.\n\n    R = [[1, 2], [3, 4]] + f(x)[0] / (a*b - c*d) == {1: 2, 3: 4}; \\alpha_{i}."
    )
    assert prose_paragraphs(text) == [
        "Return the number of elements that are held in the container at this moment, or zero."
    ]


def test_absent_package_is_named() -> None:
    with pytest.raises(DataError, match="'no_such_package_here' is not an installed package"):
        load_corpus(EmbeddedCorpusConfig(packages=("no_such_package_here",)))
    with pytest.raises(DataError, match="not an installed package"):
        load_corpus(EmbeddedCorpusConfig(packages=("../etc",)))


def test_files_are_read_in_order_without_marks_and_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\nline\rend\r\n")
    (tmp_path / "a.txt").write_text("first é")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "d.md").write_text("not matched")
    corpus = files(tmp_path, patterns=("*.txt", "**/*.txt"))
    assert corpus.train == ("first é", "second\nline\nend", "third")


def test_paragraphs_can_be_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\none\n\n  \n\ntwo\n\none, ONE!\n")
    assert files(tmp_path, split_documents="paragraph").train == ("one\none", "two")
    assert files(tmp_path, split_documents="paragraph", min_document_chars=4).train == ("one\none",)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"fine\nbad \xff byte", "line 2 is not UTF-8 .byte 0xff"), (b"a\n\nb\0c", "line 3 holds a NUL byte")],
)
def test_invalid_text_is_named_or_replaced(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        files(tmp_path)
    assert str(path) in str(caught.value)
    (document,) = files(tmp_path, invalid_text="replace").train
    assert document.count("\ufffd") == 1
    assert "\0" not in document


def test_no_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches \*\*/\*\.txt"):
        files(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n\n ")
    with pytest.raises(DataError, match="no document of at least 1 characters"):
        files(tmp_path)


@pytest.mark.timeout(20)
def test_ten_megabyte_line_is_cut(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_bytes(b"x" * 10_000_000)
    (tmp_path / "words.txt").write_text("word " * 50_000)
    corpus = files(tmp_path)
    assert max(len(document) for document in corpus.train) <= 100_000
    assert "".join(files(tmp_path, patterns=("words.txt",)).train).replace("word ", "") in ("", "word")


def test_near_duplicates_leave_the_held_out_part(tmp_path: Path) -> None:
    sentence = "a sentence of many words that stands in every single one of these documents without a change"
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"Document {number} {number * 7}: {sentence}.")
    corpus = files(tmp_path, held_out_fraction=0.3)
    assert corpus.held_out == ()
    assert corpus.dropped > 3
    assert len(corpus.train) + corpus.dropped == 40


def test_copies_that_differ_in_case_and_spacing_are_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The same words.")
    (tmp_path / "b.txt").write_text("the  SAME\nwords")
    assert files(tmp_path).train == ("The same words.",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"held_out_fraction": 1.0}, "held_out_fraction must be in"),
        ({"min_document_chars": 0}, "min_document_chars must be at least 1"),
        ({"max_train_bytes": 0}, "max_train_bytes must be at least 1"),
    ],
)
@pytest.mark.parametrize("config", [EmbeddedCorpusConfig, FilesCorpusConfig])
def test_config_ranges_are_checked(config, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_empty_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="packages must name"):
        EmbeddedCorpusConfig(packages=(), topics=False)
    with pytest.raises(ValueError, match="patterns must hold"):
        FilesCorpusConfig(patterns=())


def test_compressors_need_few_bits_for_repetition() -> None:
    noise = bytes((i * i * 31 + i // 7) % 251 for i in range(4000))
    repeated, mixed = compression_baselines(b"abc" * 2000), compression_baselines(noise)
    assert set(repeated) == {"gzip", "bz2", "xz"}
    assert all(repeated[name] < 0.3 and repeated[name] < mixed[name] for name in repeated)
    with pytest.raises(ValueError, match="at least one byte"):
        compression_baselines(b"")
