"""VideoGen-RewardBench: pairs of videos with a label for each of several dimensions. What is compared are files."""

from __future__ import annotations

import posixpath
import reprlib
from collections.abc import Iterator

from listener_reward.datasets.format import (
    Format,
    Labelled,
    Place,
    Row,
    Skipped,
    field,
    number,
    published,
    text,
    undecoded,
)
from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair

DIMENSIONS = ("VQ", "MQ", "TA", "Overall")
"""Visual quality, motion quality, text alignment, and all in one."""

CRITERIA = {"VQ": "quality", "MQ": "motion", "TA": "alignment"}
"""The criterion that asks for each dimension; `Overall` is the general question."""

_LABELS = {"a": 1.0, "b": 0.0, "same": 0.5}


def _videogen(row: Row, place: Place) -> Iterator[Labelled | Skipped]:
    """`A`, `B` or `same` in each dimension; the training files also have `invalid`, which says nothing."""
    has = [name for name in DIMENSIONS if text(row.get(name))]
    wanted = place.dimension or "Overall"
    if wanted != "all" and wanted not in DIMENSIONS:
        raise InputError(f"dimension is {wanted!r}; give one of {', '.join(DIMENSIONS)}, or all")
    if place.dimension is None and has and "Overall" not in row:
        raise InputError(
            f"there is no Overall; name what to compare as videogen:PATH#{has[0]}, or #all for every label"
        )
    if not has or (wanted != "all" and wanted not in has):
        raise InputError(f"{wanted} has no label; the row has labels for {', '.join(has) or 'nothing'}")
    paths = [str(field(row, name)) for name in ("path_A", "path_B")]
    videos = [undecoded(posixpath.normpath(path), place, "", "videos") for path in paths]
    for dimension in has if wanted == "all" else [wanted]:
        label = str(row[dimension]).strip().lower()
        if label == "invalid":
            yield Skipped(f"{dimension} is invalid")
            continue
        if label not in _LABELS:
            raise InputError(f"{dimension} is {reprlib.repr(row[dimension])}; it is A, B or same")
        name = f"{place.index}/{dimension}"
        pair = PreferencePair(
            field(row, "prompt"),
            videos[0],
            videos[1],
            _LABELS[label],
            name,
            "videogen",
            criterion=CRITERIA.get(dimension),
        )
        yield published(
            pair,
            item=(posixpath.normpath(paths[0]), posixpath.normpath(paths[1])),
            model=(text(row.get("A_model")), text(row.get("B_model"))),
            dimension=dimension,
            fps=_numbers(row, "fps_A", "fps_B"),
            frames=_numbers(row, "num_frames_A", "num_frames_B"),
            mos=_numbers(row, f"MOS_A_{dimension}", f"MOS_B_{dimension}"),
        )


VIDEOGEN = Format(
    "videogen",
    _videogen,
    {
        "dimension": "string",
        **{f"model_{side}": "string" for side in ("first", "second")},
        **{f"{name}_{side}": "float64" for name in ("fps", "frames", "mos") for side in ("first", "second")},
    },
    signs=(frozenset({"path_A", "path_B", "prompt"}),),
    files=("videogen-rewardbench.csv", "example.csv"),
    archives="KwaiVGI/VideoGen-RewardBench",
)


def _numbers(row: Row, *fields: str) -> tuple[float | None, ...]:
    return tuple(number(row.get(name), name) for name in fields)
