"""The generic schema: anybody's own pairs, one a row.

`prompt`; `image_first` and `image_second`, or `images` with two entries; `p_first` in [0, 1], or `label` among 1, 2,
"first", "second", "tie"; and, where the file has them, `id` and the columns of `OPTIONAL`.
"""

from __future__ import annotations

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

_FIELDS = ("prompt", "image_first", "image_second", "images", "p_first", "label", "id", *OPTIONAL)
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
    kept = {name: kind for name, kind in OPTIONAL.items() if name in fields or name in columns}
    for name in kept:
        if (other := other_side(name)) not in kept and other != name:
            raise InputError(f"{source} has a column {name} and no {other}; add it, or give {name} another name")
    return Format("generic", partial(_pairs, source=source, columns=columns, kept=kept, labelled=labelled), kept)


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
    name = text(row.get("id"), "id") or str(place.index)
    if not labelled and is_empty(row.get("p_first")) and is_empty(row.get("label")):
        yield Unlabelled(row["prompt"], first, second, name)
        return
    extra = {
        key: text(row.get(key), key) if kind == "string" else number(row.get(key), key) for key, kind in kept.items()
    }
    yield Labelled(PreferencePair(row["prompt"], first, second, _label_of(row), name, source), extra)


def _two_images(row: Row) -> Sequence[Any]:
    if "image_first" in row and "image_second" in row:
        return row["image_first"], row["image_second"]
    if "images" not in row:
        raise InputError(f"image_first and image_second, or images, are not in {names(row)}; name them by columns")
    images = row["images"]
    if not isinstance(images, list) or len(images) != 2:
        raise InputError(f"images is {reprlib.repr(images)}; give a list of two")
    return images


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
