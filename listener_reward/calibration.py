"""Confidence that means something: from what a judge says to how often people agree, fitted on votes.

Two maps, both on log-odds, for the reasoner and for the listener each:

- Every answer (one thought, one order) goes through Platt scaling, `logit(p) / temperature + bias`. It is about the
  image *shown first*, so its bias is a position bias. Both orders are averaged afterwards, and a bias that helps the
  first image in one order helps the other image in the other: swapping the images still mirrors the verdict.
- The verdict, in which no position is left, goes through an odd curve, f(-x) = -f(x). Platt's bias has to vanish there:
  it would say that of two images the caller's first is the better one. A curve of one knot is a temperature
  (Guo et al. 2017, arXiv 1706.04599); with several it is an isotonic regression (Zadrozny & Elkan 2002) that is linear
  between its knots.

The labels are shares of people in [0, 1]; a hard label is 0 or 1. Nothing here loads a model.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from scipy.optimize import isotonic_regression, minimize, minimize_scalar
from scipy.special import betaincinv, expit, logit

from listener_reward.errors import InputError
from listener_reward.reliability import reliability
from listener_reward.verdict import LISTENING, Aggregate, Mode

if TYPE_CHECKING:
    import datasets

    from listener_reward.judge import Judge

Method = Literal["auto", "temperature", "isotonic"]

MOST_KNOTS = 10
LEAST_IN_A_BIN = 30
"""Isotonic regression gets at most this many knots, and this many pairs for each of them at least."""

BANDS = 20
"""How many tie bands are tried for a wanted accuracy, which leave the surest 5 %, 10 % ... of the pairs outside."""

STEEPEST = 100.0
"""Slopes are kept in [1 / STEEPEST, STEEPEST]: the likelihood of a judge that is never wrong has no maximum."""


# ---------------------------------------------------------------------------------------------------------------------
# The maps, as they travel in a checkpoint's card
# ---------------------------------------------------------------------------------------------------------------------


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

    def of(self, log_odds: np.ndarray) -> np.ndarray:
        """Calibrated log-odds of any shape."""
        if not self.knots:
            return log_odds
        x, y = np.array(((0.0, 0.0), *self.knots)).T
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
        if not isinstance(saved, dict) or not set(saved) <= {*maps, "tie_band", "mode"}:
            raise InputError(
                f"calibration is {saved!r}; it may have {', '.join(maps)}, tie_band and mode, and no other field"
            )
        values: dict[str, Any] = dict(saved)
        if saved.get("mode") is not None:
            values["mode"] = Mode.from_dict(saved["mode"])
        for name in set(saved) & set(maps):
            if maps[name] is Curve:
                values[name] = Curve(saved[name])
            elif isinstance(saved[name], dict) and set(saved[name]) <= {"temperature", "bias"}:
                values[name] = Platt(**saved[name])
            else:
                raise InputError(f"calibration has {name} {saved[name]!r}; give its temperature and bias")
        return cls(**values)


CURVE_OF: dict[Aggregate, str] = {"mean": "verdict", "majority": "verdict", "listener": "listener", "both": "both"}
"""The field of a `Calibration` that a verdict goes through last."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---------------------------------------------------------------------------------------------------------------------
# Fitting: `log_odds` and `labels` are (n,) float64
# ---------------------------------------------------------------------------------------------------------------------


def fit_platt(log_odds: np.ndarray, labels: np.ndarray) -> Platt:
    """The temperature and bias of highest likelihood (Platt 1999; on soft labels the cross-entropy)."""

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, bias = parameters
        scaled = slope * log_odds + bias
        missed = expit(scaled) - labels
        return _cross_entropy(scaled, labels), np.array([np.mean(missed * log_odds), np.mean(missed)])

    # The loss is convex in slope and bias, so where it starts does not matter.
    bounds = [(1 / STEEPEST, STEEPEST), (-10.0, 10.0)]
    slope, bias = minimize(loss, [1.0, 0.0], jac=True, bounds=bounds, method="L-BFGS-B").x
    return Platt(_short(1 / slope), _short(bias))


