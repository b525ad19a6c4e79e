"""Figures: the data that stands in them, names that can be read, and files that are equal from equal data."""

from __future__ import annotations

import xml.etree.ElementTree
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from listener_reward.evaluate.confidence import reliability
from listener_reward.evaluate.plotting import LINE, label_ends, reliability_figure, save_svg

RNG = np.random.default_rng(0)


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line that has a name."""
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()]  # pyright: ignore
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def test_equal_data_give_equal_files_without_a_date(tmp_path):
    curves = {"before": (RNG.random(200), RNG.random(200))}
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    save_svg(reliability_figure(curves), first)
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.grid": False}):
        save_svg(reliability_figure(curves), second)  # nor does the user's own matplotlibrc change anything
    assert first.read_bytes() == second.read_bytes()
    assert "date" not in first.read_text() and matplotlib.__version__ not in first.read_text()


def test_names_are_only_text(tmp_path):
    """Neither markup of SVG nor mathematics of matplotlib."""
    p_first = RNG.random(200)
    names = ["<before> & after", "$x$ for $5"]
    save_svg(reliability_figure({name: (p_first, p_first) for name in names}), tmp_path / "x.svg")
    written = [element.text for element in xml.etree.ElementTree.parse(tmp_path / "x.svg").getroot().iter()]
    assert set(names) <= set(written)


def test_names_of_lines_that_end_together_stand_above_one_another():
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_ends(axes, [("c", 1, 0.5, "red"), ("a", 1, 0.9, "blue"), ("b", 1, 0.5, "green"), ("short", 0.5, 0.5, "red")])
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    beside = sorted((boxes[name] for name in "abc"), key=lambda box: box.y0)
    assert all(upper.y0 >= lower.y1 for lower, upper in pairwise(beside))
    middles = [(box.y0 + box.y1) / 2 for box in beside]
    assert middles[1] - middles[0] == pytest.approx(LINE * figure.dpi / 72, abs=0.5)
    right, middle = axes.transData.transform((1, 0.9))
    assert boxes["a"].x0 > right and boxes["a"].y0 < middle < boxes["a"].y1
    x, y = axes.transData.transform((0.5, 0.5))
    assert boxes["short"].y0 > y and boxes["short"].x0 < x < boxes["short"].x1


def test_a_reliability_figure_has_the_bins():
    labels, p_first = RNG.random(200), RNG.random(200)
    axes = reliability_figure({"one": (labels, p_first), "two": (labels, p_first**2)}).axes[0]
    bins = reliability(labels, p_first)
    assert lines(axes)["one"] == [(one.confidence, one.agreement) for one in bins] and len(bins) == 10
    assert lines(axes)["two"] == [(one.confidence, one.agreement) for one in reliability(labels, p_first**2)]
    dots = axes.collections[0]
    assert np.array_equal(dots.get_offsets(), lines(axes)["one"])
    sizes = dots.get_sizes()  # pyright: ignore[reportAttributeAccessIssue]
    assert sizes / sizes.sum() == pytest.approx([one.n / 200 for one in bins])
    low, high = axes.get_ylim()
    assert low < min(one.agreement for one in bins) and high > 1
