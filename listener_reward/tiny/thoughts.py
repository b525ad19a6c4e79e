"""The language of the tiny world's thoughts, and the imperfect thoughts that its models are pretrained on."""

from __future__ import annotations

import random
from dataclasses import replace

from listener_reward.tiny.world import COLORS, QUALITIES, SHAPES, Scene, TinyPair, utility

SILENT = 0.1
"""Share of pretraining examples with an empty thought, from which the mode without thoughts is learnt."""


def describe(first: Scene, second: Scene) -> str:
    return f"image 1 : {first.words()} . image 2 : {second.words()} ."


def misread(scene: Scene, rng: random.Random, error: float) -> Scene:
    """`scene` as an inattentive eye sees it: each attribute is a random one with probability `error`."""
    return replace(
        scene,
        color=rng.choice(COLORS) if rng.random() < error else scene.color,
        shape=rng.choice(SHAPES) if rng.random() < error else scene.shape,
        count=rng.randint(1, 3) if rng.random() < error else scene.count,
        quality=rng.choice(QUALITIES) if rng.random() < error else scene.quality,
    )


def better(prompt: Scene, first: Scene, second: Scene, rng: random.Random) -> int:
    """1 or 2, the scene of higher utility; a coin where they are equal."""
    gap = utility(prompt, first) - utility(prompt, second)
    return rng.choice((1, 2)) if gap == 0 else 1 if gap > 0 else 2


def reasoner_example(pair: TinyPair, rng: random.Random, *, error: float, whim: float) -> tuple[str, int]:
    """A thought and an answer as an imperfect reasoner would give them.

    Its descriptions err (`error` per attribute), half of its thoughts state a verdict in words, and its answer follows
    its own description except for a `whim` share of coin tosses.
    """
    first, second = misread(pair.first, rng, error), misread(pair.second, rng, error)
    verdict = better(pair.prompt, first, second, rng)
    thought = "" if rng.random() < SILENT else _aloud(first, second, verdict, rng)
    return thought, rng.choice((1, 2)) if rng.random() < whim else verdict


def listener_example(pair: TinyPair, rng: random.Random, *, true: float, lies: float) -> tuple[str, int, bool]:
    """A thought, a voter's answer, and whether the thought is true.

    A share `true` of the thoughts is true; a share `lies` is the opposite of careless: the description that favours
    the worse image; the rest err at a random rate. What the voter answers never depends on the thought, so the
    listener learns how far words can be believed against its own eyes.
    """
    answer = 1 if rng.random() < pair.p_first else 2
    kind = rng.random()
    if kind < true:
        first, second = pair.first, pair.second
    elif kind < true + lies:
        first, second = pair.second, pair.first
        if rng.random() < 0.5:
            first, second = misread(first, rng, 0.3), misread(second, rng, 0.3)
    else:
        error = rng.uniform(0.0, 0.9)
        first, second = misread(pair.first, rng, error), misread(pair.second, rng, error)
    if rng.random() < SILENT:
        return "", answer, True
    return _aloud(first, second, better(pair.prompt, first, second, rng), rng), answer, kind < true


def _aloud(first: Scene, second: Scene, verdict: int, rng: random.Random) -> str:
    """The description, and in half of the thoughts the verdict in words."""
    return describe(first, second) + (f" so image {verdict} is better ." if rng.random() < 0.5 else "")
