"""Intervals and paired tests for metrics of pairs, where pairs of one prompt are not independent.

What a judge earns is given pair by pair, as `earned` and `possible`, and its value is the sum of the one over the sum
of the other. A `cluster` is all pairs of one prompt: resampling draws prompts, because the images of a prompt come back
in many of its pairs and a bootstrap over pairs would call the same luck many observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap, permutation_test, sem, t

RESAMPLES = 2000
"""Bootstrap samples: the ends of a 95 % interval are then themselves known to about a twentieth of its width."""

EXCHANGES = 10_000
"""Random exchanges of two judges, where there are too many to try them all: p-values are at least 0.0001."""

_EXACT = 13
"""Prompts on which two judges differ, up to which all 2^13 exchanges are tried."""

_CELLS = 2**20
"""Numbers drawn at a time: memory does not grow with the number of prompts times the number of samples."""


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two judges on the same pairs: how far apart they are, and whether chance would do that."""

    difference: float
    """Value of the first judge minus value of the second, over the pairs that both were asked."""
    interval: tuple[float, float] | None
    """95 %, by a bootstrap that draws prompts, both judges on the same ones; None of a single prompt."""
    p_value: float
    """Two-sided, by exchanging the judges prompt by prompt: all exchanges of up to 13 prompts, else 10,000 of them."""
    mcnemar_p_value: float
    """Two-sided and exact, on the pairs that only one judge gets right. It takes pairs for independent, which pairs of
    one prompt are not: it is here for comparison with papers."""
    only_first: int
    """Pairs on which the first judge earns more."""
    only_second: int
    pairs: int
    prompts: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self) | {"interval": None if self.interval is None else list(self.interval)}


def wilson(count: int, n: int) -> tuple[float, float] | None:
    """The Wilson 95 % interval of a fraction, None of nothing."""
    if n == 0:
        return None
    low, high = binomtest(count, n).proportion_ci(method="wilson")
    return float(low), float(high)


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """The mean over runs (n,), and half its 95 % interval by Student's t; None of a single run.

    Differences of two ways to train from the same seeds give the paired interval.
    """
    half = sem(values) * t.ppf(0.975, len(values) - 1) if len(values) > 1 else None
    return float(np.mean(values)), None if half is None else float(half)


def clustered_interval(
    earned: np.ndarray,
    possible: np.ndarray,
    clusters: np.ndarray,
    *,
    fraction: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The 95 % interval of `earned.sum() / possible.sum()`, by a percentile bootstrap that draws whole clusters.

    Where no cluster holds more than one pair and each pair is right or wrong, this is the Wilson interval, which is
    better on few pairs; so it is, on the number of clusters, where all are right or all are wrong, of which a bootstrap
    knows nothing. None where nothing is possible.

    Args:
        earned, possible: (n,) floats, finite.
        clusters: (n,) integers, equal for pairs of one prompt.
        fraction: whether the value is a fraction, of which Wilson's interval tells something. Not so a correlation,
            which has no interval where all clusters have the same.
        resamples: number of bootstrap samples.
        seed: of the samples.
    """
    counted = possible > 0
    if not counted.any():
        return None
    sums = _sums(clusters[counted], earned[counted], possible[counted])
    got, could = sums
    if fraction and (np.isin(earned[counted], (0, 1)) & (possible[counted] == 1)).all() and (could == 1).all():
        return wilson(int(got.sum()), len(got))
    rates = got / could
    if len(rates) == 1 or (rates == rates[0]).all():
        return wilson(round(len(rates) * float(rates[0])), len(rates)) if fraction and rates[0] in (0, 1) else None
    return _resampled(got, could, resamples, seed)


def paired_test(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    clusters: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedTest | None:
    """Compares two judges on the same pairs.

    Args:
        first, second: `(earned, possible)`, (n,) floats each, of the two judges. Pairs on which the two could not earn
            the same are left out; there one judge gave no answer.
        clusters: (n,) integers, equal for pairs of one prompt.
        resamples, seed: of the bootstrap; the permutations use the same seed.

    Returns:
        None where no pair is left.
    """
    both = (first[1] > 0) & (first[1] == second[1])
    if not both.any():
        return None
    (one, possible), (two, _), clusters = (first[0][both], first[1][both]), (second[0][both], None), clusters[both]
    gaps, could = _sums(clusters, one - two, possible)
    ahead, behind = int(np.sum(one > two)), int(np.sum(one < two))
    return PairedTest(
        difference=float(gaps.sum() / could.sum()),
        interval=_resampled(gaps, could, resamples, seed) if len(gaps) > 1 else None,
        p_value=_exchanged(gaps, seed),
        mcnemar_p_value=float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0,
        only_first=ahead,
        only_second=behind,
        pairs=len(one),
        prompts=len(gaps),
    )


def _exchanged(gaps: np.ndarray, seed: int) -> float:
    """How often a sum as far from zero comes about when each cluster's gap may as well have the other sign."""
    gaps = gaps[gaps != 0]  # a gap of zero has no sign to change
    if len(gaps) < 2:
        return 1.0
    if len(gaps) <= _EXACT:
        found = permutation_test(
            (gaps,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=2**_EXACT, vectorized=True
        )
        return float(found.pvalue)
    # Gaps of one size are exchangeable: how many of them are positive is one binomial draw, not one for each.
    sizes, counts = np.unique(np.round(np.abs(gaps), 12), return_counts=True)
    rng, extreme, limit = np.random.default_rng(seed), 0, abs(gaps.sum()) * (1 - 1e-9)
    rows = max(1, _CELLS // len(sizes))
    for start in range(0, EXCHANGES, rows):
        drawn = rng.binomial(counts, 0.5, size=(min(rows, EXCHANGES - start), len(sizes)))
        extreme += int((np.abs((2 * drawn - counts) @ sizes) >= limit).sum())
    return (extreme + 1) / (EXCHANGES + 1)  # the order that was seen is one of those possible


def _sums(clusters: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each of `values` summed within each cluster."""
    _, which = np.unique(clusters, return_inverse=True)
    return tuple(np.bincount(which, weights=value) for value in values)


def _resampled(got: np.ndarray, could: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % interval of `got.sum() / could.sum()`, drawing the clusters whose sums the two hold; at least two."""
    interval = bootstrap(
        (got, could),
        lambda got, could, axis: got.sum(axis) / could.sum(axis),
        paired=True,  # a cluster's two sums are drawn together
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        batch=max(1, _CELLS // len(got)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
