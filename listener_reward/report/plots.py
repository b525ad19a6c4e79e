"""The drawings of the page as coordinates of SVG: learning curves, reliability, accuracy against confidence, order.

Every drawing is told in the units of its view box, about one CSS pixel. `report.html` holds the markup.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from listener_reward.report.values import to_decimals, to_fraction, to_list, to_mapping, to_number, to_percent

LEFT, RIGHT, TOP, BOTTOM = 36, 312, 20, 152
"""The plot area of a panel, in the units of its view box (about one CSS pixel)."""

MAX_BANDS = 60
"""Steps of a panel that answer to the pointer; more would be thinner than a pointer can hit."""


def variant_color(index: int) -> int:
    """The number of a variant's CSS colour; there are four."""
    return index % 4 + 1


# ---------------------------------------------------------------------------------------------------------------------
# Learning curves
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Metric:
    """A panel of the learning curves."""

    key: str
    title: str
    meaning: str
    percent: bool = True
    from_zero: bool = False
    """Whether the axis starts at zero: where how little there is of something is the point."""


METRICS = (
    Metric("reward", "Reward", "mean over a step; each variant's own reward", percent=False),
    Metric("accuracy", "Accuracy", "the answer's agreement with the label"),
    Metric("listener", "Listener's confidence", "how far the thought convinces it of the label"),
    Metric("contradiction", "Contradictions", "the listener picks the other picture", from_zero=True),
    Metric("malformed", "Malformed", "no readable answer", from_zero=True),
)


def curve_panel(metric: Metric, curves: Mapping[str, Any]) -> dict[str, Any]:
    """A panel's lines, ticks and hover bands, in view box coordinates."""
    variants = {name: _series(to_mapping(variant), metric.key) for name, variant in curves.items()}
    known = [(step, value) for series in variants.values() for step, value in series if value is not None]
    panel: dict[str, Any] = {"title": metric.title, "meaning": metric.meaning, "percent": metric.percent, "lines": []}
    panel |= {"x_ticks": [], "y_ticks": [], "bands": [], "empty": not known}
    if not known:
        return panel

    x_low, x_high = min(step for step, _ in known), max(step for step, _ in known)
    x_ticks = [tick for tick in _ticks(x_low, x_high, count=6) if x_low <= tick <= x_high] or [x_low]
    lowest, highest = min(value for _, value in known), max(value for _, value in known)
    y_ticks = _ticks(min(0.0, lowest) if metric.from_zero else lowest, highest)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * ((step - x_low) / (x_high - x_low) if x_high > x_low else 0.5), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - y_low) / (y_high - y_low), 1)

    def text(value: float | None) -> str | None:
        return to_decimals(value, 1 if metric.percent else 2, percent=metric.percent)

    smoothed: dict[str, dict[float, float]] = {}
    for index, (name, series) in enumerate(variants.items()):
        steps = [step for step, _ in series]
        smooth = _smooth([value for _, value in series])
        smoothed[name] = {step: value for step, value in zip(steps, smooth, strict=True) if value is not None}
        panel["lines"].append(
            {
                "name": name,
                "color": variant_color(index),
                "raw": _path([(x(step), None if value is None else y(value)) for step, value in series]),
                "smooth": _path([(x(s), None if v is None else y(v)) for s, v in zip(steps, smooth, strict=True)]),
                "last": text(next((value for value in reversed(smooth) if value is not None), None)),
            }
        )
    panel["x_ticks"] = [{"at": x(tick), "text": f"{tick:g}"} for tick in x_ticks]
    digits = _tick_digits(y_ticks, metric.percent)
    panel["y_ticks"] = [{"at": y(t), "text": to_decimals(t, digits, percent=metric.percent)} for t in y_ticks]
    panel["bands"] = [
        {
            "left": left,
            "width": round(right - left, 1),
            "at": x(step),
            "title": "\n".join(
                [f"step {step:g}"]
                + [
                    f"{name}: {text(values[step])}{' %' if metric.percent else ''}"
                    for name, values in smoothed.items()
                    if step in values
                ]
            ),
        }
        for step, left, right in _bands(sorted({step for values in smoothed.values() for step in values}), x)
    ]
    return panel


def _series(variant: Mapping[str, Any], key: str) -> list[tuple[float, float | None]]:
    """(step, value) of a curve in the order of the steps; the position stands in for a step that is not known."""
    values = [to_number(value) for value in to_list(variant.get(key))]
    steps = [to_number(step) for step in to_list(variant.get("step"))][: len(values)]
    steps += [None] * (len(values) - len(steps))
    known = [float(i) if step is None else step for i, step in enumerate(steps)]
    return sorted(zip(known, values, strict=True), key=lambda point: point[0])


def _smooth(values: Sequence[float | None]) -> list[float | None]:
    """A centred Gaussian mean, one point in forty wide: it does not lag, as an exponential one does. Gaps stay gaps."""
    sigma = max(1.0, len(values) / 40)
    reach = math.ceil(3 * sigma)
    kernel = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    smooth: list[float | None] = []
    for i, value in enumerate(values):
        near = [(kernel[j - i + reach], values[j]) for j in range(max(0, i - reach), min(len(values), i + reach + 1))]
        present = [(weight, v) for weight, v in near if v is not None]
        total = sum(weight for weight, _ in present)
        smooth.append(None if value is None else sum(weight * v for weight, v in present) / total)
    return smooth


