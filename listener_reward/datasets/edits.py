"""Benchmarks of edit judges: both that are called EditReward-Bench. Their rows were read in their authors' code.

EditReward's (`TIGER-Lab/EditReward-Bench`) ranks two, three or four edits of a source and gives every two of them as a
row; EditScore's (`EditScore/EditReward-Bench`) has pairs by dimension, the better edit always first.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

from listener_reward.datasets.format import Format, Labelled, Place, Row, field, published, text, undecoded
from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair

# ---------------------------------------------------------------- EditReward


def _editreward(row: Row, place: Place) -> Iterator[Labelled]:
    """`ranking` is A>B, or A=B for a tie, with the letters of `comparison_type`: of AvsC, candidate_1 is A.

    `id` up to its first underscore names the group whose comparisons the authors count together.
    """
    letters = str(row.get("comparison_type") or "AvsB").split("vs")
    if len(letters) != 2 or letters[0] == letters[1] or not all(letters):
        raise InputError(f"comparison_type is {reprlib.repr(row['comparison_type'])}; it is two letters, such as AvsB")
    first, second = (letter.strip() for letter in letters)
    ranking = text(field(row, "ranking"), "ranking") or ""
    winners = {f"{first}>{second}": 1.0, f"{second}>{first}": 0.0}
    p_first = winners.get(ranking, 0.5 if _is_tie(ranking, first, second) else None)
    if p_first is None:
        given = reprlib.repr(ranking)
        raise InputError(f"ranking is {given}; it is {first}>{second}, {second}>{first} or {first}={second}")
    source, one, other = (undecoded(field(row, name), place) for name in ("source_image", "candidate_1", "candidate_2"))
    name, subset = text(row.get("id"), "id") or str(place.index), text(row.get("dataset"), "dataset")
    # Pairs of one group must differ by name, whatever of the comparison their ids have.
    own = name if name.endswith(f"{first}vs{second}") else f"{name}/{first}vs{second}"
    group = name.partition("_")[0] if "_" in name else name[:10]
    yield published(
        PreferencePair(
            field(row, "instruction"),
            one,
            other,
            p_first,
            f"{subset}/{own}" if subset else own,
            "editreward-bench",
            (source,),
        ),
        f"{subset}/{group}" if subset else group,
        model=(text(row.get("model_1")), text(row.get("model_2"))),
        both_bad=ranking.endswith("=Bad"),
        category=subset,
    )


def _is_tie(ranking: str, first: str, second: str) -> bool:
    return ranking in (f"{first}={second}", f"{first}={second}=Good", f"{first}={second}=Bad")


EDITREWARD_BENCH = Format(
    "editreward-bench",
    _editreward,
    {"model_first": "string", "model_second": "string", "both_bad": "bool", "category": "string"},
    asks=frozenset({"sources"}),
    signs=(frozenset({"source_image", "candidate_1", "candidate_2", "ranking"}),),
)

# ---------------------------------------------------------------- EditScore

DIMENSIONS: dict[str, str | None] = {"prompt_following": "alignment", "consistency": "consistency", "overall": None}
"""EditScore's dimensions, and the criterion that asks for each; None is the general question."""


def _editscore(row: Row, place: Place) -> Iterator[Labelled]:
    """The first of `output_images` is the better one in the row's dimension; there are no ties."""
    dimension = text(field(row, "dimension"), "dimension")
    wanted = place.dimension or "overall"
    if wanted != "all" and wanted not in DIMENSIONS:
        raise InputError(f"dimension is {wanted!r}; give one of {', '.join(DIMENSIONS)}, or all")
    if dimension not in DIMENSIONS:
        raise InputError(f"dimension is {reprlib.repr(dimension)}; it is one of {', '.join(DIMENSIONS)}")
    if wanted not in ("all", dimension):
        return
    outputs, keys = row.get("output_images"), row.get("key")
    if not isinstance(outputs, list) or len(outputs) != 2:
        raise InputError(f"output_images is {reprlib.repr(outputs)}; give a list of two")
    several: list[Any] = keys if isinstance(keys, list) and len(keys) == 2 else [None, None]
    items = tuple(text(key, "key") for key in several)
    source, first, second = (undecoded(one, place) for one in (field(row, "input_image"), *outputs))
    prompt, name, criterion = field(row, "instruction"), f"{place.index}/{dimension}", DIMENSIONS[dimension]
    yield published(
        PreferencePair(prompt, first, second, 1.0, name, "editscore-bench", (source,), criterion),
        item=items,
        dimension=dimension,
        category=text(row.get("task_type"), "task_type"),
    )


EDITSCORE_BENCH = Format(
    "editscore-bench",
    _editscore,
    {"dimension": "string", "category": "string"},
    asks=frozenset({"sources"}),
    signs=(frozenset({"input_image", "output_images", "instruction", "dimension"}),),
)
