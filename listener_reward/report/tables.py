"""The page's tables, for each split one of the judges, one of the protocols and one of the criteria, as texts and
places."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from listener_reward.report.values import DASH, MINUS, to_decimals, to_ends, to_fraction, to_interval, to_mapping


@dataclass(frozen=True, slots=True)
class Caption:
    """How the page calls a split, and what it says of it."""

    title: str
    meaning: str = ""


def captions_of(given: object) -> dict[str, Caption]:
    """`results["splits"]` as captions; a title that is no text is the split's name."""
    found = {}
    for name, words in to_mapping(given).items():
        told = {key: text for key, text in to_mapping(words).items() if isinstance(text, str)}
        found[str(name)] = Caption(told.get("title") or str(name), told.get("meaning", ""))
    return found


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
        "fraction of pairs, ties among people left out, in which the judge picks the picture that most people prefer",
        digits=1,
        percent=True,
        best="highest",
        interval="accuracy_interval",
    ),
    Column(
        "contradiction_rate",
        "contradictions, %",
        "fraction of thoughts after which the listener picks the other picture than the thought's own answer",
        digits=1,
        percent=True,
        interval="contradiction_interval",
    ),
    Column("malformed_rate", "malformed, %", "fraction of thoughts without a readable answer", digits=1, percent=True),
    Column("position_gap", "position gap", "how far the judge's probability moves when the two pictures swap places"),
    Column("ece", "ECE", "expected calibration error: the gap between how sure the judge is and how often it is right"),
)
MORE_COLUMNS = (
    Column("label_mass", "label mass", "the two labels' total probability at the answer slot", best="highest"),
    Column("brier", "Brier score", ""),
    Column("nll", "log loss", ""),
    Column("listener_accuracy", "listener accuracy, %", "", digits=1, percent=True, best="highest"),
    Column("swap_consistency", "swap consistency, %", "", digits=1, percent=True, best="highest"),
    Column("swap_checked", "pairs swapped", "", digits=0, best=None),
    Column("always_first", "always the first, %", "", digits=1, percent=True, best=None),
    Column("missing", "pairs without an answer", "", digits=0, best=None),
    Column("seconds", "seconds", "", digits=0, best=None),
)


