"""Scores to advantages: pure arithmetic on groups, the samples of one prompt.

A missing score is NaN. A missing score is left out of every mean and standard deviation, and its advantage is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

AdvantageStd = Literal["batch", "group"]

TINY = 1e-4
"""Added to standard deviations, as Flow-GRPO does, so that nearly equal rewards get small advantages."""


def group_advantages(
    rewards: np.ndarray, groups: np.ndarray, *, std_of: AdvantageStd = "batch", errors: np.ndarray | None = None
) -> np.ndarray:
    """Each reward less its group's mean, by a standard deviation: float64 (N,).

        A_i = (r_i - mean_g) / (sqrt(std^2 + noise_g) + TINY)

    Args:
        rewards: (N,), NaN where missing.
        groups: (N,) numbers; equal ones are a group, the samples of one prompt.
        std_of: "group" divides by the group's own standard deviation (GRPO), "batch" by the standard deviation of all N
            rewards (Flow-GRPO). "batch" does not blow up the noise of a group with nearly equal rewards.
        errors: (N,) standard errors of the rewards, NaN where unknown. `noise_g` is the mean of their squares in the
            group: a group whose rewards differ no more than by chance does not get unit variance. Left out, it is 0.

    A group with fewer than two rewards has nothing to compare and gets 0.
    """
    advantages = np.zeros(len(rewards))
    known = ~np.isnan(rewards)
    for group in np.unique(groups):
        members = known & (groups == group)
        if members.sum() > 1:
            values = rewards[members].astype(np.float64)
            spread = values if std_of == "group" else rewards[known].astype(np.float64)
            advantages[members] = (values - values.mean()) / _scale(spread, None if errors is None else errors[members])
    return advantages


def normalised_sum(
    components: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    groups: np.ndarray,
    scored: np.ndarray,
    *,
    errors: Mapping[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of several rewards, each normalised within its group and then summed by weight.

        s_i = sum over k of w_k * (r_ik - mean_gk) / (sqrt(std_gk^2 + noise_gk) + TINY)

    with mean and standard deviation of reward k over the scored samples of the group of i. Without errors this is the
    first half of GDPO (arXiv 2601.05242); `group_advantages` of the result, by the batch's standard deviation, is the
    second.

    Args:
        components: by name (N,), NaN where missing.
        weights: by the same names.
        groups: (N,) numbers; equal ones are a group.
        scored: (N,) bool, false for samples that have no part in anything.
        errors: by name (N,) standard errors, of the components that have some; see `group_advantages`.

    Returns:
        The sums, float64 (N,), NaN where `scored` is false, and their standard errors (N,), 0 without `errors`. A
        component that a scored sample lacks counts for no sample of that group, and its weight goes to no other
        component. A group with fewer than two scored samples has nothing to compare and gets 0.
    """
    total, variance = np.zeros(len(groups)), np.zeros(len(groups))
    for group in np.unique(groups):
        members = scored & (groups == group)
        for name, weight in weights.items():
            values = components[name][members].astype(np.float64)
            if len(values) < 2 or np.isnan(values).any():
                continue
            own = errors[name][members] if errors and name in errors else np.zeros(len(values))
            scale = _scale(values, own)
            total[members] += weight * (values - values.mean()) / scale
            variance[members] += (weight * np.nan_to_num(own) / scale) ** 2
    return np.where(scored, total, np.nan), np.sqrt(variance)


def noise_fraction(rewards: np.ndarray, groups: np.ndarray, errors: np.ndarray) -> float:
    """How much of what tells a group's samples apart may be chance: the mean over groups of noise / (variance + noise).

    In [0, 1]; arguments as in `group_advantages`. NaN without a group of two rewards.
    """
    fractions = []
    for group in np.unique(groups):
        members = ~np.isnan(rewards) & (groups == group)
        if members.sum() > 1:
            noise = _noise(errors[members])
            both = rewards[members].astype(np.float64).var() + noise
            fractions.append(noise / both if both else 0.0)
    return float(np.mean(fractions)) if fractions else float("nan")


def _scale(values: np.ndarray, errors: np.ndarray | None) -> float:
    """What differences are divided by, above 0."""
    return float(np.sqrt(values.var() + (0 if errors is None else _noise(errors)))) + TINY


def _noise(errors: np.ndarray) -> float:
    """The mean square of the standard errors that are known, 0 if none is."""
    known = errors[~np.isnan(errors)].astype(np.float64)
    return float((known**2).mean()) if known.size else 0.0
