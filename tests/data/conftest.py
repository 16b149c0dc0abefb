import pytest

from perilune.data import Corpus, EmbeddedCorpusConfig, Tokenizer, load_corpus, train_tokenizer


@pytest.fixture(scope="session")
def small_corpus() -> Corpus:
    return load_corpus(EmbeddedCorpusConfig(packages=("jinja2", "fsspec"), held_out_fraction=0.1))


@pytest.fixture(scope="session")
def tokenizer(small_corpus: Corpus) -> Tokenizer:
    return train_tokenizer(small_corpus.train, 320)
