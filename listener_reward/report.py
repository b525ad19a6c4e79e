"""Writes the results of a run as one HTML page that opens anywhere: no server, no network, no second file.

This module turns numbers into text and coordinates; `report.html` holds all markup. Prompts and thoughts come from data
sets and models, so they are untrusted: the template escapes every value, and the page's security policy allows no
request and no script but its own. A value that is missing, None or NaN is shown as a dash: a page about a half-finished
run is better than none.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from PIL import Image

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

PIXELATED_BELOW = 192
"""Pictures whose longest side is smaller are enlarged in hard pixels: smoothing would blur what the judge saw."""

SPLITS = {
    "id": ("In distribution", "New pairs of the same kind as in training."),
    "ood": (
        "Out of distribution",
        "Prompts and a drawing style that training never showed; the frame says nothing about quality.",
    ),
    "wrong": (
        "Wrong-way",
        "In training a framed picture was usually the better one; here it is usually the worse one, so a judge that "
        "learnt to look for the frame falls below 50 %.",
    ),
}
"""Title and explanation of the tiny world's splits; another split is shown under its own name."""


def write_report(path: str | os.PathLike[str], results: Mapping[str, Any]) -> Path:
    """Write `results` to `path` as one self-contained HTML page (UTF-8) and return the path.

    Folders that do not exist are made. `results` may hold, each optional:

    - `title`, `created`, `command`: text; `versions`, `settings`: name to value.
    - `table`: one mapping per model and split, `Evaluation.to_dict()` with `model` and `split` added.
    - `curves`: arm to `{"step": [...], "reward": [...], "accuracy": [...], "listener": [...], "contradiction": [...],
      "malformed": [...]}`, lists of equal length; rates in [0, 1]; None where nothing was measured.
    - `ranking`: `Ranking.to_dict()` with `prompt` and `images` (base64 of PNG, JPEG or WebP) added.
    - `pairs`: mappings with `prompt`, `split`, `model`, `p_first`, `first_png`, `second_png` (base64) and `verdict`
      (`Verdict.to_dict()`).
    """
    template = _environment().from_string(
        importlib.resources.files("listener_reward").joinpath("report.html").read_text(encoding="utf-8")
    )
    curves = _mapping(results.get("curves"))
    table = [_mapping(row) for row in _list(results.get("table"))]
    scale = _scale(table)
    page = template.render(
        title=results.get("title") or "Listener reward: report",
        created=results.get("created"),
        command=results.get("command"),
        columns=COLUMNS,
        more_columns=MORE_COLUMNS,
        scale=scale,
        splits=_splits(table, scale),
        arms=[{"name": name, "color": _arm_color(index)} for index, name in enumerate(curves)],
        panels=[_panel(metric, curves) for metric in METRICS],
        ranking=_ranking(_mapping(results.get("ranking"))),
        pairs=[_pair(_mapping(pair)) for pair in _list(results.get("pairs"))],
        settings=[(name, _plain(value)) for name, value in _mapping(results.get("settings")).items()],
        versions=[(name, _plain(value)) for name, value in _mapping(results.get("versions")).items()],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The script is named in the page's policy by its hash, so that no other script runs even if one got in.
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment


_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _shown(value: object) -> object:
    """What the template prints for `value`: a dash for nothing, and no character that UTF-8 or HTML refuses."""
    if value is None or value == "":
        return DASH
    if isinstance(value, markupsafe.Markup):
        return value  # from the template itself (its script), never from a result
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def _number(value: object) -> float | None:
    """`value` as a finite float, or None for what is not one or is too large to be a measurement."""
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < 1e12 else None


def _decimals(value: object, digits: int, *, percent: bool = False, sign: bool = False) -> str | None:
    number = _number(value)
    if number is None:
        return None
    text = f"{100 * number if percent else number:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", MINUS)


def _share(value: object) -> float | None:
    """`value` as a share in [0, 1], or None for what is not one."""
    number = _number(value)
    return None if number is None else min(1.0, max(0.0, number))


