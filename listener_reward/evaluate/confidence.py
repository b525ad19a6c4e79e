"""How sure a judge was against how many people agreed: bins, and what is measured over all pairs.

`labels` and `p_first` are (n,) probabilities that the first image is preferred, by people and by the judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import xlogy


class Binned(NamedTuple):
    """How sure a judge was of each of n pairs, and how many people agree with it."""

    confidence: np.ndarray
    """(n,) probability of the preferred image, in [0.5, 1]."""
    agreement: np.ndarray
    """(n,) fraction of people who prefer that image too; half of them where the judge prefers neither."""
    number: np.ndarray
    """(n,) int64, the bin of the confidence: 0 for the unsure, up to one less than there are bins."""


def binned(labels: np.ndarray, p_first: np.ndarray, bins: int) -> Binned:
    """Each pair's confidence and agreement, and its bin: `bins` of equal width in [0.5, 1], the last one closed."""
    confidence = np.maximum(p_first, 1 - p_first)
    agreement = np.select([p_first > 0.5, p_first < 0.5], [labels, 1 - labels], 0.5)
    return Binned(confidence, agreement, np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1))


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs on which the judge was about equally sure."""

    low: float
    high: float
    """The confidences that fall into it, [low, high)."""
    n: int
    confidence: float
    """Mean probability of the preferred image."""
    agreement: float
    """Mean fraction of people who prefer it too."""


def reliability(labels: np.ndarray, p_first: np.ndarray, bins: int = 10) -> list[Bin]:
    """The bins of a reliability diagram that hold a pair, from unsure to sure: those of `binned`."""
    confidence, agreement, number = binned(labels, p_first, bins)
    return [
        Bin(
            0.5 + one / (2 * bins),
            0.5 + (one + 1) / (2 * bins),
            int((inside := number == one).sum()),
            float(confidence[inside].mean()),
            float(agreement[inside].mean()),
        )
        for one in np.unique(number).tolist()
    ]


def expected_calibration_error(labels: np.ndarray, p_first: np.ndarray, bins: int = 15) -> float:
    """How far the judge's confidence is from the fraction of people who agree with it, on average.

    Each bin's gap between mean confidence and mean agreement counts by its number of pairs; see `binned`.
    """
    confidence, agreement, number = binned(labels, p_first, bins)
    gaps = np.bincount(number, weights=confidence - agreement, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def brier_score(labels: np.ndarray, p_first: np.ndarray) -> float:
    """Mean squared distance between probability and fraction of people, in [0, 1]; saying 0.5 to all gets at most
    0.25."""
    return float(np.mean((p_first - labels) ** 2))


def negative_log_likelihood(labels: np.ndarray, p_first: np.ndarray, margin: float = 1e-6) -> float:
    """Mean cross-entropy in nats. Probabilities keep `margin` from 0 and 1: one wrong certainty costs 13.8, not all."""
    p = np.clip(p_first, margin, 1 - margin)
    return float(-np.mean(xlogy(labels, p) + xlogy(1 - labels, 1 - p)))
