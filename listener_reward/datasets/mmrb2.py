"""Multimodal RewardBench 2: expert-annotated pairs of responses. Those that are one image each can be judged as such.

Longer ones, as those of the interleaved task are, can be judged as pages (`#pages`): texts and pictures from top to
bottom as one picture. That is this package's way and not the authors', who hand a model the parts one by one.

Published for evaluation only, under CC BY-NC 4.0: do not train on it.
"""

from __future__ import annotations

import io
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
from listener_reward.media.images import to_pil
from listener_reward.media.pages import page
from listener_reward.pairs import PreferencePair

_TASKS = ("t2i", "edit", "interleaved", "reasoning")
_IMAGE = re.compile(r"<image_\d+>")


class _Message(NamedTuple):
    """A prompt or a response: its parts in their order, each a text, or an image as a path or embedded."""

    parts: list[tuple[str, Any]]

    @property
    def texts(self) -> list[str]:
        return [part for kind, part in self.parts if kind == "text"]

    @property
    def images(self) -> list[Any]:
        return [part for kind, part in self.parts if kind == "image"]

    @property
    def is_one_image(self) -> bool:
        return len(self.images) == 1 and not any(map(str.strip, self.texts))


def _mmrb2(row: Row, place: Place) -> Iterator[Labelled | Skipped]:
    """`chosen` is A or B, never a tie. Annotators give 1 (B by far) to 6 (A by far); each is counted as one vote.

    The prompt's images are the pair's sources: what is to be edited, or what the prompt speaks of. Where they stand
    among its texts is not kept.
    """
    if place.dimension not in (None, "pages"):
        raise InputError(f"dimension is {place.dimension!r}; give pages, or none")
    prompt, *responses = _of_the_hub(row) if "prompt_text" in row else _of_the_build(row)
    paged = not all(response.is_one_image for response in responses)
    if paged and not all(response.images for response in responses):
        yield Skipped("a response has no image")
        return
    if paged and place.dimension is None:
        yield Skipped("a response is more than one image")
        return
    chosen = row.get("chosen", row.get("human_preference"))
    if not isinstance(chosen, str) or chosen.upper() not in ("A", "B"):
        raise InputError(f"chosen is {reprlib.repr(chosen)}; it is A or B")
    given = [None if paged else response.images[0] for response in responses]
    first, second = (
        _page(response, place) if paged else undecoded(response.images[0], place, "", "images")
        for response in responses
    )
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
        coming, parts = iter(images or []), list[tuple[str, Any]]()
        for number, words_between in enumerate(_IMAGE.split(words)):
            if number and (image := next(coming, None)) is not None:
                parts.append(("image", image))
            if words_between.strip():
                parts.append(("text", words_between.strip()))
        messages.append(_Message([*parts, *(("image", image) for image in coming)]))
    return messages


def _page(response: _Message, place: Place) -> dict[str, Any]:
    """A response as a page, embedded. Where a picture of it cannot be read it stands for the page, which then is as
    broken as the picture."""
    parts: list[Any] = []
    for kind, part in response.parts:
        if kind == "text":
            parts.append(part)
            continue
        image = undecoded(part, place, "", "images")
        try:
            parts.append(to_pil(image))
        except InputError:
            return image
    file = io.BytesIO()
    page(parts).save(file, "JPEG", quality=90)
    return {"bytes": file.getvalue(), "path": None}


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
    parts: list[tuple[str, Any]] = []
    if not isinstance(content, list):
        raise InputError(f"{name} is {reprlib.repr(content)}; give a list of parts")
    for part in content:
        if (
            not isinstance(part, list)
            or len(part) != 2
            or not all(isinstance(one, str) for one in part)
            or part[0] not in ("text", "image")
        ):
            raise InputError(f"{name} holds {reprlib.repr(part)}; a part is a text or an image's path")
        parts.append((part[0], part[1]))
    return _Message(parts)


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
