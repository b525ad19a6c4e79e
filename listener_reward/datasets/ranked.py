"""Formats that rank several images of a prompt: HPDv2 and ImageRewardDB. Every two images of a record are a pair."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from listener_reward.datasets.format import (
    Format,
    Labelled,
    Place,
    Row,
    field,
    fraction_first,
    published,
    text,
    undecoded,
)
from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair, check_text

_LIST = {"rank_first": "float64", "rank_second": "float64", "place_first": "int64", "place_second": "int64"}
_VOTES = {"votes_first": "float64", "votes_second": "float64"}


def _imagereward(row: Row, place: Place) -> Iterator[Labelled]:
    """`ranking` is 1 for the best; equal ranks are a tie, and ranks may skip."""
    files = _files(row, "generations")
    ranks = rank_table([field(row, "ranking")], len(files), "ranking")[0]
    group = text(row.get("id"), "id") or str(place.index)
    check_text(row.get("prompt"), field="prompt")
    images = [undecoded(name, place, "", "images", "..") for name in files]
    for i, j in combinations(range(len(files)), 2):
        p_first = float((np.sign(ranks[j] - ranks[i]) + 1) / 2)
        pair = PreferencePair(row["prompt"], images[i], images[j], p_first, f"{group}/{i}-{j}", "imagereward")
        yield published(pair, group, item=(files[i], files[j]), rank=(ranks[i], ranks[j]), place=(i, j))


IMAGEREWARD = Format(
    "imagereward",
    _imagereward,
    _LIST,
    signs=(frozenset({"generations", "ranking"}),),
    files=("test.json", "train.json", "valid.json"),
    archives="zai-org/ImageRewardDB",
)


def _hpdv2(row: Row, place: Place) -> Iterator[Labelled]:
    """`rank` and `raw_annotations` are lower for the better image; `human_preference` is 1 for the chosen one.

    p_first is the fraction of annotators who rank the first image better, a tie being half a vote for each.
    `test.json`, `train.json` and the gallery's `annotations.json` are told apart by their fields.
    """
    files = _files(row, "file_path" if "image_path" not in row and "file_path" in row else "image_path")
    check_text(row.get("prompt"), field="prompt")
    ranks, votes = _hpdv2_ranks(row, len(files), place)
    stem = place.file.rpartition(".")[0]  # images lie in test/ for test.json, in the gallery in images/
    images = [undecoded(name, place, stem, "images", "") for name in files]
    for i, j in combinations(range(len(files)), 2):
        ahead = np.sign(votes[:, j] - votes[:, i])  # +1 where the first has the lower, hence better, rank
        counts = float((ahead + 1).sum() / 2), float((1 - ahead).sum() / 2)
        name = f"{place.index}/{i}-{j}"
        pair = PreferencePair(row["prompt"], images[i], images[j], fraction_first(*counts), name, "hpdv2")
        yield published(
            pair,
            str(place.index),
            item=(files[i], files[j]),
            rank=(ranks[i], ranks[j]),
            place=(i, j),
            votes=counts if len(votes) > 1 else (None, None),
        )


HPDV2 = Format(
    "hpdv2",
    _hpdv2,
    _LIST | _VOTES,
    signs=(
        frozenset({"image_path", "rank"}),
        frozenset({"image_path", "annotator_ranks"}),
        frozenset({"file_path", "human_preference"}),
    ),
    files=("test.json", "annotations.json", "train.json"),
    archives="ymhao/HPDv2",
)


def _hpdv2_ranks(row: Row, n: int, place: Place) -> tuple[np.ndarray, np.ndarray]:
    """(n,) published ranks, and (annotators, n) single ones or the published ones again; lower is better."""
    if "annotator_ranks" in row:
        single = rank_table(row["annotator_ranks"], n, "annotator_ranks")
        return rank_table([row["mean_rank"]], n, "mean_rank")[0] if "mean_rank" in row else single.mean(axis=0), single
    if "human_preference" in row:
        ranks = 2 - rank_table([row["human_preference"]], n, "human_preference")  # 1 for the chosen image
        return ranks[0], ranks
    if "rank" not in row:
        raise InputError(f"{place} has no annotator_ranks, rank or human_preference; add one")
    ranks = rank_table([row["rank"]], n, "rank")
    raw = row.get("raw_annotations") or row.get("raw_annotation")
    if not raw:
        return ranks[0], ranks
    if not isinstance(raw, list):
        raise InputError(f"raw_annotations is {reprlib.repr(raw)}; give a list of objects with a rank")
    single = rank_table([one.get("rank") if isinstance(one, dict) else None for one in raw], n, "raw_annotations")
    # Nothing documents that raw ranks run the same way as their published average, so the data has to show it.
    if (single.mean(axis=0) - single.mean()) @ (ranks[0] - ranks.mean()) < 0:
        raise InputError("raw_annotations run against rank; remove one of the two")
    return ranks[0], single


def rank_table(value: Any, n: int, name: str) -> np.ndarray:
    """(rankings, n) float64.

    Raises:
        InputError: not one finite number for each image in every ranking.
    """
    try:
        ranks = np.array(value, dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} is not one number for each of {n} images; repair it") from error
    if ranks.ndim != 2 or ranks.shape[1] != n or ranks.size == 0 or not np.isfinite(ranks).all():
        raise InputError(f"{name} has shape {ranks.shape}, or is not finite; give one rank for each of {n} images")
    return ranks


def _files(row: Row, name: str) -> list[str]:
    files = row.get(name)
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise InputError(f"{name} is {reprlib.repr(files)}; give the list of file names")
    return files
