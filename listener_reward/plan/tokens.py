"""How many tokens a pair has, and how they come about."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from listener_reward.chat import ChatFormat
from listener_reward.errors import InputError
from listener_reward.plan.checkpoints import Checkpoint
from listener_reward.plan.passes import GRID

SAMPLE = 2000
"""Pairs of a data set that are looked at: enough for the longest of many thousands but for a few tokens."""


@dataclass(frozen=True)
class Pair:
    """One pair as a model reads it."""

    question: int
    """Tokens of the question's wording and the chat template."""
    prompt: int
    grids: tuple[GRID, ...]
    images: tuple[int, ...]
    """Tokens of each image."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each image in pixels, as it is in its file."""

    @property
    def total(self) -> int:
        """Tokens before the model writes its first."""
        return self.question + self.prompt + sum(self.images)


@dataclass(frozen=True)
class Pairs:
    """The pairs of a data set, or those that stand for it."""

    number: int
    seen: list[Pair]
    source: str
    """What they were taken from."""
    unread: int = 0
    """Further pairs that were looked at, of which an image cannot be read."""

    @property
    def longest(self) -> Pair:
        return max(self.seen, key=lambda pair: pair.total)

    @property
    def mean(self) -> float:
        return statistics.fmean(pair.total for pair in self.seen)

    @property
    def notes(self) -> list[str]:
        """What a reader of the plan should know of pairs that are not in it."""
        if not self.unread:
            return []
        looked_at = len(self.seen) + self.unread
        return [f"{self.unread} of {looked_at} pairs looked at have an image that cannot be read, and are left out"]

    def to_dict(self, thought: int) -> dict[str, Any]:
        longest = asdict(self.longest) | {"thought": thought, "total": self.longest.total + thought}
        return {
            "pairs": self.number,
            "looked_at": len(self.seen),
            "source": self.source,
            "mean": self.mean + thought,
            "longest": longest,
        }


def make_pair(
    checkpoint: Checkpoint, chat_format: ChatFormat, prompt: str, sizes: Sequence[tuple[int, int]], asked: int = 0
) -> Pair:
    """`asked` is the question's tokens where they are known."""
    grids = tuple(checkpoint.grid(*size) for size in sizes)
    images = tuple(map(checkpoint.tokens, grids))
    question = asked or checkpoint.question_tokens(chat_format)
    return Pair(question, checkpoint.text_tokens(prompt), grids, images, tuple(sizes))


def assumed(
    checkpoint: Checkpoint, chat_format: ChatFormat, size: tuple[int, int], prompt_tokens: int, number: int, why: str
) -> Pairs:
    """Pairs of images of one size, in place of data that is not here."""
    pair = make_pair(checkpoint, chat_format, "", [size, size])
    pair = Pair(pair.question, prompt_tokens, pair.grids, pair.images, pair.sizes)
    return Pairs(number, [pair], f"{why}: images of {size[0]} x {size[1]} and prompts of {prompt_tokens} tokens")


def of_data(checkpoint: Checkpoint, chat_format: ChatFormat, spec: str, limit: int | None, seed: int) -> Pairs:
    """Pairs of the data `spec`; of images the file's header is read and no pixel.

    Raises:
        InputError: the data cannot be read.
    """
    from listener_reward.datasets import load_pairs

    rows = load_pairs(spec, limit=limit, seed=seed, check_images=False)
    number = len(rows)
    step = max(1, number // SAMPLE)
    asked = checkpoint.question_tokens(chat_format)
    seen: list[Pair] = []
    chosen: Any = rows.select(range(0, number, step))
    for row in chosen:
        sizes = [_size(image) for image in row["images"]]
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes):
            seen.append(make_pair(checkpoint, chat_format, row["prompt"], known, asked))
    if not seen:
        raise InputError(f"{spec}: no image among those looked at can be read; give --image-size WIDTHxHEIGHT instead")
    return Pairs(number, seen, spec, len(chosen) - len(seen))


def _size(image: Any) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
            width, height = opened.size
            turned = opened.getexif().get(0x0112, 1) >= 5  # taken with the camera on its side
            return (height, width) if turned else (width, height)
    except (OSError, ValueError, TypeError):
        return None
