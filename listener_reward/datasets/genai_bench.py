"""GenAI-Bench: votes of an arena between two generators of images or videos, or two editors, with two kinds of tie.

Its authors score their four-way rule on the split `test_v1`; UnifiedReward and VisionReward take `test`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

from listener_reward.datasets.format import Format, Labelled, Place, Row, field, names, published, text, undecoded
from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair

_VOTES = {"leftvote": (1.0, False), "rightvote": (0.0, False), "tievote": (0.5, False), "bothbad_vote": (0.5, True)}
_VOTES["tie"] = _VOTES["tievote"]


def _genai_bench(row: Row, place: Place) -> Iterator[Labelled]:
    """Left is first. A tie is 0.5 whether both were good or both bad; `both_bad` keeps the two apart.

    An edit is of `source_image` by `instruct_prompt`; the descriptions of the picture before and after are not shown.
    EditReward-Data has the same rows with `instruction` and `source_img`, and the vote `tie` in a copy of it.
    """
    vote = field(row, "vote_type")
    if not isinstance(vote, str) or vote not in _VOTES:
        raise InputError(f"vote_type is {reprlib.repr(vote)}; it is one of {', '.join(_VOTES)}")
    p_first, both_bad = _VOTES[vote]
    media = next((name for name in ("image", "output_image", "video") if f"left_{name}" in row), None)
    if media is None:
        raise InputError(f"left_image or left_video is not in {names(row)}; add it")
    given = [field(row, f"{side}_{media}") for side in ("left", "right")]
    first, second = (undecoded(_located(one, place) if media == "video" else one, place) for one in given)
    prompt = next((row[name] for name in ("prompt", "instruct_prompt", "instruction") if name in row), None)
    source = next((row[name] for name in ("source_image", "source_img") if row.get(name) is not None), None)
    sources = () if source is None else (undecoded(source, place),)
    yield published(
        PreferencePair(prompt, first, second, p_first, str(place.index), "genai-bench", sources),  # pyright: ignore[reportArgumentType] - checked there
        item=tuple(one if isinstance(one, str) else None for one in given),
        model=(text(row.get("left_model")), text(row.get("right_model"))),
        both_bad=both_bad,
    )


GENAI_BENCH = Format(
    "genai-bench",
    _genai_bench,
    {"model_first": "string", "model_second": "string", "both_bad": "bool"},
    signs=(frozenset({"vote_type"}),),
    split="image_generation/test_v1",
)


def _located(video: Any, place: Place) -> Any:
    """The Hub names its videos by strings and does not embed them: their address there, which is no file of ours."""
    if place.folder is None and isinstance(video, str) and "://" not in video:
        return f"hf://datasets/{place.file.partition(':')[0]}/{video.lstrip('/')}"
    return video
