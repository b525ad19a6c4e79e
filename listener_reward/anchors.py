"""Scores on a scale that does not move: an image is compared with a few anchors, images whose scores are fixed.

The anchors of a prompt are compared with one another once. Their Bradley-Terry scores, with mean zero, are the scale.
Every other image is placed on the scale by its own comparisons with the anchors, so its score depends on no other
image: it is the same in every call, at every step of a training run.

An image meets its anchors one after the other, each time the anchor that tells most. A comparison tells most about a
score s where its outcome is least certain: its information is votes * p (1 - p), with p = sigmoid(s - anchor). The
expectation over what is known of s falls with the distance of the anchor. So the next anchor is the nearest one that
the image has not met, and the first is the one in the middle.
"""

# What a caller or a file gives need not be what is annotated, and is checked all the same.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from listener_reward.errors import InputError
from listener_reward.media.clips import Visual
from listener_reward.media.storyboards import to_visuals
from listener_reward.pairs import PromptLike
from listener_reward.ranking import PRIOR_STD, estimate_votes, first_equal, fit_bradley_terry
from listener_reward.references import Kept, is_kept, packed, unpacked
from listener_reward.verdict import PairJudge, Verdict, checked

Ask = Callable[[list[tuple[PromptLike, Visual, Visual]]], Sequence[Verdict | None]]
"""The verdicts on some `(prompt, first, second)`, in one batch; None where the judge broke."""


