"""Calibrates a judge on labelled pairs, and evaluates the calibration on other pairs."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from scipy.special import betaincinv, logit

from listener_reward.calibration.fit import Method, fit_curve, fit_platt
from listener_reward.calibration.maps import CURVE_OF, Calibration
from listener_reward.errors import InputError, check_choice
from listener_reward.evaluate.asked import check_asked
from listener_reward.evaluate.batches import batches_of, load_batches
from listener_reward.evaluate.confidence import reliability
from listener_reward.progress import progress_bars
from listener_reward.verdict import LISTENING, Aggregate

if TYPE_CHECKING:
    import datasets

    from listener_reward.judge import Judge

BANDS = 20
"""How many tie bands are tried for a wanted accuracy. They leave the most confident 5 %, 10 % ... of the pairs
outside."""


def choose_tie_band(labels: np.ndarray, p_first: np.ndarray, *, sure: float | None = None) -> float:
    """How near to 1/2 a verdict should prefer neither image, in [0, 0.5].

    With `sure`, the narrowest band outside of which the accuracy is at least `sure`. The accuracy is a lower bound for
    new pairs (Clopper & Pearson 1934, one-sided), which holds with 95 % at one of the `BANDS` bands that are tried.
    Without `sure`, the band of highest accuracy by PickScore's rule: a tie is an answer, and a tie that only one side
    sees is half right. The band is 0 for labels without ties.
    """
    from listener_reward.evaluate.protocols import best_tie_threshold

    margins, people = p_first - 0.5, labels - 0.5
    if sure is None:
        return max(best_tie_threshold(margins, people, half=0.5), 0.0) if (people == 0).any() else 0.0
    decided = people != 0
    sizes, right = np.abs(margins)[decided], (margins * people > 0)[decided]
    order = np.argsort(-sizes, kind="stable")
    count, hits = np.arange(1, len(order) + 1), np.cumsum(right[order])
    least = betaincinv(np.maximum(hits, 1e-9), count - hits + 1, 0.05)
    # Equal sizes fall on the same side of a band, so a band ends at the last of equal sizes. Few bands are tried: the
    # best of many would be chance.
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


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration, and what it changed on pairs that it has not seen."""

    calibration: Calibration
    n_fit: int
    n_validation: int
    n_test: int
    before: dict[str, float]
    """`ece`, `brier`, `nll`, `preferred` (the fraction of pairs that the tie band leaves a preference) and
    `preferred_accuracy` (how often that is the majority's; NaN where there is none) on the test, without any
    calibration, an earlier one included."""
    after: dict[str, float]
    listener_before: dict[str, float] | None
    listener_after: dict[str, float] | None
    labels: np.ndarray = field(repr=False)
    """(n_test,) fractions of people."""
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
    criterion: str | None = None,
    method: Method = "auto",
    sure: float | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Calibrated:
    """Fits the calibration of `judge` as it judges now (its thoughts, aggregate, orders, with or without thinking).

    With a listener, the curves of the aggregates "listener" and "both" are fitted too.

    Pairs are divided by prompt: one half fits the maps, a fifth chooses the curve and the tie band, and the rest tests
    the calibration. The judge itself is not changed.

    Args:
        judge: a `Judge`.
        pairs: as `evaluate` reads them.
        criterion: the question that it is fitted for: of the pairs those whose column `criterion` is this one, and all
            of them where they have no such column. None is the general question.
        method: of the verdict's curve: "temperature", "isotonic", or "auto" for what fits the validation part better.
        sure: see `choose_tie_band`.
        batch_size: pairs for each call of the judge.
        seed: of the division.
        progress: show a progress bar on standard error.

    Raises:
        InputError: no pair by the criterion, fewer than 50, or too few prompts to divide them; a method or `sure` out
            of range; or pairs with sources or a criterion that the judge has no question about.
        JudgeError: the judge broke.
    """
    check_choice("method", method, get_args(Method))
    if sure is not None and not 0.5 <= sure <= 1:
        raise InputError(f"sure is {sure}; give a fraction of pairs in [0.5, 1]")
    pairs = _asked_by(criterion, pairs)
    if len(pairs) < 50:
        raise InputError(f"pairs has {len(pairs)} rows; a calibration needs 50 at the very least, and deserves 1,000")
    labels = np.asarray(pairs["p_first"], dtype=np.float64)
    parts = np.array([_part(prompt, seed) for prompt in pairs["prompt"]])
    if np.bincount(parts, minlength=3).min() < 5:
        raise InputError(f"pairs has too few prompts to divide its {len(pairs)} rows by prompt; give more prompts")
    fit, validation, test = (parts == part for part in range(3))

    check_asked(judge, pairs)
    judgements: list[Any] = []
    with progress_bars(visible=progress) as bars:
        task = bars.add_task("judging", total=len(pairs))
        for rows in load_batches(batches_of(pairs, batch_size)):
            firsts, seconds = map(list, zip(*rows["images"], strict=True))
            judgements += judge.judgements(rows["asked"], firsts, seconds)
            bars.update(task, completed=len(judgements))

    def verdicts(calibration: Calibration, aggregate: Aggregate) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """p_first, the listener's (NaN without one), and the preferred side (1, -1, 0 for none) of every pair."""
        found = [judge.conclude(some, calibration=calibration, aggregate=aggregate) for some in judgements]
        listener = [math.nan if one.listener_p_first is None else one.listener_p_first for one in found]
        sides = [{1: 1, 2: -1, None: 0}[one.preferred] for one in found]
        return np.array([one.p_first for one in found]), np.array(listener), np.array(sides)

    fit_judgements = [
        (y, judgement) for y, pair, chosen in zip(labels, judgements, fit, strict=True) if chosen for judgement in pair
    ]
    agreed = np.array([1 - y if judgement.flipped else y for y, judgement in fit_judgements])
    mode = judge.card.mode(judge.think)
    reasoner_platt = fit_platt(logit(np.array([judgement.p_reasoner for _, judgement in fit_judgements])), agreed)
    calibration = Calibration(reasoner_platt=reasoner_platt, mode=mode)
    listens = all(judgement.p_listener is not None for _, judgement in fit_judgements)
    if listens:
        listener_platt = fit_platt(logit(np.array([judgement.p_listener for _, judgement in fit_judgements])), agreed)
        calibration = replace(calibration, listener_platt=listener_platt)

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
        before=_metrics(labels[test], uncalibrated[0][test]) | _preferences(labels[test], uncalibrated[2][test]),
        after=_metrics(labels[test], after[0][test]) | _preferences(labels[test], after[2][test]),
        listener_before=_metrics(labels[test], uncalibrated[1][test]) if listens else None,
        listener_after=_metrics(labels[test], after[1][test]) if listens else None,
        labels=labels[test],
        p_before=uncalibrated[0][test],
        p_after=after[0][test],
    )


