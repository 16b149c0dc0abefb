import xml.etree.ElementTree as ET

import numpy as np
import pytest

from perilune.report.plots import (
    MAX_POINTS,
    BarSeries,
    Curve,
    Point,
    bar_plot,
    best_balance,
    heat_strips,
    line_plot,
    pareto_front,
    scatter_plot,
    thin,
)


def test_thinning_keeps_the_mean_and_the_order():
    curve = thin(Curve(label="a", x=range(900), y=[float(x) for x in range(900)], spread=[1.0] * 900))
    assert len(curve.x) == len(curve.y) == MAX_POINTS
    assert np.mean(curve.y) == pytest.approx(449.5)
    assert list(curve.x) == sorted(curve.x)
    assert set(curve.spread or ()) == {1.0}


def test_thinning_leaves_out_what_is_not_finite():
    curve = thin(Curve(label="a", x=[0, 1, 2], y=[1.0, float("nan"), float("inf")]))
    assert (curve.x, curve.y) == ([0.0], [1.0])


def test_the_pareto_front_is_what_nothing_beats_in_both():
    points = [Point(label=name, x=x, y=y) for name, x, y in (("a", 1, 1), ("b", 2, 3), ("c", 3, 2), ("d", 4, 4))]
    assert [point.label for point in pareto_front(points)] == ["a", "b", "d"]
    assert pareto_front([]) == []


def test_the_best_balance_weighs_accuracy_against_length():
    points = [
        Point(label=label, x=x, y=y) for label, x, y in (("a", 40, 60), ("b", 50, 59), ("c", 80, 90), ("d", 200, 91))
    ]
    assert [best_balance(points, price).label for price in (10, 0, 500)] == ["c", "d", "a"]


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("log_y", [False, True])
def test_lines_are_labelled(count, log_y):
    curves = [Curve(label=f"run {index}", x=[0, 1], y=[1.0, 2.0 + index]) for index in range(count)]
    svg = line_plot("p", curves, "step", "loss, nats", references=[(1.5, "gzip"), (1.6, "xz")], log_y=log_y)
    ET.fromstring(svg)
    assert "gzip" in svg
    assert "loss, nats" in svg
    assert (f"run {count - 1}" in svg.split(">", 1)[1]) == (count > 1)


def test_a_curve_of_one_point_is_drawn():
    assert "<svg" in line_plot("p", [Curve(label="a", x=[5], y=[1.0])], "step", "y")


def test_names_with_markup_stay_text():
    hostile = '<b>&"$x_1$'
    svg = bar_plot("p", [hostile], [BarSeries(label="a", values=[1.0]), BarSeries(label="b", values=[None])], "y")
    ET.fromstring(svg)
    assert "<b>" not in svg


def test_more_series_than_colors_are_told_apart():
    series = [BarSeries(label=str(index), values=[1.0]) for index in range(8)]
    assert "<pattern" in bar_plot("p", ["g"], series, "y")


def test_scatter_shows_spread_and_labels():
    points = [Point(label="merge", x=10, y=50, x_spread=1, y_spread=2), Point(label="dpo", x=20, y=60)]
    svg = scatter_plot("p", points, "tokens", "accuracy, %")
    ET.fromstring(svg)
    assert "merge" in svg.split(">", 1)[1]


@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_heat_strips_take_any_number_of_steps(num_steps):
    strips = [np.ones((4, num_steps)), np.zeros((4, num_steps))]
    ET.fromstring(heat_strips("p", ["a", "b"], strips, list(range(num_steps))))
