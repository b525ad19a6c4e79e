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
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from PIL import Image

from listener_reward.report_plots import METRICS, arm_color, coverage_panel, curve_panel, gap_panel, reliability_panel
from listener_reward.report_values import (
    DASH,
    MINUS,
    to_decimals,
    to_interval,
    to_list,
    to_mapping,
    to_number,
    to_percent,
    to_share,
    to_text,
)

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

    Folders that do not exist are made. `results` may hold what follows. What is not there is left out of the page; what
    is there and empty is shown as such.

    - `title`, `created`, `command`, `summary`: text; `notes`: list of text; `versions`, `settings`: name to value.
    - `table`: one mapping per model and split, `Evaluation.to_dict()` with `model` and `split` added, and optionally
      `diagnostics` (`diagnostics.diagnose`), `paired` (`PairedTest.to_dict()`) and `against`, the model it is to.
    - `curves`: arm to `{"step": [...], "reward": [...], "accuracy": [...], "listener": [...], "contradiction": [...],
      "malformed": [...]}`, lists of equal length; rates in [0, 1]; None where nothing was measured.
    - `ranking`: `Ranking.to_dict()` with `prompt` and `images` (base64 of PNG, JPEG or WebP) added.
    - `pairs`: mappings with `prompt`, `split`, `model`, `p_first`, `first_png`, `second_png` (base64) and `verdict`
      (`Verdict.to_dict()`), optionally `id`; as `Gallery.pairs` has them. `pairs_title` and `pairs_note`: text.
    """
    template = _environment().from_string(
        importlib.resources.files("listener_reward").joinpath("report.html").read_text(encoding="utf-8")
    )
    curves = to_mapping(results.get("curves"))
    table = [to_mapping(row) for row in to_list(results.get("table"))]
    colors = _colors([*curves, *(str(row.get("model")) for row in table)])
    scale = _scale(table)
    pairs = [_pair(to_mapping(pair)) for pair in to_list(results.get("pairs"))]
    page = template.render(
        has=set(results),
        title=results.get("title") or "Listener reward: report",
        created=results.get("created"),
        command=results.get("command"),
        summary=results.get("summary"),
        notes=to_list(results.get("notes")),
        columns=COLUMNS,
        more_columns=MORE_COLUMNS,
        scale=scale,
        splits=_splits(table, scale),
        protocols=_protocols(table),
        breakdown=_breakdown(table, colors),
        arms=[{"name": name, "color": colors[name]["color"]} for name in curves],
        panels=[curve_panel(metric, curves) for metric in METRICS],
        ranking=_ranking(to_mapping(results.get("ranking"))),
        pairs_title=results.get("pairs_title") or "Judged pairs",
        pairs_note=results.get("pairs_note"),
        pairs=pairs,
        filters=_filters(pairs),
        settings=[(name, to_text(value)) for name, value in to_mapping(results.get("settings")).items()],
        versions=[(name, to_text(value)) for name, value in to_mapping(results.get("versions")).items()],
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
    Column("missing", "pairs without an answer", "", digits=0, best=None),
    Column("seconds", "seconds", "", digits=0, best=None),
)


def _scale(table: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The ends of the axis that all accuracies share, in whole tens of per cent; one half is on it."""
    shares = [
        share for row in table for share in (to_share(row.get("accuracy")), *to_interval(row.get("accuracy_interval")))
    ]
    known = [0.5, *(share for share in shares if share is not None)]
    return 10 * math.floor(10 * min(known) - 1e-9), 10 * math.ceil(10 * max(known) + 1e-9)


