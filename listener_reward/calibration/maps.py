"""Confidence that means something: maps from what a judge says to how often people agree.

Two maps, both on log-odds, for the reasoner and for the listener each:

- Every answer (one thought, one order) goes through Platt scaling, `logit(p) / temperature + bias`. It is about the
  image *shown first*, so its bias is a position bias. Both orders are averaged afterwards, and a bias that helps the
  first image in one order helps the other image in the other: swapping the images still mirrors the verdict.
- The verdict, in which no position is left, goes through an odd curve, f(-x) = -f(x). Platt's bias has to vanish there:
  it would say that of two images the caller's first is the better one. A curve of one knot is a temperature
  (Guo et al. 2017, arXiv 1706.04599); with several it is an isotonic regression (Zadrozny & Elkan 2002) that is linear
  between its knots.

The maps travel in a checkpoint's card; `calibration.fit` fits them on votes. Nothing here loads a model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from listener_reward.errors import InputError
from listener_reward.verdict import LISTENING, Aggregate, Mode


@dataclass(frozen=True, slots=True)
class Platt:
    """Log-odds divided by a temperature, plus a bias. The default changes nothing."""

    temperature: float = 1.0
    bias: float = 0.0
    """Log-odds added to the image shown first; a judge that favours it is fitted a negative one."""

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature of a calibration is {self.temperature!r}; give a number above 0")
        if not _is_number(self.bias):
            raise InputError(f"bias of a calibration is {self.bias!r}; give a finite number of log-odds")

    def __call__(self, p: float) -> float:
        """The calibrated probability of `p` in (0, 1)."""
        if self == Platt():
            return p
        return float(expit(logit(p) / self.temperature + self.bias))


@dataclass(frozen=True, slots=True)
class Curve:
    """An odd, increasing map of log-odds: straight lines through the origin, the knots and their mirror images."""

    knots: tuple[tuple[float, float], ...] = ()
    """(from, to) in log-odds, both increasing, the first above (0, 0); beyond the last one its own ray from the origin
    goes on. Without knots nothing changes; one knot is a temperature, its first number over its second."""

    def __post_init__(self) -> None:
        try:
            knots = tuple((float(x), float(y)) for x, y in self.knots)
        except (TypeError, ValueError):
            raise InputError(f"a calibration curve is {self.knots!r}; give a list of pairs of numbers") from None
        object.__setattr__(self, "knots", knots)
        for (x, y), (next_x, next_y) in zip(((0.0, 0.0), *knots), knots, strict=False):
            if not (x < next_x < math.inf and y <= next_y < math.inf):
                raise InputError(f"knots of a calibration curve are {knots}; they have to increase from (0, 0)")

    def __call__(self, p: float) -> float:
        """The calibrated probability of `p` in [1/2, 1); the caller mirrors what lies below."""
        return p if not self.knots else float(expit(self.of(np.array(logit(p)))))

    def of(self, log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Calibrated log-odds of any shape."""
        if not self.knots:
            return log_odds
        knots: NDArray[np.float64] = np.array(((0.0, 0.0), *self.knots))
        x, y = knots[:, 0], knots[:, 1]
        size = np.abs(log_odds)
        return np.sign(log_odds) * np.where(size > x[-1], size * (y[-1] / x[-1]), np.interp(size, x, y))


@dataclass(frozen=True, slots=True)
class Calibration:
    """What turns a judge's numbers into probabilities that can be believed. The default changes nothing."""

    answer: Platt = field(default_factory=Platt)
    """Of the reasoner's answer after each thought."""
    verdict: Curve = field(default_factory=Curve)
    """Of the verdict, after all thoughts and orders have been put together."""
    heard: Platt = field(default_factory=Platt)
    """Of the listener's answer after each thought."""
    listener: Curve = field(default_factory=Curve)
    """Of the listener's mean over thoughts and orders."""
    both: Curve = field(default_factory=Curve)
    """Of the mean of what `verdict` and `listener` give, in log-odds, where reasoner and listener judge together."""
    tie_band: float = 0.0
    """A verdict prefers neither image where p_first is this near to 1/2, in [0, 0.5]."""
    mode: Mode | None = None
    """How the verdicts were made that it was fitted on; None for not known, as `Card` reads it."""

    def __post_init__(self) -> None:
        if not (_is_number(self.tie_band) and 0 <= self.tie_band <= 0.5):
            raise InputError(f"tie_band is {self.tie_band!r}; give a number in [0, 0.5]")

    def to_dict(self) -> dict[str, Any]:
        """The maps as JSON-able values."""
        curves = {name: [list(knot) for knot in getattr(self, name).knots] for name in ("verdict", "listener", "both")}
        return asdict(self) | curves

    def covers(self, mode: Mode) -> bool:
        """Whether it is for verdicts made in `mode`, or changes nothing.

        One fit serves the aggregates "mean", "listener" and "both", unless an early stop or a tie band was chosen for
        one of them.
        """
        if self.mode in (None, mode):
            return True
        if "majority" in (self.mode.aggregate, mode.aggregate) or self.tie_band > 0 or mode.early_stop is not None:
            return False
        fitted = mode.aggregate not in LISTENING or getattr(self, CURVE_OF[mode.aggregate]) != Curve()
        return fitted and replace(self.mode, aggregate=mode.aggregate) == mode

    @classmethod
    def from_dict(cls, saved: Any) -> Calibration:
        """Reads what `to_dict` wrote; a map that is left out changes nothing.

        Raises:
            InputError: names the field that is unknown or out of range.
        """
        maps = {"answer": Platt, "verdict": Curve, "heard": Platt, "listener": Curve, "both": Curve}
        if not isinstance(saved, dict) or not set(cast("dict[str, Any]", saved)) <= {*maps, "tie_band", "mode"}:
            raise InputError(
                f"calibration is {saved!r}; it may have {', '.join(maps)}, tie_band and mode, and no other field"
            )
        values = dict(cast("dict[str, Any]", saved))
        if values.get("mode") is not None:
            values["mode"] = Mode.from_dict(values["mode"])
        for name in set(values) & set(maps):
            given: Any = values[name]
            if maps[name] is Curve:
                values[name] = Curve(given)
            elif isinstance(given, dict) and set(cast("dict[str, Any]", given)) <= {"temperature", "bias"}:
                values[name] = Platt(**cast("dict[str, Any]", given))
            else:
                raise InputError(f"calibration has {name} {given!r}; give its temperature and bias")
        return cls(**values)


CURVE_OF: dict[Aggregate, str] = {"mean": "verdict", "majority": "verdict", "listener": "listener", "both": "both"}
"""The field of a `Calibration` that a verdict goes through last."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
