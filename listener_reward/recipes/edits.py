"""How the embedded models learn edits: what each can do already, and lessons about edits, in equal parts.

A model that knows no edits gets the words for them first (`with_new_words`). Then its language model reads, as in
`pretrain`, and all of it learns in rounds, after each of which it is a whole model: an interrupted run goes on after
the last finished round.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from listener_reward.card import Card
from listener_reward.recipes.lessons import (
    DISTURBED,
    LITTERED,
    Lesson,
    Mixed,
    Shown,
    any_edits,
    any_pairs,
    drawn_lessons,
    drawn_pictures,
    edit_lessons,
    edit_pictures,
    littered,
    voters,
)
from listener_reward.recipes.teaching import (
    FORMAT,
    SCENES,
    Stage,
    run_stages,
    save,
    teach_to_read,
    teach_to_see,
    teach_to_speak,
)
from listener_reward.recipes.workers import Report
from listener_reward.tiny.models import build_processor
from listener_reward.tiny.thoughts import reasoner_example
from listener_reward.tiny.world import Scene

MAX_NEW_TOKENS = 64
"""A thought about an edit has 47 tokens, and its tags and answer seven."""

TAUGHT = {"listener": "edit-listener", "base": "edit-base", "judge": "judge"}
"""Folders of the models by what they are made from. Base and listener stay beside them, because the demo's figures and
others' are theirs; the judge of pairs becomes one of both."""

LISTENER = "tiny-edit-listener"

READ: dict[str, Any] = {"steps": 250, "batch": 64, "rate": 1e-3}
READ_AGAIN: dict[str, Any] = {"steps": 300, "batch": 64, "rate": 1e-3}
SEE: dict[str, Any] = {"steps": 300, "batch": 64, "rate": 7e-4}

SPEAK: dict[str, list[tuple[int, float]]] = {
    "judge": [(700, 8e-4), (500, 5e-4), (500, 4e-4)],
    "listener": [(700, 8e-4), (500, 5e-4)],
    "base": [(300, 8e-4)],
}
"""Steps and rates of the rounds before the model has looked at wooden frames and read again."""

SPEAK_AGAIN: dict[str, list[tuple[int, float]]] = {
    "judge": [(600, 6e-4), (500, 4e-4), (500, 3e-4), (600, 4e-4)],
    "listener": [(500, 6e-4)],
    "base": [(300, 6e-4)],
}
"""And after that. The base is imperfect on purpose, and learns least."""

LESSONS: dict[str, Any] = {"batch": 32, "autocast": True}
"""Of every round. In bfloat16, with float32 weights, a step takes three quarters of the time."""

BASE = {"error": 0.55, "whim": 0.45, "taste": 0.8}
"""The base's imperfection: see `thoughts.reasoner_example`."""


def with_new_words(model: Any, processor: Any) -> Any:
    """`model` with a row in its embeddings, which are its head's too, for every token of a longer tokenizer.

    A new row is drawn around the mean of the old ones, so that no new word is likelier than a known one before it is
    learnt. Known words keep their numbers and their rows.
    """
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=True)
    return model


def learn_edits(report: Report, kind: str, out: str, scratch: str, generated: str) -> str:
    """Teaches the model `kind` in `out`, a key of `TAUGHT`, to judge edits too, and saves it there under its new name.

    Half of its lessons are those that it had before, so that it forgets nothing: drawn pairs, and for the judge
    generated ones too, disturbed thoughts, littered prompts, and answers that are as sure as people are.
    """
    folder = Path(out, kind)
    torch.manual_seed(0)
    rng = random.Random(f"{kind} edits")
    processor = build_processor()
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, attn_implementation="eager"
    )
    with_new_words(model, processor)
    mixed = Mixed(torch.load(generated, weights_only=False), rng) if kind == "judge" else None

    def plain(pair: Shown) -> tuple[str, int]:
        return reasoner_example(pair, rng)

    def finished(pair: Shown) -> tuple[str, int]:
        return reasoner_example(pair, rng, **BASE) if kind == "base" else plain(pair)

    def pairs(n: int) -> list[Shown]:
        return [*any_pairs(rng, n // 2), *any_edits(rng, n - n // 2)]

    def pictures(n: int) -> tuple[list[Scene], list[Image.Image]]:
        known = mixed.pictures(n // 2) if mixed else drawn_pictures(rng, n // 2)
        (scenes, shown), (more, others) = known, edit_pictures(rng, n - n // 2)
        return [*scenes, *more], [*shown, *others]

    def lessons(n: int) -> list[Lesson]:
        edits = edit_lessons(rng, n // 2)
        if mixed is None:
            return [*drawn_lessons(rng, n - n // 2), *edits]
        return [*mixed.lessons(n - n // 2), *littered(edits, rng)]

    def speak(stage: dict[str, Any]) -> Callable[[Callable[[int, str], None]], None]:
        judges = {"disturb": mixed.disturb, "voters": voters} if mixed else {}
        return lambda tell: teach_to_speak(model, processor, finished, lessons, stage, tell, **judges)

    about = DISTURBED | {"prompts": LITTERED} if mixed else BASE if kind == "base" else {}

    def rounds(settings: list[tuple[int, float]]) -> list[Stage]:
        stages = [{"steps": steps, "rate": rate} | LESSONS for steps, rate in settings]
        return [(stage | about, speak(stage)) for stage in stages]

    stages: list[Stage] = [
        (READ, lambda tell: teach_to_read(model, processor, plain, pairs, READ, tell)),
        *rounds(SPEAK[kind]),
        (SEE, lambda tell: teach_to_see(model, processor, pictures, SEE, tell, SCENES)),
        (READ_AGAIN, lambda tell: teach_to_read(model, processor, plain, pairs, READ_AGAIN, tell)),
        *rounds(SPEAK_AGAIN[kind]),
    ]
    run_stages(report, stages, model, rng, Path(scratch, f"{kind}-edits"))
    listener = None if kind == "listener" else LISTENER
    card = replace(Card.load(folder), format=FORMAT, max_new_tokens=MAX_NEW_TOKENS, listener=listener)
    taught = Path(out, TAUGHT[kind])
    save(model, processor, card, taught)
    return str(taught)
