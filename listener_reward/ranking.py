"""From comparisons of pairs to one score per image: the Bradley-Terry model, and who should meet whom.

Bradley-Terry says that image i beats image j with probability sigmoid(s_i - s_j). A judge's answers are probabilities
and not wins, so each enters as a soft outcome worth one comparison. A Gaussian prior keeps the scores finite where an
image wins every comparison, and fixes their level: at the optimum their mean is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.special import expit

from listener_reward.errors import InputError, JudgeError

PRIOR_STD = 2.0
"""Standard deviation of scores before any comparison: two random images are 2.8 log-odds apart, about 94 to 6."""

FULL_UP_TO = 8
"""Largest number of images of which every pair is compared in a training batch; `pairings` thins the rest."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Images of one prompt, ordered and scored."""

    order: list[int]
    """Positions of the images, best first; equal scores keep the caller's order."""
    scores: list[float]
    """Log-odds in the caller's order, mean zero: image i beats j with probability sigmoid(scores[i] - scores[j])."""
    standard_errors: list[float]
    """One for each score, in the same order and unit."""
    comparisons: int
    """How many pairs the judge compared."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)


def fit_bradley_terry(
    n: int, outcomes: Sequence[tuple[int, int, float]], *, prior_std: float = PRIOR_STD
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable scores of `n` images given soft outcomes `(i, j, p)`: "i beats j with probability p".

    Args:
        n: number of images, at least 1.
        outcomes: any pairs in any number and order; an image in none of them scores zero.
        prior_std: standard deviation of the Gaussian prior on each score, in [0.001, 1000].

    Returns:
        Scores `(n,)` and standard errors `(n,)`, float64. The errors are from the curvature at the optimum, so an
        image about which nothing is known has the prior's, and more comparisons give less.

    Raises:
        InputError: no image, an outcome that names an image that is not there or one image twice, a probability
            outside [0, 1], or a prior out of range.
    """
    if n < 1:
        raise InputError(f"n is {n}; there must be at least one image to score")
    if not 1e-3 <= prior_std <= 1e3:
        raise InputError(f"prior_std is {prior_std}; choose one in [0.001, 1000] log-odds, 2 being usual")
    wins = np.zeros((n, n))
    for i, j, p in outcomes:
        if not (0 <= i < n and 0 <= j < n) or i == j:
            raise InputError(f"outcomes has ({i}, {j}, {p}); an outcome is between two different images of 0..{n - 1}")
        if not 0 <= p <= 1:
            raise InputError(f"outcomes has ({i}, {j}, {p}); the third value is a probability in [0, 1]")
        wins[i, j] += p
        wins[j, i] += 1 - p

    meetings, precision = wins + wins.T, prior_std**-2
    scores = np.zeros(n)
    while True:
        p_beats = expit(scores[:, None] - scores)
        gradient = (wins - meetings * p_beats).sum(1) - precision * scores
        weight = meetings * p_beats * (1 - p_beats)
        curvature = np.diag(weight.sum(1) + precision) - weight
        step = np.linalg.solve(curvature, gradient)
        if (stretch := np.ptp(step)) < 1e-6:  # quadratic by now: the last step leaves an error of about its square
            scores += step
            return scores - scores.mean(), np.sqrt(np.diag(np.linalg.inv(curvature)))
        # log(1 + d) / d is a step length at which Newton's method provably climbs on a logistic likelihood, d being
        # the largest change of a score difference (Sun & Tran-Dinh 2019); it tends to 1 as the steps shrink.
        scores += step * np.log1p(stretch) / stretch


def pairings(n: int) -> list[tuple[int, int]]:
    """Who meets whom among `n` images when comparisons are dear: every pair `(i, j)`, i < j, up to `FULL_UP_TO` images.

    More images sit on a ring and meet those at four distances that grow geometrically from 1 to half the ring, which
    keeps any two images few meetings apart. Each then meets seven others, or eight where `n` is odd, because seven
    each cannot be.
    """
    if n <= FULL_UP_TO:
        return list(combinations(range(n), 2))
    distances = {round((n / 2) ** (k / 3)) for k in range(3)} | {n // 2}
    return sorted({(min(i, j), max(i, j)) for d in distances for i in range(n) for j in [(i + d) % n]})


def rank_images(
    compare_batch: Callable[[list[tuple[int, int]]], Sequence[float]], n: int, *, prior_std: float = PRIOR_STD
) -> Ranking:
    """Ranks `n` images by comparing every pair of them once.

    Args:
        compare_batch: for each pair `(i, j)`, the probability that image i beats image j. Called once with all pairs,
            or not at all for a single image.
        n: number of images, at least 1.
        prior_std: see `fit_bradley_terry`.

    Raises:
        InputError: there is no image.
        JudgeError: `compare_batch` left out an answer, or gave one that is not a probability.
    """
    if n < 1:
        raise InputError(f"images has {n} images; give at least one to rank")
    pairs = list(combinations(range(n), 2))
    answers = [float(p) for p in compare_batch(pairs)] if pairs else []
    if len(answers) != len(pairs):
        raise JudgeError(f"the judge gave {len(answers)} answers to {len(pairs)} comparisons")
    for (i, j), p in zip(pairs, answers, strict=True):
        if not 0 <= p <= 1:
            raise JudgeError(f"the judge answered p_first = {p} for images {i} and {j}; it must be in [0, 1]")
    outcomes = [(i, j, p) for (i, j), p in zip(pairs, answers, strict=True)]
    scores, errors = fit_bradley_terry(n, outcomes, prior_std=prior_std)
    return Ranking(np.argsort(-scores, kind="stable").tolist(), scores.tolist(), errors.tolist(), len(pairs))
