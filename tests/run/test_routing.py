"""A run's routing view, from its files to a picture."""

from dataclasses import replace

import pytest

from perilune.errors import DataError
from perilune.models import PRESETS, set_attention_mode
from perilune.run import draw_routing, load, load_model, measure_recall, routing, run_recipe
from perilune.run.routing import MOST_BLOCKS
from tests.run.tiny_run import write_recipe

HEADS = {"num_heads": 2, "head_dim": 8}
MODEL = {
    "preset": "tiny-moba",
    "vocab_size": 280,
    "d_model": 32,
    "d_ff": 32,
    "layers": ["gqa", "moba", "moba"],
    "gqa": HEADS,
    "moba": {**HEADS, "moba_chunk_size": 8, "moba_topk": 2},
}
TEXT = "what is <this>, and\nwhere does it go? " * 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moba")
    run_recipe(load(write_recipe(folder / "recipe.toml", "pretrain", model=MODEL, tasks=[])), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def needles(tmp_path_factory):
    """A run of synthetic tasks, the first with too few tokens for a choice."""
    folder = tmp_path_factory.mktemp("needles")
    train = {"steps": 1}
    stages = {
        name: {"kind": "synthetic", "sequences": 2, "task": {"kind": "needle", "length": length}, "train": train}
        for name, length in (("short", 16), ("long", 40))
    }
    run_recipe(load(write_recipe(folder / "recipe.toml", stages=stages, model=MODEL, tasks=[])), folder / "run")
    return folder / "run"


def test_the_page_lies_in_the_run_and_shows_every_moba_layer(run):
    view = draw_routing(run, TEXT)
    page = view.path.read_text(encoding="utf-8")
    assert view.path == run / "routing.html"
    assert list(view.layers) == [1, 2]
    assert "Blocks that tiny reads after pretrain" in page
    assert f"{view.num_tokens} tokens in blocks of 8; a query reads 2 of them" in page
    assert "&lt;" in page
    assert "<this" not in page
    assert len(view.layers[1].chosen) == -(-view.num_tokens // 8)


def test_one_layer_is_drawn_as_a_picture(run, tmp_path):
    view = draw_routing(run, TEXT, layer=2, stage="pretrain", out=tmp_path / "two.png")
    assert list(view.layers) == [2]
    assert view.path.read_bytes().startswith(b"\x89PNG")
    assert view.layers[2] == draw_routing(run, TEXT, out=tmp_path / "all.html").layers[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "layer 0 reads no blocks; those that do, counted from 0, are 1, 2"),
        ({"layer": 9}, "layer 9 reads no blocks"),
        ({"out": "routing.pdf"}, r"must be a \.html or a \.png file"),
        ({"stage": "sft"}, "has no model of stage 'sft'"),
        ({"text": "short"}, "from 17 on queries have a choice of blocks"),
        ({"text": ""}, "the text has 1 tokens"),
        ({"text": "x" * 9 * MOST_BLOCKS}, f"at most {8 * MOST_BLOCKS} are drawn"),
        ({"text": "a lone \ud800 surrogate"}, "the text cannot be read"),
    ],
)
def test_what_cannot_be_drawn_is_said(run, options, message, tmp_path):
    arguments = {"text": TEXT, "out": tmp_path / "routing.html", **options}
    if isinstance(arguments["out"], str):
        arguments["out"] = tmp_path / arguments["out"]
    with pytest.raises(DataError, match=message):
        draw_routing(run, arguments.pop("text"), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_model_that_reads_everything_has_nothing_to_show(run, monkeypatch):
    loaded = load_model(run)
    set_attention_mode(loaded.model, "full")
    monkeypatch.setattr(routing, "load_model", lambda *_: loaded)
    with pytest.raises(DataError, match="after pretrain every layer of tiny has full attention"):
        draw_routing(run, TEXT)


def test_a_model_without_moba_says_what_to_run(run, monkeypatch):
    loaded = load_model(run)
    other = replace(loaded, recipe=replace(loaded.recipe, model=replace(PRESETS["tiny-gqa"], vocab_size=280)))
    monkeypatch.setattr(routing, "load_model", lambda *_: other)
    with pytest.raises(
        DataError, match=r"no MoBA layers, its layers are gqa, gqa, gqa, gqa; run a recipe with model\.p"
    ):
        draw_routing(run, TEXT)


def test_recall_is_measured_on_a_text(run):
    view = measure_recall(run, TEXT)
    assert list(view.layers) == [1, 2]
    assert set(view.layers[1]) == {"mean", "recent", "sink_recent", "minmax", "random", "oracle"}
    for rules in view.layers.values():
        assert {found.queries for found in rules.values()} == {view.num_tokens - 16}
        assert rules["oracle"].recall == (1.0, 1.0)
        assert all(max(found.mass) <= min(1.0, max(rules["oracle"].mass)) for found in rules.values())


def test_recall_is_measured_where_a_synthetic_task_asks(needles):
    view = measure_recall(needles, sequences=3)
    assert view.num_tokens == 3 * 40
    assert {found.queries for found in view.layers[2].values()} == {3 * 4}  # the symbols of one value each
    assert measure_recall(needles, sequences=3) == view


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("run", {"text": "short"}, r"behind the first 16 tokens .* and the longest has"),
        ("run", {}, "stage pretrain has no synthetic task to take sequences from; give a text"),
        ("run", {"text": TEXT, "stage": "sft"}, "has no model of stage 'sft'"),
        ("needles", {"stage": "short"}, "no query that counts has a choice of blocks.* and the longest has 16"),
        ("needles", {"text": TEXT}, "no text and no tokenizer"),
    ],
)
def test_recall_that_cannot_be_measured_is_said(name, arguments, message, request):
    with pytest.raises(DataError, match=message):
        measure_recall(request.getfixturevalue(name), **arguments)


def test_recall_of_a_text_that_is_too_long_is_refused(run, monkeypatch):
    monkeypatch.setattr(routing, "MOST_RECALL_TOKENS", 20)
    with pytest.raises(DataError, match=r"has \d+ tokens; every pair of them is compared, so that at most 20 are read"):
        measure_recall(run, TEXT)


def test_recall_needs_layers_that_choose(needles, monkeypatch):
    loaded = routing.load_stage_model(needles)
    model = loaded.recipe.model
    for changed, message in (
        (replace(model, layers=("gqa",), moba=None), "no MoBA layers, its layers are gqa"),
        (replace(model, moba=replace(model.moba, moba_topk=1)), "moba_topk 1, so that there is nothing to choose"),
    ):
        other = replace(loaded, recipe=replace(loaded.recipe, model=changed))
        monkeypatch.setattr(routing, "load_stage_model", lambda *_, other=other: other)
        with pytest.raises(DataError, match=message):
            measure_recall(needles)
