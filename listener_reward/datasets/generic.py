"""The generic schema: anybody's own pairs, one a row.

`prompt`; `image_first` and `image_second`, or `images` with two entries; `p_first` in [0, 1], or `label` among 1, 2,
"first", "second", "tie"; and, where the file has them:

- `sources`, the images that the prompt speaks of, as a list or as one image; or `image_source`, or `source_image`, one;
- `criterion`, the name of the question that people were asked;
- `id`, and the columns of `OPTIONAL`.

A cell that is empty is a pair without sources, or one that was judged as a whole.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from listener_reward.datasets.format import (
    Format,
    Labelled,
    Place,
    Row,
    Unlabelled,
    group_of,
    is_empty,
    names,
    number,
    other_side,
    text,
    undecoded,
)
from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair

OPTIONAL = {
    "group": "string",
    "dimension": "string",
    "category": "string",
    **{f"{name}_{side}": "string" for name in ("item", "model") for side in ("first", "second")},
    **{f"{name}_{side}": "float64" for name in ("votes", "rank") for side in ("first", "second")},
}
"""Columns that are kept where the file has them; they mean what they mean in the published formats."""

SOURCES = ("sources", "image_source", "source_image")
"""What a file may call its source images."""

_FIELDS = ("prompt", "image_first", "image_second", "images", *SOURCES, "criterion", "p_first", "label", "id")
_FIELDS += tuple(OPTIONAL)
_LABELS = {"1": 1.0, "first": 1.0, "2": 0.0, "second": 0.0, "tie": 0.5}


def generic_format(
    source: str, fields: Collection[str], columns: Mapping[str, str], *, labelled: bool = True
) -> Format:
    """The generic schema as `source` uses it: `columns` renames, `fields` are those that the file has.

    Unless `labelled`, a row may be without a label.

    Raises:
        InputError: `columns` names a field that the schema has not.
    """
    if unknown := [name for name in columns if name not in _FIELDS]:
        raise InputError(f"columns names the field {unknown[0]!r}; the fields are {', '.join(_FIELDS)}")
    has = {*fields, *columns}
    asks: set[str] = ({"sources"} if has & set(SOURCES) else set()) | (has & {"criterion"})
    # The group tells one instruction on two sources apart.
    kept = {name: kind for name, kind in OPTIONAL.items() if name in has or (name == "group" and "sources" in asks)}
    for name in kept:
        if (other := other_side(name)) not in kept and other != name:
            raise InputError(f"{source} has a column {name} and no {other}; add it, or give {name} another name")
    read = partial(_pairs, source=source, columns=columns, kept=kept, labelled=labelled)
    return Format("generic", read, kept, frozenset(asks))


def _pairs(
    row: Row, place: Place, *, source: str, columns: Mapping[str, str], kept: Mapping[str, str], labelled: bool
) -> Iterator[Labelled | Unlabelled]:
    for name, column in columns.items():
        if column not in row:
            raise InputError(
                f"column {column!r} is missing from {names(row)}; change columns, the {name} is named there"
            )
    row = {**row, **{name: row[column] for name, column in columns.items()}}
    if "prompt" not in row:
        raise InputError(f"prompt is missing from {names(row)}; add it, or name it by columns={{'prompt': ...}}")
    first, second = (undecoded(image, place) for image in _two_images(row))
    sources = _sources(row, place)
    criterion = text(row.get("criterion"), "criterion")
    name = text(row.get("id"), "id") or str(place.index)
    if not labelled and is_empty(row.get("p_first")) and is_empty(row.get("label")):
        yield Unlabelled(row["prompt"], first, second, name, sources, criterion)
        return
    extra = {
        key: text(row.get(key), key) if kind == "string" else number(row.get(key), key) for key, kind in kept.items()
    }
    pair = PreferencePair(row["prompt"], first, second, _label_of(row), name, source, sources, criterion)
    if sources and extra.get("group") is None:
        extra["group"] = group_of(pair)
    yield Labelled(pair, extra)


def _two_images(row: Row) -> Sequence[Any]:
    if "image_first" in row and "image_second" in row:
        return row["image_first"], row["image_second"]
    if "images" not in row:
        raise InputError(f"image_first and image_second, or images, are not in {names(row)}; name them by columns")
    images = row["images"]
    if not isinstance(images, list) or len(images) != 2:
        raise InputError(f"images is {reprlib.repr(images)}; give a list of two")
    return images


def _sources(row: Row, place: Place) -> tuple[dict[str, Any], ...]:
    """The source images, undecoded, under whichever name the row has them. CSV holds several as a JSON list."""
    given = [name for name in SOURCES if not _is_nothing(row.get(name))]
    if not given:
        return ()
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} are both there; give the source images once")
    value = row[given[0]]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{given[0]} is {reprlib.repr(value)}, which is no list in JSON ({error})") from error
    several: list[Any] = value if isinstance(value, list) else [value]
    if any(_is_nothing(one) for one in several):
        raise InputError(f"{given[0]} is {reprlib.repr(value)}, with an empty place; leave out what is no source image")
    return tuple(undecoded(one, place) for one in several)


def _is_nothing(value: Any) -> bool:
    """Whether a cell has no image: empty, or what Parquet has for one, an object of nothing."""
    if isinstance(value, dict):
        return value.get("bytes") is None and value.get("path") is None
    return is_empty(value) or value == []


def _label_of(row: Row) -> float:
    """p_first, or what the label says it is."""
    given, label = row.get("p_first"), row.get("label")
    if not is_empty(given):
        try:
            return float(given)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"p_first is {reprlib.repr(given)}; give a number from 0 to 1") from error
    if is_empty(label):
        raise InputError(f"p_first and label are missing or empty in {names(row)}; fill in one, or name it by columns")
    # Tables make floats of whole numbers beside an empty cell, and a CSV has them as text: 1.0 is 1 in every file.
    word = re.sub(r"^([12])\.0+$", r"\1", str(label).strip().lower())
    if word not in _LABELS or not isinstance(label, str | int | float):
        raise InputError(f"label is {reprlib.repr(label)}; give 1 or 'first', 2 or 'second', or 'tie'")
    return _LABELS[word]
