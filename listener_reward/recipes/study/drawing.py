"""What is there of a study, as figures: one a question, a panel for each metric or for each split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from listener_reward.evaluate.intervals import t_interval
from listener_reward.evaluate.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, save_svg, styled
from listener_reward.recipes.study.plans import Question, Study
from listener_reward.recipes.study.results import METRICS, Records, figures, rows_of
from listener_reward.recipes.study.runs import slug

COLORS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
DASHES = ("-", "--", ":", "-.")
DRAWN = ("accuracy", "contradiction_rate", "true utility", "own view", "KL", "color", "framed")
"""The metrics that have a panel; the tables have the others."""

Points = Mapping[Any, list[float]]
"""Values over seeds by their place on the x-axis."""


def draw_study(study: Study, records: Records, folder: Path) -> list[Path]:
    """Writes an SVG for every question of which a run is there, and returns the paths."""
    paths: list[Path] = []
    for question in study.questions:
        if panels := panels_of(question, records):
            paths.append(folder / f"{slug(question.question)[:60]}.svg")
            save_svg(figure_of(panels, question.vary), paths[-1])
    return paths


def panels_of(question: Question, records: Records) -> dict[str, dict[str, Points]]:
    """By title of the panel and name of the line, the values at each place.

    Where a field varies, its values are the places, an arm is a line, and a panel is the first metric's of one column.
    Else columns are the places, and a panel is a metric's.
    """
    panels: dict[str, dict[str, dict[Any, list[float]]]] = {}
    for run in (run for runs in rows_of(question).values() for run in runs if run.key in records):
        shown = {
            name: by_column for name, by_column in figures(records[run.key]).items() if name in DRAWN and by_column
        }
        for metric, by_column in list(shown.items())[: 1 if question.vary else None]:
            for column, value in by_column.items():
                title = METRICS[metric].title + (f", {column}" if question.vary else "")
                place = getattr(run.arm.recipe, question.vary) if question.vary else _number(column)
                line = panels.setdefault(title, {}).setdefault(run.arm_name if question.vary else run.label, {})
                line.setdefault(place, []).append(value * METRICS[metric].factor)
    return panels  # pyright: ignore[reportReturnType]


@styled
def figure_of(panels: Mapping[str, Mapping[str, Points]], vary: str | None = None) -> Figure:
    """Panels side by side; a line's mean over seeds, and its 95 % t-interval as a band, or as a bar over names.

    A name has one colour in all panels.
    """
    figure = Figure(figsize=(4.4 * len(panels), 3.8))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (title, lines) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
        _draw(axes, lines, names)
        axes.set(title=title, xlabel=vary)
    shown = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    handles = [shown[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(2 * len(panels) + 1, len(names)), frameon=False)
    return figure


def _draw(axes: Axes, lines: Mapping[str, Points], names: Sequence[str]) -> None:
    places = list(dict.fromkeys(place for points in lines.values() for place in points))
    numbers = all(isinstance(place, int | float) for place in places)
    for index, (name, points) in enumerate(lines.items()):
        style = names.index(name)
        color, dash = COLORS[style % len(COLORS)], DASHES[style // len(COLORS) % len(DASHES)]
        found = {place: t_interval(values) for place, values in points.items()}
        means = np.array([mean for mean, _ in found.values()])
        halves = np.array([half or 0 for _, half in found.values()])
        if numbers:
            axes.plot([*found], means, color=color, linestyle=dash, label=name)
            axes.fill_between([*found], means - halves, means + halves, color=color, alpha=0.15, linewidth=0)
        else:
            offset = (index - (len(lines) - 1) / 2) * 0.6 / len(lines)
            at = np.array([places.index(place) for place in found]) + offset
            axes.errorbar(at, means, halves, color=color, fmt="o", capsize=2, label=name)
    if numbers:
        if min(places) > 0 and max(places) >= 16 * min(places):
            axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(places)), [str(place) for place in places])


def _number(column: str) -> Any:
    return int(column) if column.isdigit() else column
