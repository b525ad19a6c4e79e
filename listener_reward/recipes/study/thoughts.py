"""Thoughts that are short, missing or partly false: what a judge makes of them tells whether it reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from listener_reward.chat import Chat, ChatFormat
from listener_reward.tiny.thoughts import MARKS
from listener_reward.tiny.world import COLORS, COUNTS, QUALITIES, SHAPES
from listener_reward.trace import parse

CHANGES = ("whole", "half", "none", "one in four misnamed", "one in four false")
"""What is left of a thought before anybody reads it. A false word is another one of its kind: a colour for a colour,
"wrong" for "right". Where things are only misnamed, right and wrong stand as they were."""

_PLURALS = tuple(f"{shape}s" for shape in SHAPES)
_NAMES = (COLORS, SHAPES, _PLURALS, COUNTS, QUALITIES)
_KINDS = (*_NAMES, MARKS)


def changed(thought: str, change: str, rng: random.Random) -> str:
    """`thought` after one of `CHANGES`: its first half by words, nothing, or each word that has a kind turned into
    another of it with probability 1/4."""
    if change == "whole":
        return thought
    if change == "none":
        return ""
    words = thought.split()
    if change == "half":
        return " ".join(words[: len(words) // 2])
    kinds = _NAMES if change == "one in four misnamed" else _KINDS
    return " ".join(_other(word, kinds, rng) if rng.random() < 0.25 else word for word in words)


def _other(word: str, kinds: Sequence[Sequence[str]], rng: random.Random) -> str:
    kind = next((kind for kind in kinds if word in kind), (word,))
    return rng.choice([one for one in kind if one != word] or [word])


class ChangedThoughts:
    """A judge's reasoner whose well-formed thoughts are changed once they are written: it reads its answer after what
    is left, and so does the listener. Everything else is the model's own."""

    def __init__(self, vlm: Any, chat_format: ChatFormat, change: str):
        self._vlm, self._format, self._change = vlm, chat_format, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlm, name)

    def generate(self, chats: Sequence[Chat], *, seeds: Sequence[int], **options: Any) -> list[str]:
        """The model's completions, changed by generators that their seeds seed."""
        completions: list[str] = self._vlm.generate(chats, seeds=seeds, **options)
        return [self._after(text, random.Random(seed)) for text, seed in zip(completions, seeds, strict=True)]

    def _after(self, completion: str, rng: random.Random) -> str:
        trace = parse(completion, self._format)
        if trace.answer is None:
            return completion
        label = self._format.labels[trace.answer - 1]
        return f"{self._format.answer_slot(changed(trace.thought, self._change, rng))}{label}{self._format.answer[1]}"
