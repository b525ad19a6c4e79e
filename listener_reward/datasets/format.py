"""What all formats share: where a row stands, a pair with its format's own columns, and how a format is described."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from listener_reward.errors import InputError
from listener_reward.media.containers import demuxer, head_of
from listener_reward.media.images import ImageLike, identity
from listener_reward.pairs import PreferencePair, check_text

Row: TypeAlias = "Mapping[str, Any]"

_VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")

PUBLISHED = {"group": "string", "item_first": "string", "item_second": "string"}
"""Columns of every published format beside those of all data, and their Arrow types."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: what messages call it, and where its relative image paths start."""

    file: str
    """Name of the file, or of the Hub data set."""
    index: int
    """Counts on over the files of one data set."""
    folder: Path | None = None
    """None for the Hub, whose rows may not name files of this machine."""
    dimension: str | None = None
    """Which of several labels was asked for."""

    def __str__(self) -> str:
        return f"{self.file}, {'entry' if self.file.endswith('.json') else 'row'} {self.index}"


@dataclass(frozen=True, slots=True)
class Labelled:
    """A pair and the columns that only its format has. Those ending in `_first` and `_second` move with the images."""

    pair: PreferencePair
    columns: Mapping[str, Any]
    swapped: bool = False
    """Whether the pair's images have been exchanged."""

    def exchanged(self) -> Labelled:
        columns = {other_side(name): value for name, value in self.columns.items()}
        return Labelled(self.pair.swapped(), columns, not self.swapped)


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """Two images for one prompt on which nobody has voted: they can be scored, and neither trained nor measured on."""

    prompt: str
    first: ImageLike
    second: ImageLike
    id: str
    sources: tuple[ImageLike, ...] = ()
    criterion: str | None = None

    def __post_init__(self) -> None:
        check_text(self.prompt, field="prompt")
        check_text(self.id, field="id")


class Skipped(NamedTuple):
    """A row that its publisher marks as no pair; it is counted, not refused."""

    reason: str


@dataclass(frozen=True, slots=True)
class Format:
    """How one publisher writes preferences."""

    kind: str
    """The word before the colon of a spec, and the `dataset` of its pairs."""
    pairs: Callable[[Row, Place], Iterator[Labelled | Unlabelled | Skipped]]
    """Every pair of one row, in the published order. Raises InputError for a row that cannot be used."""
    columns: Mapping[str, str]
    """Its own columns beside `PUBLISHED`, to their Arrow types."""
    asks: frozenset[str] = frozenset()
    """Those of `sources` and `criterion` that its data has whatever the first rows show."""
    signs: tuple[frozenset[str], ...] = ()
    """Fields by which a file of this format is recognised: all those of one set."""
    files: tuple[str, ...] = ()
    """Names that it goes by in a folder, best first; else the folder's Parquet files are meant."""
    archives: str | None = None
    """Where the Hub keeps its images in archives: the repository to download and unpack. None if they are embedded."""
    embedded: str | None = None
    """The one repository of the Hub that embeds the images of a set whose images else are in archives."""
    split: str = "train"
    """The Hub's split unless one is named, and its configuration with a slash where it has several."""

    def recognises(self, fields: set[str]) -> bool:
        return any(sign <= fields for sign in self.signs)


def read_pairs(source: Iterable[tuple[Place, Row]], form: Format) -> Iterator[Labelled | Unlabelled | Skipped]:
    """All pairs of a source one after another, in the published order; an error names the row."""
    for place, row in source:
        try:
            yield from form.pairs(row, place)
        except InputError as error:
            if str(error).startswith(str(place)):
                raise
            raise InputError(f"{place}: {error}") from error


def published(pair: PreferencePair, group: str | None = None, **columns: Any) -> Labelled:
    """A pair of a published format. A column given as a pair of values becomes `_first` and `_second`.

    `group` is the record that the pair belongs to; without one, all pairs with the same prompt and sources are a group.
    """
    values: dict[str, Any] = {"group": group_of(pair) if group is None else group}
    for name, value in {"item": (None, None), **columns}.items():
        if isinstance(value, tuple):
            values[f"{name}_first"], values[f"{name}_second"] = value
        else:
            values[name] = value
    return Labelled(pair, values)


def group_of(pair: PreferencePair) -> str:
    """A name for all pairs of the same prompt and sources: one instruction on two sources is two groups."""
    named = [pair.prompt, *map(identity, pair.sources)]
    return hashlib.blake2b("\x1f".join(named).encode("utf-8", "replace"), digest_size=8).hexdigest()


