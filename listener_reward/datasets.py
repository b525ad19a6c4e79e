"""Preference data of every supported format as one `datasets.Dataset`: prompt, two images, the voters' share.

| spec | what it reads |
| --- | --- |
| `tiny:train`, `tiny:id`, `tiny:ood`, `tiny:wrong` | the embedded world, drawn on the spot |
| `hpdv2:DIR` or `hpdv2:FILE.json` | HPDv2's `train.json` and `test.json`, and its gallery's `annotations.json` |
| `FILE.jsonl`, `.json`, `.csv`, `.parquet` | the generic schema below |
| `org/name` or `org/name:split` | the generic schema on the Hugging Face Hub; the split is `train` unless named |

The generic schema is `prompt`; `image_first` and `image_second`, or `images` with two entries; `p_first` in [0, 1], or
`label` among 1, 2, "first", "second", "tie"; and optionally `id`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from listener_reward.errors import InputError
from listener_reward.images import to_pil
from listener_reward.pairs import PreferencePair, check_text
from listener_reward.tiny.draw import draw_pair
from listener_reward.tiny.world import SPLITS, split_pairs

Rows: TypeAlias = "list[dict[str, Any]] | pa.Table"

FEATURES = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "images": datasets.List(datasets.Image(decode=False)),
        "p_first": datasets.Value("float64"),
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
    }
)

TINY_PAIRS = 400
"""Pairs of a tiny split where no limit is given."""

MAX_BROKEN = 0.2
"""Above this share of pairs with an unreadable image the data set is refused: its folder is wrong or incomplete."""

_FIELDS = ("prompt", "image_first", "image_second", "images", "p_first", "label", "id")
_LABELS = {"1": 1.0, "first": 1.0, "2": 0.0, "second": 0.0, "tie": 0.5}
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def load_pairs(
    spec: str, *, limit: int | None = None, seed: int = 0, columns: Mapping[str, str] | None = None
) -> datasets.Dataset:
    """Pairs with columns prompt (string), images (two, undecoded), p_first (float64 in [0, 1]), id and source (string).

    Which image comes first is decided by a hash of `seed` and the pair's id, because published files leak the label in
    their order. The tiny world's order is random as it is.

    Args:
        spec: what to read, see the table at the top of this module.
        limit: keep a random sample of this many pairs, in the order of the file, the same for the same seed. For the
            tiny world, the number of pairs to draw.
        seed: of the sample and of the image order; for the tiny world, of the pairs.
        columns: what the file calls a field of the generic schema, such as `{"prompt": "caption"}`.

    Raises:
        InputError: the spec, a file, a column, a label or too many images cannot be used; or there are no pairs.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; give at least 1, or None for all pairs")
    kind, _, rest = spec.partition(":")
    if columns and kind in ("tiny", "hpdv2"):
        raise InputError(f"columns is {dict(columns)!r}, but {kind} has names of its own; leave it out")
    if kind == "tiny":
        return _dataset(list(_tiny(rest, TINY_PAIRS if limit is None else limit, seed)))
    if kind == "hpdv2":
        pairs = list(_hpdv2(Path(rest)))
        pairs = [pairs[i] for i in _sample(len(pairs), limit, seed)]
    else:
        rows, folder, source = _open(spec)
        pairs = [_pair(_row(rows, i), i, folder, source, columns or {}) for i in _sample(len(rows), limit, seed)]
    if not pairs:
        raise InputError(f"{spec} holds no pairs; give data with at least one")
    return _dataset([_shuffled(pair, seed) for pair in _readable(pairs, spec)])


# ---------------------------------------------------------------- the tiny world


def _tiny(split: str, n: int, seed: int) -> Iterator[PreferencePair]:
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; the tiny world has {', '.join(map(repr, SPLITS))}")
    for index, pair in enumerate(split_pairs(split, n, seed=seed)):
        first, second = ({"bytes": _png(image), "path": None} for image in draw_pair(pair))
        yield PreferencePair(pair.wording, first, second, pair.p_first, f"{split}-{seed}-{index}", f"tiny:{split}")


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# ---------------------------------------------------------------- HPDv2


def _hpdv2(path: Path) -> Iterator[PreferencePair]:
    """All pairs of every prompt's images; p_first is the share of annotators who rank the first one better."""
    if path.is_dir():
        found = [path / name for name in ("test.json", "annotations.json") if (path / name).is_file()]
        if not found:
            raise InputError(f"hpdv2 folder is {str(path)!r}, without test.json or annotations.json; check the path")
        path = found[0]
    for index, record in enumerate(_parsed(path, _read_json)):
        where = f"{path.name}, entry {index}"
        names = record.get("image_path", record.get("file_path"))
        if not isinstance(names, list) or not names:
            raise InputError(f"{where}: image_path is {reprlib.repr(names)}; give the list of file names")
        check_text(record.get("prompt"), field=f"{where}: prompt")
        ranks = _ranks(record, len(names), where)
        images = [{"bytes": None, "path": _hpdv2_image(path, name)} for name in names]
        for i, j in combinations(range(len(names)), 2):
            ahead = np.sign(ranks[:, j] - ranks[:, i])  # +1 where the first has the lower, hence better, rank
            share = float((ahead.mean() + 1) / 2)
            yield PreferencePair(record["prompt"], images[i], images[j], share, f"{index}/{i}-{j}", "hpdv2")


