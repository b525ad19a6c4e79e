"""Figures of the documentation, the benchmarks and `calibrate --plot`, in one style, as SVG.

Equal data give equal files: no date, no random names, and no setting of the user's own matplotlibrc.

The page of `eval --html` draws for itself (`report.plots`): that page loads nothing.

Raises:
    MissingExtraError: on import, where the extra `plot` is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from listener_reward.errors import missing

if fault := missing("plot", "drawing"):
    raise fault

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from listener_reward.evaluate.confidence import reliability
from listener_reward.files import replace_file

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#767676"
"""Colours that colour-blind readers tell apart (Okabe and Ito's), and a grey for what is only compared with."""

LINE = 11.0
"""Points from one line of text to the next."""

STYLE: Mapping[str, Any] = {
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that the layout is the same everywhere
    "font.size": 9,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,  # inches
    "figure.constrained_layout.h_pad": 0.08,
    "svg.fonttype": "none",  # text stays text: smaller, and can be searched and selected
    "svg.hashsalt": "listener-reward",  # else every file has other random names of its parts
}

styled = style.context(["default", STYLE])
"""Decorates a function that draws: in it matplotlib has the style above, whatever the user's own matplotlibrc says."""


@styled
def save_svg(figure: Figure, path: Path | str) -> None:
    """Writes `figure` with a white background, which reads on light pages and on dark ones, and without a date."""
    replace_file(path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}))


@styled
def label_ends(axes: Axes, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes names to the right of where their lines end, in the lines' colours, none over another.

    The name of a line that ends left of another's end is written above its end. Call this last: places depend on the
    limits of `axes`.

    Args:
        labels: for each line its name, the x and y of its end in the units of the data, and its colour.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # only now is it known how high the axes are
    right, lowest = max((x for _, x, _, _ in labels), default=0), -np.inf
    for name, x, y, color in sorted(labels, key=lambda label: label[2]):
        text = axes.annotate(name, (x, y), (0, 7), textcoords="offset points", color=color, annotation_clip=False)
        if x < right:
            text.set(ha="center", va="bottom")
        else:
            own = axes.transData.transform((x, y))[1] * 72 / figure.dpi  # points
            lowest = max(own, lowest + LINE)
            text.set(ha="left", va="center", position=(6, lowest - own))


@styled
def reliability_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """A reliability diagram: how many people agree with the judge, against how sure the judge is.

    Args:
        curves: by name `(labels, p_first)`, (n,) floats in [0, 1] each, at least one pair. At most four curves.

    Returns:
        For each curve a line through its bins, in each bin a dot whose area goes by the bin's fraction of the pairs.
        The dashed diagonal is a judge that is as sure as people agree.
    """
    figure = Figure(figsize=(5, 4.2))
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="as sure as people agree")
    ends, lowest = [], 0.5
    for (name, (labels, p_first)), color in zip(curves.items(), (ORANGE, BLUE, GREEN, PURPLE), strict=False):
        bins = reliability(labels, p_first)
        confidence, agreement = [one.confidence for one in bins], [one.agreement for one in bins]
        axes.plot(confidence, agreement, color=color, linewidth=1.2, label=name)
        sizes = [700 * one.n / len(labels) for one in bins]
        axes.scatter(confidence, agreement, sizes, color=color, alpha=0.6, linewidths=0, label=name)
        ends.append((name, 1.01, agreement[-1], color))
        lowest = min(lowest, *agreement)
    axes.set(xlim=(0.49, 1.01), ylim=(np.floor(lowest * 10 - 0.1) / 10, 1.01), xticks=np.arange(0.5, 1.01, 0.1))
    axes.set(xlabel="confidence of the judge", title="fraction of people who agree")
    label_ends(axes, ends)
    return figure
