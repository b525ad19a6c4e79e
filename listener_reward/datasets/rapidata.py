"""Rapidata's preference sets: counted votes, votes weighted by the voters' reliability, or both as JSON text."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator
from typing import Any

from listener_reward.datasets.format import (
    Format,
    Labelled,
    Place,
    Row,
    Skipped,
    field,
    fraction_first,
    names,
    number,
    published,
    text,
    undecoded,
)
from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair

CRITERIA = {"coherence": "quality", "alignment": "alignment"}
"""The criterion that asks for each dimension: coherence is the freedom from visual faults. Preference is the general
question."""

_WEIGHTED = re.compile(r"weighted_results_image1_(\w+)")
_SIDE = re.compile(r"(?:image|option)?[ _]?([12])(?:\.\w+)?", re.IGNORECASE)


def _rapidata(row: Row, place: Place) -> Iterator[Labelled | Skipped]:
    """p_first is the first image's part of all votes, or of the weighted ones; an equal number is a tie."""
    results = _results(row)
    wanted = place.dimension or ("preference" if "preference" in results else "all")
    if wanted != "all" and wanted not in results:
        raise InputError(f"dimension is {wanted!r}; the file has {', '.join(results)}")
    images = [undecoded(field(row, name), place) for name in ("image1", "image2")]
    for dimension, votes in results.items():
        if wanted not in ("all", dimension):
            continue
        if sum(votes) == 0:
            yield Skipped(f"no votes for {dimension}")
            continue
        name = f"{place.index}/{dimension}"
        prompt, p_first, criterion = field(row, "prompt"), fraction_first(*votes), CRITERIA.get(dimension)
        pair = PreferencePair(prompt, images[0], images[1], p_first, name, "rapidata", criterion=criterion)
        yield published(
            pair,
            item=(text(row.get("image1_path")), text(row.get("image2_path"))),
            model=(text(row.get("model1")), text(row.get("model2"))),
            votes=votes,
            dimension=dimension,
            category=text(row.get("category")),
        )


RAPIDATA = Format(
    "rapidata",
    _rapidata,
    {
        "model_first": "string",
        "model_second": "string",
        "votes_first": "float64",
        "votes_second": "float64",
        "dimension": "string",
        "category": "string",
    },
    signs=tuple(
        frozenset({"prompt", "image1", "image2", name})
        for name in ("votes_image1", "weighted_results_image1_preference", "aggregated_results")
    ),
)


def _results(row: Row) -> dict[str, tuple[float, float]]:
    """Each dimension to the votes for the two images."""
    if "votes_image1" in row:
        return {"preference": _two(row.get("votes_image1"), row.get("votes_image2"), "votes_image1, votes_image2")}
    weighted = {match[1]: name for name in row if (match := _WEIGHTED.fullmatch(name)) and row[name] is not None}
    if weighted:
        return {
            dimension: _two(row[name], row.get(name.replace("image1", "image2", 1)), name)
            for dimension, name in weighted.items()
        }
    if "aggregated_results" in row:
        return {"preference": _aggregated(row["aggregated_results"])}
    raise InputError(f"votes_image1, weighted_results_image1_... or aggregated_results is not in {names(row)}; add one")


def _aggregated(value: Any) -> tuple[float, float]:
    """Votes from JSON text such as `{"image1": 7, "image2": 3}`, the two images in either order."""
    try:
        counts = json.loads(value) if isinstance(value, str) else value
        sides = {match[1]: votes for name, votes in counts.items() if (match := _SIDE.fullmatch(name))}
        return _two(sides["1"], sides["2"], "aggregated_results")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        given = reprlib.repr(value)
        raise InputError(f"aggregated_results is {given}; give the votes for image1 and image2") from error


def _two(first: Any, second: Any, name: str) -> tuple[float, float]:
    votes = number(first, name), number(second, name)
    if votes[0] is None or votes[1] is None or min(votes[0], votes[1]) < 0:
        raise InputError(f"{name} is {reprlib.repr(first)}, {reprlib.repr(second)}; give two numbers of at least 0")
    return votes[0], votes[1]