def field(row: Row, name: str) -> Any:
    """The value of a field that has to be there."""
    if name not in row:
        raise InputError(f"{name} is missing from {names(row)}; repair the file")
    return row[name]


def number(value: Any, name: str) -> float | None:
    """A finite number, or None for an empty cell."""
    if is_empty(value):
        return None
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise InputError(f"{name} is {reprlib.repr(value)}; give a finite number, or nothing")
    return result


def text(value: Any, name: str = "a cell") -> str | None:
    """A string, a number as one, or None for an empty cell.

    Raises:
        InputError: a list, an object, or text that cannot be encoded.
    """
    if is_empty(value):
        return None
    if not isinstance(value, str | int | float):
        raise InputError(f"{name} is {reprlib.repr(value)}; give a string")
    check_text(str(value), field=name)
    return str(value)


def is_empty(value: Any) -> bool:
    """Whether a cell has nothing in it: null or no text. NaN is not that, but a number that somebody got wrong."""
    return value is None or (isinstance(value, str) and not value.strip())


def fraction_first(first: float, second: float) -> float:
    """The first's part of all votes, of which there is at least one."""
    return first / (first + second)


def undecoded(image: Any, place: Place, *folders: str) -> dict[str, Any]:
    """An image as the `datasets` library stores it, embedded bytes without their path: file names tell on images.

    It is None, bytes, a path, a data URL, or an object of `bytes` and `path`; JSON cells may be anything else.

    A relative path is looked for in `folders`, themselves relative to the file's own, and stays in the first where it
    is in none.
    """
    if isinstance(image, dict):
        data, path = image.get("bytes"), image.get("path")
    else:
        data, path = (image, None) if isinstance(image, bytes) else (None, image)
    if data is not None and not isinstance(data, bytes):
        raise InputError(f"bytes of an image are {reprlib.repr(data)}; {_HOW_TO_EMBED}")
    if data is not None:
        return {"bytes": data, "path": None}
    if path is not None and not isinstance(path, str):
        raise InputError(f"image is {reprlib.repr(image)}; give a path, or embed the image's file: {_HOW_TO_EMBED}")
    if path is not None:
        check_text(path, field="image")
        if path.startswith("data:"):
            return {"bytes": _of_data_url(path), "path": None}
        if _is_base64(path):
            raise InputError(f"image is {reprlib.repr(path)}, bare base64; {_HOW_TO_EMBED}")
    if place.folder is None and isinstance(image, str) and "://" not in image:
        raise InputError(f"image is the path {reprlib.repr(image)}; a Hub data set has to embed its images")
    if path is None or place.folder is None or "://" in path:
        return {"bytes": None, "path": path}
    base, usual = str(place.folder), folders[0] if folders else ""
    others = (os.path.join(base, folder, path) for folder in folders[1:])
    found = os.path.join(base, usual, path)
    if len(folders) > 1 and not os.path.isfile(found):
        found = next(filter(os.path.isfile, others), found)
    return {"bytes": None, "path": os.path.normpath(found)}


_HOW_TO_EMBED = "JSON holds an image as a data URL, data:image/png;base64,...; Parquet as bytes"
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "AAAA", "SUkq", "TU0A", "Qk")
"""Base64 of what files of PNG, JPEG, WebP, GIF, AVIF, TIFF and BMP begin with."""


def _is_base64(path: str) -> bool:
    """Whether this is an image's content and no path: it is longer than names of files are."""
    return len(path) > 255 and path.startswith(_BASE64_STARTS) and re.fullmatch(r"[\w+/\s]+={0,2}\s*", path) is not None


def _of_data_url(url: str) -> bytes:
    """The bytes of `data:image/png;base64,...`."""
    head, comma, data = url.partition(",")
    try:
        if not (comma and head.endswith(";base64")):
            raise ValueError("it is not base64")
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise InputError(f"image is the data URL {reprlib.repr(url)}, which does not decode ({error})") from error


def stored_as_video(image: Mapping[str, Any]) -> bool:
    """Whether an undecoded image is a video instead: by its first bytes, or by its path's suffix.

    No file is opened, for a path may name one that is not on this machine.
    """
    if image.get("bytes") is not None:
        return demuxer(head_of(image["bytes"])) is not None
    return Path(image.get("path") or "").suffix.lower() in _VIDEO_SUFFIXES


def names(row: Row) -> str:
    return "columns " + ", ".join(map(str, row))


def other_side(name: str) -> str:
    """`model_second` for `model_first` and the other way round; any other name as it is."""
    for side, other in (("_first", "_second"), ("_second", "_first")):
        if name.endswith(side):
            return name.removesuffix(side) + other
    return name
