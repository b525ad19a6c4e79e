"""GenAI-Bench: votes of an arena between two generators, with two kinds of tie."""

from __future__ import annotations

from collections.abc import Iterator

from listener_reward.datasets.format import Format, Labelled, Place, Row, field, names, published, text, undecoded
from listener_reward.errors import InputError
from listener_reward.pairs import PreferencePair

_VOTES = {"leftvote": (1.0, False), "rightvote": (0.0, False), "tievote": (0.5, False), "bothbad_vote": (0.5, True)}


def _genai_bench(row: Row, place: Place) -> Iterator[Labelled]:
    """Left is first. A tie is 0.5 whether both were good or both bad; `both_bad` keeps the two apart."""
    vote = field(row, "vote_type")
    if vote not in _VOTES:
        raise InputError(f"vote_type is {vote!r}; it is one of {', '.join(_VOTES)}")
    p_first, both_bad = _VOTES[vote]
    media = next((name for name in ("image", "output_image", "video") if f"left_{name}" in row), None)
    if media is None:
        raise InputError(f"left_image or left_video is not in {names(row)}; add it")
    first, second = (undecoded(field(row, f"{side}_{media}"), place) for side in ("left", "right"))
    prompt = next((row[name] for name in ("prompt", "instruct_prompt", "instruction") if name in row), None)
    yield published(
        PreferencePair(prompt, first, second, p_first, str(place.index), "genai-bench"),  # pyright: ignore[reportArgumentType] - checked there
        model=(text(row.get("left_model")), text(row.get("right_model"))),
        both_bad=both_bad,
    )


GENAI_BENCH = Format(
    "genai-bench",
    _genai_bench,
    {"model_first": "string", "model_second": "string", "both_bad": "bool"},
    signs=(frozenset({"vote_type"}),),
    split="image_generation/test",
)
