"""Multimodal RewardBench 2: expert-annotated pairs of responses. Those that are one image each can be judged here.

Published for evaluation only, under CC BY-NC 4.0: do not train on it.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple

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
_IMAGE = re.compile(r"<image_\d+>")


class _Message(NamedTuple):
    """A prompt or a response: its texts, and its images in their order, paths or embedded."""

    texts: list[str]
    images: list[Any]


def _mmrb2(row: Row, place: Place) -> Iterator[Labelled | Skipped]:
    """`chosen` is A or B, never a tie. Annotators give 1 (B by far) to 6 (A by far); each is counted as one vote.

    The prompt's images are the pair's sources: what is to be edited, or what the prompt speaks of. Where they stand
    among its texts is not kept.
    """
    prompt, *responses = _of_the_hub(row) if "prompt_text" in row else _of_the_build(row)
    if any(len(response.images) != 1 or any(map(str.strip, response.texts)) for response in responses):
        yield Skipped("a response is more than one image")
        return
    chosen = row.get("chosen", row.get("human_preference"))
    if not isinstance(chosen, str) or chosen.upper() not in ("A", "B"):
        raise InputError(f"chosen is {reprlib.repr(chosen)}; it is A or B")
    given = [response.images[0] for response in responses]
    first, second = (undecoded(image, place, "", "images") for image in given)
    sources = tuple(undecoded(image, place, "", "input_images") for image in prompt.images)
    name = text(row.get("id", row.get("pair_id"))) or str(place.index)  # the README says pair_id, the files id
    p_first = float(chosen.upper() == "A")
    yield published(
        PreferencePair("\n".join(prompt.texts), first, second, p_first, name, "mmrb2", sources),
        item=tuple(image if isinstance(image, str) else None for image in given),
        model=tuple(_model(row, side) for side in "ab"),
        votes=_votes(row.get("human_annotations")),
        dimension=_task(place),
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
    signs=(frozenset({"response_a", "response_b"}), frozenset({"prompt_text", "response_a_images"})),
    files=("t2i.json",),
    archives="facebook/MMRB2_image",
    embedded="rl-research/multimodal-rewardbench-2",
    split="t2i/test",
)


def _of_the_build(row: Row) -> list[_Message]:
    """Prompt and both responses as the benchmark's build writes them: lists of texts and images' paths."""
    if "prompt_content" not in row:
        raise InputError(f"prompt_content is missing from {names(row)}; build the benchmark, which adds the prompts")
    contents = {"prompt_content": row["prompt_content"]}
    contents |= {f"response_{side}": _response(row, side).get("response_content") for side in "ab"}
    return [_parts(content, name) for name, content in contents.items()]


def _of_the_hub(row: Row) -> list[_Message]:
    """The same as the Hub's copy has them: texts with `<image_N>` where an image stands, and the images beside them."""
    messages: list[_Message] = []
    for name in ("prompt", "response_a", "response_b"):
        words, images = text(row.get(f"{name}_text"), f"{name}_text") or "", row.get(f"{name}_images")
        if not isinstance(images, list | None):
            raise InputError(f"{name}_images is {reprlib.repr(images)}; give a list")
        texts = [part.strip() for part in _IMAGE.split(words) if part.strip()]
        messages.append(_Message(texts, images or []))
    return messages


def _task(place: Place) -> str | None:
    """The task by the file's name, its folder's, or the configuration on the Hub."""
    stem = place.file.partition(".")[0].partition("_")[0]
    configuration = place.file.partition(":")[2].partition("/")[0]
    folder = "" if place.folder is None else place.folder.name
    return next((name for name in (stem, configuration, folder) if name in _TASKS), None)


def _response(row: Row, side: str) -> dict[str, Any]:
    response = field(row, f"response_{side}")
    if not isinstance(response, dict):
        raise InputError(f"response_{side} is {reprlib.repr(response)}; give an object with response_content")
    return response


def _model(row: Row, side: str) -> str | None:
    response = row.get(f"response_{side}")
    if not isinstance(response, dict):
        return text(row.get(f"response_{side}_model"))
    return text(response.get("model_name", response.get("model")))


def _parts(content: Any, name: str) -> _Message:
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
    return _Message(parts["text"], parts["image"])


def _votes(annotations: Any) -> tuple[float | None, float | None]:
    if isinstance(annotations, str):  # the Hub's copy has JSON
        try:
            annotations = json.loads(annotations)
        except ValueError:
            annotations = None
    if not isinstance(annotations, list) or not annotations or not all(one in range(1, 7) for one in annotations):
        return None, None
    first = sum(one > 3 for one in annotations)
    return float(first), float(len(annotations) - first)