# ---------------------------------------------------------------------------------------------------------------------
# How sure, how right, and what order does
# ---------------------------------------------------------------------------------------------------------------------


SQUARE = (36, 232, 12, 176)
"""The plot area of all drawings here: left, right, top, bottom."""


def reliability_panel(bins: object) -> dict[str, Any] | None:
    """A dot for each bin of confidence: how sure the judge was across, how many people agree upwards.

    None where `bins` holds none; see `diagnostics.diagnose`.
    """
    left, right, top, bottom = SQUARE
    known = []
    for one in map(to_mapping, to_list(bins)):
        n, sure, agreed = to_number(one.get("n")), to_fraction(one.get("confidence")), to_fraction(one.get("agreement"))
        if n and n > 0 and sure is not None and agreed is not None:
            known.append((n, max(sure, 0.5), agreed))
    if not known:
        return None
    total = sum(n for n, _, _ in known)
    dots = [
        {
            "x": round(left + (right - left) * 2 * (sure - 0.5), 1),
            "y": round(bottom - (bottom - top) * agreed, 1),
            "r": round(2 + 9 * math.sqrt(n / total), 1),
            "title": f"{n:.0f} pairs: {to_percent(sure)} sure, {to_percent(agreed)} of the people agree",
        }
        for n, sure, agreed in known
    ]
    return {"dots": dots, "line": _path([(dot["x"], dot["y"]) for dot in dots])}


def coverage_panel(coverages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A line for each of `coverages` (`name`, `color`, `dashed`, and `coverage` of `diagnostics.diagnose`): accuracy of
    the surest pairs against the fraction of pairs that they are. None where there is no line to draw."""
    left, right, top, bottom = SQUARE
    lines = []
    for one in coverages:
        found = to_mapping(one.get("coverage"))
        points = zip(map(to_fraction, to_list(found.get("share"))), map(to_fraction, to_list(found.get("accuracy"))))  # noqa: B905
        known = [(fraction, accuracy) for fraction, accuracy in points if fraction is not None and accuracy is not None]
        if known:
            lines.append((one, known))
    if not lines:
        return None
    heights = [accuracy for _, known in lines for _, accuracy in known]
    ticks = _ticks(min(0.5, *heights), max(heights))
    low, high = ticks[0], ticks[-1]

    def place(fraction: float, accuracy: float) -> tuple[float, float]:
        return round(left + (right - left) * fraction, 1), round(
            bottom - (bottom - top) * (accuracy - low) / (high - low), 1
        )

    digits = _tick_digits(ticks, percent=True)
    return {
        "lines": [
            {
                "name": one["name"],
                "color": one["color"],
                "dashed": one["dashed"],
                "d": _path([place(*p) for p in known]),
            }
            for one, known in lines
        ],
        "y_ticks": [{"at": place(0, t)[1], "text": to_decimals(t, digits, percent=True)} for t in ticks],
        "x_ticks": [{"at": place(t, low)[0], "text": f"{100 * t:g}"} for t in (0, 0.25, 0.5, 0.75, 1)],
        "half": place(0, 0.5)[1],
    }


def gap_panel(counts: object) -> dict[str, Any] | None:
    """A histogram of position gaps from -1 to 1; None where there is none to draw. The tallest bar fills the height."""
    left, right, top, bottom = SQUARE
    known = [max(0.0, to_number(count) or 0.0) for count in to_list(counts)]
    tallest, total = max(known, default=0.0), sum(known)
    if not tallest or len(known) > 1000:
        return None
    width = (right - left) / len(known)
    bars = []
    for number, count in enumerate(known):
        height = (bottom - top) * count / tallest
        low = 2 * number / len(known) - 1
        bars.append(
            {
                "x": round(left + number * width + 0.5, 1),
                "y": round(bottom - height, 1),
                "width": round(width - 1, 1),
                "height": round(height, 1),
                "title": f"{to_decimals(low, 2)} to {to_decimals(low + 2 / len(known), 2)}: {count:.0f} pairs, "
                f"{to_percent(count / total)}",
            }
        )
    return {"bars": bars, "tallest": to_percent(tallest / total)}


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers in about `count` equal steps, the first at most `low` and the last at least `high`."""
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):
        low, high = (0.0, 1.0) if 0 <= low <= 1 else (low - 0.5, low + 0.5)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tick_digits(ticks: Sequence[float], percent: bool) -> int:
    """The fewest decimals that tell the ticks apart."""
    scale = 100 if percent else 1
    return next((d for d in range(6) if all(abs(round(t * scale, d) - t * scale) < 1e-9 for t in ticks)), 6)


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """SVG path data with a break at every gap; `h0` makes a dot of a point that has no neighbour."""
    data, pen_down = [], False
    for x, y in points:
        if y is not None:
            data.append(f"L{x:g} {y:g}" if pen_down else f"M{x:g} {y:g}h0")
        pen_down = y is not None
    return "".join(data)


def _bands(steps: Sequence[float], x: Callable[[float], float]) -> list[tuple[float, float, float]]:
    """(step, left, right) of the areas that answer to the pointer: each reaches half-way to its neighbours."""
    if len(steps) > MAX_BANDS:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_BANDS - 1))] for i in range(MAX_BANDS)]
    centers = [x(step) for step in steps]
    edges = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(centers)), RIGHT]
    return [(step, round(left, 1), right) for step, (left, right) in zip(steps, itertools.pairwise(edges), strict=True)]
