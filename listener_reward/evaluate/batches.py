"""Batches of a data set as a judge gets them: pictures decoded in threads and once, videos as clips.

Published sets show a picture in many pairs: each of the nine of an HPDv2 record is in eight. What was decoded last is
therefore kept, up to `BUDGET`, and memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from listener_reward.errors import InputError
from listener_reward.media.clips import Clip, Visual
from listener_reward.media.images import Picture, identity, to_picture
from listener_reward.pairs import prompt_with

if TYPE_CHECKING:
    import datasets

    from listener_reward.evaluate.judged import Labels

BUDGET = 2**27
"""Bytes of decoded pictures that are kept for the next batches."""

AT_ONCE = 2**29
"""Bytes of decoded pictures that a judge is shown at once: 64 pairs of 1024 x 1024. A larger batch comes in parts."""

_FILMED = 8
"""Pairs of videos for each call of the judge, at most: their frames are many."""

_AHEAD = 16
"""Pairs that are decoded at a time, before their bytes are counted again."""

Batch = dict[str, list[Any]]
"""Column to list."""


def batches_of(pairs: datasets.Dataset | datasets.IterableDataset, size: int) -> Iterator[Batch]:
    """The rows of a data set, `size` at a time, nothing decoded."""
    return iter(pairs.iter(batch_size=size))  # dicts, for no format is set


def load_batches(batches: Iterable[Batch], labels: Labels | None = None) -> Iterator[Batch]:
    """The batches, or parts of them, with their pictures decoded; `labels` gets each as it was, its images named.

    A batch has a column more, `asked`: the prompts with what belongs to them, for whoever asks a judge. A picture that
    cannot be decoded is left as it is, so that the judge which asks for it says so.

    Raises:
        InputError: a video that cannot be read, or an image that is neither undecoded nor one of PIL's.
    """
    kept: dict[str, Visual] = {}
    with ThreadPoolExecutor() as pool:
        for rows in batches:
            filmed = any(_is_film(image) for pair in rows["images"] for image in pair)
            start, size = 0, _FILMED if filmed else len(rows["images"])
            while start < len(rows["images"]):
                end = start + size
                sources = rows.get("sources", [None] * len(rows["images"]))[start:end]
                shown = [[*pair, *(some or ())] for pair, some in zip(rows["images"][start:end], sources, strict=True)]
                seen = _decoded(shown, kept, pool)
                part = {name: values[start : start + len(seen)] for name, values in rows.items()}
                if labels is not None:
                    first, second = ([pair[side][0] for pair in seen] for side in (0, 1))
                    labels.add({"item_first": first, "item_second": second} | part)
                visuals = [[visual for _, visual in pair] for pair in seen]
                criteria = part.get("criterion", [None] * len(seen))
                asked = [
                    prompt_with(text, tuple(some[2:]), criterion)
                    for text, some, criterion in zip(part["prompt"], visuals, criteria, strict=True)
                ]
                yield part | {"images": [some[:2] for some in visuals], "asked": asked}
                start += len(seen)


def _decoded(pairs: list[list[Any]], kept: dict[str, Visual], pool: ThreadPoolExecutor) -> list[list[tuple[str, Any]]]:
    """Identity and picture of every image of a pair, for as many pairs as fit into `AT_ONCE`, but at least `_AHEAD`.

    Pictures come from `kept` and go into it, the latest used at its end.
    """
    found: dict[str, Visual] = {}
    seen: list[list[tuple[str, Any]]] = []
    while len(seen) < len(pairs) and sum(visual.nbytes for visual in found.values()) < AT_ONCE:
        some = [
            [image if isinstance(image, Mapping) else to_picture(image) for image in pair]
            for pair in pairs[len(seen) : len(seen) + _AHEAD]
        ]
        named = [[(identity(image), image) for image in pair] for pair in some]
        wanted = {name: image for pair in named for name, image in pair if name not in found}
        found |= {name: kept.pop(name) for name in wanted if name in kept}
        missing = [name for name in wanted if name not in found]
        for name, visual in zip(missing, pool.map(_visual, (wanted[name] for name in missing)), strict=True):
            if visual is not None:
                found[name] = visual
        _shrink(kept, BUDGET - sum(visual.nbytes for visual in found.values()))
        seen += [[(name, found.get(name, image)) for name, image in pair] for pair in named]
    kept |= found
    _shrink(kept, BUDGET)
    return seen


def _shrink(kept: dict[str, Visual], size: int) -> None:
    """Lets go what was not used for longest, until `kept` has at most `size` bytes."""
    held = sum(visual.nbytes for visual in kept.values())
    while kept and held > size:
        held -= kept.pop(next(iter(kept))).nbytes


def _is_film(image: Any) -> bool:
    from listener_reward.datasets.format import stored_as_video

    return isinstance(image, Mapping) and stored_as_video(image)


def _visual(image: Any) -> Picture | Clip | None:
    if _is_film(image):
        from listener_reward.media.videos import read_clip

        return read_clip(image.get("bytes") or image["path"], field="a video of the data")
    try:
        return to_picture(image)
    except InputError:
        return None
