"""What the stages of a run share: made once, marked whole by the tokenizer, which is written last."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from perilune.data import EmbeddedCorpusConfig, FilesCorpusConfig, compression_baselines, load_corpus
from perilune.errors import DataError
from perilune.report import NullProgress
from perilune.run import prepared, run_recipe
from perilune.run.config import Recipe, SFTStage, presets
from perilune.run.directory import RunDirectory
from perilune.run.loading import read_recipe
from perilune.run.prepared import check_inputs, prepare_data
from perilune.run.recipe import LoadedRecipe, build_recipe
from perilune.tasks import TaskConfig
from perilune.train import TrainConfig

FILES = ("train-tokens.npy", "held-out-tokens.npy", "corpus.json")


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    random = Random(0)
    for number in range(60):
        words = ("".join(random.choices("abcdefghij", k=random.randint(1, 6))) for _ in range(60))
        (folder / f"{number}.txt").write_text(f"Document {number}: {' '.join(words)}")
    return folder


@pytest.fixture
def recipe(corpus):
    tree = {
        "name": "x",
        "tokenizer": {"vocab_size": 300, "train_bytes": 5000},
        "corpus": {"kind": "files", "root": str(corpus), "held_out_fraction": 0.2},
        "model": {"preset": "smoke", "vocab_size": 300},
        "evaluation": {"text_bytes": 1500},
        "stages": {"a": {"kind": "pretrain", "train": {"steps": 1}}},
    }
    return build_recipe(tree, Recipe, source="test", presets=presets())


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.prepare({})
    return directory


def prepare(recipe, directory):
    return prepare_data(recipe, directory, NullProgress())


def test_the_streams_are_the_corpus_in_tokens(recipe, directory):
    data = prepare(recipe, directory)
    corpus = load_corpus(recipe.corpus)
    decoded = data.tokenizer.decode([token for token in data.train_tokens.tolist() if token >= 0])
    assert all(document in decoded for document in corpus.train)
    assert not any(document in decoded for document in corpus.held_out)
    assert int((data.train_tokens == data.tokenizer.bos_id).sum()) == len(corpus.train)


def test_held_out_text_is_whole_documents_up_to_the_limit(recipe, directory):
    data = prepare(recipe, directory)
    corpus = load_corpus(recipe.corpus)
    count = int((data.held_out_tokens == data.tokenizer.bos_id).sum())
    taken = corpus.held_out[:count]
    assert 1 <= count < len(corpus.held_out)
    assert data.held_out_bytes == sum(len(document.encode()) for document in taken)
    assert sum(len(document.encode()) for document in taken[:-1]) < 1500 <= data.held_out_bytes
    assert data.compressors == compression_baselines("\n\n".join(taken).encode())


def test_a_later_stage_reads_what_the_first_one_made(recipe, directory, monkeypatch):
    first = prepare(recipe, directory)
    monkeypatch.setattr(prepared, "load_corpus", lambda config: pytest.fail("the corpus is read again"))
    second = prepare(recipe, directory)
    assert np.array_equal(first.train_tokens, second.train_tokens)
    assert np.array_equal(first.held_out_tokens, second.held_out_tokens)
    assert (first.held_out_bytes, first.compressors) == (second.held_out_bytes, second.compressors)
    assert second.tokenizer.encode("Document 3: word7") == first.tokenizer.encode("Document 3: word7")


def test_what_was_broken_off_is_made_again_and_the_same(recipe, directory):
    prepare(recipe, directory)
    made = {name: directory.data(name).read_bytes() for name in FILES} | {"t": directory.tokenizer.read_bytes()}
    directory.tokenizer.unlink()
    directory.data("train-tokens.npy").write_bytes(b"half")
    directory.data("corpus.json").unlink()
    prepare(recipe, directory)
    assert {name: directory.data(name).read_bytes() for name in FILES} | {"t": directory.tokenizer.read_bytes()} == made


def test_the_tokenizer_is_written_last(recipe, directory, monkeypatch):
    class Killed(Exception):
        pass

    def kill(self, path):
        assert all(directory.data(name).is_file() for name in FILES)
        raise Killed

    monkeypatch.setattr("perilune.data.Tokenizer.save", kill)
    with pytest.raises(Killed):
        prepare(recipe, directory)
    assert not directory.tokenizer.exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "nonsense"])
def test_a_damaged_file_is_named_with_what_to_do(recipe, directory, name, damage):
    prepare(recipe, directory)
    path = directory.data(name)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2]}.get(damage, b"nonsense"))
    if damage == "missing":
        path.unlink()
    with pytest.raises(DataError, match=r"remove .*tokenizer\.json") as caught:
        prepare(recipe, directory)
    assert str(path) in str(caught.value)


def test_facts_without_the_numbers_are_damaged(recipe, directory):
    prepare(recipe, directory)
    directory.data("corpus.json").write_text(json.dumps({"held_out_bytes": 3, "compressors": [1]}))
    with pytest.raises(DataError, match=r"corpus\.json is missing or damaged"):
        prepare(recipe, directory)


def test_a_damaged_tokenizer_is_named(recipe, directory):
    prepare(recipe, directory)
    directory.tokenizer.write_text(directory.tokenizer.read_text()[:-50])
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        prepare(recipe, directory)


def test_a_corpus_without_held_out_text_is_refused_before_anything_is_written(recipe, directory):
    nothing_held_out = replace(recipe, corpus=replace(recipe.corpus, held_out_fraction=0.0))
    with pytest.raises(DataError, match=r"raise corpus\.held_out_fraction"):
        prepare(nothing_held_out, directory)
    assert not list(directory.data("").iterdir())
    assert not directory.tokenizer.exists()


def test_texts_of_the_tasks_are_no_strangers_to_the_tokenizer(finished):
    recipe = read_recipe(RunDirectory(finished))
    texts = list(prepared._tokenizer_texts(recipe, load_corpus(recipe.corpus)))
    asked = [text for text in texts if text.startswith("Count the 1 bits of ")]
    assert len(asked) == prepared.TEACHER_TEXTS
    assert sum(len(text.encode()) for text in texts[: -3 * len(asked)]) >= 20_000


def test_without_tasks_the_tokenizer_sees_whole_documents_up_to_its_limit(recipe):
    corpus = load_corpus(recipe.corpus)
    texts = list(prepared._tokenizer_texts(recipe, corpus))
    assert texts == list(corpus.train[: len(texts)])
    sizes = [len(text.encode()) for text in texts]
    assert sum(sizes[:-1]) < 5000 <= sum(sizes)


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(recipe, directory):
    large = replace(recipe.tokenizer, vocab_size=5000)
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size 5000 needs more text"):
        prepare(replace(recipe, tokenizer=large, model=replace(recipe.model, vocab_size=5000)), directory)
    assert not directory.tokenizer.exists()


def test_a_task_or_package_that_does_not_exist_is_told_before_anything_is_made(recipe, tmp_path):
    place = tmp_path / "run"
    embedded = EmbeddedCorpusConfig(packages=("stdlib", "no_such_package"))
    for wrong, words in (
        (replace(recipe, corpus=embedded), "'no_such_package' is not an installed package"),
        (replace(recipe, corpus=FilesCorpusConfig(root=tmp_path / "nowhere")), "no file matches"),
        (replace(recipe, tasks=(TaskConfig(name="no_such_task"),)), "no_such_task"),
    ):
        with pytest.raises(DataError, match=words):
            run_recipe(LoadedRecipe(recipe=wrong, tree={}, source="here.toml"), place)
        assert not place.exists()


def test_a_task_without_a_teacher_cannot_be_in_sft(recipe):
    sft = SFTStage(train=TrainConfig(steps=1))
    with pytest.raises(DataError, match="base_conversion have no teacher"):
        check_inputs(replace(recipe, tasks=(TaskConfig(name="base_conversion"),), stages={"sft": sft}))


def test_text_that_changed_since_the_run_began_is_refused(recipe, directory, corpus):
    prepare(recipe, directory)
    directory.tokenizer.unlink()
    prepare(recipe, directory)  # the same text: made again
    directory.tokenizer.unlink()
    (corpus / "0.txt").write_text("Another text, as after an upgrade. " * 20)
    with pytest.raises(DataError, match="the corpus has changed since this run began"):
        prepare(recipe, directory)
    assert not directory.tokenizer.exists()