def fit_temperature(log_odds: np.ndarray, labels: np.ndarray) -> Curve:
    """The curve of one knot of highest likelihood: a temperature."""
    steepest = math.log(STEEPEST)
    found: Any = minimize_scalar(
        lambda log_slope: _cross_entropy(math.exp(log_slope) * log_odds, labels),
        bounds=(-steepest, steepest),
        method="bounded",
    )
    return Curve(((1.0, _short(math.exp(found.x))),))


def fit_isotonic(log_odds: np.ndarray, labels: np.ndarray) -> Curve:
    """The increasing curve of highest likelihood through bins of equal numbers of pairs, by their |log-odds|.

    A pair and its mirror image say the same, so the curve is fitted on the side of the preferred image only, and is
    odd by construction. Bins that the data cannot tell apart become one knot, and no knot is surer than its number of
    pairs allows (n agreeing of n give (n + 1) / (n + 2)).
    """
    sided = log_odds != 0
    sizes, agreement = np.abs(log_odds[sided]), np.where(log_odds > 0, labels, 1 - labels)[sided]
    n_bins = min(MOST_KNOTS, len(sizes) // LEAST_IN_A_BIN)
    if n_bins < 2:
        return fit_temperature(log_odds, labels)
    bins = np.array_split(np.argsort(sizes, kind="stable"), n_bins)
    weights = np.array([len(rows) for rows in bins], dtype=np.float64)
    fitted: Any = isotonic_regression([agreement[rows].mean() for rows in bins], weights=weights)
    knots, least = [], (0.0, 0.0)
    for start, end in zip(fitted.blocks[:-1], fitted.blocks[1:], strict=True):
        rows = np.concatenate(bins[start:end])
        share = (float(fitted.x[start]) * len(rows) + 1) / (len(rows) + 2)
        knot = _short(sizes[rows].mean()), _short(max(logit(share), 0.0))
        if knot[0] > least[0] and knot[1] >= least[1]:
            knots.append(least := knot)
    return Curve(tuple(knots)) if knots and knots[-1][1] > 0 else fit_temperature(log_odds, labels)


FITS = {"temperature": fit_temperature, "isotonic": fit_isotonic}


def fit_curve(
    log_odds: np.ndarray, labels: np.ndarray, validation: tuple[np.ndarray, np.ndarray], method: Method = "auto"
) -> Curve:
    """The curve by `method`; "auto" takes the one under which `validation` (log-odds, labels) is likelier."""
    if method != "auto":
        return FITS[method](log_odds, labels)
    curves = [fit(log_odds, labels) for fit in FITS.values()]
    return min(curves, key=lambda curve: _cross_entropy(curve.of(validation[0]), validation[1]))


def choose_tie_band(labels: np.ndarray, p_first: np.ndarray, *, sure: float | None = None) -> float:
    """How near to 1/2 a verdict should prefer neither image, in [0, 0.5].

    With `sure`, the narrowest band outside of which at least that share of pairs is right by the majority: not only of
    these pairs, of which some share always is, but by a lower bound for others (Clopper & Pearson 1934, one-sided) that
    holds with 95 % at one of the `BANDS` bands that are tried. Without `sure`, the band of highest accuracy when ties
    are an answer and a tie that only one side sees is half right (PickScore's rule); people who never tie want none.
    """
    from listener_reward.protocols import best_tie_threshold

    margins, people = p_first - 0.5, labels - 0.5
    if sure is None:
        return max(best_tie_threshold(margins, people, half=0.5), 0.0) if (people == 0).any() else 0.0
    decided = people != 0
    sizes, right = np.abs(margins)[decided], (margins * people > 0)[decided]
    order = np.argsort(-sizes, kind="stable")
    count, hits = np.arange(1, len(order) + 1), np.cumsum(right[order])
    least = betaincinv(np.maximum(hits, 1e-9), count - hits + 1, 0.05)
    # Equal sizes fall on the same side of a band, so only the last of them can be the least that is preferred. Few
    # bands are tried, because the luckiest of many is luck.
    ends = np.flatnonzero(np.append(np.diff(sizes[order]) != 0, True)) if len(order) else np.array([], dtype=int)
    ends = ends[np.unique(np.linspace(0, len(ends) - 1, BANDS + 1).astype(int)[1:])] if len(ends) else ends
    good = ends[least[ends] >= sure]
    if not len(good):
        raise InputError(
            f"sure is {sure}, and on {len(order)} pairs no band makes certain that the judge is right that often; give "
            "more pairs, of which a fifth chooses the band, or a lower share"
        )
    beyond = sizes[order][good[-1] + 1 :]
    return float(beyond[0]) if len(beyond) else 0.0


def _cross_entropy(log_odds: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(labels * np.logaddexp(0, -log_odds) + (1 - labels) * np.logaddexp(0, log_odds)))


def _short(value: float) -> float:
    """Four decimals are more than any data set fixes, and a card should be readable."""
    return round(float(value), 4)


# ---------------------------------------------------------------------------------------------------------------------
# Calibrating a judge
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration, and what it changed on pairs that it has not seen."""

    calibration: Calibration
    n_fit: int
    n_validation: int
    n_test: int
    before: dict[str, float]
    """`ece`, `brier`, `nll`, `preferred` (the share of pairs that the tie band leaves a preference) and
    `preferred_accuracy` (how often that is the majority's; NaN where there is none) on the test, without any
    calibration, an earlier one included."""
    after: dict[str, float]
    listener_before: dict[str, float] | None
    listener_after: dict[str, float] | None
    labels: np.ndarray = field(repr=False)
    """(n_test,) shares of people."""
    p_before: np.ndarray = field(repr=False)
    """(n_test,) the judge's, before and after."""
    p_after: np.ndarray = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-able values, with the calibration and the reliability after it, without the pairs."""
        names = ("n_fit", "n_validation", "n_test", "before", "after", "listener_before", "listener_after")
        bins = [asdict(one) for one in reliability(self.labels, self.p_after)]
        return {name: getattr(self, name) for name in names} | {
            "calibration": self.calibration.to_dict(),
            "reliability": bins,
        }


def calibrate(
    judge: Judge,
    pairs: datasets.Dataset,
    *,
    method: Method = "auto",
    sure: float | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Calibrated:
    """Fits the calibration of `judge` as it judges now (its thoughts, aggregate, orders, with or without thinking).

    Where it has a listener, the curves of the aggregates "listener" and "both" are fitted too.

    Pairs are divided by prompt: the maps are fitted on one half, a fifth chooses between curves and the tie band, and
    the rest measures what they changed. The judge is left as it is.

    Args:
        judge: a `Judge`.
        pairs: as `evaluate` reads them.
        method: of the verdict's curve: "temperature", "isotonic", or "auto" for what fits the validation part better.
        sure: see `choose_tie_band`.
        batch_size: pairs for each call of the judge.
        seed: of the division.
        progress: show a progress bar on standard error.

    Raises:
        InputError: fewer than 50 pairs, or too few prompts to divide them; a method or `sure` out of range.
        JudgeError: the judge broke.
    """
    if method not in get_args(Method):
        raise InputError(f"method is {method!r}; choose one of {', '.join(map(repr, get_args(Method)))}")
    if sure is not None and not 0.5 <= sure <= 1:
        raise InputError(f"sure is {sure}; give a share of pairs in [0.5, 1]")
    if len(pairs) < 50:
        raise InputError(f"pairs has {len(pairs)} rows; a calibration needs 50 at the very least, and deserves 1,000")
    labels = np.asarray(pairs["p_first"], dtype=np.float64)
    parts = np.array([_part(prompt, seed) for prompt in pairs["prompt"]])
    if np.bincount(parts, minlength=3).min() < 5:
        raise InputError(f"pairs has too few prompts to divide its {len(pairs)} rows by prompt; give more prompts")
    fit, validation, test = (parts == part for part in range(3))

    from rich.console import Console
    from rich.progress import track

    answers: list[Any] = []
    starts = range(0, len(pairs), batch_size)
    for start in track(starts, "judging", console=Console(stderr=True), disable=not progress):
        rows: dict[str, list[Any]] = pairs[start : start + batch_size]
        firsts, seconds = map(list, zip(*rows["images"], strict=True))
        answers += judge.answers(rows["prompt"], firsts, seconds)

    def verdicts(calibration: Calibration, aggregate: Aggregate) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """p_first, the listener's (NaN without one), and the preferred side (1, -1, 0 for none) of every pair."""
        made = [judge.conclude(views, calibration=calibration, aggregate=aggregate) for views in answers]
        heard = [math.nan if one.listener_p_first is None else one.listener_p_first for one in made]
        sides = [{1: 1, 2: -1, None: 0}[one.preferred] for one in made]
        return np.array([one.p_first for one in made]), np.array(heard), np.array(sides)

    views = [(y, view) for y, pair, chosen in zip(labels, answers, fit, strict=True) if chosen for view in pair]
    shown = np.array([1 - y if view.flipped else y for y, view in views])
    mode = judge.card.mode(judge.think)
    answer = fit_platt(logit(np.array([view.p_own for _, view in views])), shown)
    calibration = Calibration(answer=answer, mode=mode)
    listens = all(view.p_heard is not None for _, view in views)
    if listens:
        heard = fit_platt(logit(np.array([view.p_heard for _, view in views])), shown)
        calibration = replace(calibration, heard=heard)

    fitted_on: list[Aggregate] = ["majority" if mode.aggregate == "majority" else "mean"]
    for aggregate in fitted_on + list(LISTENING) * listens:  # "both" last: it rests on the other two
        p_first = verdicts(calibration, aggregate)[0]
        fitted, held_out = ((logit(p_first[part]), labels[part]) for part in (fit, validation))
        curve = fit_curve(*fitted, held_out, method)
        calibration = replace(calibration, **{CURVE_OF[aggregate]: curve})
    p_first = verdicts(calibration, mode.aggregate)[0]
    band = choose_tie_band(labels[validation], p_first[validation], sure=sure)
    calibration = replace(calibration, tie_band=math.ceil(band * 1e4) / 1e4 if band < 0.5 else 0.5)

    uncalibrated, after = verdicts(Calibration(), mode.aggregate), verdicts(calibration, mode.aggregate)
    return Calibrated(
        calibration,
        *(int(part.sum()) for part in (fit, validation, test)),
        before=_measures(labels[test], uncalibrated[0][test]) | _preferences(labels[test], uncalibrated[2][test]),
        after=_measures(labels[test], after[0][test]) | _preferences(labels[test], after[2][test]),
        listener_before=_measures(labels[test], uncalibrated[1][test]) if listens else None,
        listener_after=_measures(labels[test], after[1][test]) if listens else None,
        labels=labels[test],
        p_before=uncalibrated[0][test],
        p_after=after[0][test],
    )


def _part(prompt: str, seed: int) -> int:
    """0 to fit on, 1 to validate, 2 to measure: half, a fifth and the rest of the prompts."""
    share = hashlib.blake2b(f"{seed}/{prompt}".encode("utf-8", "replace"), digest_size=2).digest()
    return int(np.searchsorted([0.5, 0.7], int.from_bytes(share) / 2**16, side="right"))


def _preferences(labels: np.ndarray, sides: np.ndarray) -> dict[str, float]:
    """The share of pairs that are given a preference, and how often that is the majority's, where people have one."""
    people = np.sign(labels - 0.5)
    both = (sides != 0) & (people != 0)
    right = float((sides == people)[both].mean()) if both.any() else math.nan
    return {"preferred": float((sides != 0).mean()), "preferred_accuracy": right}


def _measures(labels: np.ndarray, p_first: np.ndarray) -> dict[str, float]:
    from listener_reward.evaluate import brier_score, expected_calibration_error, negative_log_likelihood

    return {
        "ece": expected_calibration_error(labels, p_first),
        "brier": brier_score(labels, p_first),
        "nll": negative_log_likelihood(labels, p_first),
    }
