"""HPDv3 and HPDv3++: pairs whose first path always won; and EditReward's training files, which add a source."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator

from listener_reward.datasets.format import (
    Format,
    Labelled,
    Place,
    Row,
    field,
    fraction_first,
    number,
    published,
    text,
    undecoded,
)
from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair


def _hpdv3(row: Row, place: Place) -> Iterator[Labelled]:
    """`choice_dist` counts the votes, of which `path1`, the published winner, has the more; without it the label is 1.

    The counts stand in either order in the files: HPSv3's loader sorts them before it takes the first for `path1`'s. A
    pair whose votes are even keeps its published winner in the ranks, by which `hpsv3-pair` goes.

    `path_src` is what was edited. Where `tie_case` is true the two are equal, and `path1` is first by chance.
    """
    paths = str(field(row, "path1")), str(field(row, "path2"))
    votes = _votes(row)
    # HPDv3 has its JSON beside images/, HPDv3++ in train/ and test/ with paths from the folder above.
    images = [undecoded(path, place, "", "..", "images") for path in paths]
    p_first = 1.0 if votes is None else fraction_first(*votes)
    tie = row.get("tie_case") is True and votes is None
    source = text(row.get("path_src"), "path_src")
    sources = () if source is None else (undecoded(source, place, "", "..", "images"),)
    p_first = 0.5 if tie else p_first
    pair = PreferencePair(field(row, "prompt"), images[0], images[1], p_first, str(place.index), "hpdv3", sources)
    yield published(
        pair,
        item=paths,
        model=(text(row.get("model1")), text(row.get("model2"))),
        rank=(1.0, 1.0 if tie else 2.0),
        votes=votes or (None, None),
        confidence=number(row.get("confidence"), "confidence"),
    )


HPDV3 = Format(
    "hpdv3",
    _hpdv3,
    {
        "model_first": "string",
        "model_second": "string",
        "rank_first": "float64",
        "rank_second": "float64",
        "votes_first": "float64",
        "votes_second": "float64",
        "confidence": "float64",
    },
    signs=(frozenset({"path1", "path2", "prompt"}),),
    files=("test.json", "train.json", "all.json", "test_aes.json", "test_tf.json", "train_aes.json", "train_tf.json"),
    archives="MizzenAI/HPDv3 (or Junjun2333/HPDv3-PlusPlus)",
)


def _votes(row: Row) -> tuple[float, float] | None:
    counts = row.get("choice_dist")
    if counts is None:
        return None
    if not isinstance(counts, list) or len(counts) != 2:
        raise InputError(f"choice_dist is {reprlib.repr(counts)}; give the votes for the two paths, or null")
    fewer, more = sorted(number(count, "choice_dist") or 0.0 for count in counts)
    if fewer < 0 or more == 0:
        raise InputError(f"choice_dist is {reprlib.repr(counts)}; give at least one vote, and none below 0")
    return more, fewer
