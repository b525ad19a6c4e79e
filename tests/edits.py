"""A judge of edits without a model, and edits whose order it knows.

The instruction is always to make a picture redder: by `STEP`, with all else as it was in the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from conftest import sigmoid
from PIL import Image

from listener_reward.errors import InputError
from listener_reward.media.images import to_picture
from listener_reward.pairs import as_prompt
from listener_reward.verdict import Verdict

INSTRUCTION = "make it redder"
STEP = 100


def plain(red: int, green: int = 40) -> Image.Image:
    return Image.new("RGB", (8, 8), (red, green, 0))


DARK, BRIGHT = plain(20), plain(120)
"""Two sources of the same instruction."""

GOOD, HALF, WRONG = plain(20 + STEP), plain(20 + STEP // 2), plain(20, 240)
"""Edits of `DARK`: done, half done, something else done. `GOOD` is as good as no edit of `BRIGHT`."""

BRIGHT_GOOD = plain(120 + STEP)
"""The edit of `BRIGHT`, which on `DARK` is too much."""


class EditJudge:
    """Prefers the picture nearer to what its source becomes by the instruction; it needs exactly one source."""

    name = "edits"

    def __init__(self) -> None:
        self.asked: list[Any] = []
        """Every prompt that came, in order."""

    def compare_many(
        self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        self.asked += prompts
        verdicts: list[Verdict] = []
        for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
            sources = as_prompt(prompt).sources
            if len(sources) != 1:
                raise InputError(f"the judge of edits got {len(sources)} sources")
            wanted = _mean(sources[0]) + np.array([STEP, 0, 0])
            gaps = [np.abs(_mean(image) - wanted).sum() for image in (first, second)]
            p_first = sigmoid((gaps[1] - gaps[0]) / 50)
            preferred = None if p_first == 0.5 else 1 if p_first > 0.5 else 2
            verdicts.append(Verdict(p_first, preferred, (), None, None, 0.0, 0, (p_first, p_first)))
        return verdicts


def _mean(image: Any) -> np.ndarray:
    return np.asarray(to_picture(image).image, dtype=float).reshape(-1, 3).mean(0)