def _whole_percent(value: object) -> str | None:
    share = _share(value)
    return None if share is None else f"{100 * share:.0f} %"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    """`value` as a list: empty for None, for text and for whatever cannot be listed (numpy arrays can)."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)) else []


def _plain(value: object) -> str | None:
    """A setting as text: what JSON calls a value keeps its JSON spelling, except for text and None."""
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the result table."""

    key: str
    title: str
    meaning: str
    digits: int = 3
    percent: bool = False
    best: str | None = "lowest"
    interval: str | None = None
    """The key of the pair of numbers that is the value's 95 % interval."""


COLUMNS = (
    Column(
        "accuracy",
        "accuracy, %",
        "share of pairs, ties among people left out, in which the judge picks the picture that most people prefer",
        digits=1,
        percent=True,
        best="highest",
        interval="accuracy_interval",
    ),
    Column(
        "contradiction_rate",
        "contradictions, %",
        "share of thoughts after which the listener picks the other picture than the thought's own answer",
        digits=1,
        percent=True,
        interval="contradiction_interval",
    ),
    Column("malformed_rate", "malformed, %", "share of thoughts without a readable answer", digits=1, percent=True),
    Column("position_gap", "position gap", "how far the judge's probability moves when the two pictures swap places"),
    Column("ece", "ECE", "expected calibration error: the gap between how sure the judge is and how often it is right"),
)
MORE_COLUMNS = (
    Column("brier", "Brier score", ""),
    Column("nll", "log loss", ""),
    Column("listener_accuracy", "listener accuracy, %", "", digits=1, percent=True, best="highest"),
    Column("swap_consistency", "swap consistency, %", "", digits=1, percent=True, best="highest"),
    Column("swap_checked", "pairs swapped", "", digits=0, best=None),
    Column("always_first", "always the first, %", "", digits=1, percent=True, best=None),
    Column("seconds", "seconds", "", digits=0, best=None),
)