@dataclass(frozen=True, slots=True)
class Anchors:
    """Images of one prompt that others are compared with, and their fixed scores. `fit_anchors` makes them.

    Raises:
        InputError: no images, other numbers of scores, or numbers that cannot be.
    """

    images: tuple[Visual, ...]
    """Pictures or clips, no two equal."""
    scores: tuple[float, ...]
    """Log-odds with mean zero: anchor i beats anchor j with probability sigmoid(scores[i] - scores[j])."""
    votes: float
    """How many votes one comparison with an anchor is worth; see `ranking.estimate_votes`."""
    judge: str
    """Whose comparisons the scores rest on: `identity_of` the judge. Another judge has another scale."""

    def __post_init__(self) -> None:
        if not self.images or len(self.images) != len(self.scores):
            raise InputError(f"anchors has {len(self.images)} images and {len(self.scores)} scores; give one for each")
        if not all(map(math.isfinite, self.scores)) or not 0 < self.votes < math.inf:
            raise InputError(f"anchors has scores {self.scores} and votes {self.votes}; give finite numbers")

    def __len__(self) -> int:
        return len(self.images)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, each picture as the bytes of a PNG; see `references.Kept`."""
        images: list[Kept] = [packed(image) for image in self.images]
        return {"images": images, "scores": list(self.scores), "votes": self.votes, "judge": self.judge}

    @classmethod
    def from_dict(cls, saved: Any) -> Anchors:
        """Reads what `to_dict` gave.

        Raises:
            InputError: it is something else.
        """
        try:
            images, scores, votes, judge = (saved[name] for name in ("images", "scores", "votes", "judge"))
            if not all(map(is_kept, images)):
                raise TypeError("an image is neither a PNG nor a clip")
            return cls(tuple(map(unpacked, images)), tuple(map(float, scores)), float(votes), str(judge))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"anchors are {saved!r:.60}, which cannot be read ({error})") from error

    def check_judge(self, judge: str) -> None:
        """Refuses another judge than the one that the scores are of.

        Raises:
            InputError: names both.
        """
        if judge != self.judge:
            raise InputError(
                f"anchors have scores by the judge {self.judge!r}, and this is {judge!r}, whose scale is another; make "
                "anchors with this judge, or give the images alone"
            )


@dataclass(frozen=True, slots=True)
class AnchoredScore:
    """How good one image is by itself, on the scale of its prompt's anchors."""

    win_share: float
    """The expected share of wins against the anchors, in [0, 1], by the judge's calibrated probabilities."""
    win_share_error: float
    """The standard error of `win_share`."""
    score: float
    """Log-odds: the image beats an anchor with probability sigmoid(score - the anchor's score); their mean is 0."""
    standard_error: float
    """The standard error of `score`, the anchors' scores being taken as known."""
    comparisons: int
    """How many anchors the judge compared the image with."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {name: getattr(self, name) for name in self.__slots__}


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def place(anchors: Anchors, outcomes: Mapping[int, float]) -> tuple[float, float]:
    """The most probable score of an image and its standard error, in log-odds.

    Args:
        anchors: whose scores and votes count as known.
        outcomes: for some anchors, by position, the probability in [0, 1] that the image beats the anchor. With none
            the score is 0, the prior's mean, and the error `PRIOR_STD`.

    The score s solves votes * sum(p_a - sigmoid(s - a)) = s / PRIOR_STD^2. The error comes from the curvature there.
    """
    met = sorted(outcomes)  # one order, so that the same outcomes give the same score to the last bit
    scores, p = np.array([anchors.scores[a] for a in met]), np.array([outcomes[a] for a in met])
    precision = PRIOR_STD**-2

    def slope(s: float) -> float:
        return float(anchors.votes * np.sum(p - expit(s - scores)) - precision * s)

    bound = anchors.votes * len(met) / precision + 1  # beyond it the prior outweighs every outcome
    s = float(brentq(slope, -bound, bound, xtol=1e-12, rtol=1e-14))
    return s, float((precision + anchors.votes * np.sum(_spread(s - scores))) ** -0.5)


def win_share(anchors: Anchors, score: float, error: float) -> tuple[float, float]:
    """The expected share of wins of an image with this score against the anchors, in [0, 1], and its standard error.

    The share is the mean of sigmoid(score - anchor); the error is the score's, times the share's slope.
    """
    gaps = score - np.array(anchors.scores)
    return float(np.mean(expit(gaps))), float(error * np.mean(_spread(gaps)))


def next_anchor(anchors: Anchors, score: float, met: Iterable[int]) -> int | None:
    """The anchor that tells most about an image whose score is so far `score`, out of those not in `met`."""
    left = set(range(len(anchors))).difference(met)
    return min(left, key=lambda a: (abs(score - anchors.scores[a]), a), default=None)


def _spread(gaps: np.ndarray) -> np.ndarray:
    """p (1 - p) at these log-odds."""
    return expit(gaps) * expit(-gaps)


# ---------------------------------------------------------------------------------------------------------------------
# Anchors
# ---------------------------------------------------------------------------------------------------------------------


def identity_of(judge: Any) -> str:
    """What tells a judge from others whose scores are not its own: its `identity`, or its name where it has none."""
    return str(getattr(judge, "identity", None) or judge.name)


def mutual(images: Sequence[Visual]) -> list[tuple[int, int]]:
    """The comparisons that the scores of anchors rest on: every pair."""
    return list(combinations(range(len(images)), 2))


def fit(images: Sequence[Visual], outcomes: Sequence[tuple[int, int, float]], judge: str) -> Anchors:
    """Anchors with the scores that `outcomes` give them.

    Args:
        images: no two equal.
        outcomes: `(i, j, p)`: image i beats image j with probability p.
        judge: `identity_of` the judge whose outcomes they are.
    """
    votes = estimate_votes(len(images), outcomes)
    scores, _ = fit_bradley_terry(len(images), outcomes, votes=votes)
    return Anchors(tuple(images), tuple((scores - scores.mean()).tolist()), votes, judge)


def pick(images: Sequence[Visual], outcomes: Sequence[tuple[int, int, float]], count: int, judge: str) -> Anchors:
    """`count` anchors out of a group of images, spread over the group's quality; all of a smaller group.

    The group is ordered by its scores and cut into `count` equal parts; the middle of each part is an anchor. So there
    are anchors near every image, and not only near the best. Arguments as in `fit`.
    """
    group = fit(images, outcomes, judge)
    count = min(count, len(images))
    worst_first = np.argsort(group.scores, kind="stable")
    chosen = [int(worst_first[int((k + 0.5) * len(images) / count)]) for k in range(count)]
    scores = np.array([group.scores[i] for i in chosen])
    return Anchors(tuple(images[i] for i in chosen), tuple((scores - scores.mean()).tolist()), group.votes, judge)


def fit_anchors(judge: PairJudge, prompt: PromptLike, images: Any) -> Anchors:
    """Compares every pair of `images`, and fixes their scores.

    Args:
        judge: whose scale it is.
        prompt: what the images were made from.
        images: one or more, as `Judge.rank` takes them; equal ones count once. Four or more, of different quality, tell
            images apart better; docs/anchors.md has how much.

    Raises:
        InputError: no image, or one that cannot be read.
        JudgeError: the judge broke on one of the comparisons.
    """
    distinct = distinct_of(to_visuals(images))
    return fit(distinct, compared(judge, prompt, distinct, mutual(distinct)), identity_of(judge))


def compared(
    judge: PairJudge, prompt: PromptLike, images: Sequence[Visual], pairs: Sequence[tuple[int, int]]
) -> list[tuple[int, int, float]]:
    """The outcomes `(i, j, p)` of these pairs of images, from one call of the judge; none of it for no pair.

    Raises:
        JudgeError: the judge broke.
    """
    if not pairs:
        return []
    prompts = [prompt] * len(pairs)
    firsts, seconds = [images[i] for i, _ in pairs], [images[j] for _, j in pairs]
    verdicts = checked(judge.compare_many(prompts, firsts, seconds), prompts, "the judge")
    return [(i, j, verdict.p_first) for (i, j), verdict in zip(pairs, verdicts, strict=True)]


def distinct_of(images: Sequence[Visual]) -> list[Visual]:
    """The images without those that are equal to an earlier one.

    Raises:
        InputError: there is none.
    """
    if not images:
        raise InputError("anchors has no images; give at least one")
    same = first_equal(images)
    return [image for place, image in enumerate(images) if same[place] == place]


# ---------------------------------------------------------------------------------------------------------------------
# Meeting them
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Candidate:
    """An image to be placed among anchors, and what is known of it so far."""

    prompt: PromptLike
    image: Visual
    anchors: Anchors
    outcomes: dict[int, float] = field(init=False)
    """By anchor, the probability that the image beats it. An equal anchor is a tie, about which nobody is asked."""
    verdicts: list[Verdict] = field(default_factory=list)
    """The image is the first of each."""
    asked: set[int] = field(default_factory=set)
    """The anchors that the judge was to compare it with, those included on which the judge broke."""

    def __post_init__(self) -> None:
        same = [image.digest == self.image.digest for image in self.anchors.images]
        self.outcomes = {a: 0.5 for a, is_same in enumerate(same) if is_same}

    @property
    def failed(self) -> bool:
        """Whether the judge broke on every comparison, so that there is no score."""
        return not self.outcomes

    @property
    def score(self) -> AnchoredScore:
        """By the comparisons so far. A failed one has none: look at `failed` first."""
        score, error = place(self.anchors, self.outcomes)
        return AnchoredScore(*win_share(self.anchors, score, error), score, error, len(self.verdicts))

    def due(self, comparisons: int | None, error: float | None) -> list[int]:
        """The anchors to meet in the next round; arguments as in `meet`."""
        met = self.asked | self.outcomes.keys()
        left = min(len(self.anchors) - len(met), (comparisons or len(self.anchors)) - len(self.asked))
        if left <= 0:
            return []
        if error is None and left == len(self.anchors) - len(met):  # all that there are: nothing to choose
            return [a for a in range(len(self.anchors)) if a not in met]
        score, known = place(self.anchors, self.outcomes)
        if error is not None and known <= error:
            return []
        chosen = next_anchor(self.anchors, score, met)
        return [] if chosen is None else [chosen]


def meet(candidates: Sequence[Candidate], ask: Ask, *, comparisons: int | None = None, error: float | None = None):
    """Has the judge compare each of `candidates` with anchors, in rounds, one batch each.

    What an image meets depends on its own outcomes alone, and not on the others in the call.

    Args:
        ask: the judge.
        comparisons: most comparisons of an image, at least 1; None is every anchor.
        error: no more comparisons for an image whose score has a standard error as low as this, in log-odds.
    """
    while meetings := [(each, a) for each in candidates for a in each.due(comparisons, error)]:
        verdicts = ask([(each.prompt, each.image, each.anchors.images[a]) for each, a in meetings])
        for (each, a), verdict in zip(meetings, verdicts, strict=True):
            each.asked.add(a)
            if verdict is not None:
                each.outcomes[a] = verdict.p_first
                each.verdicts.append(verdict)


def check_effort(comparisons: Any, error: Any, *, prefix: str = "") -> None:
    """Refuses what `meet` cannot work by.

    Raises:
        InputError: names the option, with the prefix that it has where it was given.
    """
    whole = isinstance(comparisons, int) and not isinstance(comparisons, bool)
    if comparisons is not None and not (whole and comparisons >= 1):
        raise InputError(
            f"{prefix}comparisons is {comparisons!r}; give a number of at least 1, or None for every anchor"
        )
    if error is not None and not (isinstance(error, int | float) and 0 < error < math.inf):
        raise InputError(f"{prefix}error is {error!r}; give a standard error in log-odds above 0, or None for no limit")
