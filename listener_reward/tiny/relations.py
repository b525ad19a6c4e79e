"""Two groups of objects and how they lie, in the tiny world: prompts, pictures' contents, a known utility, splits.

A prompt such as "a red circle left of two blue squares" is harder than one group is: each of two places has a colour, a
shape and a count of its own, and what is right in one place is wrong in the other. Generators fail here as large ones
do: an attribute is wrong, the two groups change places, their colours do, or they lie along the other axis.

The shortcut is not the frame of the other splits but a *signature*, a short dark stroke in the lower right corner, for
which thoughts have no word and which the utility ignores.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from listener_reward.tiny.world import (
    COLORS,
    QUALITIES,
    SHAPES,
    TRAIN_CUE,
    WORTH,
    Scene,
    held_out,
    led,
    phrase,
    samples_of,
    votes_for_first,
)

Axis = Literal["left", "above"]
AXES: tuple[Axis, ...] = ("left", "above")
"""How the first group of a picture lies to the second. Nothing lies "right of" anything: "right" means correct."""

RELATIONS = ("left of", "above", "below")
"""What a prompt may say between its groups; the one that is below is the second of the picture."""

MOST = 2
"""Objects of a group."""

GROUP = {"color": 1.0, "shape": 1.0, "count": 0.8}
"""What a group's attributes add to the utility where they are those that were asked for in its place."""

ALONG = 1.2
"""And what the right axis adds."""

LEAST_GAP = 0.5
"""Pairs closer than this in utility are not shown to voters."""

EXCHANGED, MIXED_UP, ASTRAY = 0.1, 0.15, 0.2
"""How often a generator exchanges the two groups, gives each the other's colour, and takes the other axis."""

RelationSplit = Literal["relation-train", "relation", "relation-ood", "relation-wrong"]
RELATION_SPLITS: tuple[RelationSplit, ...] = ("relation-train", "relation", "relation-ood", "relation-wrong")


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What a picture of two groups shows. Of a group only colour, shape and count are meant."""

    first: Scene
    """The left or the upper one."""
    second: Scene
    axis: Axis
    quality: str = QUALITIES[0]
    signed: bool = False
    """Has the generator's signature, for which thoughts have no word."""
    sketch: bool = False
    """Drawn in the second style, which only the out-of-distribution split uses."""


@dataclass(frozen=True, slots=True)
class TinyRelation:
    """A prompt about two groups, two pictures' contents, and the fraction of voters who preferred the first."""

    goal: Arrangement
    """What the prompt asks for, clean and unsigned."""
    first: Arrangement
    second: Arrangement
    p_first: float
    wording: str
    seed: int
    """Seeds the drawing of both."""

    def utility(self, shown: Arrangement) -> float:
        return relation_utility(self.goal, shown)

    @property
    def gap(self) -> float:
        """By how much the first is worth more."""
        return self.utility(self.first) - self.utility(self.second)


def relation_utility(goal: Arrangement, shown: Arrangement) -> float:
    """How much people like `shown` where `goal` was asked for, in [0, 8]. Signature and style count for nothing.

    Each place is compared with what was to be there, so groups that have changed places are as wrong as others are.
    """
    places = (goal.first, shown.first), (goal.second, shown.second)
    right = sum(
        worth * (getattr(asked, part) == getattr(there, part))
        for asked, there in places
        for part, worth in GROUP.items()
    )
    return right + ALONG * (shown.axis == goal.axis) + WORTH[shown.quality]


def sample_goal(rng: random.Random, held: bool) -> Arrangement:
    """Two groups of different colours. With `held` at least one is of a held-out colour and shape, else none."""
    while True:
        groups = [Scene(rng.choice(COLORS), rng.choice(SHAPES), rng.randint(1, MOST)) for _ in range(2)]
        apart = groups[0].color != groups[1].color
        if apart and any(held_out(group.color, group.shape) for group in groups) == held:
            return Arrangement(*groups, axis=rng.choice(AXES))


def sample_arrangement(goal: Arrangement, rng: random.Random, error: float) -> Arrangement:
    """A generator's attempt at `goal`: each attribute of a group goes wrong with probability `error`."""
    first, second = goal.first, goal.second
    if rng.random() < EXCHANGED:
        first, second = second, first
    if rng.random() < MIXED_UP:
        first, second = replace(first, color=second.color), replace(second, color=first.color)
    first, second = (_erring(group, rng, error) for group in (first, second))
    axis = rng.choice(AXES) if rng.random() < 2 * ASTRAY else goal.axis
    return Arrangement(first, second, axis, rng.choice(QUALITIES))


def sample_relation(
    rng: random.Random, *, cue: float, held: bool = False, sketch: bool = False, votes: int = 1, error: float = 0.2
) -> TinyRelation:
    """One labelled pair. Exactly one picture is signed: the better one with probability `cue`."""
    goal = sample_goal(rng, held)
    while True:
        first, second = (sample_arrangement(goal, rng, error) for _ in range(2))
        gap = relation_utility(goal, first) - relation_utility(goal, second)
        if abs(gap) >= LEAST_GAP:
            break
    first_signed = (gap > 0) == (rng.random() < cue)
    first = replace(first, signed=first_signed, sketch=sketch)
    second = replace(second, signed=not first_signed, sketch=sketch)
    p_first = votes_for_first(gap, votes, rng)
    return TinyRelation(goal, first, second, p_first, relation_wording(goal, rng), rng.getrandbits(31))


def relation_wording(goal: Arrangement, rng: random.Random) -> str:
    """The prompt for `goal` in plain English: what lies above the other is named first or last."""
    first, second = (phrase(group, rng) for group in (goal.first, goal.second))
    if goal.axis == "left":
        body = f"{first} left of {second}"
    else:
        body = rng.choice((f"{first} above {second}", f"{second} below {first}"))
    return led(body, rng)


def split_relations(split: RelationSplit, n: int, *, cue: float = TRAIN_CUE, seed: int = 0) -> Iterator[TinyRelation]:
    """`n` pairs of a split, as `world.split_pairs` has them: one vote each in training, fifteen in tests."""
    yield from samples_of(split, RELATION_SPLITS, "the tiny world's relations have", sample_relation, n, cue, seed)


def _erring(group: Scene, rng: random.Random, error: float) -> Scene:
    color = rng.choice(COLORS) if rng.random() < error else group.color
    shape = rng.choice(SHAPES) if rng.random() < error else group.shape
    count = rng.randint(1, MOST) if rng.random() < error else group.count
    return Scene(color, shape, count)