def accuracy_axis(table: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The ends of the axis that all accuracies share, in whole tens of per cent; one half is on it."""
    fractions = [
        fraction
        for row in table
        for fraction in (to_fraction(row.get("accuracy")), *to_interval(row.get("accuracy_interval")))
    ]
    known = [0.5, *(fraction for fraction in fractions if fraction is not None)]
    return 10 * math.floor(10 * min(known) - 1e-9), 10 * math.ceil(10 * max(known) + 1e-9)


def by_split(
    table: Sequence[Mapping[str, Any]], captions: Mapping[str, Caption]
) -> list[tuple[Caption, list[Mapping[str, Any]]]]:
    """The rows of the table by split, those with a caption first and in its order, models in the order of the results.

    A split without a caption has its name for a title.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        rows.setdefault(str(row.get("split") or "all pairs"), []).append(row)
    names = [name for name in captions if name in rows] + [name for name in rows if name not in captions]
    return [(captions.get(name, Caption(name)), rows[name]) for name in names]


def splits(
    table: Sequence[Mapping[str, Any]], captions: Mapping[str, Caption], scale: tuple[int, int]
) -> list[dict[str, Any]]:
    return [_split(caption, rows, scale) for caption, rows in by_split(table, captions)]


def _split(caption: Caption, rows: Sequence[Mapping[str, Any]], scale: tuple[int, int]) -> dict[str, Any]:
    def place(fraction: float | None) -> float | None:
        return None if fraction is None else (100 * fraction - scale[0]) / (scale[1] - scale[0])

    cells = {column.key: _cells(column, rows) for column in COLUMNS + MORE_COLUMNS}
    models = [
        {
            "name": row.get("model"),
            "cells": {key: column_cells[index] for key, column_cells in cells.items()},
            "dot": place(to_fraction(row.get("accuracy"))),
            "whisker": [place(end) for end in to_interval(row.get("accuracy_interval"))],
            "half": place(0.5),
        }
        for index, row in enumerate(rows)
    ]
    sizes = {(to_decimals(row.get("n"), 0), to_decimals(row.get("n_ties"), 0)) for row in rows}
    n, ties = sizes.pop() if len(sizes) == 1 else (None, None)
    baselines = {to_decimals(row.get("always_first"), 1, percent=True): row.get("always_first") for row in rows}
    text, fraction = baselines.popitem() if len(baselines) == 1 else (None, None)
    baseline = {"text": text, "dot": place(to_fraction(fraction)), "half": place(0.5)} if text else None
    return asdict(caption) | {"models": models, "baseline": baseline, "n": n, "ties": ties}


def _cells(column: Column, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A column of one split. Values that print the same are equally good; if all do, none is the best."""
    texts = [to_decimals(row.get(column.key), column.digits, percent=column.percent) for row in rows]
    values = {text: float(text.replace(MINUS, "-")) for text in texts if text is not None}
    best = None
    if column.best and len(values) > 1:
        best = (max if column.best == "highest" else min)(values, key=lambda text: values[text])
    cells = []
    for row, text in zip(rows, texts, strict=True):
        reach = _reach(row.get(column.interval), column.digits, percent=column.percent) if column.interval else None
        cells.append({"text": text, "interval": reach, "best": best is not None and text == best})
    return cells


def _reach(interval: object, digits: int, *, percent: bool) -> str | None:
    """An interval of fractions as text."""
    low, high = (to_decimals(end, digits, percent=percent) for end in to_interval(interval))
    return None if low is None or high is None else f"{low}{DASH}{high}"


def protocols(table: Sequence[Mapping[str, Any]], captions: Mapping[str, Caption]) -> list[dict[str, Any]]:
    """For each split, what each model has by each protocol, the baselines and the tests; without what `splits` shows.

    A split is left out where there is one protocol, whose values are those of the accuracy, and no test.
    """
    parts = []
    for caption, rows in by_split(table, captions):
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
                "title": caption.title,
                "names": names,
                "against": next((row.get("against") for row in rows if row.get("against")), None)
                if any(tests)
                else None,
                "models": [
                    {
                        "name": row.get("model"),
                        "cells": [{"text": to_decimals(f.get("value"), 3), "interval": to_ends(f, 3)} for f in of_row],
                        "difference": to_decimals(test.get("difference"), 3, sign=True),
                        "interval": to_ends(test, 3, sign=True),
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


def criteria(table: Sequence[Mapping[str, Any]], captions: Mapping[str, Caption]) -> list[dict[str, Any]]:
    """For each split whose pairs have criteria, what each model has by each of them; other splits are left out."""
    parts = []
    for caption, rows in by_split(table, captions):
        results = [to_mapping(row.get("by_criterion")) for row in rows]
        if names := list(dict.fromkeys(name for of_row in results for name in of_row)):
            found = [[to_mapping(of_row.get(name)) for name in names] for of_row in results]
            heads = [(name, _agreed((of_row[k].get("n") for of_row in found), 0)) for k, name in enumerate(names)]
            models = [
                {"name": row.get("model"), "cells": [_of_criterion(one) for one in of_row]}
                for row, of_row in zip(rows, found, strict=True)
            ]
            parts.append({"title": caption.title, "names": heads, "models": models})
    return parts


def _of_criterion(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": to_decimals(found.get("accuracy"), 1, percent=True),
        "interval": _reach(found.get("accuracy_interval"), 1, percent=True),
        "ece": to_decimals(found.get("ece"), 3),
    }


def _agreed(values: Iterable[object], digits: int = 3) -> str | None:
    """A number that all models of a split share, such as a baseline."""
    texts = {to_decimals(value, digits) for value in values}
    return texts.pop() if len(texts) == 1 else None


def _p_value(value: object) -> str | None:
    p = to_fraction(value)
    return None if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"