def _ranks(record: Mapping[str, Any], n: int, where: str) -> np.ndarray:
    """(annotators, n) ranks, lower is better, from whichever fields the file has."""
    raw = record.get("raw_annotations") or record.get("raw_annotation")
    if "annotator_ranks" in record:
        return _rank_table(record["annotator_ranks"], n, f"{where}: annotator_ranks")
    if "human_preference" in record:
        return -_rank_table([record["human_preference"]], n, f"{where}: human_preference")  # 1 for the chosen image
    if "rank" not in record:
        raise InputError(f"{where} has no annotator_ranks, rank or human_preference; add one")
    published = _rank_table([record["rank"]], n, f"{where}: rank")
    if not raw:
        return published
    votes = [one.get("rank") if isinstance(one, dict) else None for one in raw]
    ranks = _rank_table(votes, n, f"{where}: raw_annotations")
    # Nothing documents that raw ranks run the same way as their published average, so the data has to show it.
    if (ranks.mean(axis=0) - ranks.mean()) @ (published[0] - published.mean()) < 0:
        raise InputError(f"{where}: raw_annotations run against rank; remove one of the two")
    return ranks


def _rank_table(value: list[Any], n: int, name: str) -> np.ndarray:
    try:
        ranks = np.array(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not one number for each of {n} images; repair it") from error
    if ranks.ndim != 2 or ranks.shape[1] != n or ranks.size == 0 or not np.isfinite(ranks).all():
        raise InputError(f"{name} has shape {ranks.shape}, or is not finite; give one rank for each of {n} images")
    return ranks


def _hpdv2_image(annotations: Path, name: str) -> str:
    """HPDv2 keeps images in a folder named after the file (`test/` for `test.json`), its gallery in `images/`."""
    places = [annotations.parent / folder / name for folder in (annotations.stem, "images", "")]
    return str(next((place for place in places if place.is_file()), places[0]))


# ---------------------------------------------------------------- the generic schema


def _open(spec: str) -> tuple[Rows, Path | None, str]:
    """The rows of a file or Hub data set, the folder that relative image paths start from, and the source's name."""
    path = Path(spec)
    if path.suffix.lower() in _SUFFIXES:
        return _read_file(path), path.parent, path.name
    hub = _HUB_NAME.fullmatch(spec)
    if hub is None or path.exists():
        raise InputError(
            f"data is {spec!r}; give tiny:SPLIT, hpdv2:DIR, a file of type {', '.join(_SUFFIXES)}, or org/name:split"
        )
    name, split = hub[1], hub[2] or "train"
    return _download(name, split), None, f"{name}:{split}"


def _download(name: str, split: str) -> pa.Table:
    try:
        data = datasets.load_dataset(name, split=split)
    except ConnectionError as error:
        raise InputError(f"{name}: the Hugging Face Hub cannot be reached; connect, or give a local file") from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(f"{name}, split {split!r}, cannot be loaded from the Hugging Face Hub: {error}") from error
    return data.with_format("arrow")[:]  # images stay undecoded


def _read_file(path: Path) -> Rows:
    read = {".parquet": pq.read_table, ".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}
    return _parsed(path, read[path.suffix.lower()])


def _parsed(path: Path, read: Callable[[Path], Any]) -> Any:
    if not path.is_file():
        raise InputError(f"data is {str(path)!r}, where there is no file; check the path")
    try:
        rows = read(path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path.name} does not parse ({error}); repair the file") from error
    if not isinstance(rows, pa.Table) and not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise InputError(f"{path.name} is not a list of objects; give one object for each entry")
    return rows


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def _sample(n: int, limit: int | None, seed: int) -> Sequence[int]:
    return range(n) if limit is None or limit >= n else sorted(random.Random(seed).sample(range(n), limit))


def _row(rows: Rows, index: int) -> dict[str, Any]:
    """One row at a time, so that a sample of a large table never decodes the rest."""
    return rows[index] if isinstance(rows, list) else rows.slice(index, 1).to_pylist()[0]


def _pair(
    row: Mapping[str, Any], index: int, folder: Path | None, source: str, columns: Mapping[str, str]
) -> PreferencePair:
    """A row of the generic schema, its own column names first turned into the schema's."""
    try:
        for field, column in columns.items():
            if field not in _FIELDS:
                raise InputError(f"columns names the field {field!r}; the fields are {', '.join(_FIELDS)}")
            if column not in row:
                raise InputError(f"column {column!r} is missing from {_names(row)}; change columns")
        row = {**row, **{field: row[column] for field, column in columns.items()}}
        if "prompt" not in row:
            raise InputError(f"prompt is missing from {_names(row)}; add it, or name it by columns={{'prompt': ...}}")
        first, second = (_undecoded(image, folder) for image in _two_images(row))
        name = str(index) if row.get("id") in (None, "") else str(row["id"])
        return PreferencePair(row["prompt"], first, second, _share(row), name, source)
    except InputError as error:
        raise InputError(f"{source}, row {index}: {error}") from error


def _two_images(row: Mapping[str, Any]) -> Sequence[Any]:
    if "image_first" in row and "image_second" in row:
        return row["image_first"], row["image_second"]
    if "images" not in row:
        raise InputError(f"image_first and image_second, or images, are not in {_names(row)}; name them by columns")
    images = row["images"]
    if not isinstance(images, list) or len(images) != 2:
        raise InputError(f"images is {reprlib.repr(images)}; give a list of two")
    return images


def _undecoded(image: Any, folder: Path | None) -> dict[str, Any]:
    """An image as the `datasets` library stores it, embedded bytes without their path: file names tell on images."""
    if image is None or isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, dict) and image.get("bytes") is not None:
        return {"bytes": image["bytes"], "path": None}
    path = image.get("path") if isinstance(image, dict) else image
    if path is not None and not isinstance(path, str):
        raise InputError(f"image is {reprlib.repr(image)}; give a path or the bytes of an image file")
    if folder is None and isinstance(image, str):
        raise InputError(f"image is the path {image!r}; a Hub data set has to embed its images")
    return {"bytes": None, "path": path if path is None or folder is None or "://" in path else str(folder / path)}


def _share(row: Mapping[str, Any]) -> float:
    """p_first, or what the label says it is."""
    share, label = row.get("p_first"), row.get("label")
    if share not in (None, ""):
        try:
            return float(share)
        except (TypeError, ValueError) as error:
            raise InputError(f"p_first is {share!r}; give a number from 0 to 1") from error
    if label in (None, ""):
        raise InputError(f"p_first and label are missing or empty in {_names(row)}; fill in one, or name it by columns")
    if isinstance(label, float) and label.is_integer():  # what a table makes of integers beside an empty cell
        label = int(label)
    word = str(label).strip().lower()
    if word not in _LABELS:
        raise InputError(f"label is {label!r}; give 1 or 'first', 2 or 'second', or 'tie'")
    return _LABELS[word]


def _names(row: Mapping[str, Any]) -> str:
    return "columns " + ", ".join(map(str, row))


# ---------------------------------------------------------------- what every format goes through


def _readable(pairs: Sequence[PreferencePair], spec: str) -> list[PreferencePair]:
    """The pairs whose images both decode. Every distinct image is decoded once, so that no run breaks on one later."""
    images = {_key(image): (pair.id, image) for pair in pairs for image in (pair.first, pair.second)}
    with ThreadPoolExecutor() as pool:
        faults = dict(zip(images, pool.map(lambda named: _fault(*named), images.values()), strict=True))
    kept = [pair for pair in pairs if not (faults[_key(pair.first)] or faults[_key(pair.second)])]
    if len(kept) == len(pairs):
        return kept
    messages = [fault for fault in faults.values() if fault]
    more = f"; and {len(messages) - 5} more" if len(messages) > 5 else ""
    summary = f"{spec}: {len(pairs) - len(kept)} of {len(pairs)} pairs have an unreadable image: "
    summary += "; ".join(messages[:5]) + more
    if len(pairs) - len(kept) > MAX_BROKEN * len(pairs):
        raise InputError(f"{summary}. More than {MAX_BROKEN:.0%} cannot be right; complete the images")
    warnings.warn(f"{summary}. These pairs are left out", stacklevel=3)
    return kept


def _key(image: Any) -> str | int:
    return image["path"] or id(image)


def _fault(pair_id: str, image: Any) -> str | None:
    try:
        to_pil(image, field=f"an image of pair {pair_id}")
    except InputError as error:
        return str(error)
    return None


def _shuffled(pair: PreferencePair, seed: int) -> PreferencePair:
    coin = hashlib.blake2b(f"{seed}/{pair.id}".encode(), digest_size=1).digest()[0] & 1
    return pair.swapped() if coin else pair


def _dataset(pairs: Sequence[PreferencePair]) -> datasets.Dataset:
    rows = [
        {"prompt": p.prompt, "images": [p.first, p.second], "p_first": p.p_first, "id": p.id, "source": p.source}
        for p in pairs
    ]
    # In parts, because one Arrow array holds at most 2 GiB of image bytes.
    parts = [datasets.Dataset.from_list(rows[i : i + 500], features=FEATURES) for i in range(0, len(rows), 500)]
    return datasets.concatenate_datasets(parts)
