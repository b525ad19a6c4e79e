"""Scores images from pairwise comparisons by the Bradley-Terry model, and chooses which pairs to compare.

Bradley-Terry says that image i beats image j with probability sigmoid(s_i - s_j). A judge gives probabilities and not
wins, so each comparison is a soft outcome. The better a judge's outcomes fit one another, the more votes each outcome
is worth (`estimate_votes`). A Gaussian prior keeps scores finite where an image wins every comparison. The prior also
fixes the level: at the optimum the scores' mean is zero.

Every pair of n images is n (n - 1) / 2 comparisons. With a budget, pairs are compared in rounds, and each round takes
the most informative pairs (`next_round`).
"""

# What a caller or a file gives need not be what is annotated, and is checked all the same.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtr

from listener_reward.calibration.fit import fit_temperature
from listener_reward.calibration.maps import Curve
from listener_reward.errors import InputError, JudgeError
from listener_reward.verdict import PairJudge

if TYPE_CHECKING:
    from listener_reward.media.clips import Visual
    from listener_reward.pairs import PromptLike

PRIOR_STD = 2.0
"""Standard deviation of scores before any comparison: two random images are 2.8 log-odds apart, about 94 to 6."""

VOTES = 16.0
PRIOR_DEGREES = 4.0
"""The prior of `estimate_votes`: an outcome is worth `VOTES` votes, as if `PRIOR_DEGREES` degrees of freedom had shown
it."""

MOST_VOTES = 1000.0

FULL_UP_TO = 8
"""Largest number of images of which every pair is compared in a training batch; `pairings` thins the rest."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Images of one prompt, ordered and scored."""

    order: list[int]
    """Positions of the images, best first; equal scores keep the caller's order."""
    scores: list[float]
    """Log-odds in the caller's order: image i beats j with probability sigmoid(scores[i] - scores[j]).

    Their mean is zero, equal images counting once."""
    standard_errors: list[float]
    """The standard error of each score, in log-odds relative to the images' mean."""
    comparisons: int
    """How many pairs the judge compared."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)


def fit_bradley_terry(
    n: int, outcomes: Sequence[tuple[int, int, float]], *, prior_std: float = PRIOR_STD, votes: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The most probable scores of `n` images, given soft outcomes `(i, j, p)`: image i beats image j with probability
    p.

    Args:
        n: number of images, at least 1.
        outcomes: any pairs in any number and order; an image in none of them scores zero.
        prior_std: standard deviation of the Gaussian prior on each score, in [0.001, 1000].
        votes: how many votes an outcome is worth, in [0.001, 1000000]; see `estimate_votes`.

    Returns:
        Scores `(n,)` and standard errors `(n,)`, float64. The errors come from the curvature at the optimum: an image
        without comparisons has the prior's error, and more comparisons reduce it.

    Raises:
        InputError: no image, an outcome that names an image that is not there or one image twice, a probability
            outside [0, 1], or a prior or a number of votes out of range.
    """
    scores, covariance = _posterior(n, outcomes, prior_std, votes)
    return scores, np.sqrt(np.diag(covariance))


