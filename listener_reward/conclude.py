"""From judgements to a verdict, and when there are enough judgements. Arithmetic only, no model.

A judgement is about the image in first place. This module calibrates judgements, averages them within each order and
over both orders, and calibrates the average once more. A verdict is computed from differences between the orders. So
swapping the images turns the verdict's sign and changes nothing else, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import expit, logit, stdtr

from listener_reward.calibration.maps import Calibration, Curve
from listener_reward.errors import InputError
from listener_reward.shaping import contradicted
from listener_reward.trace import Trace
from listener_reward.verdict import LISTENING, Mode, Thought, Verdict

_GRID = 2**40
"""Probabilities are rounded to multiples of 1 / _GRID, on which 1 - p is exact in both directions."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One thought and both models' probabilities for the image in first place, before any calibration."""

    flipped: bool
    """Whether the caller's second image stood in first place."""
    number: int
    """Index of the thought within its order, from 0."""
    trace: Trace
    p_reasoner: float
    """The reasoner's probability at its answer slot, in (0, 1)."""
    p_listener: float | None
    """The listener's probability, in (0, 1); None without a listener."""
    label_mass: float | None = None
    """Both labels' probability at the reasoner's answer slot, in [0, 1]; None where it is not known."""
    frame: int = 0
    """Index of the frame, where clips are judged frame by frame."""
    criterion: str | None = None
    """The criterion that was asked by, see `Prompt.criterion`."""

    @property
    def vote(self) -> float:
        """1 for the image in first place, 0 for the other, by the answer; of a malformed completion, the likelier
        image."""
        if self.trace.answer is not None:
            return float(self.trace.answer == 1)
        return 0.5 if self.p_reasoner == 0.5 else float(self.p_reasoner > 0.5)


@dataclass(frozen=True, slots=True)
class _Decider:
    """One model that decides, reasoner or listener: its (flipped, p of the image in first place) for each judgement."""

    probabilities: list[tuple[bool, float]]
    curve: Curve
    shrink: float = 1.0
    """Multiplies the mean's distance from 1/2."""

    @property
    def support(self) -> list[float]:
        """Each judgement's probability of the caller's first image, in [0, 1]."""
        return [1 - p if flipped else p for flipped, p in self.probabilities]

    @property
    def lead(self) -> float:
        """How much more than 1/2 its answers give the caller's first image, summed."""
        return math.fsum(p - 0.5 for p in self.support)

    def p_first(self, margin: float) -> float:
        """The calibrated probability for a mean of 1/2 + `margin`."""
        return _probability(margin * self.shrink, self.curve)


def check_listens(mode: Mode, listens: bool) -> None:
    """Raises `InputError` for a way to judge that needs a listener where there is none."""
    if mode.aggregate in LISTENING and not listens:
        raise InputError(
            f"aggregate is {mode.aggregate!r}, and the judge has no listener; give one (--listener), or choose 'mean' "
            "or 'majority'"
        )


def check_thinks(think: bool, thoughts: int | None) -> None:
    """Raises `InputError` for a number of thoughts that is asked of a judge which is to have none."""
    if not think and thoughts is not None:
        raise InputError(
            f"thoughts is {thoughts} (--thoughts), and think is False (--no-think), which samples none; leave one of "
            "them out"
        )


@dataclass(frozen=True, slots=True)
class Evidence:
    """The numbers that a verdict is made from, for one pair of pictures or one frame of two clips."""

    p_first: float
    """Calibrated, in [0, 1]."""
    by_order: tuple[float | None, float | None]
    position_gap: float
    listener_p_first: float | None = None
    lead: float | None = None
    """The reasoner's p_first - 1/2, where the listener decides or helps to decide."""
    thoughts: tuple[Thought, ...] = ()
    malformed: int = 0
    label_mass: float | None = None


