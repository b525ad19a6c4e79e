"""The unit of preference data: a prompt, two images, and the share of people who prefer the first."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal

from listener_reward.errors import InputError
from listener_reward.media.images import ImageLike


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two images for one prompt and how people voted.

    Raises:
        InputError: the prompt or the id is not encodable text, or `p_first` is not a number in [0, 1].
    """

    prompt: str
    first: ImageLike
    second: ImageLike
    p_first: float
    """Share of people who prefer the first image, in [0, 1]: 1 or 0 for one vote, 0.5 for a tie, 0.73 for many."""
    id: str
    source: str
    """Where the pair came from, such as `"tiny:ood"` or `"hpdv2"`."""

    def __post_init__(self) -> None:
        check_text(self.prompt, field="prompt")
        check_text(self.id, field="id")
        if not (isinstance(self.p_first, Real) and math.isfinite(self.p_first) and 0 <= self.p_first <= 1):
            raise InputError(
                f"p_first is {self.p_first!r}; give the share of people who prefer the first image, from 0 to 1"
            )

    def swapped(self) -> PreferencePair:
        """The same votes with the images in the other order."""
        return replace(self, first=self.second, second=self.first, p_first=1 - self.p_first)

    @property
    def majority(self) -> Literal[1, 2] | None:
        """The image that most people prefer; None for an even split."""
        if self.p_first == 0.5:
            return None
        return 1 if self.p_first > 0.5 else 2


def check_text(text: object, *, field: str) -> None:
    """Refuses what is not text, or is text that no tokenizer can encode (half of a surrogate pair).

    Raises:
        InputError: names the field and what was given.
    """
    if not isinstance(text, str):
        raise InputError(f"{field} is {reprlib.repr(text)}; give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{field} is {reprlib.repr(text)}, which holds half a character at position {error.start}; repair its "
            "encoding"
        ) from error