def _asked_by(criterion: str | None, pairs: datasets.Dataset) -> datasets.Dataset:
    """The pairs that are asked by `criterion`."""
    if "criterion" not in pairs.column_names:
        return pairs if criterion is None else cast("Any", pairs).add_column("criterion", [criterion] * len(pairs))
    given = Counter(pairs["criterion"])
    if not given[criterion]:
        what = "the general question" if criterion is None else f"the criterion {criterion!r}"
        others = ", ".join("none" if name is None else repr(name) for name in given)
        raise InputError(f"pairs has no row for {what}; the criteria in it are {others}: name one of them by criterion")
    if len(given) == 1:
        return pairs
    return pairs.select([row for row, name in enumerate(pairs["criterion"]) if name == criterion])


def _part(prompt: str, seed: int) -> int:
    """0 to fit on, 1 to validate, 2 to test: half, a fifth and the rest of the prompts."""
    place = hashlib.blake2b(f"{seed}/{prompt}".encode("utf-8", "replace"), digest_size=2).digest()
    return int(np.searchsorted([0.5, 0.7], int.from_bytes(place, "big") / 2**16, side="right"))


def _preferences(labels: np.ndarray, sides: np.ndarray) -> dict[str, float]:
    """The fraction of pairs that are given a preference, and how often that is the majority's, where people have
    one."""
    people = np.sign(labels - 0.5)
    both = (sides != 0) & (people != 0)
    right = float((sides == people)[both].mean()) if both.any() else math.nan
    return {"preferred": float((sides != 0).mean()), "preferred_accuracy": right}


def _metrics(labels: np.ndarray, p_first: np.ndarray) -> dict[str, float]:
    from listener_reward.evaluate.confidence import brier_score, expected_calibration_error, negative_log_likelihood

    return {
        "ece": expected_calibration_error(labels, p_first),
        "brier": brier_score(labels, p_first),
        "nll": negative_log_likelihood(labels, p_first),
    }
