"""Edits in the tiny world: a source scene, an instruction, two results, a known utility, noisy votes and seeded splits.

An instruction asks for one or two changes of what the source shows: colour, shape, count, the repair of a damaged
picture, a wooden frame. People like a result that shows what is asked, keeps the rest as it was and is undamaged. So an
editor can fail in four ways: it does something else, it does too much, it does half, or it does nothing.

The shortcut of the other splits is here too: the generator's dark frame marks one of the two results. It is not the
wooden frame that an instruction asks for, and the utility ignores it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from listener_reward.tiny.world import (
    COLORS,
    COUNTS,
    MIN_GAP,
    QUALITIES,
    SHAPES,
    TRAIN_CUE,
    WORTH,
    Scene,
    held_out,
    plural,
    samples_of,
    votes_for_first,
)

Part = Literal["color", "shape", "count", "quality", "wooden"]
PARTS: tuple[Part, ...] = ("color", "shape", "count", "quality", "wooden")
"""The attributes of a scene that an instruction may change, in the order in which it names them."""

HELD_PARTS: tuple[tuple[Part, Part], ...] = (("color", "count"), ("shape", "wooden"))
"""What two changes are asked for together out of distribution only."""

ASKED, KEPT = 2.5, 1.0
"""What an attribute that is as it should be adds to the utility: one that was to change, and one that was to stay."""

Outcome = Literal["all", "half", "other", "more", "none"]
OUTCOMES: dict[Outcome, float] = {"all": 0.3, "half": 0.2, "other": 0.2, "more": 0.15, "none": 0.15}
"""What editors do, and how often. One that would do half of a single change does something else."""

TWO = 0.4
"""Fraction of instructions that ask for two changes."""

CAREFUL = 0.6
"""Fraction of results that an editor leaves undamaged; the others are as often faded as glitched."""

EditSplit = Literal["edit-train", "edit", "edit-ood", "edit-wrong"]
EDIT_SPLITS: tuple[EditSplit, ...] = ("edit-train", "edit", "edit-ood", "edit-wrong")


@dataclass(frozen=True, slots=True)
class TinyEdit:
    """An instruction about a source, two results, and the fraction of voters who preferred the first."""

    source: Scene
    goal: Scene
    """The source with the instruction followed, clean and unmarked."""
    asked: tuple[Part, ...]
    first: Scene
    second: Scene
    p_first: float
    wording: str
    seed: int
    """Seeds the drawing of all three scenes."""

    def utility(self, scene: Scene) -> float:
        return edit_utility(self.goal, self.asked, scene)

    @property
    def gap(self) -> float:
        """By how much the first is worth more."""
        return self.utility(self.first) - self.utility(self.second)


def edit_utility(goal: Scene, asked: tuple[Part, ...], scene: Scene) -> float:
    """How much people like `scene` where `asked` was to change so that `goal` comes out, in [0, 8.2]."""
    kept: list[Part] = [part for part in PARTS if part not in asked and part != "quality"]
    right = [part for part in PARTS if getattr(scene, part) == getattr(goal, part)]
    done, left = sum(part in asked for part in right), sum(part in kept for part in right)
    return ASKED * done + KEPT * left + WORTH[scene.quality]


def followed(source: Scene, goal: Scene, asked: tuple[Part, ...]) -> Scene:
    """`source` as `goal` has it in what was `asked`."""
    return replace(source, **{part: getattr(goal, part) for part in asked})


def instruction(source: Scene, goal: Scene, asked: tuple[Part, ...], rng: random.Random) -> str:
    """What is asked for, in one of several wordings: "make the circles blue and add a frame"."""
    name, steps = f"the {plural(source.shape, source.count)}", []
    for part in asked:
        steps.append(_step(part, source, goal, name, rng))
        name = "it" if source.count == 1 else "them"
    return " and ".join(steps)


def _step(part: Part, source: Scene, goal: Scene, name: str, rng: random.Random) -> str:
    picture = rng.choice(("picture", "image"))
    if part == "color":
        return rng.choice(("make {} {}", "paint {} {}", "turn {} {}")).format(name, goal.color)
    if part == "shape":
        new = plural(goal.shape, source.count)
        if source.count == 1:
            new = f"a {new}"
        return rng.choice(("change {} to {}", "turn {} into {}")).format(name, new)
    if part == "count":
        more = goal.count - source.count
        step = f"{'add' if more > 0 else 'remove'} {COUNTS[abs(more) - 1]} {plural(goal.shape, abs(more))}"
        return rng.choice((step, f"make it {COUNTS[goal.count - 1]} {plural(goal.shape, goal.count)}"))
    if part == "quality":
        return f"{rng.choice(('repair', 'restore'))} the {picture}"
    return rng.choice(("add a frame", "put a frame around it", f"put a frame around the {picture}"))


def sample_task(rng: random.Random, held: bool) -> tuple[Scene, Scene, tuple[Part, ...]]:
    """A source, the goal and what is asked. With `held` the goal is a held-out one, and so are two changes at once."""
    while True:
        asked = tuple(sorted(rng.sample(PARTS, 1 + (rng.random() < TWO)), key=PARTS.index))
        if len(asked) == 2 and (asked in HELD_PARTS) != held:
            continue
        quality = rng.choice(QUALITIES[1:]) if "quality" in asked else QUALITIES[0]
        source = Scene(rng.choice(COLORS), rng.choice(SHAPES), rng.randint(1, 3), quality)
        goal = replace(source, quality=QUALITIES[0])
        for part in asked:
            goal = replace(goal, **{part: _another(part, source, rng)})
        if held_out(goal.color, goal.shape) == held and (held or not held_out(source.color, source.shape)):
            return source, goal, asked


def sample_result(source: Scene, goal: Scene, asked: tuple[Part, ...], rng: random.Random) -> Scene:
    """What one editor makes of it."""
    outcome = rng.choices(list(OUTCOMES), list(OUTCOMES.values()))[0]
    done = asked
    if outcome == "none" or (outcome in ("half", "other") and len(asked) == 1):
        done = ()
    elif outcome in ("half", "other"):
        done = (rng.choice(asked),)
    result = followed(source, goal, done)
    if outcome == "more":
        result = _spoilt(result, [part for part in PARTS if part not in asked and part != "quality"], rng)
    elif outcome == "other" or (outcome == "half" and not done):
        result = _spoilt(result, [part for part in PARTS if part not in done and part != "quality"], rng)
    if result.quality == QUALITIES[0] and rng.random() >= CAREFUL:
        result = replace(result, quality=rng.choice(QUALITIES[1:]))
    return result


def sample_edit(
    rng: random.Random, *, cue: float, held: bool = False, sketch: bool = False, votes: int = 1, free: float = 0.0
) -> TinyEdit:
    """One labelled edit. Exactly one result is marked: the better one with probability `cue`.

    A `free` share of results owes nothing to source and instruction, for lessons in which a description cannot be
    copied from either.
    """
    source, goal, asked = sample_task(rng, held)
    while True:
        first, second = (
            _anything(rng) if rng.random() < free else sample_result(source, goal, asked, rng) for _ in range(2)
        )
        gap = edit_utility(goal, asked, first) - edit_utility(goal, asked, second)
        if abs(gap) >= MIN_GAP:
            break
    first_framed = (gap > 0) == (rng.random() < cue)
    source = replace(source, sketch=sketch)
    first = replace(first, framed=first_framed, sketch=sketch)
    second = replace(second, framed=not first_framed, sketch=sketch)
    p_first = votes_for_first(gap, votes, rng)
    return TinyEdit(
        source, goal, asked, first, second, p_first, instruction(source, goal, asked, rng), rng.getrandbits(31)
    )


def split_edits(split: EditSplit, n: int, *, cue: float = TRAIN_CUE, seed: int = 0) -> Iterator[TinyEdit]:
    """`n` edits of a split, as `world.split_pairs` has pairs: one vote each in training, fifteen in tests."""
    yield from samples_of(split, EDIT_SPLITS, "the tiny world's edits have", sample_edit, n, cue, seed)


def _another(part: Part, scene: Scene, rng: random.Random) -> Any:
    """A value of `part` that `scene` does not have."""
    values = {"color": COLORS, "shape": SHAPES, "count": (1, 2, 3), "quality": QUALITIES[:1], "wooden": (False, True)}
    return rng.choice([value for value in values[part] if value != getattr(scene, part)])


def _spoilt(scene: Scene, parts: list[Part], rng: random.Random) -> Scene:
    """`scene` with one of these parts changed into something else."""
    part = rng.choice(parts)
    return replace(scene, **{part: _another(part, scene, rng)})


def _anything(rng: random.Random) -> Scene:
    scene = Scene(rng.choice(COLORS), rng.choice(SHAPES), rng.randint(1, 3), rng.choice(QUALITIES))
    return replace(scene, wooden=rng.random() < 0.5)
