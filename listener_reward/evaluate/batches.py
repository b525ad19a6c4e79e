"""Batches of a data set as a judge is shown them: pictures decoded in threads and once, videos as clips.

Published sets show a picture in many pairs: each of the nine of an HPDv2 record is in eight. What was decoded last is
therefore kept, up to `BUDGET`, and memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from listener_reward.errors import InputError
from listener_reward.media.clips import Clip, Visual
from listener_reward.media.images import Picture, to_picture

if TYPE_CHECKING:
    from listener_reward.evaluate.measure import Labels

BUDGET = 2**27
"""Bytes of decoded pictures that are kept; a batch that has more is left to the judge to decode."""

_FILMED = 8
"""Pairs of videos for each call of the judge, at most: their frames are many."""

_AHEAD = 32
"""Pictures that are decoded at a time, before their bytes are counted again."""

_EMBEDDED = "\0"
"""How the key of a picture begins that is no file; no path can."""


def shown(batches: Iterable[dict[str, list[Any]]], labels: Labels) -> Iterator[dict[str, list[Any]]]:
    """The batches with their pictures decoded; `labels` gets each as it was.

    A picture that cannot be decoded is left as it is, so that the judge which asks for it says so.

    Raises:
        InputError: a video that cannot be read.
    """
    from listener_reward.datasets.format import stored_as_video

    kept: dict[str, Visual] = {}
    with ThreadPoolExecutor() as pool:
        for rows in batches:
            filmed = any(
                isinstance(image, Mapping) and stored_as_video(image) for pair in rows["images"] for image in pair
            )
            size = _FILMED if filmed else len(rows["images"])
            for start in range(0, len(rows["images"]), size):
                part = {name: values[start : start + size] for name, values in rows.items()}
                labels.add(part)
                yield part | {"images": _decoded(part["images"], kept, pool)}


def _decoded(pairs: list[list[Any]], kept: dict[str, Visual], pool: ThreadPoolExecutor) -> list[list[Any]]:
    """The pairs' pictures, those of files from `kept` and into it, the latest used at its end."""
    from listener_reward.datasets.format import stored_as_video

    wanted = {_key(image): image for pair in pairs for image in pair if isinstance(image, Mapping)}
    found = {key: kept.pop(key) for key in wanted if key in kept}
    room = BUDGET - sum(visual.nbytes for visual in found.values())
    missing = [key for key in wanted if key not in found]
    for start in range(0, len(missing), _AHEAD):
        keys = [key for key in missing[start : start + _AHEAD] if room > 0 or stored_as_video(wanted[key])]
        for key, picture in zip(keys, pool.map(_picture, (wanted[key] for key in keys)), strict=True):
            if picture is not None:
                found[key] = picture
                room -= picture.nbytes
    decoded = [
        [found.get(_key(image), image) if isinstance(image, Mapping) else image for image in pair] for pair in pairs
    ]
    kept |= {key: picture for key, picture in found.items() if not key.startswith(_EMBEDDED)}
    held = sum(visual.nbytes for visual in kept.values())
    while held > BUDGET:
        held -= kept.pop(next(iter(kept))).nbytes
    return decoded


def _key(image: Mapping[str, Any]) -> str:
    """A file is known by its path, embedded bytes by their place in memory, which says nothing once they are gone."""
    embedded = image.get("bytes") is not None or not image.get("path")
    return f"{_EMBEDDED}{id(image)}" if embedded else str(image["path"])


def _picture(image: Mapping[str, Any]) -> Picture | Clip | None:
    from listener_reward.datasets.format import stored_as_video

    if stored_as_video(image):
        from listener_reward.media.videos import read_clip  # pyright: ignore[reportMissingImports]

        return read_clip(image.get("bytes") or image["path"], field="a video of the data")
    try:
        return to_picture(image)
    except InputError:
        return None
