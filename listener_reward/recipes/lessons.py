"""What the embedded judge is taught with: pictures and pairs of pictures, drawn and generated, and littered texts.

Every function draws from the generator that it is given, so that lessons are a function of its seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image, ImageOps

from listener_reward.tiny.drawing import draw, draw_arrangement, draw_edit, draw_pair, draw_relation
from listener_reward.tiny.edits import TinyEdit, sample_edit
from listener_reward.tiny.generated import Sample
from listener_reward.tiny.models import QUESTION, build_tokenizer
from listener_reward.tiny.relations import Arrangement, TinyRelation, sample_relation
from listener_reward.tiny.thoughts import reasoner_example, verdict
from listener_reward.tiny.world import COLORS, QUALITIES, SHAPES, Scene, TinyPair, p_of, sample_pair

Shown = TinyPair | TinyEdit | TinyRelation

Lesson = tuple[Shown, tuple[Image.Image, ...]]
"""A pair and its two pictures, or an edit and its three."""

ERRORS = (0.35, 0.35, 1.0)
"""How often a drawn attribute differs from the prompt's, one of these for each pair. At 1 the picture owes nothing to
the prompt, so a description cannot be copied from it."""

FREE = (0.0, 0.0, 0.7)
"""How often a result of an edit owes nothing to source and instruction, one of these for each edit, for that reason."""

STRAYING = (0.2, 0.2, 1.0)
"""How often an attribute of a group differs from what was asked for in its place, one of these for each pair."""

LITTERED = 0.4
"""Fraction of the judge's prompts that are littered with words that mean nothing there, which must not move the
answer."""

DISTURBED = {"littered": 0.25, "misled": 0.2, "silent": 0.25}
"""Shares of thoughts that are read there and not spoken, so that the answer follows the pictures whatever stands before
it: littered as prompts are, ending with a verdict for either image, or empty, which is the mode without thoughts."""

STRAY = tuple(sorted(word for word in build_tokenizer().get_vocab() if word.isalnum() or word in ".:,?"))
"""The words that `litter` strews."""


def drawn_pictures(rng: random.Random, n: int) -> tuple[list[Scene], list[Image.Image]]:
    """`n` scenes of every kind, and pictures of them."""
    scenes = [_any_scene(rng) for _ in range(n)]
    return scenes, [draw(scene, rng) for scene in scenes]


def drawn_lessons(rng: random.Random, n: int) -> list[Lesson]:
    return [(pair, draw_pair(pair)) for pair in any_pairs(rng, n)]


def shift(picture: Image.Image, rng: random.Random) -> Image.Image:
    """`picture` a little smaller and elsewhere, and mirrored or not: what it shows stays what it is."""
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    left, top = (rng.randint(0, picture.width // 8) for _ in range(2))
    right, bottom = (rng.randint(0, picture.width // 8) for _ in range(2))
    corner: Any = picture.getpixel((0, 0))
    return ImageOps.expand(picture, (left, top, right, bottom), fill=corner)


def litter(text: str, rng: random.Random) -> str:
    """`text` with 1 to 40 words before or after it that say nothing about this pair.

    Half of the times any words of the tokenizer, and others, which are all one to it; else one word again and again, or
    a piece of a chat about other pictures.
    """
    count = round(math.exp(rng.uniform(0, math.log(40))))
    kind = rng.choice(("any", "any", "one", "chat"))
    if kind == "chat":
        (pair,) = any_pairs(rng, 1)
        thought, answer = reasoner_example(pair, rng)
        chat = f"{QUESTION.format(first='', second='', prompt=pair.wording)} assistant {thought} {answer} user".split()
        start = rng.randrange(len(chat))
        words = chat[start : start + count]
    elif kind == "one":
        words = [rng.choice(STRAY)] * count
    else:
        words = [rng.choice(STRAY) if rng.random() < 0.6 else "zq" for _ in range(count)]
    littered = [*words, text] if rng.random() < 0.5 else [text, *words]
    return " ".join(littered)


def littered(lessons: Iterable[Lesson], rng: random.Random) -> list[Lesson]:
    """The lessons, `LITTERED` of them with a littered prompt."""
    return [
        (replace(pair, wording=litter(pair.wording, rng)) if rng.random() < LITTERED else pair, images)
        for pair, images in lessons
    ]


def any_pairs(rng: random.Random, n: int) -> list[TinyPair]:
    return [sample_pair(rng, cue=0.5, error=rng.choice(ERRORS)) for _ in range(n)]


def any_edits(rng: random.Random, n: int) -> list[TinyEdit]:
    return [sample_edit(rng, cue=0.5, free=rng.choice(FREE)) for _ in range(n)]


def edit_lessons(rng: random.Random, n: int) -> list[tuple[TinyEdit, tuple[Image.Image, Image.Image, Image.Image]]]:
    return [(edit, draw_edit(edit)) for edit in any_edits(rng, n)]


def edit_pictures(rng: random.Random, n: int) -> tuple[list[Scene], list[Image.Image]]:
    """At least `n` scenes of edits, and pictures of them."""
    shown = [
        (scene, picture)
        for edit, pictures in edit_lessons(rng, math.ceil(n / 3))
        for scene, picture in zip((edit.source, edit.first, edit.second), pictures, strict=True)
    ]
    return [scene for scene, _ in shown], [picture for _, picture in shown]


def any_relations(rng: random.Random, n: int) -> list[TinyRelation]:
    return [sample_relation(rng, cue=0.5, error=rng.choice(STRAYING)) for _ in range(n)]


def relation_lessons(rng: random.Random, n: int) -> list[tuple[TinyRelation, tuple[Image.Image, Image.Image]]]:
    return [(pair, draw_relation(pair)) for pair in any_relations(rng, n)]


def relation_pictures(rng: random.Random, n: int) -> tuple[list[Arrangement], list[Image.Image]]:
    """`n` pictures of two groups that owe nothing to a prompt, and what they show."""
    shown = [sample_relation(rng, cue=0.5, error=1.0).first for _ in range(n)]
    return shown, [draw_arrangement(one, rng) for one in shown]


def voters(pair: Shown) -> float:
    """The fraction of people who prefer the first image."""
    return p_of(pair.gap)


def _any_scene(rng: random.Random) -> Scene:
    return Scene(
        rng.choice(COLORS), rng.choice(SHAPES), rng.randint(1, 3), rng.choice(QUALITIES), framed=rng.random() < 0.5
    )


class Mixed:
    """Lessons of which half are drawn and half generated.

    Labels of generated pictures are what `read.read` sees there, which here are people's eyes; those that it cannot
    read are left out.
    """

    def __init__(self, groups: Sequence[Sequence[Sample]], rng: random.Random):
        """`groups` are two samples each of one prompt."""
        self.rng = rng
        seen = [(sample.reading.scene(), sample.picture) for group in groups for sample in group]
        self._seen = [(scene, picture) for scene, picture in seen if scene is not None]
        self._pairs: list[tuple[TinyPair, tuple[Image.Image, Image.Image]]] = []
        for first, second in groups:
            scenes = first.reading.scene(), second.reading.scene()
            if scenes[0] and scenes[1]:
                pair = TinyPair(first.prompt, scenes[0], scenes[1], 0.5, first.wording, 0)
                self._pairs.append((pair, (first.picture, second.picture)))

    def pictures(self, n: int) -> tuple[list[Scene], list[Image.Image]]:
        """`n` scenes, and pictures of them."""
        scenes, images = drawn_pictures(self.rng, n // 2)
        chosen = self.rng.choices(self._seen, k=n - n // 2)
        shifted = [shift(picture, self.rng) for _, picture in chosen]
        return [*scenes, *(scene for scene, _ in chosen)], [*images, *shifted]

    def lessons(self, n: int) -> list[Lesson]:
        """`n` pairs, some of whose prompts are littered."""
        rng = self.rng
        chosen: list[Lesson] = [
            (pair, (shift(a, rng), shift(b, rng))) for pair, (a, b) in rng.choices(self._pairs, k=n - n // 2)
        ]
        return littered([*chosen, *drawn_lessons(rng, n // 2)], rng)

    def disturb(self, thought: str) -> str | None:
        """Another thought in this one's place, in `DISTURBED` of all cases."""
        match self.rng.choices((*DISTURBED, None), (*DISTURBED.values(), 1 - sum(DISTURBED.values())))[0]:
            case "littered":
                return litter(thought, self.rng)
            case "misled":
                return f"{thought} {verdict(self.rng.choice((1, 2)))}"
            case "silent":
                return ""
            case _:
                return None

    def example(self, pair: Shown) -> tuple[str, int]:
        """A true thought about `pair`, and the right answer."""
        return reasoner_example(pair, self.rng)
