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


def group_advantages(rewards: np.ndarray, groups: np.ndarray, *, std_of: AdvantageStd = "batch") -> np.ndarray:
    """Each reward less its group's mean, by a standard deviation: float64 (N,).

    Args:
        rewards: (N,), NaN where missing.
        groups: (N,) numbers; equal ones are a group, the samples of one prompt.
        std_of: "group" divides by the group's own standard deviation (GRPO), "batch" by the standard deviation of all N
            rewards (Flow-GRPO). "batch" does not blow up the noise of a group with nearly equal rewards.

    A group with fewer than two rewards has nothing to compare and gets 0.
    """
    advantages = np.zeros(len(rewards))
    known = ~np.isnan(rewards)
    for group in np.unique(groups):
        members = known & (groups == group)
        if members.sum() > 1:
            values = rewards[members].astype(np.float64)
            std = values.std() if std_of == "group" else rewards[known].astype(np.float64).std()
            advantages[members] = (values - values.mean()) / (std + TINY)
    return advantages


def normalised_sum(
    components: Mapping[str, np.ndarray], weights: Mapping[str, float], groups: np.ndarray, scored: np.ndarray
) -> np.ndarray:
    """Scores of several rewards, each normalised within its group and then summed by weight: float64 (N,).

        s_i = sum over k of w_k * (r_ik - mean_k) / (std_k + TINY)

    with mean and standard deviation of reward k over the scored samples of the group of i. This is the first half of
    GDPO (arXiv 2601.05242); `group_advantages` of the result, by the batch's standard deviation, is the second.

    Args:
        components: by name (N,), NaN where missing.
        weights: by the same names.
        groups: (N,) numbers; equal ones are a group.
        scored: (N,) bool, false for samples that have no part in anything.

    Returns:
        NaN where `scored` is false. A component that a scored sample lacks counts for no sample of that group, and its
        weight goes to no other component.
    """
    total = np.zeros(len(groups))
    for name, weight in weights.items():
        values = np.where(scored, components[name], np.nan)
        lacking = np.unique(groups[scored & np.isnan(values)])
        total += weight * group_advantages(np.where(np.isin(groups, lacking), np.nan, values), groups, std_of="group")
    return np.where(scored, total, np.nan)
