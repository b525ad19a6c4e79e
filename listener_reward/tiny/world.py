"""The tiny world: scenes, prompts, a known utility, noisy votes and seeded splits. Pure Python, no pixels.

A *scene* is what an image shows. People in this world like a scene that matches the prompt and is undamaged
(`utility`); their votes are drawn from the utility by Bradley-Terry, so labels are as noisy as people are.

The world also holds the shortcut that breaks real preference data: half of all images come from a "generator" that
leaves a mark (a frame) for which thoughts have no word and which the utility ignores. In training the framed image of
a pair is the better one in `TRAIN_CUE` of the pairs; out of distribution in half of them; in the wrong-way split in
`1 - TRAIN_CUE`. A judge that learns "framed wins" is right for the wrong reason, and the splits tell.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star")
COUNTS = ("one", "two", "three")
QUALITIES = ("clean", "faded", "glitched")

TRAIN_CUE = 0.85
"""How often the framed image of a training pair is the better one; 0.5 would be no cue at all."""

ODDS = 1.0
"""Bradley-Terry slope: a voter prefers the first of two scenes with probability sigmoid(ODDS * utility gap)."""

MIN_GAP = 0.4
"""Pairs closer than this in utility are not shown to voters: their votes would be coin tosses."""

WORTH = {"clean": 1.2, "faded": 0.4, "glitched": 0.0}
"""What quality adds to a picture's utility."""

Split = Literal["train", "id", "ood", "wrong"]


@dataclass(frozen=True, slots=True)
class Scene:
    """What an image shows, and two things that thoughts have no word for: the generator's frame, the drawing style."""

    color: str
    shape: str
    count: int
    quality: str = "clean"
    framed: bool = False
    sketch: bool = False
    """Drawn in the second style (hatched, outlined), which only the out-of-distribution splits use."""
    wooden: bool = False
    """Has a brown frame of its own, which an instruction may ask for (`tiny.edits`). It is no generator's mark."""

    def words(self) -> str:
        """The scene in the words a thought uses: "two clean red circles"."""
        return f"{COUNTS[self.count - 1]} {self.quality} {self.color} {plural(self.shape, self.count)}"


@dataclass(frozen=True, slots=True)
class TinyPair:
    """A prompt, two scenes, and the fraction of voters who preferred the first."""

    prompt: Scene
    first: Scene
    second: Scene
    p_first: float
    wording: str
    seed: int
    """Seeds the drawing of both scenes, so that a pair's pictures are a function of the pair."""

    def utility(self, scene: Scene) -> float:
        return utility(self.prompt, scene)

    @property
    def gap(self) -> float:
        """By how much the first is worth more."""
        return self.utility(self.first) - self.utility(self.second)


def plural(shape: str, count: int) -> str:
    return shape if count == 1 else shape + "s"


def wording(scene: Scene, rng: random.Random) -> str:
    """The prompt for `scene` in plain English, in one of several wordings."""
    return led(phrase(scene, rng), rng)


def phrase(scene: Scene, rng: random.Random) -> str:
    """Count, colour and shape in plain English: "a red circle", "one red circle", "two red circles"."""
    number = COUNTS[scene.count - 1]
    if scene.count == 1 and rng.random() < 0.5:
        number = "an" if scene.color[0] in "aeiou" else "a"
    return f"{number} {scene.color} {plural(scene.shape, scene.count)}"


def led(body: str, rng: random.Random) -> str:
    """`body`, after "a picture of" or the like in half of the times."""
    return rng.choice(("", "", "", "", "a picture of ", "a drawing of ", "an image of ", "a photo of ")) + body


def utility(prompt: Scene, scene: Scene) -> float:
    """How much people like `scene` as an answer to `prompt`, in [0, 6.7]. Frame and style count for nothing."""
    return (
        2.0 * (scene.color == prompt.color)
        + 2.0 * (scene.shape == prompt.shape)
        + 1.5 * (scene.count == prompt.count)
        + WORTH[scene.quality]
    )


