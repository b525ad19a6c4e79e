"""A guard against reward hacking: the reward rises while the quality that it stands for falls.

Training exploits whatever raises the reward, flaws of the judge included. Quantities that training does not optimise
then fall. The guard watches three: the listener's agreement with the judge's verdicts, the diversity of a prompt's
images, and a second reward if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
from scipy.stats import linregress

REWARD = "reward_mean"

OVER_BASE = ("reward_over_base", "reward_over_base_se")
"""The mean score of fixed samples minus the base's, and its standard error; present only in epochs that draw
samples."""

WATCHED = {"agreement": 0.05, "diversity": 0.2, "second_reward_mean": 0.0}
"""The watched quantities, and the fraction that each may lose within the window. Diversity falls in every training;
losing a fifth within one window is more than usual."""

SIGNIFICANT = 0.01
"""One-sided p-value below which a trend counts. Small, because every epoch tests again."""


class HackingGuard:
    """Takes each epoch's numbers and returns warnings of what looks like reward hacking.

    Args:
        window: epochs that a trend is fitted to.
        min_epochs: fewest epochs before any warning.
    """

    def __init__(self, window: int = 20, min_epochs: int = 8):
        self.window, self.min_epochs = window, min_epochs
        self.rows: list[dict[str, float]] = []
        self.raised: list[str] = []
        """Quantities with a warning that have not recovered since."""

    def update(self, row: Mapping[str, float]) -> list[str]:
        """One message for each of `WATCHED` that has begun to fall while the reward rises.

        A `ListenerReward` that compares within groups has mean zero by construction. Such a reward has risen if the
        newest fixed samples in the window beat the base's by more than two standard errors. Without such samples the
        reward is assumed to rise.
        """
        names = (REWARD, *OVER_BASE, *WATCHED)
        self.rows = [*self.rows, {name: float(row.get(name, math.nan)) for name in names}][-self.window :]
        falling = [name for name, tolerance in WATCHED.items() if self._falls(name, tolerance)]
        if not falling or not self._reward_rises():
            self.raised = []
            return []
        fresh = [name for name in falling if name not in self.raised]
        self.raised = falling
        return [self._message(name) for name in fresh]

    def state_dict(self) -> dict[str, list]:
        return {"rows": self.rows, "raised": self.raised}

    def load_state_dict(self, state: Mapping[str, list]) -> None:
        self.rows, self.raised = list(state["rows"]), list(state["raised"])

    def _series(self, name: str) -> np.ndarray:
        values = np.array([row.get(name, math.nan) for row in self.rows])
        return values[~np.isnan(values)]

    def _reward_rises(self) -> bool:
        rewards = self._series(REWARD)
        if not (len(rewards) and np.abs(rewards).max() < 1e-3):
            return self._trend(REWARD, "greater") is not None
        over, error = (self._series(name) for name in OVER_BASE)
        return bool(over[-1] > 2 * error[-1]) if len(error) else True

    def _falls(self, name: str, tolerance: float) -> bool:
        trend = self._trend(name, "less")
        return trend is not None and trend[0] - trend[1] > tolerance * abs(trend[0])

    def _trend(self, name: str, direction: Literal["less", "greater"]) -> tuple[float, float] | None:
        """The fitted first and last value in the window if the trend is significant."""
        values = self._series(name)
        if len(values) < self.min_epochs or np.ptp(values) == 0:
            return None
        fit: Any = linregress(np.arange(len(values)), values, alternative=cast(Any, direction))
        return (fit.intercept, fit.intercept + fit.slope * (len(values) - 1)) if fit.pvalue < SIGNIFICANT else None

    def _message(self, name: str) -> str:
        trend = self._trend(name, "less")
        assert trend is not None
        return (
            f"{name} fell from {trend[0]:.3g} to {trend[1]:.3g} in {len(self._series(name))} epochs while the reward "
            "rose; this looks like reward hacking. Look at the sample grids; raise kl, or stop earlier"
        )