def make_verdict(parts: Sequence[Evidence], *, tie_band: float = 0.0) -> Verdict:
    """The verdict on a pair, or the mean over the frames of two clips. Every verdict in this package is made here.

    Args:
        parts: one for a pair of pictures, one for each frame of two clips.
        tie_band: distance of p_first from 1/2 within which no image is preferred.
    """
    p_first = parts[0].p_first if len(parts) == 1 else on_grid_mean([part.p_first for part in parts])
    listener = [part.listener_p_first for part in parts if part.listener_p_first is not None]
    listener_p_first = (listener[0] if len(listener) == 1 else on_grid_mean(listener)) if listener else None
    # A listener that decides cannot contradict the verdict; it can still contradict the reasoner.
    leads = [part.lead for part in parts if part.lead is not None]
    lead = math.fsum(leads) / len(leads) if leads else p_first - 0.5
    preferred = _preferred(p_first, tie_band)
    return Verdict(
        p_first=p_first,
        preferred=preferred,
        thoughts=tuple(thought for part in parts for thought in part.thoughts),
        listener_p_first=listener_p_first,
        contradicted=None
        if listener_p_first is None or preferred is None or lead == 0
        else (listener_p_first < 0.5 if lead > 0 else listener_p_first > 0.5),
        position_gap=math.fsum(part.position_gap for part in parts) / len(parts),
        malformed=sum(part.malformed for part in parts),
        by_order=(_mean([part.by_order[0] for part in parts]), _mean([part.by_order[1] for part in parts])),
        label_mass=_mean([part.label_mass for part in parts]),
    )


def mean_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on two clips as the mean of their frames' verdicts, for a judge of pictures only."""
    return make_verdict(
        [
            Evidence(
                verdict.p_first,
                verdict.by_order,
                verdict.position_gap,
                verdict.listener_p_first,
                thoughts=verdict.thoughts,
                malformed=verdict.malformed,
                label_mass=verdict.label_mass,
            )
            for verdict in verdicts
        ]
    )


def verdict_of(judgements: Sequence[Judgement], mode: Mode, calibration: Calibration) -> Verdict:
    """One pair's verdict from at least one judgement."""
    frames: dict[int, list[Judgement]] = {}
    for judgement in judgements:
        frames.setdefault(judgement.frame, []).append(judgement)
    parts = [_evidence(frame, mode, calibration) for _, frame in sorted(frames.items())]
    return make_verdict(parts, tie_band=calibration.tie_band)


def _evidence(judgements: Sequence[Judgement], mode: Mode, calibration: Calibration) -> Evidence:
    judgements = sorted(
        judgements, key=lambda judgement: (judgement.flipped != judgements[0].flipped, judgement.number)
    )
    calibrated = [_calibrated(judgement, calibration) for judgement in judgements]
    deciders = _deciders(calibrated, mode, calibration)
    by_order = [_by_order(decider.probabilities) for decider in deciders]
    listener = [
        (judgement.flipped, judgement.p_listener) for judgement in calibrated if judgement.p_listener is not None
    ]
    reasoner = _by_order([(judgement.flipped, judgement.p_reasoner) for judgement in calibrated])
    return Evidence(
        p_first=_together(deciders, [order.margin for order in by_order], calibration),
        by_order=(_mean([order.as_given for order in by_order]), _mean([order.swapped for order in by_order])),
        position_gap=math.fsum(order.gap for order in by_order) / len(by_order),
        listener_p_first=_probability(_by_order(listener).margin, calibration.listener_curve) if listener else None,
        lead=reasoner.margin if mode.aggregate in LISTENING else None,
        thoughts=tuple(_thought(judgement) for judgement in calibrated) if mode.think else (),
        malformed=sum(not judgement.trace.well_formed for judgement in calibrated) if mode.think else 0,
        label_mass=_mean([judgement.label_mass for judgement in calibrated]),
    )


def settled(judgements: Sequence[Judgement], mode: Mode, calibration: Calibration) -> bool:
    """Whether a pair needs no further thought under the mode's early stop.

    It needs none where the thoughts still to come could not change the preference. With an early stop below 1 it also
    needs none where they would not change it with that probability; docs/judging.md has the formula.
    """
    if not judgements or mode.early_stop is None:
        return False
    deciders = _deciders([_calibrated(judgement, calibration) for judgement in judgements], mode, calibration)
    remaining = max(mode.planned - len(judgements), 0)
    if _cannot_change(deciders, remaining, calibration):
        return True
    if mode.early_stop >= 1:
        return False
    slopes = _slopes(deciders, calibration)
    steepness = math.fsum(slopes)
    if steepness <= 0:  # the curve says even odds of all that is near
        return False
    edge = float(logit(0.5 + calibration.tie_band)) / steepness
    return is_sure(_joint_support(deciders, slopes), remaining, mode.early_stop, edge=edge)


