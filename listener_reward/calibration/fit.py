"""Fits the maps of a calibration on votes: `log_odds` and `labels` are (n,) float64.

The labels are fractions of people in [0, 1]; a hard label is 0 or 1. Nothing here loads a model.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize, minimize_scalar
from scipy.special import expit, logit

from listener_reward.calibration.maps import Curve, Platt

Method = Literal["auto", "temperature", "isotonic"]

MOST_KNOTS = 10

LEAST_IN_A_BIN = 30
"""Isotonic regression has at most `MOST_KNOTS` knots, each from at least `LEAST_IN_A_BIN` pairs."""

STEEPEST = 100.0
"""Slopes are kept in [1 / STEEPEST, STEEPEST]: the likelihood of a judge that is never wrong has no maximum."""

# ---------------------------------------------------------------------------------------------------------------------
# Fitting: `log_odds` and `labels` are (n,) float64
# ---------------------------------------------------------------------------------------------------------------------


def fit_platt(log_odds: NDArray[np.float64], labels: NDArray[np.float64]) -> Platt:
    """The temperature and bias of lowest cross-entropy (Platt 1999)."""

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.floating]]:
        slope, bias = parameters
        scaled: NDArray[np.float64] = slope * log_odds + bias
        missed = expit(scaled) - labels
        return _cross_entropy(scaled, labels), np.array([np.mean(missed * log_odds), np.mean(missed)])

    # The loss is convex in slope and bias, so where it starts does not matter.
    bounds = [(1 / STEEPEST, STEEPEST), (-10.0, 10.0)]
    slope, bias = minimize(loss, [1.0, 0.0], jac=True, bounds=bounds, method="L-BFGS-B").x
    return Platt(_short(1 / slope), _short(bias))


def fit_temperature(log_odds: NDArray[np.float64], labels: NDArray[np.float64]) -> Curve:
    """The one-knot curve, a temperature, of highest likelihood."""
    steepest = math.log(STEEPEST)
    found: Any = minimize_scalar(
        lambda log_slope: _cross_entropy(math.exp(log_slope) * log_odds, labels),
        bounds=(-steepest, steepest),
        method="bounded",
    )
    return Curve(((1.0, _short(math.exp(found.x))),))


def fit_isotonic(log_odds: NDArray[np.float64], labels: NDArray[np.float64]) -> Curve:
    """The increasing curve of highest likelihood through bins of equal numbers of pairs, by their |log-odds|.

    A pair and its swapped copy carry the same information. So the curve is fitted on the preferred image's side only,
    and is odd by construction. Bins that the data cannot tell apart become one knot. A knot's probability is bounded by
    its number of pairs: n agreeing of n give (n + 1) / (n + 2).
    """
    sided = log_odds != 0
    sizes, agreement = np.abs(log_odds[sided]), np.where(log_odds > 0, labels, 1 - labels)[sided]
    n_bins = min(MOST_KNOTS, len(sizes) // LEAST_IN_A_BIN)
    if n_bins < 2:
        return fit_temperature(log_odds, labels)
    bins = np.array_split(np.argsort(sizes, kind="stable"), n_bins)
    weights = np.array([len(rows) for rows in bins], dtype=np.float64)
    fitted: Any = isotonic_regression([agreement[rows].mean() for rows in bins], weights=weights)
    knots: list[tuple[float, float]] = []
    least = (0.0, 0.0)
    for start, end in zip(fitted.blocks[:-1], fitted.blocks[1:], strict=True):
        rows = np.concatenate(bins[start:end])
        fraction = (float(fitted.x[start]) * len(rows) + 1) / (len(rows) + 2)
        knot = _short(sizes[rows].mean()), _short(max(logit(fraction), 0.0))
        if knot[0] > least[0] and knot[1] >= least[1]:
            knots.append(least := knot)
    return Curve(tuple(knots)) if knots and knots[-1][1] > 0 else fit_temperature(log_odds, labels)


FITS = {"temperature": fit_temperature, "isotonic": fit_isotonic}


def fit_curve(
    log_odds: NDArray[np.float64],
    labels: NDArray[np.float64],
    validation: tuple[NDArray[np.float64], NDArray[np.float64]],
    method: Method = "auto",
) -> Curve:
    """The curve by `method`; "auto" takes the curve with the higher likelihood on `validation` (log-odds, labels)."""
    if method != "auto":
        return FITS[method](log_odds, labels)
    curves = [fit(log_odds, labels) for fit in FITS.values()]
    return min(curves, key=lambda curve: _cross_entropy(curve.of(validation[0]), validation[1]))


def _cross_entropy(log_odds: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    return float(np.mean(labels * np.logaddexp(0, -log_odds) + (1 - labels) * np.logaddexp(0, log_odds)))


def _short(value: float) -> float:
    """Four decimals are more than any data set fixes, and a card should be readable."""
    return round(float(value), 4)
