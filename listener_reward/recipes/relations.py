"""How models come about that judge two groups of objects: `python -m listener_reward.recipes.relations`.

They judge nothing else. Both begin as the embedded judge, which sees one group well, and have their first lessons in
common: the language model reads about two groups, the vision tower learns to tell the places apart, then both together
describe pictures. There the ways part.

- `relation-base` learns to err, as `base` does: what training on `tiny:relation-train` starts from.
- `relation-listener` goes on with true lessons. It is of the base's own family, a better pupil and no stranger.

Each stage is kept, so that an interrupted run goes on after the last finished one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from listener_reward.card import Card
from listener_reward.models.hub import resolve
from listener_reward.recipes.edits import with_new_words
from listener_reward.recipes.lessons import Lesson, Shown, any_relations, relation_lessons, relation_pictures
from listener_reward.recipes.teaching import (
    FORMAT,
    Sight,
    Stage,
    run_stages,
    save,
    teach_to_read,
    teach_to_see,
    teach_to_speak,
)
from listener_reward.recipes.variants import Recipe
from listener_reward.recipes.workers import Report, run_side_by_side
from listener_reward.tiny.models import build_processor
from listener_reward.tiny.relations import AXES, MOST, Arrangement
from listener_reward.tiny.thoughts import reasoner_example
from listener_reward.tiny.world import COLORS, QUALITIES, SHAPES

WEIGHTS_DIR = Path(__file__).parents[1] / "tiny" / "weights"

BEGIN = "tiny"
"""The checkpoint that both begin as."""

MAX_NEW_TOKENS = 64
"""A thought about two groups has 44 tokens with its verdict, and its tags and answer seven."""

READ: dict[str, Any] = {"steps": 400, "batch": 64, "rate": 1e-3}
SEE: dict[str, Any] = {"steps": 2000, "batch": 64, "rate": 1.5e-3}
SPEAK: dict[str, Any] = {"steps": 700, "batch": 32, "rate": 1e-3, "autocast": True}
"""What both have in common."""

MORE: list[dict[str, Any]] = [
    {"steps": 800, "batch": 32, "rate": 8e-4, "autocast": True},
    {"steps": 800, "batch": 32, "rate": 5e-4, "autocast": True},
]
"""The listener's further lessons."""

ERR: dict[str, Any] = {"steps": 300, "batch": 32, "rate": 7e-4, "autocast": True}
"""The base's last ones."""

BASE = {"error": 0.45, "whim": 0.4, "taste": 0.8}
"""The base's imperfection: see `thoughts.reasoner_example`."""

KINDS = ("base", "listener")


def _answers(shown: Arrangement) -> list[int]:
    groups = [
        answer
        for group in (shown.first, shown.second)
        for answer in (group.count - 1, COLORS.index(group.color), SHAPES.index(group.shape))
    ]
    return [AXES.index(shown.axis), *groups, QUALITIES.index(shown.quality)]


_GROUP = (MOST, len(COLORS), len(SHAPES))

ARRANGEMENTS = Sight((len(AXES), *_GROUP, *_GROUP, len(QUALITIES)), _answers, places=9)
"""The axis, count, colour and shape of both groups, and the picture's quality."""


def learn_relations(report: Report, kind: str | None, out: str, scratch: str) -> None:
    """Teaches one of `KINDS` and saves it in `out`; with None, what both have in common, which is kept in `scratch`."""
    torch.manual_seed(0)
    rng = random.Random("relations")
    processor = build_processor(relations=True)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        resolve(BEGIN), dtype=torch.float32, trust_remote_code=False, attn_implementation="eager"
    )
    with_new_words(model, processor)

    def plain(pair: Shown) -> tuple[str, int]:
        return reasoner_example(pair, rng)

    def erring(pair: Shown) -> tuple[str, int]:
        return reasoner_example(pair, rng, **BASE)

    def pairs(n: int) -> list[Shown]:
        return [*any_relations(rng, n)]

    def pictures(n: int) -> tuple[list[Arrangement], list[Image.Image]]:
        return relation_pictures(rng, n)

    def lessons(n: int) -> list[Lesson]:
        return [*relation_lessons(rng, n)]

    def speak(stage: dict[str, Any], example: Callable[[Shown], tuple[str, int]] = plain) -> Stage:
        return stage, lambda tell: teach_to_speak(model, processor, example, lessons, stage, tell)

    stages: list[Stage] = [
        (READ, lambda tell: teach_to_read(model, processor, plain, pairs, READ, tell)),
        (SEE, lambda tell: teach_to_see(model, processor, pictures, SEE, tell, ARRANGEMENTS)),
        speak(SPEAK),
    ]
    if kind == "base":
        _, err = speak(ERR, erring)
        stages.append((ERR | BASE, err))
    elif kind == "listener":
        stages += [speak(stage) for stage in MORE]
    run_stages(report, stages, model, rng, Path(scratch, "relations"))
    if kind is None:
        return
    card = Card(
        format=FORMAT,
        listener=None if kind == "listener" else "tiny-relation-listener",
        listener_grounding=Recipe.grounding,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    save(model, processor, card, Path(out, f"relation-{kind}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS_DIR, help="where relation-base and relation-listener go")
    parser.add_argument("--scratch", type=Path, default=Path("tiny-relations"), help="where finished stages are kept")
    parser.add_argument("--at-once", type=int, default=2, help="models that learn side by side, a core each")
    args = parser.parse_args()
    folders = {"out": str(args.out), "scratch": str(args.scratch)}
    run_side_by_side({"both": (learn_relations, folders | {"kind": None})})
    run_side_by_side({kind: (learn_relations, folders | {"kind": kind}) for kind in KINDS}, at_once=args.at_once)


if __name__ == "__main__":
    main()
