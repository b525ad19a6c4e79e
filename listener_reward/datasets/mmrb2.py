"""Multimodal RewardBench 2: expert-annotated pairs of responses. Those that are one image each can be judged here.

Published for evaluation only, under CC BY-NC 4.0: do not train on it.
"""

from __future__ import annotations

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
    names,
    published,
    text,
    undecoded,
)
from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair

_TASKS = ("t2i", "edit", "interleaved", "reasoning")


def _mmrb2(row: Row, place: Place) -> Iterator[Labelled | Skipped]:
    """`chosen` is A or B, never a tie. Annotators give 1 (B by far) to 6 (A by far); each is counted as one vote."""
    if "prompt_content" not in row:
        raise InputError(f"prompt_content is missing from {names(row)}; build the benchmark, which adds the prompts")
    prompt = _parts(row["prompt_content"], "prompt_content")
    responses = [_parts(_response(row, side).get("response_content"), f"response_{side}") for side in "ab"]
    if prompt["image"]:
        yield Skipped("the prompt holds images")
        return
    if any(len(parts["image"]) != 1 or any(map(str.strip, parts["text"])) for parts in responses):
        yield Skipped("a response is more than one image")
        return
    chosen = row.get("chosen", row.get("human_preference"))
    if chosen not in ("A", "B"):
        raise InputError(f"chosen is {reprlib.repr(chosen)}; it is A or B")
    files = responses[0]["image"][0], responses[1]["image"][0]
    images = [undecoded(file, place, "", "images") for file in files]
    name = text(row.get("id", row.get("pair_id"))) or str(place.index)  # the README says pair_id, the files id
    stem = place.file.partition(".")[0].partition("_")[0]
    yield published(
        PreferencePair("\n".join(prompt["text"]), images[0], images[1], float(chosen == "A"), name, "mmrb2"),
        item=files,
        model=tuple(text(_response(row, side).get("model_name", _response(row, side).get("model"))) for side in "ab"),
        votes=_votes(row.get("human_annotations")),
        dimension=stem if stem in _TASKS else None,
        category=text(row.get("prompt_source")),
    )


MMRB2 = Format(
    "mmrb2",
    _mmrb2,
    {
        "model_first": "string",
        "model_second": "string",
        "votes_first": "float64",
        "votes_second": "float64",
        "dimension": "string",
        "category": "string",
    },
    signs=(frozenset({"response_a", "response_b"}),),
    files=("t2i.json",),
    archives="facebook/MMRB2_image",
)


def _response(row: Row, side: str) -> dict[str, Any]:
    response = field(row, f"response_{side}")
    if not isinstance(response, dict):
        raise InputError(f"response_{side} is {reprlib.repr(response)}; give an object with response_content")
    return response


def _parts(content: Any, name: str) -> dict[str, list[str]]:
    """The texts and the image paths of a message, which is a list of `["text", ...]` and `["image", path]`."""
    parts: dict[str, list[str]] = {"text": [], "image": []}
    if not isinstance(content, list):
        raise InputError(f"{name} is {reprlib.repr(content)}; give a list of parts")
    for part in content:
        if (
            not isinstance(part, list)
            or len(part) != 2
            or not all(isinstance(one, str) for one in part)
            or part[0] not in parts
        ):
            raise InputError(f"{name} holds {reprlib.repr(part)}; a part is a text or an image's path")
        parts[part[0]].append(part[1])
    return parts


def _votes(annotations: Any) -> tuple[float | None, float | None]:
    if not isinstance(annotations, list) or not annotations or not all(one in range(1, 7) for one in annotations):
        return None, None
    first = sum(one > 3 for one in annotations)
    return float(first), float(len(annotations) - first)
