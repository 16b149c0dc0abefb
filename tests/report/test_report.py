import re
import xml.etree.ElementTree as ET

import pytest

from perilune.errors import DataError
from perilune.report import write_report
from perilune.report.html import Page, Section, Transcript, render_page
from perilune.report.results import Sample
from perilune.report.sections import find_tau
from tests.report.synthetic import write_run

NETWORK = re.compile(r"""(?:src|href)\s*=\s*["'](?!#)|url\(\s*["']?(?!#|data:)|@import|<script|<link|<iframe""")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("run") / "one")).read_text(encoding="utf-8")


def test_the_report_has_every_section(page):
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Summary",
        "Loss",
        "Attention logits",
        "Expert load",
        "Reinforcement learning",
        "Tasks",
        "Transcripts",
        "Time",
        "Machine",
        "Recipe",
    ]


def test_the_report_is_one_small_file_without_script_or_network(page):
    assert len(page.encode()) < 2_000_000
    without_data = re.sub(r'"data:image/png;base64,[^"]*"', '"data:"', page)
    assert not NETWORK.search(re.sub(r'xlink:href="data:|href="data:', 'x="', without_data))


def test_text_of_models_is_escaped(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_every_plot_is_well_formed_described_and_captioned(page):
    figures = re.findall(r'<figure class="plot">(.*?)<figcaption>(.*?)</figcaption>', page, flags=re.DOTALL)
    assert len(figures) >= 12
    for drawing, caption in figures:
        assert ET.fromstring(drawing).attrib["aria-label"]
        assert len(caption) > 30


def test_drawings_follow_the_page_colors(page):
    drawing = page[page.index('<figure class="plot">') :]
    assert "var(--ink)" in drawing
    assert "var(--series-0)" in drawing
    assert "#123456" not in drawing


def test_ids_are_unique(page):
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_numbers_of_the_run_are_there(page):
    for text in ("gzip 2.790", "3 m 00 s", "Synthetic CPU", "tau = 30", "problems kept", "[stages.pretrain]", "<math"):
        assert text in page
    assert "25.0 %" in page  # of the machine's own rate of matrix products
    assert "It scaled down 50% of the heads at least once." in page


def test_the_report_is_the_same_each_time(tmp_path):
    run = write_run(tmp_path / "run", stages=("pretrain",))
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_run_that_has_only_begun_gets_a_report_of_what_is_there(tmp_path):
    (tmp_path / "recipe.toml").write_text('name = "young"\n[stages.pretrain]\nkind = "pretrain"\n')
    text = write_report(tmp_path).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Recipe"]
    assert "no stage finished yet" in text


def test_curves_that_are_nan_throughout_are_left_out(tmp_path):
    from perilune.report import MetricsLog

    (tmp_path / "recipe.toml").write_text('name = "diverged"\n')
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(3):
            log.log(
                step, {"loss": float("nan"), "max_logits": [float("inf")], "reward": float("nan")}, stage="pretrain"
            )
    assert re.findall(r"<h2>(.*?)</h2>", write_report(tmp_path).read_text()) == ["Attention logits", "Recipe"]


@pytest.mark.parametrize("damage", [None, "= nonsense"])
def test_a_directory_that_is_no_run_is_refused_and_nothing_is_written(tmp_path, damage):
    if damage is not None:
        (tmp_path / "recipe.toml").write_text(damage)
    with pytest.raises(DataError, match=r"recipe\.toml"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_prompt_that_a_stage_was_not_asked_says_so():
    transcript = Transcript(
        task="t", prompt="<p>", answer="", responses=[("sft", Sample(task="t", prompt="p", response="r")), ("rl", None)]
    )
    text = render_page(Page(title="x", subtitle="", sections=[Section(title="T", blocks=[transcript])]))
    assert "not asked" in text
    assert "&lt;p&gt;" in text


@pytest.mark.parametrize(
    ("tree", "tau"),
    [
        ({"train": {"optimizer": {"tau": 50}}}, 50.0),
        ({"optimizer": {"tau": 50.0, "qk_clip": False}}, None),
        ({"rl": {"objective": {"tau": 0.1}}}, None),
        ({}, None),
    ],
)
def test_tau_is_the_optimizers_and_only_where_it_clips(tree, tau):
    assert find_tau(tree) == tau
