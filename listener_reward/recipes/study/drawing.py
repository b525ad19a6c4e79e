"""What is there of a study, as figures: one a question, a panel for each metric or for each split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from listener_reward.errors import missing

if fault := missing("plot", "drawing"):
    raise fault

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from listener_reward.evaluate.intervals import t_interval
from listener_reward.evaluate.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, save_svg, styled
from listener_reward.recipes.study.plans import Question, Study
from listener_reward.recipes.study.results import METRICS, Records, figures, rows_of
from listener_reward.recipes.study.runs import slug

COLORS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
DASHES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
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
            save_svg(figure_of(panels, axis_of(question)), paths[-1])
    return paths


def axis_of(question: Question) -> str | None:
    """What a question asks to see its arms along: the field that varies, the tokens of several thoughts, or whatever
    else is measured in several ways; None where there is no such thing."""
    if question.vary is not None or len(question.measurements) < 2:
        return question.vary
    judges = [getattr(measured, "judge", {}) for measured in question.measurements.values()]
    return METRICS["tokens"].title if all("thoughts" in judge for judge in judges) else "measurement"


def panels_of(question: Question, records: Records) -> dict[str, dict[str, Points]]:
    """By title of the panel and name of the line, the values at each place.

    Where a question has an axis, its values are the places, an arm is a line, and a panel is the first metric's of one
    column. Else columns are the places, and a panel is a metric's.
    """
    panels: dict[str, dict[str, dict[Any, list[float]]]] = {}
    for title, line, place, value in _points(question, records):
        panels.setdefault(title, {}).setdefault(line, {}).setdefault(place, []).append(value)
    return panels  # pyright: ignore[reportReturnType]


def _points(question: Question, records: Records) -> Iterator[tuple[str, str, Any, float]]:
    """Title, line, place and value of every number that is drawn."""
    axis = axis_of(question)
    for runs in rows_of(question).values():
        found = [(run, figures(records[run.key])) for run in runs if run.key in records]
        for run, numbers in found:
            drawn = [metric for metric in DRAWN if numbers.get(metric)][: 1 if axis else None]
            for metric, column, value in ((name, *entry) for name in drawn for entry in numbers[name].items()):
                shown = METRICS[metric]
                if axis is None:
                    yield shown.title, run.label, _number(column), value * shown.factor
                    continue
                place: Any = run.value if question.vary is not None else run.point
                if axis == METRICS["tokens"].title:  # one place for all seeds
                    place = round(float(np.mean([each["tokens"][column] for _, each in found])))
                yield f"{shown.title}, {column}", run.arm_name, place, value * shown.factor


@styled
def figure_of(panels: Mapping[str, Mapping[str, Points]], axis: str | None = None) -> Figure:
    """Panels side by side; a line's mean over seeds, and its 95 % t-interval as a band, or as a bar over names.

    A name has one colour in all panels.
    """
    figure = Figure(figsize=(4.4 * len(panels), 3.8))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (title, lines) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
        _draw(axes, lines, names)
        axes.set(title=title, xlabel=axis)
    shown = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    handles = [shown[name] for name in names]
    columns = max(1, int(figure.get_figwidth() / (0.7 + 0.08 * max(map(len, names)))))  # in inches
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns, len(names)), frameon=False)
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
            marker = MARKERS[style // len(COLORS) % len(MARKERS)]
            axes.errorbar(at, means, halves, color=color, fmt=marker, capsize=2, label=name)
    if numbers:
        if min(places) > 0 and max(places) >= 8 * min(places):
            axes.set_xscale("log", base=2)
        ticks = _apart(sorted(places), log=axes.get_xscale() == "log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(places)), [fill(str(place), 14) for place in places])


def _apart(places: Sequence[float], *, log: bool) -> list[float]:
    """The first of `places`, in ascending order, and those whose labels do not run into the label before."""
    at = np.log(places) if log else np.array(places)
    kept = [0]
    for number in range(1, len(places)):
        if at[number] - at[kept[-1]] >= 0.1 * (at[-1] - at[0]):
            kept.append(number)
    return [places[number] for number in kept]


def _number(column: str) -> Any:
    return int(column) if column.isdigit() else column
