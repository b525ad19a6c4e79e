"""The language of the tiny world's thoughts, and the imperfect thoughts that its models are pretrained on."""

from __future__ import annotations

import random
from dataclasses import replace

from listener_reward.tiny.edits import TinyEdit, edit_utility, followed
from listener_reward.tiny.relations import AXES, MOST, Arrangement, TinyRelation
from listener_reward.tiny.world import COLORS, COUNTS, QUALITIES, SHAPES, Scene, TinyPair, utility

SILENT = 0.1
"""Fraction of pretraining examples with an empty thought, from which the mode without thoughts is learnt."""

MARKS = ("right", "wrong")
"""What a thought says of each word of the prompt."""

STATED = 0.5
"""Fraction of thoughts that end with their verdict in words, which the stricter masking removes for the listener."""


def describe(prompt: Scene, first: Scene, second: Scene) -> str:
    """What each image shows, word by word against the prompt: "image 1 : two right red wrong circles right clean ." """
    return f"image 1 : {_weigh(prompt, first)} . image 2 : {_weigh(prompt, second)} ."


def _weigh(prompt: Scene, scene: Scene) -> str:
    return f"{_weigh_group(prompt, scene)} {scene.quality}"


def _weigh_group(prompt: Scene, scene: Scene) -> str:
    count, _, color, shape = scene.words().split()
    return " ".join(
        (
            count,
            _mark(scene.count == prompt.count),
            color,
            _mark(scene.color == prompt.color),
            shape,
            _mark(scene.shape == prompt.shape),
        )
    )


def _mark(right: bool) -> str:
    return MARKS[0 if right else 1]


def misread(scene: Scene, rng: random.Random, error: float, most: int = len(COUNTS)) -> Scene:
    """`scene` as an inattentive eye sees it: each attribute is a random one with probability `error`.

    A random count is `most` at most.
    """
    return replace(
        scene,
        color=rng.choice(COLORS) if rng.random() < error else scene.color,
        shape=rng.choice(SHAPES) if rng.random() < error else scene.shape,
        count=rng.randint(1, most) if rng.random() < error else scene.count,
        quality=rng.choice(QUALITIES) if rng.random() < error else scene.quality,
    )


def describe_edit(source: Scene, goal: Scene, first: Scene, second: Scene) -> str:
    """What was, what was wanted, and what each result shows, word by word against that.

    "source : two clean red circles . goal : two clean blue circles plain . image 1 : two right blue right circles right
    clean plain right . image 2 : ..."; "plain" is without a wooden frame.
    """
    results = " ".join(
        f"image {number} : {_weigh(goal, scene)} {_edge(scene)} {_mark(scene.wooden == goal.wooden)} ."
        for number, scene in ((1, first), (2, second))
    )
    return f"source : {source.words()} . goal : {goal.words()} {_edge(goal)} . {results}"


def describe_relation(goal: Arrangement, first: Arrangement, second: Arrangement) -> str:
    """What each image shows, place by place against what was to be there.

    "image 1 : left right two right blue right squares right one right red wrong circle right clean . image 2 : ...":
    the groups lie side by side as they should, and the first is the left one.
    """
    return " ".join(
        f"image {number} : {shown.axis} {_mark(shown.axis == goal.axis)} {_weigh_group(goal.first, shown.first)} "
        f"{_weigh_group(goal.second, shown.second)} {shown.quality} ."
        for number, shown in ((1, first), (2, second))
    )


def misread_arrangement(shown: Arrangement, rng: random.Random, error: float, muddle: float = 0.0) -> Arrangement:
    """`misread` of two groups, of their axis and of the picture's quality.

    With probability `muddle` each group is taken for the other: what is there is seen, and not where.
    """
    first, second = shown.first, shown.second
    if muddle and rng.random() < muddle:
        first, second = second, first
    return replace(
        shown,
        first=misread(first, rng, error, MOST),
        second=misread(second, rng, error, MOST),
        axis=rng.choice(AXES) if rng.random() < error else shown.axis,
        quality=rng.choice(QUALITIES) if rng.random() < error else shown.quality,
    )


def _edge(scene: Scene) -> str:
    return "frame" if scene.wooden else "plain"


def reasoner_example(
    pair: TinyPair | TinyEdit | TinyRelation,
    rng: random.Random,
    *,
    error: float = 0.0,
    whim: float = 0.0,
    taste: float = 0.5,
    muddle: float = 0.0,
) -> tuple[str, int]:
    """A thought and an answer as a reasoner would give them, a true one unless told how imperfect it is.

    Its descriptions err (`error` per attribute), half of its thoughts state a verdict in words, and its answer follows
    its own description except for a `whim` share. Those go by looks: to the marked image with probability `taste`.
    Of two groups it takes each for the other with probability `muddle`.
    """
    described, gap = _described(pair, rng, error, muddle)
    preferred = rng.choice((1, 2)) if gap == 0 else 1 if gap > 0 else 2
    thought = "" if rng.random() < SILENT else _aloud(described, preferred, rng)
    if rng.random() < whim:
        marked = 1 if (pair.first.signed if isinstance(pair, TinyRelation) else pair.first.framed) else 2
        return thought, marked if rng.random() < taste else 3 - marked
    return thought, preferred


def _described(
    pair: TinyPair | TinyEdit | TinyRelation, rng: random.Random, error: float, muddle: float
) -> tuple[str, float]:
    """What a reasoner sees in both images, and by how much it then likes the first one better."""
    if isinstance(pair, TinyRelation):
        shown = [misread_arrangement(one, rng, error, muddle) for one in (pair.first, pair.second)]
        return describe_relation(pair.goal, *shown), pair.utility(shown[0]) - pair.utility(shown[1])
    first, second = misread(pair.first, rng, error), misread(pair.second, rng, error)
    if isinstance(pair, TinyEdit):
        source = misread(pair.source, rng, error)
        goal = replace(followed(source, pair.goal, pair.asked), quality=QUALITIES[0])
        gap = edit_utility(goal, pair.asked, first) - edit_utility(goal, pair.asked, second)
        return describe_edit(source, goal, first, second), gap
    return describe(pair.prompt, first, second), utility(pair.prompt, first) - utility(pair.prompt, second)


def verdict(better: int) -> str:
    """A thought's last sentence, where it has one."""
    return f"so image {better} is better ."


def _aloud(described: str, preferred: int, rng: random.Random) -> str:
    """The description, and in half of the thoughts the verdict in words."""
    return described + (f" {verdict(preferred)}" if rng.random() < STATED else "")