def _scale(table: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The ends of the axis that all accuracies share, in whole tens of per cent; one half is on it."""
    shares = [
        share for row in table for share in (_share(row.get("accuracy")), *_interval(row.get("accuracy_interval")))
    ]
    known = [0.5, *(share for share in shares if share is not None)]
    return 10 * math.floor(10 * min(known) - 1e-9), 10 * math.ceil(10 * max(known) + 1e-9)


def _splits(table: Sequence[Mapping[str, Any]], scale: tuple[int, int]) -> list[dict[str, Any]]:
    """The rows of the table by split, the known splits first, models in the order of the results."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        rows.setdefault(str(row.get("split") or "all pairs"), []).append(row)
    names = [name for name in SPLITS if name in rows] + [name for name in rows if name not in SPLITS]
    return [_split(name, rows[name], scale) for name in names]


def _split(name: str, rows: Sequence[Mapping[str, Any]], scale: tuple[int, int]) -> dict[str, Any]:
    def place(share: float | None) -> float | None:
        return None if share is None else (100 * share - scale[0]) / (scale[1] - scale[0])

    title, meaning = SPLITS.get(name, (name, ""))
    cells = {column.key: _cells(column, rows) for column in COLUMNS + MORE_COLUMNS}
    models = [
        {
            "name": row.get("model"),
            "cells": {key: column_cells[index] for key, column_cells in cells.items()},
            "dot": place(_share(row.get("accuracy"))),
            "whisker": [place(end) for end in _interval(row.get("accuracy_interval"))],
            "half": place(0.5),
        }
        for index, row in enumerate(rows)
    ]
    sizes = {(_decimals(row.get("n"), 0), _decimals(row.get("n_ties"), 0)) for row in rows}
    n, ties = sizes.pop() if len(sizes) == 1 else (None, None)
    return {"title": title, "meaning": meaning, "models": models, "n": n, "ties": ties}


def _cells(column: Column, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A column of one split. Values that print the same are equally good; if all do, none is the best."""
    texts = [_decimals(row.get(column.key), column.digits, percent=column.percent) for row in rows]
    values = {text: float(text.replace(MINUS, "-")) for text in texts if text is not None}
    best = None
    if column.best and len(values) > 1:
        best = (max if column.best == "highest" else min)(values, key=lambda text: values[text])
    cells = []
    for row, text in zip(rows, texts, strict=True):
        low, high = _interval(row.get(column.interval)) if column.interval else (None, None)
        spread = None
        if low is not None and high is not None:
            ends = [_decimals(end, column.digits, percent=column.percent) for end in (low, high)]
            spread = f"{ends[0]}{DASH}{ends[1]}"
        cells.append({"text": text, "interval": spread, "best": best is not None and text == best})
    return cells


def _interval(value: object) -> tuple[float | None, float | None]:
    ends = [_share(end) for end in _list(value)]
    return (ends[0], ends[1]) if len(ends) == 2 else (None, None)


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
    Metric("reward", "Reward", "mean over a step; each arm's own reward", percent=False),
    Metric("accuracy", "Accuracy", "the answer's agreement with the label"),
    Metric("listener", "Listener's confidence", "how far the thought convinces it of the label"),
    Metric("contradiction", "Contradictions", "the listener picks the other picture", from_zero=True),
    Metric("malformed", "Malformed", "no readable answer", from_zero=True),
)

PANEL_WIDTH, PANEL_HEIGHT = 320, 184
LEFT, RIGHT, TOP, BOTTOM = 36, 312, 20, 152
"""The plot area of a panel, in the units of its view box (about one CSS pixel)."""

MAX_BANDS = 60
"""Steps of a panel that answer to the pointer; more would be thinner than a pointer can hit."""


def _arm_color(index: int) -> int:
    """The number of an arm's CSS colour; there are four."""
    return index % 4 + 1


def _panel(metric: Metric, curves: Mapping[str, Any]) -> dict[str, Any]:
    """A panel's lines, ticks and hover bands, in view box coordinates."""
    arms = {name: _series(_mapping(arm), metric.key) for name, arm in curves.items()}
    known = [(step, value) for series in arms.values() for step, value in series if value is not None]
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
        return _decimals(value, 1 if metric.percent else 2, percent=metric.percent)

    smoothed: dict[str, dict[float, float]] = {}
    for index, (name, series) in enumerate(arms.items()):
        steps = [step for step, _ in series]
        smooth = _smooth([value for _, value in series])
        smoothed[name] = {step: value for step, value in zip(steps, smooth, strict=True) if value is not None}
        panel["lines"].append(
            {
                "name": name,
                "color": _arm_color(index),
                "raw": _path([(x(step), None if value is None else y(value)) for step, value in series]),
                "smooth": _path([(x(s), None if v is None else y(v)) for s, v in zip(steps, smooth, strict=True)]),
                "last": text(next((value for value in reversed(smooth) if value is not None), None)),
            }
        )
    panel["x_ticks"] = [{"at": x(tick), "text": f"{tick:g}"} for tick in x_ticks]
    digits = _tick_digits(y_ticks, metric.percent)
    panel["y_ticks"] = [{"at": y(t), "text": _decimals(t, digits, percent=metric.percent)} for t in y_ticks]
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


def _series(arm: Mapping[str, Any], key: str) -> list[tuple[float, float | None]]:
    """(step, value) of a curve in the order of the steps; the position stands in for a step that is not known."""
    values = [_number(value) for value in _list(arm.get(key))]
    steps = [_number(step) for step in _list(arm.get("step"))][: len(values)]
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


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, ranking and pairs
# ---------------------------------------------------------------------------------------------------------------------


def _picture(encoded: object) -> dict[str, Any] | None:
    """An `<img>` for base64 of a PNG, JPEG or WebP; None for anything else, so that no other data gets into a URL."""
    if not isinstance(encoded, str):
        return None
    try:
        data = base64.b64decode(encoded, validate=True)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            kind, (width, height) = str(image.format).lower(), image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"source": source, "width": width, "height": height, "pixelated": max(width, height) < PIXELATED_BELOW}


def _ranking(ranking: Mapping[str, Any]) -> dict[str, Any]:
    """The ranked pictures, best first, with one standard error on a scale that they share."""
    images, scores = _list(ranking.get("images")), _list(ranking.get("scores"))
    errors = _list(ranking.get("standard_errors"))
    order = [int(i) for i in map(_number, _list(ranking.get("order"))) if i is not None and 0 <= i < len(images)]
    entries = []
    for rank, index in enumerate(order or range(len(images)), start=1):
        score = _number(scores[index]) if index < len(scores) else None
        error = _number(errors[index]) if index < len(errors) else None
        entries.append({"rank": rank if order else None, "picture": _picture(images[index]), "value": score})
        entries[-1] |= {"score": _decimals(score, 2, sign=True), "error": _decimals(error, 2), "spread": error or 0.0}
    placed = [entry for entry in entries if entry["value"] is not None]
    if placed:
        low = min(entry["value"] - entry["spread"] for entry in placed)
        high = max(entry["value"] + entry["spread"] for entry in placed)
        margin = 0.08 * (high - low) or 1.0
        low, span = low - margin, high - low + 2 * margin
        for entry in placed:
            entry["dot"] = (entry["value"] - low) / span
            entry["whisker"] = tuple((entry["value"] + side * entry["spread"] - low) / span for side in (-1, 1))
            entry["zero"] = -low / span
    return {
        "prompt": ranking.get("prompt"),
        "entries": entries,
        "comparisons": _decimals(ranking.get("comparisons"), 0),
    }


def _pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    verdict = _mapping(pair.get("verdict"))
    thoughts = [_thought(_mapping(thought)) for thought in _list(verdict.get("thoughts"))]
    # The first thought of each order is shown; the rest folds away.
    first_of_order = {thought["order"]: i for i, thought in reversed(list(enumerate(thoughts)))}
    shown = [thought for i, thought in enumerate(thoughts) if i in first_of_order.values()]
    folded = [thought for i, thought in enumerate(thoughts) if i not in first_of_order.values()]
    split = pair.get("split")
    people = _share(pair.get("p_first"))
    listener = _share(verdict.get("listener_p_first"))
    contradicted = bool(verdict.get("contradicted"))
    return {
        "prompt": pair.get("prompt"),
        "split": SPLITS[split][0] if isinstance(split, str) and split in SPLITS else split,
        "model": pair.get("model"),
        "pictures": [_picture(pair.get("first_png")), _picture(pair.get("second_png"))],
        "people_prefer": None if people is None or people == 0.5 else 1 if people > 0.5 else 2,
        "judge_prefers": verdict.get("preferred"),
        "mark": _mark(people, verdict),
        "contradicted": contradicted,
        "contradicted_thoughts": 0 if contradicted else sum(thought["contradicted"] for thought in thoughts),
        "bars": [
            _bar("people", people),
            _bar("judge", _share(verdict.get("p_first"))),
            _bar("listener", listener, warn=contradicted),
        ],
        "thoughts": shown,
        "folded": folded,
        "folded_contradicted": sum(thought["contradicted"] for thought in folded),
        "position_gap": _decimals(verdict.get("position_gap"), 2, sign=True),
    }


def _mark(people: float | None, verdict: Mapping[str, Any]) -> str | None:
    """Whether the verdict is right, None if that is not known. An undecided judge is wrong, as in the accuracy."""
    if people is None or "preferred" not in verdict:
        return None
    if people == 0.5:
        return "people tied"
    return "right" if verdict["preferred"] == (1 if people > 0.5 else 2) else "wrong"


def _bar(name: str, p_first: float | None, *, warn: bool = False) -> dict[str, Any]:
    second = None if p_first is None else 1 - p_first
    return {
        "name": name,
        "share": p_first,
        "first": _whole_percent(p_first),
        "second": _whole_percent(second),
        "warn": warn,
    }


def _thought(thought: Mapping[str, Any]) -> dict[str, Any]:
    answer = thought.get("answer") if thought.get("answer") in (1, 2) else None
    p_first = _share(thought.get("listener_p_first"))
    # How far the listener, who read the thought without its answer, would have given the same answer.
    agreement = None if p_first is None or answer is None else p_first if answer == 1 else 1 - p_first
    return {
        "text": thought.get("text"),
        "order": str(thought.get("order") or "as given"),
        "answer": answer,
        "agreement": agreement,
        "agreement_text": _whole_percent(agreement),
        "contradicted": bool(thought.get("contradicted")),
    }
