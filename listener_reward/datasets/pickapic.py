"""Pick-a-Pic v1 and v2: one person's choice between two images, or none; the images are embedded."""

from __future__ import annotations

from collections.abc import Iterator

from listener_reward.datasets.format import (
    Format,
    Labelled,
    Place,
    Row,
    Skipped,
    field,
    names,
    number,
    published,
    text,
    undecoded,
)
from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair


def _pickapic(row: Row, place: Place) -> Iterator[Labelled | Skipped]:
    """`label_0` is 1, 0, or 0.5 for a tie; rows with `has_label` false say nothing and are left out."""
    if row.get("has_label") is False:
        yield Skipped("has_label is false")
        return
    if "jpg_0" not in row or "jpg_1" not in row:
        raise InputError(f"jpg_0 and jpg_1 are not in {names(row)}; take the version that has images")
    first, second = (number(field(row, name), name) for name in ("label_0", "label_1"))
    if first not in (0.0, 0.5, 1.0) or second != 1 - first:
        raise InputError(f"label_0 is {first!r} and label_1 {second!r}; they are 1 and 0, 0 and 1, or 0.5 and 0.5")
    images = [undecoded(row[name], place) for name in ("jpg_0", "jpg_1")]
    pair = PreferencePair(field(row, "caption"), images[0], images[1], first, str(place.index), "pickapic")
    examples = number(row.get("num_example_per_prompt"), "num_example_per_prompt")
    yield published(
        pair,
        item=(text(row.get("image_0_uid")), text(row.get("image_1_uid"))),
        model=(text(row.get("model_0")), text(row.get("model_1"))),
        examples_per_prompt=None if examples is None else int(examples),
    )


PICKAPIC = Format(
    "pickapic",
    _pickapic,
    {"model_first": "string", "model_second": "string", "examples_per_prompt": "int64"},
    signs=(frozenset({"caption", "label_0", "label_1"}),),
    split="validation_unique",
)