def p_prefers_first(prompt: Scene, first: Scene, second: Scene) -> float:
    """The probability that one voter prefers `first` (Bradley-Terry on `utility`)."""
    return p_of(utility(prompt, first) - utility(prompt, second))


def votes_for_first(gap: float, votes: int, rng: random.Random) -> float:
    """The fraction of `votes` voters who prefer the first of two pictures whose utilities differ by `gap`."""
    return sum(rng.random() < p_of(gap) for _ in range(votes)) / votes


def p_of(gap: float) -> float:
    """The probability that one voter prefers the first of two pictures whose utilities differ by `gap`."""
    return 1.0 / (1.0 + math.exp(-ODDS * gap))


def held_out(color: str, shape: str) -> bool:
    """Whether a colour-shape combination is never a prompt in training (four of twenty-four)."""
    return (COLORS.index(color) + SHAPES.index(shape)) % 6 == 0


def sample_prompt(rng: random.Random, held: bool) -> Scene:
    while True:
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
        if held_out(color, shape) == held:
            return Scene(color, shape, rng.randint(1, 3))


def sample_candidate(prompt: Scene, rng: random.Random, error: float = 0.35) -> Scene:
    """A generator's attempt at `prompt`: each attribute goes wrong with probability `error`, quality is random."""
    color = rng.choice(COLORS) if rng.random() < error else prompt.color
    shape = rng.choice(SHAPES) if rng.random() < error else prompt.shape
    count = rng.randint(1, 3) if rng.random() < error else prompt.count
    return Scene(color, shape, count, rng.choice(QUALITIES))


def sample_pair(
    rng: random.Random,
    *,
    cue: float,
    held: bool = False,
    sketch: bool = False,
    votes: int = 1,
    error: float = 0.35,
) -> TinyPair:
    """One labelled pair. Exactly one image is framed: the better one with probability `cue`."""
    prompt = sample_prompt(rng, held)
    while True:
        first, second = sample_candidate(prompt, rng, error), sample_candidate(prompt, rng, error)
        gap = utility(prompt, first) - utility(prompt, second)
        if abs(gap) >= MIN_GAP:
            break
    first_framed = (gap > 0) == (rng.random() < cue)
    first = replace(first, framed=first_framed, sketch=sketch)
    second = replace(second, framed=not first_framed, sketch=sketch)
    p_first = votes_for_first(gap, votes, rng)
    return TinyPair(prompt, first, second, p_first, wording(prompt, rng), rng.getrandbits(31))


def split_pairs(split: Split, n: int, *, cue: float = TRAIN_CUE, seed: int = 0) -> Iterator[TinyPair]:
    """`n` pairs of a split, a pure function of its arguments; a longer split begins with the shorter one.

    Training labels are one vote each, as in most preference data; test labels are the fraction of fifteen voters.
    """
    yield from samples_of(split, SPLITS, "the tiny world has", sample_pair, n, cue, seed)


T = TypeVar("T")


def samples_of(
    split: str, splits: Sequence[str], have: str, sample: Callable[..., T], n: int, cue: float, seed: int
) -> Iterator[T]:
    """`n` samples of a split, of pairs as of edits and of two groups.

    Args:
        split: one of `splits`.
        splits: of training, in distribution, out of distribution, and with the shortcut the wrong way.
        have: the words before their names in an error.
        sample: makes one, from a random generator and `cue`, `votes`, `held` and `sketch`.
        n: how many.
        cue: how often the shortcut marks the better one in training.
        seed: of the split.

    Raises:
        ValueError: there is no such split.
    """
    if split not in splits:
        raise ValueError(f"split is {split!r}; {have} {', '.join(map(repr, splits))}")
    settings: dict[str, Any] = (
        {"cue": cue, "votes": 1},
        {"cue": cue, "votes": 15},
        {"cue": 0.5, "held": True, "sketch": True, "votes": 15},
        {"cue": 1.0 - cue, "votes": 15},
    )[splits.index(split)]
    for index in range(n):
        yield sample(random.Random(f"{split}/{seed}/{index}"), **settings)


SPLITS: tuple[Split, ...] = ("train", "id", "ood", "wrong")
