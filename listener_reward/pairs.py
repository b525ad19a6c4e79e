"""The unit of preference data: a prompt, two images, and the fraction of people who prefer the first."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

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
    """Fraction of people who prefer the first image, in [0, 1]: 1 or 0 for one vote, 0.5 for a tie, 0.73 for many."""
    id: str
    source: str
    """Where the pair came from, such as `"tiny:ood"` or `"hpdv2"`."""

    def __post_init__(self) -> None:
        check_text(self.prompt, field="prompt")
        check_text(self.id, field="id")
        if not (isinstance(self.p_first, Real) and math.isfinite(self.p_first) and 0 <= self.p_first <= 1):
            raise InputError(
                f"p_first is {self.p_first!r}; give the fraction of people who prefer the first image, from 0 to 1"
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


def check_prompts(prompts: Any, n: int) -> None:
    """Refuses what are not `n` texts with something in them, before anything is made of them.

    An empty prompt means that it was lost on the way: a judge would answer, but not the question that was meant.

    Raises:
        InputError: names the entry and what was given.
    """
    if isinstance(prompts, (str, bytes)):
        raise InputError(f"prompts is one string, {prompts[:40]!r}; give one prompt for each image")
    if not _is_list(prompts):
        raise InputError(f"prompts is of type {type(prompts).__name__}; give a list with one prompt for each image")
    if len(prompts) != n:
        raise InputError(f"prompts has {len(prompts)} entries for {n} images; give one prompt for each image")
    for position, prompt in enumerate(prompts):
        _check_string(prompt, position)
        if not prompt.strip():
            raise InputError(f"prompts[{position}] is empty; look where the host lost it, or leave the sample out")


def check_company(prompts: Sequence[str]) -> None:
    """Raises `InputError` where a prompt has one image only: there is nothing to compare it with."""
    alone = [prompt for prompt, times in Counter(map(str, prompts)).items() if times == 1]
    if alone:
        raise InputError(
            f"{len(alone)} of the prompts have one image in this call, such as {alone[0][:80]!r}, and scheme='group' "
            "compares the images of a prompt with one another; hand over whole groups, or take scheme='reference'"
        )


def check_questions(prompts: Any, firsts: Any, seconds: Any) -> None:
    """Refuses what are not as many texts as there are first and second images. An empty text is one.

    Raises:
        InputError: names the argument and what was given.
    """
    if isinstance(prompts, str):
        raise InputError(f"prompts is the single text {prompts[:40]!r}; give a list with one prompt for each pair")
    for name, given in (("prompts", prompts), ("firsts", firsts), ("seconds", seconds)):
        if not _is_list(given):
            raise InputError(f"{name} is of type {type(given).__name__}; give a list with one for each pair")
    if not len(prompts) == len(firsts) == len(seconds):
        raise InputError(
            f"prompts, firsts and seconds have lengths {len(prompts)}, {len(firsts)} and {len(seconds)}; each pair "
            "needs one of each"
        )
    for position, prompt in enumerate(prompts):
        _check_string(prompt, position)


def _check_string(prompt: Any, position: int) -> None:
    if not isinstance(prompt, str):
        raise InputError(f"prompts[{position}] is a {type(prompt).__name__}; a prompt is a string")


def _is_list(given: Any) -> bool:
    """Whether this has a length and an order: a list, a tuple, an array."""
    return isinstance(given, Iterable) and isinstance(given, Sized) and not isinstance(given, Mapping | Set)


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