def _by_split(table: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of the table by split, the known splits first, models in the order of the results."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        rows.setdefault(str(row.get("split") or "all pairs"), []).append(row)
    names = [name for name in SPLITS if name in rows] + [name for name in rows if name not in SPLITS]
    return {name: rows[name] for name in names}


def _title(split: str) -> str:
    return SPLITS[split][0] if split in SPLITS else split


def _splits(table: Sequence[Mapping[str, Any]], scale: tuple[int, int]) -> list[dict[str, Any]]:
    return [_split(name, rows, scale) for name, rows in _by_split(table).items()]


def _split(name: str, rows: Sequence[Mapping[str, Any]], scale: tuple[int, int]) -> dict[str, Any]:
    def place(share: float | None) -> float | None:
        return None if share is None else (100 * share - scale[0]) / (scale[1] - scale[0])

    title, meaning = SPLITS.get(name, (name, ""))
    cells = {column.key: _cells(column, rows) for column in COLUMNS + MORE_COLUMNS}
    models = [
        {
            "name": row.get("model"),
            "cells": {key: column_cells[index] for key, column_cells in cells.items()},
            "dot": place(to_share(row.get("accuracy"))),
            "whisker": [place(end) for end in to_interval(row.get("accuracy_interval"))],
            "half": place(0.5),
        }
        for index, row in enumerate(rows)
    ]
    sizes = {(to_decimals(row.get("n"), 0), to_decimals(row.get("n_ties"), 0)) for row in rows}
    n, ties = sizes.pop() if len(sizes) == 1 else (None, None)
    baselines = {to_decimals(row.get("always_first"), 1, percent=True): row.get("always_first") for row in rows}
    text, share = baselines.popitem() if len(baselines) == 1 else (None, None)
    baseline = {"text": text, "dot": place(to_share(share)), "half": place(0.5)} if text else None
    return {"title": title, "meaning": meaning, "models": models, "baseline": baseline, "n": n, "ties": ties}


def _cells(column: Column, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A column of one split. Values that print the same are equally good; if all do, none is the best."""
    texts = [to_decimals(row.get(column.key), column.digits, percent=column.percent) for row in rows]
    values = {text: float(text.replace(MINUS, "-")) for text in texts if text is not None}
    best = None
    if column.best and len(values) > 1:
        best = (max if column.best == "highest" else min)(values, key=lambda text: values[text])
    cells = []
    for row, text in zip(rows, texts, strict=True):
        low, high = to_interval(row.get(column.interval)) if column.interval else (None, None)
        spread = None
        if low is not None and high is not None:
            ends = [to_decimals(end, column.digits, percent=column.percent) for end in (low, high)]
            spread = f"{ends[0]}{DASH}{ends[1]}"
        cells.append({"text": text, "interval": spread, "best": best is not None and text == best})
    return cells


def _protocols(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each split, what each model has by each protocol, the baselines and the tests; without what `_splits` shows.

    A split is left out where there is one protocol, whose values are those of the accuracy, and no test.
    """
    parts = []
    for split, rows in _by_split(table).items():
        names = list(dict.fromkeys(name for row in rows for name in to_mapping(row.get("protocols"))))
        results = [[to_mapping(to_mapping(row.get("protocols")).get(name)) for name in names] for row in rows]
        tests = [to_mapping(row.get("paired")) for row in rows]
        known = [
            (to_decimals(row.get("accuracy"), 3), to_decimals(found.get("value"), 3))
            for row, of_row in zip(rows, results, strict=True)
            for found in of_row
        ]
        shuffled = any(found.get("always_first_in_file") is not None for of_row in results for found in of_row)
        if not any(tests) and not shuffled and all(accuracy == value for accuracy, value in known):
            continue
        parts.append(
            {
                "title": _title(split),
                "names": names,
                "against": next((row.get("against") for row in rows if row.get("against")), None)
                if any(tests)
                else None,
                "models": [
                    {
                        "name": row.get("model"),
                        "cells": [{"text": to_decimals(f.get("value"), 3), "interval": _ends(f, 3)} for f in of_row],
                        "difference": to_decimals(test.get("difference"), 3, sign=True),
                        "interval": _ends(test, 3, sign=True),
                        "p": _p_value(test.get("p_value")),
                    }
                    for row, of_row, test in zip(rows, results, tests, strict=True)
                ],
                "baselines": [
                    (title, [_agreed(row[column].get(key) for row in results) for column in range(len(names))])
                    for title, key in (
                        ("always the first", "always_first"),
                        ("always the first, in file order", "always_first_in_file"),
                    )
                    if key == "always_first" or shuffled
                ],
            }
        )
    return parts


def _agreed(values: Iterable[object]) -> str | None:
    """A number that all models of a split share, such as a baseline."""
    texts = {to_decimals(value, 3) for value in values}
    return texts.pop() if len(texts) == 1 else None


def _ends(found: Mapping[str, Any], digits: int, *, percent: bool = False, sign: bool = False) -> str | None:
    """An interval as text; its ends may be below zero."""
    ends = [to_decimals(end, digits, percent=percent, sign=sign) for end in to_list(found.get("interval"))]
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return f"{ends[0]}{' to ' if sign or MINUS in ends[0] else DASH}{ends[1]}"


def _p_value(value: object) -> str | None:
    p = to_share(value)
    return None if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


# ---------------------------------------------------------------------------------------------------------------------
# How sure, how right, and what order does
# ---------------------------------------------------------------------------------------------------------------------


def _colors(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """One colour for each model, the same in all drawings; a fifth model has the first colour again, dashed."""
    distinct = dict.fromkeys(names)
    return {name: {"color": arm_color(index), "dashed": index >= 4} for index, name in enumerate(distinct)}


def _breakdown(table: Sequence[Mapping[str, Any]], colors: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The splits whose rows have `diagnostics`."""
    parts = []
    for split, rows in _by_split([row for row in table if "diagnostics" in row]).items():
        models = [_model(row) | colors[str(row.get("model"))] for row in rows]
        parts.append({"title": _title(split), "models": models, "coverage": coverage_panel(models)})
    return parts


def _model(row: Mapping[str, Any]) -> dict[str, Any]:
    found = to_mapping(row.get("diagnostics"))
    bins = [to_mapping(one) for one in to_list(found.get("bins"))]
    position, contradictions = to_mapping(found.get("position")), to_mapping(found.get("contradictions"))
    by_pair = to_mapping(contradictions.get("by_pair"))
    kept = [to_mapping(one) for one in to_list(found.get("kept"))]
    return {
        "name": row.get("model"),
        "ece": to_decimals(row.get("ece"), 3),
        "n": to_decimals(row.get("n"), 0),
        "reliability": reliability_panel(bins),
        "bins": [
            {
                "range": f"{to_percent(one.get('low')) or DASH} to {to_percent(one.get('high')) or DASH}",
                "n": to_decimals(one.get("n"), 0),
                "agreement": to_decimals(one.get("agreement"), 1, percent=True),
                **_accuracy(one),
            }
            for one in bins
        ],
        "coverage": found.get("coverage"),
        "kept": [
            {"wanted": to_percent(one.get("wanted")), "share": to_percent(one.get("share")), **_accuracy(one)}
            for one in kept
        ],
        "gaps": gap_panel(position.get("counts")),
        "position": {
            "n": to_decimals(position.get("n"), 0),
            "mean": to_decimals(position.get("mean"), 3, sign=True),
            "mean_size": to_decimals(position.get("mean_size"), 3),
            "none": to_number(position.get("mean_size")) == 0,
            "turned": to_decimals(position.get("turned"), 1, percent=True),
            "interval": _ends(position, 1, percent=True),
            "to_first": to_decimals(position.get("to_first"), 1, percent=True),
            "to_second": to_decimals(position.get("to_second"), 1, percent=True),
        },
        "contradictions": {
            "thoughts": to_decimals(contradictions.get("thoughts"), 0),
            "rate": to_decimals(contradictions.get("rate"), 1, percent=True),
            "interval": _ends(contradictions, 1, percent=True),
            "right": to_decimals(contradictions.get("right"), 1, percent=True),
            "wrong": to_decimals(contradictions.get("wrong"), 1, percent=True),
            "by_pair": [_accuracy(to_mapping(by_pair.get(name))) for name in ("none", "some", "all")],
        }
        if contradictions
        else None,
    }


def _accuracy(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": to_decimals(found.get("accuracy"), 1, percent=True),
        "interval": _ends(found, 1, percent=True),
        "n": to_decimals(found.get("n"), 0),
    }


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
    images, scores = to_list(ranking.get("images")), to_list(ranking.get("scores"))
    errors = to_list(ranking.get("standard_errors"))
    order = [int(i) for i in map(to_number, to_list(ranking.get("order"))) if i is not None and 0 <= i < len(images)]
    entries = []
    for rank, index in enumerate(order or range(len(images)), start=1):
        score = to_number(scores[index]) if index < len(scores) else None
        error = to_number(errors[index]) if index < len(errors) else None
        entries.append({"rank": rank if order else None, "picture": _picture(images[index]), "value": score})
        entries[-1] |= {
            "score": to_decimals(score, 2, sign=True),
            "error": to_decimals(error, 2),
            "spread": error or 0.0,
        }
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
        "comparisons": to_decimals(ranking.get("comparisons"), 0),
    }


def _pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    verdict = to_mapping(pair.get("verdict"))
    thoughts = [_thought(to_mapping(thought)) for thought in to_list(verdict.get("thoughts"))]
    # The first thought of each order is shown; the rest folds away.
    first_of_order = {thought["order"]: i for i, thought in reversed(list(enumerate(thoughts)))}
    shown = [thought for i, thought in enumerate(thoughts) if i in first_of_order.values()]
    folded = [thought for i, thought in enumerate(thoughts) if i not in first_of_order.values()]
    split = pair.get("split")
    people = to_share(pair.get("p_first"))
    listener = to_share(verdict.get("listener_p_first"))
    contradicted = bool(verdict.get("contradicted"))
    return {
        "prompt": pair.get("prompt"),
        "split": _title(split) if isinstance(split, str) else split,
        "id": pair.get("id"),
        "model": pair.get("model"),
        "pictures": [_picture(pair.get("first_png")), _picture(pair.get("second_png"))],
        "people_prefer": None if people is None or people == 0.5 else 1 if people > 0.5 else 2,
        "judge_prefers": verdict.get("preferred"),
        "mark": _mark(people, verdict),
        "contradicted": contradicted,
        "contradicted_thoughts": 0 if contradicted else sum(thought["contradicted"] for thought in thoughts),
        "bars": [
            _bar("people", people),
            _bar("judge", to_share(verdict.get("p_first"))),
            _bar("listener", listener, warn=contradicted),
        ],
        "thoughts": shown,
        "folded": folded,
        "folded_contradicted": sum(thought["contradicted"] for thought in folded),
        "position_gap": to_decimals(verdict.get("position_gap"), 2, sign=True),
        "margin": to_decimals(verdict.get("margin"), 3, sign=True),
    }


def _filters(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The choices beside the search field, where there is something to choose: an option's value is its place.

    The template marks each card with the places of its own values, in `data-` attributes of the filters' names.
    """

    def told(pair: Mapping[str, Any], name: str) -> str:
        if name == "contradicted":
            if pair["bars"][2]["share"] is None:
                return "no listener"
            return "contradicted" if pair["contradicted"] or pair["contradicted_thoughts"] else "not contradicted"
        return str(_shown(pair[name]))

    filters = []
    for name, title in (("mark", "Verdict"), ("contradicted", "Listener"), ("model", "Judge"), ("split", "Data")):
        values = [told(pair, name) for pair in pairs]
        options = list(dict.fromkeys(values))
        if len(options) > 1:
            filters.append(
                {"name": name, "title": title, "options": options, "places": [options.index(v) for v in values]}
            )
    return filters


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
        "first": to_percent(p_first),
        "second": to_percent(second),
        "warn": warn,
    }


def _thought(thought: Mapping[str, Any]) -> dict[str, Any]:
    answer = thought.get("answer") if thought.get("answer") in (1, 2) else None
    own, p_first = to_share(thought.get("p_first")), to_share(thought.get("listener_p_first"))
    # How far the listener, who read the thought without its answer, would have given the same answer.
    agreement = None if p_first is None or answer is None else p_first if answer == 1 else 1 - p_first
    return {
        "text": thought.get("text"),
        "order": str(thought.get("order") or "as given"),
        "answer": answer,
        "sure": to_percent(own if answer == 1 else 1 - own) if answer and own is not None else None,
        "agreement": agreement,
        "agreement_text": to_percent(agreement),
        "contradicted": bool(thought.get("contradicted")),
    }
