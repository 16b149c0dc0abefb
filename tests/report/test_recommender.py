"""What reports show of recommenders: which curves appear and when, and what tables make bold."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from perilune.report import MetricsLog, write_report
from perilune.report.html import Page, Section, render_page
from perilune.report.recommender import (
    ConflictRow,
    GroupRow,
    MethodRow,
    comparison_table,
    conflict_plot,
    conflict_section,
    conflict_table,
    group_plot,
    group_section,
    group_table,
)

EPOCH = {"loss": 1.0, "l2_loss": 0.1, "lr": 1e-3}
ATTENTION = {"alpha_mean_2": 0.1, "alpha_std_2": 0.01, "gate_std": 0.02, "gate_view": 0.4, "gate_buy": 0.6}
VALIDATION = {"validation_hr@10": 0.1, "validation_ndcg@10": 0.05, "validation_mrr": 0.04}


def report_of(path, stages):
    (path / "recipe.toml").write_text('name = "rec"\n' + "".join(f"[stages.{name}]\n" for name in stages))
    with MetricsLog(path / "metrics.jsonl") as log:
        for stage, values in stages.items():
            for epoch in range(1, 5):
                log.log(epoch, values, stage)
    return write_report(path).read_text(encoding="utf-8")


def figures(page):
    found = re.findall(r'<figure class="plot">(.*?)<figcaption>(.*?)</figcaption>', page, flags=re.DOTALL)
    return [(ET.fromstring(drawing).attrib["aria-label"], caption) for drawing, caption in found]


def test_a_recommender_has_its_own_section_by_epoch(tmp_path):
    page = report_of(tmp_path, {"cigf": {**EPOCH, **ATTENTION, **VALIDATION}})
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Recommender", "Recipe"]
    assert [label for label, _ in figures(page)] == [
        "validation NDCG@10 over epoch: cigf",
        "validation HR@10 over epoch: cigf",
        "validation MRR over epoch: cigf",
        "loss over epoch: ranking, L2 term",
        "mean gate of the target over epoch: view, buy",
        "mean attention over epoch: hop 2",
        "standard deviation over epoch: attention, hop 2, gate",
    ]
    assert all(len(caption) > 30 for _, caption in figures(page))


def test_what_was_not_measured_is_not_drawn(tmp_path):
    page = report_of(tmp_path, {"mf": {**EPOCH, "validation_ndcg@10": float("nan")}})
    assert [label for label, _ in figures(page)] == ["loss over epoch: ranking, L2 term"]


def test_stages_are_compared_and_those_of_text_stay_where_they_were(tmp_path):
    page = report_of(tmp_path, {"text": {"loss": 2.0}, "mf": {**EPOCH, **VALIDATION}, "cigf": {**EPOCH, **VALIDATION}})
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Loss", "Recommender", "Recipe"]
    labels = [label for label, _ in figures(page)]
    assert labels[0] == "text loss over step: training"
    assert "validation NDCG@10 over epoch: mf, cigf" in labels
    assert labels.count("loss over epoch: ranking, L2 term") == 2
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


ROWS = [
    MethodRow(method="popularity", protocol="full, open", metrics={"hr@10": [0.2]}),
    MethodRow(method="popularity", protocol="sampled99, open", metrics={"hr@10": [0.9]}),
    MethodRow(method="<cigf>", protocol="full, open", metrics={"hr@10": [0.3, 0.5], "ndcg@10": [0.1, 0.1]}),
]


def test_the_best_mean_of_a_column_is_bold():
    table = comparison_table(ROWS, "Taobao.")
    assert table.header == ("method", "full, open: HR@10", "full, open: NDCG@10", "sampled99, open: HR@10")
    assert table.rows == [("popularity", "0.2", "-", "0.9"), ("<cigf>", "0.40 ± 0.14", "0.1 ± 0", "-")]
    assert set(table.strong) == {(1, 1), (1, 2), (0, 3)}
    assert table.caption.startswith("Taobao. Mean ± standard deviation over up to 2 seeds.")
    page = render_page(Page(title="x", subtitle="", sections=[Section(title="T", blocks=[table])]))
    assert "<td><strong>0.40 ± 0.14</strong></td>" in page
    assert page.count("<strong>") == 3
    assert "&lt;cigf&gt;" in page


def test_one_method_is_not_best_and_none_is_no_error():
    assert not comparison_table(ROWS[:2]).strong
    assert comparison_table(ROWS[:1]).caption.startswith("One seed.")
    assert comparison_table([]).rows == []
    equal = [MethodRow(method=name, protocol="full", metrics={"mrr": [0.5]}) for name in "ab"]
    assert set(comparison_table(equal).strong) == {(0, 1), (1, 1)}


def group(grouping, label, users, value):
    return GroupRow(grouping=grouping, group=label, users=users, metrics={"ndcg@10": value})


METHODS = {
    "rule": [
        group("all", "all", 1200, 0.2),
        group("purchases", "cold", 200, 0.1),
        group("purchases", ">10", 1000, 0.22),
    ],
    "cigf": [group("all", "all", 1200, 0.25), group("purchases", "cold", 200, 0.05)],
}


def test_groups_stand_beside_each_other():
    table = group_table(METHODS)
    assert table.header == ("group", "users", "rule", "cigf")
    assert table.rows == [
        ("all: all", "1,200", "20.00", "25.00"),
        ("purchases: cold", "200", "10.00", "5.00"),
        ("purchases: >10", "1,000", "22.00", "-"),
    ]
    assert set(table.strong) == {(0, 3), (1, 2), (2, 2)}
    drawn = group_plot(METHODS, "purchases")
    assert ET.fromstring(drawn.svg).attrib["aria-label"] == "NDCG@10, % by cold (n=200), >10 (n=1,000)"
    assert {"10", "22", "5"} <= set(re.findall(r">([\d.]+)<", drawn.svg))
    section = group_section(METHODS)
    assert section is not None
    assert len(section.blocks) == 2, "a grouping of one group is in the table alone"
    assert group_section({"rule": []}) is None


def conflict(decoder, place, first, users, negative):
    share, other = (None, None) if negative is None else (negative, 0.5)
    tasks = (first, "buy")
    return ConflictRow(
        decoder=decoder, place=place, tasks=tasks, users=users, negative=share, cosine=other, magnitude=other
    )


CONFLICTS = [
    conflict("mmoe", "view", "view", 100, 0.5),
    conflict("mmoe", "view", "cart", 300, 0.1),
    conflict("mmoe", "X", "view", 100, 0.4),
    conflict("dot", "view", "view", 0, None),
    conflict("dot", "X", "view", 100, 0.25),
]


def test_conflicts_are_pooled_over_pairs_by_their_users():
    drawn = conflict_plot(CONFLICTS).svg
    assert ET.fromstring(drawn).attrib["aria-label"] == "users in conflict, % by X* view, X"
    values = re.findall(r">([\d.]+)</text>", drawn)
    assert sum(value in ("20", "40", "25") for value in values) >= 3  # 20 = (100 * 50 + 300 * 10) / 400
    table = conflict_table(CONFLICTS)
    assert table.header == ("decoder: place", "view / buy", "cart / buy")
    assert table.rows[0] == ("mmoe: view", "50.0 %, +0.50, 0.50", "10.0 %, +0.50, 0.50")
    assert table.rows[2] == ("dot: view", "-", "-")
    assert "100 to 300" in table.caption
    assert conflict_section([]) is None
    section = conflict_section(CONFLICTS)
    assert section is not None
    assert len(section.blocks) == 2


@pytest.mark.parametrize("count", [2, 9])
def test_values_of_many_bars_stand_upright(count):
    methods = {f"m{place}": METHODS["rule"] for place in range(count)}
    upright = group_plot(methods, "purchases").svg.count("rotate(-90")
    assert upright == (1 if count == 2 else 1 + 18), "beside the label of the axis"