def _cannot_change(deciders: Sequence[_Decider], remaining: int, calibration: Calibration) -> bool:
    """Whether the preference stays, or that there is none, even if the thoughts still to come all said the same."""

    def preferred_if_all_say(p: Literal[0, 1]) -> Literal[1, 2] | None:
        margins = [
            (decider.lead + (p - 0.5) * remaining) / (len(decider.probabilities) + remaining) for decider in deciders
        ]
        return _preferred(_together(deciders, margins, calibration), calibration.tie_band)

    return preferred_if_all_say(0) == preferred_if_all_say(1)


def _slopes(deciders: Sequence[_Decider], calibration: Calibration) -> list[float]:
    """How steeply the verdict's log-odds grow with each voice's mean, on the line from even odds to where they are."""
    margins = [
        decider.lead / len(decider.probabilities) or 1e-6 for decider in deciders
    ]  # at even odds that of very near by
    log_odds = [float(logit(decider.p_first(margin))) for decider, margin in zip(deciders, margins, strict=True)]
    mean = math.fsum(log_odds) / len(deciders)
    last = float(calibration.both_curve.of(np.array(mean)) / mean) if len(deciders) > 1 and mean else 1.0
    return [last * x / margin / len(deciders) for x, margin in zip(log_odds, margins, strict=True)]


def _joint_support(deciders: Sequence[_Decider], slopes: Sequence[float]) -> list[float]:
    """What each thought gives the caller's first image by all voices together, weighted by their slopes, in [0, 1]."""
    steepness = math.fsum(slopes)
    each = zip(*(decider.support for decider in deciders), strict=True)
    return [0.5 + math.fsum(s * (p - 0.5) for s, p in zip(slopes, ps, strict=True)) / steepness for ps in each]


def is_sure(support: Sequence[float], remaining: int, sureness: float, *, edge: float = 0.0) -> bool:
    """Whether the mean of all thoughts will be on the side of the mean so far, with probability `sureness`.

    `support` holds each thought's probability of the caller's first image, in [0, 1]; `remaining` thoughts, at least
    one, are still to come. There are three sides: more than `edge` above 1/2, more than `edge` below 1/2, and between.
    The test is a t-test of the mean's distance from the edge, for a finite number of thoughts. One thought of the
    largest possible variance, 1/4, is pooled in, because a few thoughts may agree by chance.
    """
    n = len(support)
    mean = math.fsum(p - 0.5 for p in support) / n
    variance = (math.fsum((p - 0.5 - mean) ** 2 for p in support) + 0.25) / n
    error = math.sqrt(variance * remaining / (n * (n + remaining)))
    if abs(mean) > edge:
        return float(stdtr(n, (abs(mean) - edge) / error)) >= sureness
    inside = stdtr(n, (edge - mean) / error) + stdtr(n, (edge + mean) / error) - 1
    return float(inside) >= sureness


def on_grid(p: float) -> float:
    """The multiple of 1 / _GRID nearest to `p`, in (0, 1). float32 may round a probability to 0 or 1; no model is that
    sure."""
    return min(max(round(p * _GRID), 1), _GRID - 1) / _GRID


def on_grid_mean(probabilities: Sequence[float]) -> float:
    """The mean of probabilities on the grid, on the grid: 1 - p stays exact."""
    return round(math.fsum(probabilities) / len(probabilities) * _GRID) / _GRID


def _calibrated(judgement: Judgement, calibration: Calibration) -> Judgement:
    return replace(
        judgement,
        p_reasoner=on_grid(calibration.reasoner_platt(judgement.p_reasoner)),
        p_listener=None if judgement.p_listener is None else on_grid(calibration.listener_platt(judgement.p_listener)),
    )


