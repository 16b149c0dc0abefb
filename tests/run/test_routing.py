"""A run's routing view, from its files to a picture."""

from dataclasses import replace

import pytest

from perilune.errors import DataError
from perilune.models import PRESETS, set_attention_mode
from perilune.run import draw_routing, load, load_model, routing, run_recipe
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