def _posterior(
    n: int, outcomes: Sequence[tuple[int, int, float]], prior_std: float, votes: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores `(n,)`, and their covariance `(n, n)` by Laplace's approximation."""
    if n < 1:
        raise InputError(f"n is {n}; there must be at least one image to score")
    if not 1e-3 <= prior_std <= 1e3:
        raise InputError(f"prior_std is {prior_std}; choose one in [0.001, 1000] log-odds, 2 being usual")
    if not 1e-3 <= votes <= 1e6:
        raise InputError(f"votes is {votes}; an outcome is worth 0.001 to 1000000 of them, 1 being usual")
    wins = np.zeros((n, n))
    for i, j, p in outcomes:
        if not (0 <= i < n and 0 <= j < n) or i == j:
            raise InputError(f"outcomes has ({i}, {j}, {p}); an outcome is between two different images of 0..{n - 1}")
        if not 0 <= p <= 1:
            raise InputError(f"outcomes has ({i}, {j}, {p}); the third value is a probability in [0, 1]")
        wins[i, j] += votes * p
        wins[j, i] += votes * (1 - p)

    meetings, precision = wins + wins.T, prior_std**-2
    scores: NDArray[np.float64] = np.zeros(n)
    while True:
        p_beats = expit(scores[:, None] - scores)
        gradient: NDArray[np.float64] = (wins - meetings * p_beats).sum(1) - precision * scores
        weight = meetings * p_beats * (1 - p_beats)
        curvature = np.diag(weight.sum(1) + precision) - weight
        step = cast("NDArray[np.float64]", np.linalg.solve(curvature, gradient))
        if (stretch := np.ptp(step)) < 1e-6:  # quadratic by now: the last step leaves an error of about its square
            scores += step
            return scores - scores.mean(), cast("NDArray[np.float64]", np.linalg.inv(curvature))
        # log(1 + d) / d is a step length at which Newton's method provably climbs on a logistic likelihood, d being
        # the largest change of a score difference (Sun & Tran-Dinh 2019); it tends to 1 as the steps shrink.
        scores += step * np.log1p(stretch) / stretch


def estimate_votes(n: int, outcomes: Sequence[tuple[int, int, float]], *, prior_std: float = PRIOR_STD) -> float:
    """How many votes one outcome is worth, in [1, 1000]: the inverse of its dispersion around the Bradley-Terry model.

    A fraction of k votes has the variance p (1 - p) / k. The mean of (outcome - p)^2 / (p (1 - p)) over the degrees of
    freedom that the outcomes leave estimates 1 / k (McCullagh & Nelder 1989, section 4.5); `VOTES` with `PRIOR_DEGREES`
    degrees of freedom is added, because the first comparisons of a few images leave none. Outcomes of a judge that
    contradicts itself are worth one vote; outcomes whose log-odds add up are worth many.
    """
    votes = VOTES
    if not outcomes:
        return votes
    rows, columns, p = (np.array(values) for values in zip(*outcomes, strict=True))
    for _ in range(3):
        scores, covariance = _posterior(n, outcomes, prior_std, votes)
        expected = np.clip(expit(scores[rows] - scores[columns]), 1e-3, 1 - 1e-3)
        bernoulli = expected * (1 - expected)
        freedom = np.clip(1 - votes * bernoulli * _gap_variance(covariance)[rows, columns], 0, 1).sum()
        chi_square = float(np.sum((p - expected) ** 2 / bernoulli))
        votes = float(np.clip((PRIOR_DEGREES + freedom) / (PRIOR_DEGREES / VOTES + chi_square), 1, MOST_VOTES))
    return votes


def next_round(
    n: int,
    outcomes: Sequence[tuple[int, int, float]],
    size: int,
    *,
    prior_std: float = PRIOR_STD,
) -> list[tuple[int, int]]:
    """At most `size` pairs `(i, j)`, i < j, to compare next; none that `outcomes` has.

    Pairs are chosen one after the other, each for how much its outcome lowers the weighted variance of all score
    differences. A difference with variance v weighs doubt^2 / v; doubt is the probability that its two images stand in
    the wrong order. After each choice the covariance is updated as if the outcome were known, so two pairs of a round
    are not redundant.
    """
    votes = estimate_votes(n, outcomes, prior_std=prior_std)
    scores, covariance = _posterior(n, outcomes, prior_std, votes)
    gap = scores[:, None] - scores
    error = 1 / np.maximum(votes * expit(gap) * expit(-gap), 1e-9)  # the variance of an answer, in squared log-odds
    open_pairs = np.triu(np.ones((n, n), bool), 1)
    for i, j, _ in outcomes:
        open_pairs[min(i, j), max(i, j)] = False
    chosen: list[tuple[int, int]] = []
    for _ in range(min(size, int(open_pairs.sum()))):
        variance = _gap_variance(covariance)
        weight = ndtr(-np.abs(gap) / np.sqrt(variance)) ** 2 / variance
        np.fill_diagonal(weight, 0)
        # With u = covariance (e_i - e_j), the answer lowers variance[a, b] by (u_a - u_b)^2 / (variance + error)[i, j],
        # and the weighted sum of squared differences is the quadratic form of the graph's Laplacian.
        change = covariance @ (np.diag(weight.sum(1)) - weight) @ covariance
        gain = _gap_variance(change) / (variance + error)
        gain = np.where(
            open_pairs, np.round(gain / max(float(gain.max()), 1e-300), 9), -1
        )  # ties must not be rounding's
        i, j = (int(place) for place in np.unravel_index(np.argmax(gain), gain.shape))
        chosen.append((i, j))
        open_pairs[i, j] = False
        u = covariance[:, i] - covariance[:, j]
        covariance = covariance - np.outer(u, u) / (variance + error)[i, j]
    return chosen


def round_size(n: int, made: int) -> int:
    """How many of `n` images' pairs to compare at once, after `made` comparisons.

    Small rounds choose better; large rounds keep a GPU busier. The first round is twice as large as the later ones,
    because there are no outcomes yet to choose by.
    """
    return n // 2 if made == 0 else max(n // 4, 1)


def _gap_variance(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The variance `(n, n)` of every score difference; tiny and positive on the diagonal, which nobody reads."""
    variances = np.diag(covariance)
    return np.maximum(variances[:, None] + variances - 2 * covariance, 1e-12)


def pairings(n: int) -> list[tuple[int, int]]:
    """Pairs `(i, j)`, i < j, to compare among `n` images in training: every pair up to `FULL_UP_TO` images.

    More images are placed on a ring and compared at four distances, which grow geometrically from 1 to half the ring.
    So a short chain of comparisons links any two images. Each image is compared with seven others; with eight if `n` is
    odd, because seven each is impossible.
    """
    if n <= FULL_UP_TO:
        return list(combinations(range(n), 2))
    distances = {round((n / 2) ** (k / 3)) for k in range(3)} | {n // 2}
    return sorted({(min(i, j), max(i, j)) for d in distances for i in range(n) for j in [(i + d) % n]})


def rank_images(
    compare_batch: Callable[[list[tuple[int, int]]], Sequence[float]],
    n: int,
    *,
    budget: int | None = None,
    prior_std: float = PRIOR_STD,
    curve: Curve | None = None,
) -> Ranking:
    """Ranks `n` images by comparing pairs of them, no pair twice.

    Args:
        compare_batch: for each pair `(i, j)`, the probability that image i beats image j. Called once with all pairs;
            with a budget, once a round (`round_size`); not at all for a single image.
        n: number of images, at least 1.
        budget: the most comparisons to make, at least 1; None, and all there are, is the full round robin.
        prior_std: see `fit_bradley_terry`.
        curve: calibrates outcomes that are not calibrated yet. Scores are fitted on the uncalibrated outcomes, whose
            log-odds add up better. One factor then stretches all scores: the factor under which the calibrated outcomes
            are likeliest.

    Raises:
        InputError: there is no image, or a budget that is no number of comparisons.
        JudgeError: `compare_batch` left out an outcome, or gave one that is not a probability.
    """
    if n < 1:
        raise InputError(f"images has {n} images; give at least one to rank")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise InputError(f"budget is {budget!r}; give a number of comparisons, at least 1, or None for every pair")
    every = list(combinations(range(n), 2))
    outcomes: list[tuple[int, int, float]] = []
    if budget is None or budget >= len(every):
        outcomes += _compared(compare_batch, every)
    else:
        while len(outcomes) < budget:
            size = min(round_size(n, len(outcomes)), budget - len(outcomes))
            outcomes += _compared(compare_batch, next_round(n, outcomes, size, prior_std=prior_std))
    votes = estimate_votes(n, outcomes, prior_std=prior_std)
    scores, covariance = _posterior(n, outcomes, prior_std, votes)
    if n > 1:  # the mean of the images, which no comparison can tell, is zero by definition and not uncertain
        centre = np.eye(n) - 1 / n
        covariance = centre @ covariance @ centre
    errors = np.sqrt(np.diag(covariance))
    if curve is not None and outcomes:
        rows, columns, p = (np.array(values) for values in zip(*outcomes, strict=True))
        stretch = _stretch(scores[rows] - scores[columns], expit(curve.of(logit(p))))
        scores, errors = stretch * scores, stretch * errors
    return Ranking(_best_first(scores), scores.tolist(), errors.tolist(), len(outcomes))


def _stretch(gaps: NDArray[np.float64], p: NDArray[np.float64]) -> float:
    """The factor under which `gaps` of scores make the probabilities `p` likeliest; 1 where there are no gaps."""
    size = np.abs(gaps).max()
    return float(fit_temperature(gaps / size, p).knots[0][1] / size) if size > 1e-9 else 1.0


def _best_first(scores: NDArray[np.float64]) -> list[int]:
    """Positions by score; what differs by no more than rounding is equal, and keeps its order."""
    return np.argsort(-np.round(scores, 9), kind="stable").tolist()


@runtime_checkable
class RankingJudge(PairJudge, Protocol):
    """A judge that orders images itself, such as `Judge`; any other is asked by `rank_by`."""

    def rank(self, prompt: PromptLike, images: Sequence[Any], *, budget: int | None = None) -> Ranking:
        """Orders images or clips of one prompt; see `rank_images`."""
        ...


def rank_by(judge: PairJudge, prompt: PromptLike, visuals: Sequence[Visual], *, budget: int | None = None) -> Ranking:
    """Orders pictures or clips of one prompt by `judge.compare_many`; equal pictures are compared as one.

    Raises:
        InputError, JudgeError: as `rank_images`.
    """
    same = first_equal(visuals)
    distinct = [visual for place, visual in enumerate(visuals) if same[place] == place]

    def compare_batch(pairs: Sequence[tuple[int, int]]) -> list[float]:
        firsts, seconds = [distinct[i] for i, _ in pairs], [distinct[j] for _, j in pairs]
        return [verdict.p_first for verdict in judge.compare_many([prompt] * len(pairs), firsts, seconds)]

    return copy_scores(rank_images(compare_batch, len(distinct), budget=budget), same)


def first_equal(visuals: Sequence[Visual]) -> list[int]:
    """For each picture or clip the position of the first that is equal to it, which may be its own."""
    seen: dict[bytes, int] = {}
    return [seen.setdefault(visual.digest, place) for place, visual in enumerate(visuals)]


def copy_scores(ranking: Ranking, same: Sequence[int]) -> Ranking:
    """The ranking of all images from the ranking of the distinct images; `same` is the result of `first_equal`."""
    distinct = sorted(set(same))
    places = [distinct.index(first) for first in same]
    scores = [ranking.scores[place] for place in places]
    errors = [ranking.standard_errors[place] for place in places]
    return Ranking(_best_first(np.array(scores)), scores, errors, ranking.comparisons)


def _compared(
    compare_batch: Callable[[list[tuple[int, int]]], Sequence[float]], pairs: list[tuple[int, int]]
) -> list[tuple[int, int, float]]:
    """The outcomes of `pairs`, checked."""
    outcomes = [float(p) for p in compare_batch(pairs)] if pairs else []
    if len(outcomes) != len(pairs):
        raise JudgeError(f"the judge gave {len(outcomes)} outcomes for {len(pairs)} comparisons")
    for (i, j), p in zip(pairs, outcomes, strict=True):
        if not 0 <= p <= 1:
            raise JudgeError(f"the judge answered p_first = {p} for images {i} and {j}; it must be in [0, 1]")
    return [(i, j, p) for (i, j), p in zip(pairs, outcomes, strict=True)]
