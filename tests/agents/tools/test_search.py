import sqlite3
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.agents.tools.base import ToolError
from perilune.agents.tools.registry import ToolRegistry
from perilune.agents.tools.search import Corpus, Page, search_tools
from tests.agents.tools.helpers import context, run

PAGES = [
    Page(doc="lyon", title="Lyon", text="Lyon is a city in France with 522,250 inhabitants. " * 60),
    Page(doc="paris", title="Paris", text="Paris is the capital of France."),
    Page(doc="berlin", title="Berlin", text="Berlin is the capital of Germany. Café Müller."),
]


@pytest.fixture(scope="module")
def corpus():
    return Corpus.build(PAGES)


def do(corpus, name, /, **arguments):
    return run(ToolRegistry(search_tools(corpus)).run(name, arguments, context()))


def test_the_best_comes_first(corpus):
    assert corpus.search("capital of France")[0].doc == "paris"
    assert corpus.search("cafe muller")[0].doc == "berlin"  # accents aside
    assert corpus.search("Lyon", 1)[0].title == "Lyon"
    assert corpus.search("nowhere") == []


@pytest.mark.parametrize(
    "query", ['"', "capital AND", "NEAR(", "title: Paris", "a* OR -b", "^x", "'; drop table pages; --", "\0", "(((", ""]
)
def test_a_query_is_words_and_nothing_else(corpus, query):
    assert isinstance(corpus.search(query), list)
    assert len(corpus) == 3


@given(st.text(max_size=50))
def test_no_query_is_an_error(query):
    assert isinstance(Corpus.build(PAGES).search(query), list)


def test_search_answers_several_queries(corpus):
    text = do(corpus, "search", queries=["Paris", "nowhere"], k=1).text
    assert text.startswith(
        '[{"query": "Paris", "hits": [{"doc": "paris", "title": "Paris", "snippet": "Paris is the capital'
    )
    assert text.endswith('{"query": "nowhere", "hits": []}]')


@pytest.mark.parametrize(
    "raw", ['{"queries": []}', '{"queries": ["a","b","c","d","e","f"]}', '{"queries": ["a"], "k": 11}']
)
def test_limits_stand_in_the_schema(corpus, raw):
    assert isinstance(ToolRegistry(search_tools(corpus)).validate("search", raw), str)


def test_pages_are_read_in_pieces(corpus):
    first = do(corpus, "open_page", doc="lyon").text
    assert "[characters 0 to 1500 of 3060; the next page starts at offset 1500]" in first
    assert "[characters 3000 to 3060 of 3060]" in do(corpus, "open_page", doc="lyon", offset=3000).text
    assert "no document 'x'" in do(corpus, "open_page", doc="x").text
    assert "outside" in do(corpus, "open_page", doc="paris", offset=-1).text


def test_find_takes_a_text_literally(corpus):
    assert do(corpus, "find", doc="paris", pattern="CAPITAL").text.startswith("[at offset 13] Paris is the capital")
    assert do(corpus, "find", doc="lyon", pattern="522,250").text.endswith("[40 more]")
    started = time.monotonic()
    assert "does not stand" in do(corpus, "find", doc="lyon", pattern="(L+)+$").text
    assert time.monotonic() - started < 2
    assert do(corpus, "find", doc="lyon", pattern="").is_error


def test_a_corpus_is_kept_in_a_file(tmp_path):
    path = tmp_path / "corpus.db"
    Corpus.build(PAGES, path).close()
    corpus = Corpus.open(path)
    assert corpus.search("Germany")[0].doc == "berlin"
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        corpus._rows("delete from pages")
    corpus.close()
    with pytest.raises(ToolError, match="is there already"):
        Corpus.build(PAGES, path)
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    for name in ("junk", "missing"):
        with pytest.raises(ToolError, match="holds no corpus"):
            Corpus.open(tmp_path / name)


def test_a_folder_becomes_a_corpus(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"\n# First line\nbody \xff text")
    (tmp_path / "b.md").write_text("# Other")
    (tmp_path / "c.pdf").write_text("not taken")
    corpus = Corpus.from_folder(tmp_path)
    assert len(corpus) == 2
    assert corpus.page("sub/a.txt").title == "First line"
    assert corpus.search("body")[0].doc == "sub/a.txt"


def test_two_documents_of_one_id_are_refused():
    with pytest.raises(ToolError, match="same id"):
        Corpus.build([PAGES[0], PAGES[0]])


def test_tens_of_thousands_are_indexed_quickly():
    pages = (
        Page(doc=str(number), title=f"Entity {number}", text=f"Text of number {number}.") for number in range(20_000)
    )
    corpus = Corpus.build(pages)
    assert corpus.search("entity 12345")[0].doc == "12345"