def _deciders(judgements: Sequence[Judgement], mode: Mode, calibration: Calibration) -> list[_Decider]:
    """The models that decide in `mode`, with calibrated judgements."""
    if mode.aggregate == "majority":
        # Laplace's rule of succession: n votes of n are no certainty. An early stop predicts all planned votes.
        n = max(mode.planned, len(judgements))
        return [
            _Decider(
                [(judgement.flipped, judgement.vote) for judgement in judgements],
                calibration.reasoner_curve,
                n / (n + 2),
            )
        ]
    reasoner = _Decider(
        [(judgement.flipped, judgement.p_reasoner) for judgement in judgements], calibration.reasoner_curve
    )
    if mode.aggregate == "mean":
        return [reasoner]
    probabilities = [
        (judgement.flipped, judgement.p_listener) for judgement in judgements if judgement.p_listener is not None
    ]
    check_listens(mode, len(probabilities) == len(judgements))
    listener = _Decider(probabilities, calibration.listener_curve)
    return [listener] if mode.aggregate == "listener" else [reasoner, listener]


class _ByOrder(NamedTuple):
    """One deciding model's probabilities, by order."""

    margin: float
    """p(caller's first) - 1/2, the mean of both orders."""
    gap: float
    """p(caller's first) in first place, minus p(caller's first) in second place; NaN with one order."""
    as_given: float | None
    """p(caller's first) in first place; None if that order was not asked."""
    swapped: float | None


def _by_order(probabilities: Sequence[tuple[bool, float]]) -> _ByOrder:
    """Averages (flipped, p(image in first place)) within each order.

    Swapping the images turns the margin's sign and changes nothing else, to the last bit.
    """
    as_given = [p for flipped, p in probabilities if not flipped]
    swapped = [p for flipped, p in probabilities if flipped]
    if not swapped:
        straight = math.fsum(as_given) / len(as_given)
        return _ByOrder(straight - 0.5, math.nan, straight, None)
    if not as_given:
        reverse = math.fsum(swapped) / len(swapped)
        return _ByOrder(0.5 - reverse, math.nan, None, 1 - reverse)
    straight, reverse = math.fsum(as_given) / len(as_given), math.fsum(swapped) / len(swapped)
    return _ByOrder((straight - reverse) / 2, straight + reverse - 1.0, straight, 1 - reverse)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _together(deciders: Sequence[_Decider], margins: Sequence[float], calibration: Calibration) -> float:
    """The calibrated p_first of one decider, or of two: the mean of their log-odds. `margins` are their means minus
    1/2."""
    each = [decider.p_first(margin) for decider, margin in zip(deciders, margins, strict=True)]
    if len(each) == 1:
        return each[0]
    # Sizes with a sign, added: logit(1 - p) need not be -logit(p) to the last bit.
    log_odds = math.fsum(math.copysign(logit(max(p, 1 - p)), p - 0.5) for p in each) / len(each)
    return _probability(math.copysign(float(expit(abs(log_odds))) - 0.5, log_odds), calibration.both_curve)


def _probability(margin: float, curve: Curve) -> float:
    """The calibrated probability for a mean of 1/2 + `margin`. The sign comes last, so that 1 - p is exact."""
    if margin == 0:
        return 0.5
    high = on_grid(curve(on_grid(0.5 + abs(margin))))
    return high if margin > 0 else 1.0 - high


def _preferred(p_first: float, tie_band: float) -> Literal[1, 2] | None:
    if abs(p_first - 0.5) <= tie_band:
        return None
    return 1 if p_first > 0.5 else 2


def _thought(judgement: Judgement) -> Thought:
    """A thought in the caller's numbering."""
    trace, p_listener = judgement.trace, judgement.p_listener
    answer: Literal[1, 2] | None = trace.answer
    if judgement.flipped and answer is not None:
        answer = 2 if answer == 1 else 1
    return Thought(
        text=trace.thought,
        order="swapped" if judgement.flipped else "as given",
        answer=answer,
        p_first=1.0 - judgement.p_reasoner if judgement.flipped else judgement.p_reasoner,
        listener_p_first=None if p_listener is None else (1.0 - p_listener if judgement.flipped else p_listener),
        contradicted=None if p_listener is None else contradicted(trace, p_listener),
    )
