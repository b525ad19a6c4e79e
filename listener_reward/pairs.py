"""The unit of preference data: a prompt, two images, and the fraction of people who prefer the first.

A prompt is a text, or a `Prompt`: a text with the source images that it speaks of, or with the criterion to judge by.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, TypeAlias, cast

from PIL import Image

from listener_reward.errors import InputError
from listener_reward.media.images import ImageLike, Picture, entries_of, to_picture


@dataclass(frozen=True, slots=True, init=False)
class Prompt:
    """A prompt with what belongs to it. It stands wherever a text may stand as a prompt.

    Two prompts are equal whose texts, criteria and pixels of the sources are. So the images of one instruction on two
    sources are two groups.

    Raises:
        InputError: the text or the criterion is no text, or a source cannot be read.
    """

    text: str
    sources: tuple[Picture, ...]
    """What the text speaks of, in the text's order: the original of an edit, reference subjects, a first frame. Given
    as anything that `images.to_pil` reads, one or several."""
    criterion: str | None
    """The name of the question to ask, out of `ChatFormat.criteria`; None is the general one."""

    def __init__(self, text: str, sources: Sequence[ImageLike] | ImageLike = (), criterion: str | None = None):
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"prompt is {reprlib.repr(text)}; give a string")
        if criterion is not None:
            check_text(criterion, field="criterion")
        for name, value in (("text", text), ("sources", read_sources(sources)), ("criterion", criterion)):
            object.__setattr__(self, name, value)

    @property
    def key(self) -> str:
        """A text that no other prompt has: the text itself where nothing else belongs to it."""
        if not self.sources and self.criterion is None:
            return self.text
        names = [source.digest.hex() for source in self.sources]
        return "\x1f".join([self.text, *names, *([] if self.criterion is None else [f"criterion {self.criterion}"])])


PromptLike: TypeAlias = "str | Prompt"


def read_sources(sources: Any, *, field: str = "sources") -> tuple[Picture, ...]:
    """Source images as they are given: several, one, or None for none.

    Raises:
        InputError: one of them cannot be read. `field` is named.
    """
    if sources is None:
        return ()
    single = isinstance(sources, (str, bytes, os.PathLike, Picture, Image.Image, Mapping))
    if single or getattr(sources, "ndim", 4) in (2, 3):
        return (to_picture(cast("ImageLike", sources), field=field),)
    return tuple(to_picture(source, field=name) for name, source in entries_of(sources, field=field))


def prompt_with(text: PromptLike, sources: Any = (), criterion: str | None = None) -> PromptLike:
    """`text` with these sources and this criterion, and the text itself where there are none.

    Raises:
        InputError: as `Prompt`; or `text` is a `Prompt` with sources or a criterion of its own, and others are given.
    """
    pictures = read_sources(sources)
    if not pictures and criterion is None:
        return text
    if isinstance(text, Prompt):
        for field, own, given in (("sources", text.sources, pictures), ("criterion", text.criterion, criterion)):
            if own and given:
                raise InputError(f"{field} is given, and the prompt {text.text[:40]!r} has its own; leave one out")
        return Prompt(text.text, text.sources or pictures, text.criterion or criterion)
    return Prompt(text, pictures, criterion)


def as_prompt(prompt: PromptLike) -> Prompt:
    """A text as a `Prompt` without sources or criterion."""
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)


def key_of(prompt: PromptLike) -> str:
    """`Prompt.key`, and a text as it is."""
    return prompt.key if isinstance(prompt, Prompt) else prompt


def plain_texts(prompts: Sequence[PromptLike], who: str) -> list[str]:
    """The prompts as texts, for a judge that knows neither sources nor criteria.

    Raises:
        InputError: a prompt has one. `who` is named: what it leaves out must not be left out in silence.
    """
    for position, prompt in enumerate(prompts):
        if isinstance(prompt, Prompt) and (prompt.sources or prompt.criterion is not None):
            what = "source images" if prompt.sources else f"the criterion {prompt.criterion!r}"
            raise InputError(f"prompts[{position}] has {what}, which {who} cannot judge by; take a Judge")
    return [prompt.text if isinstance(prompt, Prompt) else prompt for prompt in prompts]


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
    dataset: str
    """Where the pair came from, such as `"tiny:ood"` or `"hpdv2"`."""
    sources: tuple[ImageLike, ...] = ()
    """What the prompt speaks of, see `Prompt.sources`; nothing is decoded here."""
    criterion: str | None = None
    """What people were asked to judge by, see `Prompt.criterion`."""

    def __post_init__(self) -> None:
        check_text(self.prompt, field="prompt")
        if self.criterion is not None:
            check_text(self.criterion, field="criterion")
        check_text(self.id, field="id")
        if not (isinstance(self.p_first, Real) and math.isfinite(self.p_first) and 0 <= self.p_first <= 1):
            raise InputError(
                f"p_first is {self.p_first!r}; give the fraction of people who prefer the first image, from 0 to 1"
            )

    @property
    def question(self) -> PromptLike:
        """The prompt with what belongs to it, sources decoded."""
        return prompt_with(self.prompt, self.sources, self.criterion)

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
    if isinstance(prompts, (str, bytes, Prompt)):
        text = prompts.text if isinstance(prompts, Prompt) else prompts[:40]
        raise InputError(f"prompts is one string, {text!r}; give one prompt for each image")
    if not _is_list(prompts):
        raise InputError(f"prompts is of type {type(prompts).__name__}; give a list with one prompt for each image")
    if len(prompts) != n:
        raise InputError(f"prompts has {len(prompts)} entries for {n} images; give one prompt for each image")
    for position, prompt in enumerate(prompts):
        _check_string(prompt, position)
        if not (prompt.text if isinstance(prompt, Prompt) else prompt).strip():
            raise InputError(f"prompts[{position}] is empty; look where the host lost it, or leave the sample out")


def with_sources(prompts: Sequence[PromptLike], n: int, metadata: Any = None, sources: Any = None) -> list[PromptLike]:
    """The prompts of a batch of `n`, each with the sources that a call hands over for it.

    Args:
        prompts: `n` texts or `Prompt`s.
        n: the number of images.
        metadata: what a trainer knows of each image. `metadata[i]["sources"]` are read, where it is such a sequence.
        sources: `n` entries of one image, several, or None.

    Raises:
        InputError: unusable prompts or sources, or sources that come twice for a prompt.
    """
    check_prompts(prompts, n)
    told: list[Mapping[str, Any]] = [entry if isinstance(entry, Mapping) else {} for entry in _entries(metadata, n)]
    found: list[Any] = [entry.get("sources") for entry in told]
    if sources is not None:
        given: list[Any] | None = None
        if isinstance(sources, Sequence) and not isinstance(sources, str | bytes):
            given = list(cast("Sequence[Any]", sources))
        if given is None or len(given) != n:
            size = f"is a {type(cast('Any', sources)).__name__}" if given is None else f"has {len(given)} entries"
            raise InputError(f"sources {size} for {n} images; give a list with one image, several or None for each")
        if any(entry is not None for entry in found):
            raise InputError("sources is given, and metadata has sources too; leave one of them out")
        found = given
    read: dict[Any, tuple[Picture, ...]] = {}  # by object: the prompts of a group hand over the same images
    asked: list[PromptLike] = []
    for place, (prompt, entry) in enumerate(zip(prompts, found, strict=True)):
        same = tuple(map(id, cast("list[Any]", entry))) if isinstance(entry, list | tuple) else id(entry)
        if same not in read:
            read[same] = read_sources(entry, field=f"sources[{place}]")
        asked.append(prompt_with(prompt if isinstance(prompt, Prompt) else str(prompt), read[same]))
    return asked


def _entries(metadata: Any, n: int) -> Sequence[Any]:
    """What is said of each of `n` images; None of each where it is said in another form."""
    if isinstance(metadata, Sequence) and not isinstance(metadata, str | bytes):
        entries = cast("Sequence[Any]", metadata)
        if len(entries) == n:
            return entries
    return [None] * n


def check_company(prompts: Sequence[PromptLike]) -> None:
    """Raises `InputError` where a prompt has one image only: there is nothing to compare it with."""
    alone = [prompt for prompt, times in Counter(prompts).items() if times == 1]
    if alone:
        raise InputError(
            f"{len(alone)} of the prompts have one image in this call, such as {as_prompt(alone[0]).text[:80]!r}, and "
            "scheme='group' compares the images of a prompt with one another; hand over whole groups, or take "
            "scheme='reference'"
        )


def check_questions(prompts: Any, firsts: Any, seconds: Any) -> None:
    """Refuses what are not as many prompts as there are first and second images. An empty text is one.

    Raises:
        InputError: names the argument and what was given.
    """
    if isinstance(prompts, str | Prompt):
        raise InputError(
            f"prompts is the single text {as_prompt(prompts).text[:40]!r}; give a list with one prompt for each pair"
        )
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
    if not isinstance(prompt, str | Prompt):
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
