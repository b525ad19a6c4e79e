"""What the benchmarks draw is what they measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchmarks import ddpo, ddpo_editor, prefix_cost, verdicts
from matplotlib.axes import Axes

from listener_reward.tiny.editing import draw_work


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line that has a name."""
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def test_prefix_cost_draws_ratios_and_limits():
    rows = [
        {"what": "listener", "group": 2, "ratio": 2.4, "limit": 2.3},
        {"what": "listener", "group": 4, "ratio": 4.4, "limit": 4.2},
        {"what": "loss", "group": 2, "ratio": 1.8, "limit": 1.9},
        {"what": "loss", "group": 4, "ratio": None, "limit": 3.3},
    ]
    axes = prefix_cost.plot(rows).axes[0]
    assert lines(axes) == {
        "listener": [(2, 2.4), (4, 4.4)],
        "listener, limit": [(2, 2.3), (4, 4.2)],
        "loss": [(2, 1.8)],
        "loss, limit": [(2, 1.9), (4, 3.3)],
    }
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 4.4, "the highest line is inside"
    assert {text.get_text() for text in axes.texts} == lines(axes).keys()


def test_ddpo_draws_each_run_and_their_mean():
    results = [
        {"reward": "judge", "utility": {"0": [5.0, 6.0], "10": [6.0, 6.0]}},
        {"reward": "judge", "utility": {"0": [5.0, 6.0], "10": [5.0, 6.0]}},
        {"reward": "random", "utility": {"0": [5.5], "10": [2.0]}},
        {"reward": "judge", "utility": {"0": [5.5], "10": [6.5]}, "settings": {"advantage_noise": True}},
    ]
    axes = ddpo.curve(results).axes[0]
    means = {"judge": [(0, 5.5), (10, 5.75)], "judge, noise-aware": [(0, 5.5), (10, 6.5)]}
    assert lines(axes) == means | {"random": [(0, 5.5), (10, 2)]}
    runs = [np.asarray(line.get_ydata()) for line in axes.lines if str(line.get_label()).startswith("_")]
    assert [list(run) for run in runs] == [[5.5, 6], [5.5, 5.5], [5.5, 6.5], [5.5, 2]]
    assert list(axes.get_xticks()) == [0, 10]


def test_what_ddpo_does_to_an_editor_is_told_by_what_was_asked_for():
    asked = ddpo_editor.edits(held=True, n=ddpo_editor.MEASURED)
    before, after = [4.0] * len(asked), [5.0 if "color" in edit.asked else 4.0 for edit in asked]
    runs = [{"reward": name, "utility": {"0": before, "40": after}} for name in ("judge", "truth")]
    rows = [line.strip("| ").split(" | ") for line in ddpo_editor.by_part(runs).splitlines()[2:]]
    assert [row[0] for row in rows] == [*ddpo_editor.PARTS]
    counts = [sum(part in edit.asked for edit in asked) for part in ddpo_editor.PARTS]
    assert [int(row[1]) for row in rows] == counts and rows[0][2:] == ["4.00", "5.00"]
    assert all(4 <= float(row[3]) < 5 for row in rows[1:])


def test_the_true_reward_of_an_edit_is_read_from_its_picture():
    asked = ddpo_editor.edits(held=False, n=6)
    drawn = [draw_work(edit) for edit in asked]
    about = [{"edit": edit} for edit in asked]
    for place, scene in ((0, "source"), (1, "goal")):
        scores, info = ddpo_editor.true_utilities([both[place] for both in drawn], None, about)
        assert list(scores) == pytest.approx([edit.utility(getattr(edit, scene)) for edit in asked]) and not info


def test_ddpo_compares_runs_by_their_seeds():
    def result(reward: str, seed: int, last: float) -> dict[str, Any]:
        utility = {"0": [5.0, 6.0], "10": [0.0], "40": [last - 1, last + 1]}
        return {"reward": reward, "seed": seed, "seconds": 90, "utility": utility}

    results = [result("judge", 3, 5.75), result("judge", 4, 6.0), result("judge", 6, 9.0), result("anchors", 4, 6.5)]
    judge, anchors = (ddpo.rises(results, name) for name in ("judge", "anchors"))
    assert (judge, anchors) == ({3: 0.25, 4: 0.5, 6: 3.5}, {4: 1.0})
    assert ddpo.paired({3: 0.5, 4: 0.5, 5: 9.0}, judge) == "+0.12 ± 1.59 by seeds 3, 4"
    assert ddpo.paired(judge, {7: 0.5}) == "no seed in common"
    assert ddpo.table(results).splitlines()[2:] == [
        "| judge | 3 | 5.50 | 6.92 | +1.42 ± 4.49 | 2 |",
        "| anchors | 1 | 5.50 | 6.50 | +1.00 | 2 |",
    ]


def test_verdicts_draws_a_panel_for_each_rule():
    def row(family: str, right: list[float], tokens: float) -> verdicts.Row:
        return family, family, np.array(right), np.array([1.0]), np.array([tokens])

    figure = verdicts.drawn(
        [
            row("fast", [1, 0, 0, 0], 0),
            row("one order", [1, 1, 1, 0], 30),
            row("mean", [1, 1, 1, 1], 120),
            row("mean", [1, 1, 0, 1], 60),
            row("mean, early stop", [1, 1, 0, 1], 70),
            *(row(rule, [1, 0, 1, 0], 60) for rule in ("majority", "listener", "both")),
        ]
    )
    above, below = figure.axes[:4], figure.axes[4:]
    assert [axes.get_title(loc="left") for axes in above] == ["mean", "majority", "listener", "both"]
    assert lines(above[0]) == {
        "both orders": [(60, 75), (120, 100)],
        "early stop": [(70, 75)],
        "one order": [(30, 75)],
    }
    assert lines(above[1]) == {"both orders": [(60, 50)]}
    assert all(lines(axes) == {"no thoughts": [(0, 25)]} for axes in below)
    assert all(low < 50 and high > 100 for low, high in (axes.get_ylim() for axes in above))
    assert all(low < 25 < high for low, high in (axes.get_ylim() for axes in below))
