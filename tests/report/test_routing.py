"""Pictures and numbers of which blocks are read, from routings made by hand."""

import io
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from perilune.report import LayerReads, block_load, load_table, routing_page, routing_picture
from perilune.report.routing import _MOST_HINTS, _pixels
from perilune.report.style import PALETTE

SIZE, TOPK = 4, 3


def reads_of(choose, length=30, heads=2, layer=0, size=SIZE, topk=TOPK):
    """Reads whose queries take the past blocks `choose(head, own)` once they have a choice, and all of them before."""
    blocks = np.full((length, heads, topk), -1)
    for t in range(length):
        for head in range(heads):
            own = t // size
            past = choose(head, own) if own >= topk else range(own)
            read = [*sorted(past), own]
            blocks[t, head, : len(read)] = read
    return LayerReads(layer=layer, block_size=size, topk=topk, blocks=blocks)


def always_the_first_two(head, own):
    return 0, 1


def nearest(head, own):
    return own - 2, own - 1


def test_what_is_read_is_told_apart_from_the_own_block():
    reads = reads_of(lambda head, own: (head, own - 1))
    past = reads.past()
    assert past.shape == (2, 30, 8)
    assert past[1, 29].tolist() == [False, True, False, False, False, False, True, False]
    assert past[0, 9].nonzero()[0].tolist() == [0, 1], "all past blocks of a query without a choice"
    assert not past[0, 3].any()
    assert reads.has_choice().tolist() == [t >= 12 for t in range(30)]


def test_one_habit_has_the_entropy_of_its_two_blocks():
    load = block_load(reads_of(always_the_first_two))
    assert load.entropy_bits == pytest.approx(1.0)
    assert load.entropy_bits < load.even_entropy_bits
    assert load.chosen == (1, 1, 0, 0, 0, 0, 0, None)
    # 18 queries choose, of 3 to 7 past blocks; the share of an even choice by hand
    even = sum(2 / (t // SIZE) for t in range(12, 30)) / 18
    assert load.relative[0] == pytest.approx(1 / even)
    assert (load.own, load.first, load.other) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert load.previous == 0


def test_shares_are_of_all_that_is_read():
    load = block_load(reads_of(nearest))
    assert (load.own, load.previous, load.first) == pytest.approx((1 / 3, 1 / 3, 0))
    assert load.own + load.previous + load.first + load.other == pytest.approx(1)


def test_an_even_choice_is_even():
    generator = np.random.default_rng(0)
    choose = lambda head, own: generator.choice(own, 2, replace=False)  # noqa: E731
    load = block_load(reads_of(choose, length=64, heads=200))
    assert load.entropy_bits == pytest.approx(load.even_entropy_bits, abs=0.01)
    assert [share for share in load.relative if share is not None] == pytest.approx([1.0] * 15, abs=0.15)


def test_a_head_is_counted_alone():
    reads = reads_of(lambda head, own: nearest(head, own) if head else always_the_first_two(head, own))
    assert block_load(reads, 0) == block_load(reads_of(always_the_first_two, heads=1))
    assert block_load(reads, 1) == block_load(reads_of(nearest, heads=1))


def test_without_past_blocks_there_is_nothing_to_choose():
    load = block_load(reads_of(lambda head, own: (), topk=1))
    assert (load.own, load.entropy_bits, load.even_entropy_bits) == (1, 0, 0)
    assert load.chosen[:7] == (0,) * 7
    assert load.relative == (None,) * 8


def test_pixels_have_the_colors_of_what_they_show():
    pixels = _pixels(reads_of(lambda head, own: (0, own - 1)))[0]
    rows, columns = (side // count for side, count in zip(pixels.shape[:2], (30, 8), strict=True))
    assert min(pixels.shape[:2]) >= 400

    def color(query, block):
        red, green, blue, opacity = pixels[query * rows, block * columns]
        return f"#{red:02x}{green:02x}{blue:02x}" if opacity else None

    assert color(29, 0) == PALETTE[4]
    assert color(29, 6) == "#00a37a"
    assert color(29, 3) is None
    assert color(29, 7) is None, "the own block is drawn as a triangle"
    assert color(9, 0) == color(9, 1) == "#9aa4b1"


@pytest.mark.parametrize("heads", [1, 5])
def test_the_picture_holds_every_layer(heads):
    layers = [reads_of(nearest, heads=heads, layer=layer) for layer in (0, 3)]
    one, two = (Image.open(io.BytesIO(routing_picture(some, "title"))) for some in (layers[:1], layers))
    assert one.format == "PNG"
    assert two.size[0] == one.size[0]
    assert two.size[1] > 1.6 * one.size[1]


def page_of(texts, **options):
    reads = reads_of(nearest, **options)
    return routing_page([reads], texts or [f"text {block}" for block in range(reads.num_blocks)], "Blocks <b>", "told")


def drawings(page):
    return re.findall(r'<figure class="plot">(.*?)<figcaption>', page, flags=re.DOTALL)


def test_the_page_has_a_section_a_layer_and_one_of_blocks():
    layers = [reads_of(nearest, layer=2), reads_of(always_the_first_two, layer=5)]
    page = routing_page(layers, [f"text {block}" for block in range(8)], "title", "told")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Layer 2", "Layer 5", "Blocks"]
    assert len(drawings(page)) == 2
    rows = re.findall(r"<tr>.*?</tr>", page[page.index(">Blocks</h2>") :])
    assert re.findall(r">([^<]+)<", rows[1]) == ["0: text 0", "0.00", "2.20"]


def test_columns_tell_their_text_which_is_escaped():
    hostile = '<script>"&'
    page = page_of([hostile] * 8)
    assert "<script" not in page
    (drawing,) = drawings(page)
    titles = [title.text for title in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * 8
    assert f"block 0, tokens 0 to 3; head 0 chose it in 0% of the queries that could: {hostile}" in titles
    assert f"block 7, tokens 28 to 29: {hostile}" in titles
    assert 'id="layer-' not in drawing


def test_the_page_needs_no_script_and_no_network():
    page = re.sub(r'"data:image/png;base64,[^"]*"', '"data:"', page_of(None))
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)|url\(\s*["']?(?!#|data:)|@import|<link|<iframe""", page)


def test_many_columns_are_drawn_without_texts():
    page = page_of(None, heads=4, size=1, length=_MOST_HINTS // 4 + 1)
    (drawing,) = drawings(page)
    assert "<title>" not in drawing
    assert "One query in" not in page


def test_a_long_text_says_that_not_every_query_is_drawn():
    assert "One query in 2 is drawn." in page_of(None, size=500, length=2100, heads=1)


def test_the_terminal_gets_a_row_a_layer():
    table = load_table({1: block_load(reads_of(nearest)), 4: block_load(reads_of(always_the_first_two))})
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["1", "4"]
    assert columns[1][1] == "1.00"
    assert columns[3] == ["33%", "33%"]
    assert math.isclose(sum(float(column[1].rstrip("%")) for column in columns[3:]), 99, abs_tol=1)
