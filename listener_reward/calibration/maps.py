"""Maps from a judge's probabilities to how often people agree.

The reasoner and the listener have two maps each, both on log-odds:

- Every judgement (one thought, one order) goes through Platt scaling, `logit(p) / temperature + bias`. `p` belongs to
  the image *in first place*, so the bias is a position bias. Both orders are averaged afterwards, and the bias helps
  one image in one order and the other image in the other: swapping the images still mirrors the verdict.
- The average over both orders, which has no position, goes through an odd curve, f(-x) = -f(x). A bias there would
  favour the caller's first image. A curve with one knot is a temperature (Guo et al. 2017, arXiv 1706.04599). A curve
  with several knots is an isotonic regression (Zadrozny & Elkan 2002), linear between its knots.

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
    """Log-odds added to the image in first place; negative for a judge that favours the first place."""

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
    """(from, to) in log-odds, both increasing from (0, 0). Beyond the last knot the curve follows the ray from the
    origin through that knot. No knots change nothing; one knot is a temperature, from / to."""

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
        """The calibrated probability of `p` in [1/2, 1); the caller mirrors smaller probabilities."""
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
    """All maps of one judge in one mode. The default changes nothing."""

    reasoner_platt: Platt = field(default_factory=Platt)
    """For the reasoner's probability after each thought."""
    reasoner_curve: Curve = field(default_factory=Curve)
    """For the reasoner's mean, or majority, over thoughts and orders."""
    listener_platt: Platt = field(default_factory=Platt)
    """For the listener's probability after each thought."""
    listener_curve: Curve = field(default_factory=Curve)
    """For the listener's mean over thoughts and orders."""
    both_curve: Curve = field(default_factory=Curve)
    """For the aggregate "both": the mean, in log-odds, of what `reasoner_curve` and `listener_curve` give."""
    tie_band: float = 0.0
    """A verdict prefers neither image where p_first is this near to 1/2, in [0, 0.5]."""
    mode: Mode | None = None
    """The mode of the verdicts that the maps were fitted on; None if unknown. `Card` sets it for older cards."""

    def __post_init__(self) -> None:
        if not (_is_number(self.tie_band) and 0 <= self.tie_band <= 0.5):
            raise InputError(f"tie_band is {self.tie_band!r}; give a number in [0, 0.5]")

    def to_dict(self) -> dict[str, Any]:
        """The maps as JSON-able values."""
        maps = {key: getattr(self, name) for key, name in KEYS.items()}
        values = {
            key: asdict(one) if isinstance(one, Platt) else [list(knot) for knot in one.knots]
            for key, one in maps.items()
        }
        return values | {"tie_band": self.tie_band, "mode": None if self.mode is None else asdict(self.mode)}

    def covers(self, mode: Mode) -> bool:
        """Whether the calibration fits verdicts made in `mode`, or has no known mode.

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
        return cls(**{KEYS.get(name, name): value for name, value in values.items()})


KEYS = {
    "answer": "reasoner_platt",
    "verdict": "reasoner_curve",
    "heard": "listener_platt",
    "listener": "listener_curve",
    "both": "both_curve",
}
"""A card's keys, and the fields of a `Calibration` that they hold."""

CURVE_OF: dict[Aggregate, str] = {
    "mean": "reasoner_curve",
    "majority": "reasoner_curve",
    "listener": "listener_curve",
    "both": "both_curve",
}
"""The curve of a `Calibration` that a verdict goes through last."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
