"""The page's pictures: the ranking, and judged pairs with their verdicts and thoughts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from listener_reward.report.tables import Caption
from listener_reward.report.values import (
    to_decimals,
    to_fraction,
    to_list,
    to_mapping,
    to_number,
    to_percent,
    to_printable,
)

PIXELATED_BELOW = 192
"""Pictures whose longest side is smaller are enlarged in hard pixels: smoothing would blur what the judge saw."""


MOST_SOURCES = 16
"""More source images of a prompt are not shown."""


def picture(encoded: object) -> dict[str, Any] | None:
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


def ranked(ranking: Mapping[str, Any]) -> dict[str, Any]:
    """The ranked pictures, best first, with one standard error on a scale that they share."""
    images, scores = to_list(ranking.get("images")), to_list(ranking.get("scores"))
    errors = to_list(ranking.get("standard_errors"))
    order = [int(i) for i in map(to_number, to_list(ranking.get("order"))) if i is not None and 0 <= i < len(images)]
    entries = []
    for rank, index in enumerate(order or range(len(images)), start=1):
        score = to_number(scores[index]) if index < len(scores) else None
        error = to_number(errors[index]) if index < len(errors) else None
        entries.append({"rank": rank if order else None, "picture": picture(images[index]), "value": score})
        entries[-1] |= {
            "score": to_decimals(score, 2, sign=True),
            "error": to_decimals(error, 2),
            "half_width": error or 0.0,
        }
    placed = [entry for entry in entries if entry["value"] is not None]
    if placed:
        low = min(entry["value"] - entry["half_width"] for entry in placed)
        high = max(entry["value"] + entry["half_width"] for entry in placed)
        margin = 0.08 * (high - low) or 1.0
        low, span = low - margin, high - low + 2 * margin
        for entry in placed:
            entry["dot"] = (entry["value"] - low) / span
            entry["whisker"] = tuple((entry["value"] + side * entry["half_width"] - low) / span for side in (-1, 1))
            entry["zero"] = -low / span
    return {
        "prompt": ranking.get("prompt"),
        "sources": [picture(source) for source in to_list(ranking.get("sources"))[:MOST_SOURCES]],
        "entries": entries,
        "comparisons": to_decimals(ranking.get("comparisons"), 0),
    }


def pair_card(pair: Mapping[str, Any], captions: Mapping[str, Caption]) -> dict[str, Any]:
    verdict = to_mapping(pair.get("verdict"))
    thoughts = [_thought(to_mapping(thought)) for thought in to_list(verdict.get("thoughts"))]
    # The first thought of each order is shown; the rest folds away.
    first_of_order = {thought["order"]: i for i, thought in reversed(list(enumerate(thoughts)))}
    visible = [thought for i, thought in enumerate(thoughts) if i in first_of_order.values()]
    folded = [thought for i, thought in enumerate(thoughts) if i not in first_of_order.values()]
    split, criterion = pair.get("split"), pair.get("criterion")
    people = to_fraction(pair.get("p_first"))
    listener = to_fraction(verdict.get("listener_p_first"))
    contradicted = bool(verdict.get("contradicted"))
    return {
        "prompt": pair.get("prompt"),
        "split": captions[split].title if isinstance(split, str) and split in captions else split,
        "id": pair.get("id"),
        "model": pair.get("model"),
        "criterion": criterion if isinstance(criterion, str) else None,
        "sources": [picture(source) for source in to_list(pair.get("source_pngs"))[:MOST_SOURCES]],
        "pictures": [picture(pair.get("first_png")), picture(pair.get("second_png"))],
        "people_prefer": None if people is None or people == 0.5 else 1 if people > 0.5 else 2,
        "judge_prefers": verdict.get("preferred"),
        "mark": _mark(people, verdict),
        "contradicted": contradicted,
        "contradicted_thoughts": 0 if contradicted else sum(thought["contradicted"] for thought in thoughts),
        "bars": [
            _bar("people", people),
            _bar("judge", to_fraction(verdict.get("p_first"))),
            _bar("listener", listener, warn=contradicted),
        ],
        "thoughts": visible,
        "folded": folded,
        "folded_contradicted": sum(thought["contradicted"] for thought in folded),
        "position_gap": to_decimals(verdict.get("position_gap"), 2, sign=True),
        "margin": to_decimals(verdict.get("margin"), 3, sign=True),
    }


def filters(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The choices beside the search field, where there is something to choose: an option's value is its place.

    The template marks each card with the places of its own values, in `data-` attributes of the filters' names.
    """

    def told(pair: Mapping[str, Any], name: str) -> str:
        if name == "contradicted":
            if pair["bars"][2]["fraction"] is None:
                return "no listener"
            return "contradicted" if pair["contradicted"] or pair["contradicted_thoughts"] else "not contradicted"
        return str(to_printable(pair[name]))

    found = []
    titles = {
        "mark": "Verdict",
        "contradicted": "Listener",
        "model": "Judge",
        "split": "Data",
        "criterion": "Criterion",
    }
    for name, title in titles.items():
        values = [told(pair, name) for pair in pairs]
        options = list(dict.fromkeys(values))
        if len(options) > 1:
            found.append(
                {"name": name, "title": title, "options": options, "places": [options.index(v) for v in values]}
            )
    return found


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
        "fraction": p_first,
        "first": to_percent(p_first),
        "second": to_percent(second),
        "warn": warn,
    }


def _thought(thought: Mapping[str, Any]) -> dict[str, Any]:
    answer = thought.get("answer") if thought.get("answer") in (1, 2) else None
    own, p_first = to_fraction(thought.get("p_first")), to_fraction(thought.get("listener_p_first"))
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
