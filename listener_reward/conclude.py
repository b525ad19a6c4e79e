"""From answers to a verdict, and when enough have been given: arithmetic only, no model.

An answer is about the image that was shown first. Here answers are calibrated, averaged within each order and over
both, and calibrated once more. A verdict is a function of differences between the orders, so that swapping the images
turns its sign and changes nothing else, to the last bit.
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
class Answer:
    """One thought and what the two models made of it, before any calibration, about the image that was shown first."""

    flipped: bool
    """Whether the caller's second image was shown first."""
    number: int
    """Which of the thoughts of its order it is, from 0."""
    trace: Trace
    p_own: float
    """The reasoner's probability at its answer slot, in (0, 1)."""
    p_heard: float | None
    """The listener's; None without one."""
    label_mass: float | None = None
    """Both labels' probability at the reasoner's answer slot, in [0, 1]; None where it is not known."""
    frame: int = 0
    """The frame that it is about, where clips are judged frame by frame."""

    @property
    def vote(self) -> float:
        """1 for the image shown first, 0 for the other: the answer given, or where that is malformed the likelier."""
        if self.trace.answer is not None:
            return float(self.trace.answer == 1)
        return 0.5 if self.p_own == 0.5 else float(self.p_own > 0.5)


@dataclass(frozen=True, slots=True)
class _Voice:
    """What one of those who decide says of a pair: (flipped, p of the image shown first) for each answer."""

    said: list[tuple[bool, float]]
    curve: Curve
    shrink: float = 1.0
    """Multiplies the mean's distance from 1/2."""

    @property
    def support(self) -> list[float]:
        """What each answer gives the caller's first image, in [0, 1]."""
        return [1 - p if flipped else p for flipped, p in self.said]

    @property
    def lead(self) -> float:
        """How much more than 1/2 its answers give the caller's first image, summed."""
        return math.fsum(p - 0.5 for p in self.support)

    def p_first(self, margin: float) -> float:
        """Its calibrated probability, where the mean of what it says is `margin` over 1/2."""
        return _probability(margin * self.shrink, self.curve)


def check_listens(mode: Mode, listens: bool) -> None:
    """Raises `InputError` for a way to judge that needs a listener where there is none."""
    if mode.aggregate in LISTENING and not listens:
        raise InputError(
            f"aggregate is {mode.aggregate!r}, and the judge has no listener; give one (--listener), or choose 'mean' "
            "or 'majority'"
        )


@dataclass(frozen=True, slots=True)
class Weighed:
    """What was said of a pair, or of a frame of two clips, as numbers; verdicts are made of these alone."""

    p_first: float
    """Calibrated, in [0, 1]."""
    by_order: tuple[float | None, float | None]
    position_gap: float
    listener_p_first: float | None = None
    lead: float | None = None
    """The reasoner's p_first - 1/2, where it is not itself what decides."""
    thoughts: tuple[Thought, ...] = ()
    malformed: int = 0
    label_mass: float | None = None


def make_verdict(parts: Sequence[Weighed], *, tie_band: float = 0.0) -> Verdict:
    """The verdict on a pair, or the mean over the frames of two clips. Every verdict in this package is made here.

    Args:
        parts: one for a pair of pictures, one for each frame of two clips.
        tie_band: distance of p_first from 1/2 within which no image is preferred.
    """
    p_first = parts[0].p_first if len(parts) == 1 else on_grid_mean([part.p_first for part in parts])
    heard = [part.listener_p_first for part in parts if part.listener_p_first is not None]
    listener_p_first = (heard[0] if len(heard) == 1 else on_grid_mean(heard)) if heard else None
    # A listener that decides cannot contradict the verdict; it can still contradict the one who thought.
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
    """The verdict on two clips from those on their frames, of a judge that knows only pictures."""
    return make_verdict(
        [
            Weighed(
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


def verdict_of(raw: Sequence[Answer], mode: Mode, calibration: Calibration) -> Verdict:
    """The verdict that answers to one pair amount to, of which there must be one at least."""
    frames: dict[int, list[Answer]] = {}
    for answer in raw:
        frames.setdefault(answer.frame, []).append(answer)
    parts = [_weighed(answers, mode, calibration) for _, answers in sorted(frames.items())]
    return make_verdict(parts, tie_band=calibration.tie_band)


def _weighed(raw: Sequence[Answer], mode: Mode, calibration: Calibration) -> Weighed:
    raw = sorted(raw, key=lambda answer: (answer.flipped != raw[0].flipped, answer.number))
    views = [_calibrated(view, calibration) for view in raw]
    voices = _voices(views, mode, calibration)
    orders = [_over_orders(voice.said) for voice in voices]
    heard = [(view.flipped, view.p_heard) for view in views if view.p_heard is not None]
    own = _over_orders([(view.flipped, view.p_own) for view in views])
    return Weighed(
        p_first=_together(voices, [order.margin for order in orders], calibration),
        by_order=(_mean([order.as_given for order in orders]), _mean([order.swapped for order in orders])),
        position_gap=math.fsum(order.gap for order in orders) / len(orders),
        listener_p_first=_probability(_over_orders(heard).margin, calibration.listener) if heard else None,
        lead=own.margin if mode.aggregate in LISTENING else None,
        thoughts=tuple(_thought(view) for view in views) if mode.think else (),
        malformed=sum(not view.trace.well_formed for view in views) if mode.think else 0,
        label_mass=_mean([view.label_mass for view in views]),
    )


def settled(answers: Sequence[Answer], mode: Mode, calibration: Calibration) -> bool:
    """Whether a pair with these thoughts needs no more of them to stop as early as `mode` says.

    It needs none where the thoughts still to come could not change the preference. With an early stop below 1 it also
    needs none where they would not change it with that probability; docs/judging.md has the formula.
    """
    if not answers or mode.early_stop is None:
        return False
    voices = _voices([_calibrated(answer, calibration) for answer in answers], mode, calibration)
    remaining = max(mode.planned - len(answers), 0)
    if _cannot_change(voices, remaining, calibration):
        return True
    if mode.early_stop >= 1:
        return False
    slopes = _slopes(voices, calibration)
    steepness = math.fsum(slopes)
    if steepness <= 0:  # the curve says even odds of all that is near
        return False
    edge = float(logit(0.5 + calibration.tie_band)) / steepness
    return is_sure(_joint_support(voices, slopes), remaining, mode.early_stop, edge=edge)


def _cannot_change(voices: Sequence[_Voice], remaining: int, calibration: Calibration) -> bool:
    """Whether the preference stays, or that there is none, even if the thoughts still to come all said the same."""

    def preferred_if_all_say(p: Literal[0, 1]) -> Literal[1, 2] | None:
        margins = [(voice.lead + (p - 0.5) * remaining) / (len(voice.said) + remaining) for voice in voices]
        return _preferred(_together(voices, margins, calibration), calibration.tie_band)

    return preferred_if_all_say(0) == preferred_if_all_say(1)


def _slopes(voices: Sequence[_Voice], calibration: Calibration) -> list[float]:
    """How steeply the verdict's log-odds grow with each voice's mean, on the line from even odds to where they are."""
    margins = [voice.lead / len(voice.said) or 1e-6 for voice in voices]  # at even odds that of very near by
    log_odds = [float(logit(voice.p_first(margin))) for voice, margin in zip(voices, margins, strict=True)]
    mean = math.fsum(log_odds) / len(voices)
    last = float(calibration.both.of(np.array(mean)) / mean) if len(voices) > 1 and mean else 1.0
    return [last * x / margin / len(voices) for x, margin in zip(log_odds, margins, strict=True)]


def _joint_support(voices: Sequence[_Voice], slopes: Sequence[float]) -> list[float]:
    """What each thought gives the caller's first image by all voices together, weighted by their slopes, in [0, 1]."""
    steepness = math.fsum(slopes)
    each = zip(*(voice.support for voice in voices), strict=True)
    return [0.5 + math.fsum(s * (p - 0.5) for s, p in zip(slopes, ps, strict=True)) / steepness for ps in each]


def is_sure(support: Sequence[float], remaining: int, sureness: float, *, edge: float = 0.0) -> bool:
    """Whether the mean of all thoughts will be on the side of the mean so far, with probability `sureness`.

    `support` holds what each thought gives the caller's first image, in [0, 1]; `remaining` are still to come, at least
    one. The sides are more than `edge` above 1/2, more than that below it, and between. It is a t-test: the distance of
    the mean from the edge against its standard error, for a finite number of thoughts. The variance is pooled with one
    thought of the largest variance there is, 1/4, because a few thoughts may agree by chance.
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
    """The multiple of 1 / _GRID nearest to `p`, in (0, 1): float32 rounds a sure answer to 0 or 1, which nobody is."""
    return min(max(round(p * _GRID), 1), _GRID - 1) / _GRID


def on_grid_mean(probabilities: Sequence[float]) -> float:
    """The mean of probabilities on the grid, on the grid: 1 - p stays exact."""
    return round(math.fsum(probabilities) / len(probabilities) * _GRID) / _GRID


def _calibrated(view: Answer, calibration: Calibration) -> Answer:
    return replace(
        view,
        p_own=on_grid(calibration.answer(view.p_own)),
        p_heard=None if view.p_heard is None else on_grid(calibration.heard(view.p_heard)),
    )


def _voices(views: Sequence[Answer], mode: Mode, calibration: Calibration) -> list[_Voice]:
    """Who decides by `mode`, of calibrated answers."""
    if mode.aggregate == "majority":
        # Laplace's rule of succession: n votes of n are no certainty. An early stop foretells what all would say.
        n = max(mode.planned, len(views))
        return [_Voice([(view.flipped, view.vote) for view in views], calibration.verdict, n / (n + 2))]
    own = _Voice([(view.flipped, view.p_own) for view in views], calibration.verdict)
    if mode.aggregate == "mean":
        return [own]
    said = [(view.flipped, view.p_heard) for view in views if view.p_heard is not None]
    check_listens(mode, len(said) == len(views))
    heard = _Voice(said, calibration.listener)
    return [heard] if mode.aggregate == "listener" else [own, heard]


class _Orders(NamedTuple):
    """What one voice says of a pair, by order."""

    margin: float
    """p(caller's first) - 1/2, the mean of both orders."""
    gap: float
    """How much more the caller's first got when shown first than when shown second; NaN of one order."""
    as_given: float | None
    """p(caller's first) where it was shown first; None where it never was."""
    swapped: float | None


def _over_orders(shown_first: Sequence[tuple[bool, float]]) -> _Orders:
    """The orders of (flipped, p(image shown first)).

    Margin and gap are differences of what the orders gave, so swapping the images turns the sign of the first and
    changes nothing else, to the last bit.
    """
    as_given = [p for flipped, p in shown_first if not flipped]
    swapped = [p for flipped, p in shown_first if flipped]
    if not swapped:
        straight = math.fsum(as_given) / len(as_given)
        return _Orders(straight - 0.5, math.nan, straight, None)
    if not as_given:
        reverse = math.fsum(swapped) / len(swapped)
        return _Orders(0.5 - reverse, math.nan, None, 1 - reverse)
    straight, reverse = math.fsum(as_given) / len(as_given), math.fsum(swapped) / len(swapped)
    return _Orders((straight - reverse) / 2, straight + reverse - 1.0, straight, 1 - reverse)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _together(voices: Sequence[_Voice], margins: Sequence[float], calibration: Calibration) -> float:
    """The calibrated p_first of voices whose means are these margins over 1/2: for two the mean of their log-odds."""
    each = [voice.p_first(margin) for voice, margin in zip(voices, margins, strict=True)]
    if len(each) == 1:
        return each[0]
    # Sizes with a sign, added: logit(1 - p) need not be -logit(p) to the last bit.
    log_odds = math.fsum(math.copysign(logit(max(p, 1 - p)), p - 0.5) for p in each) / len(each)
    return _probability(math.copysign(float(expit(abs(log_odds))) - 0.5, log_odds), calibration.both)


def _probability(margin: float, curve: Curve) -> float:
    """The calibrated probability for a margin over 1/2. The size first, then the grid, so that 1 - p is exact."""
    if margin == 0:
        return 0.5
    high = on_grid(curve(on_grid(0.5 + abs(margin))))
    return high if margin > 0 else 1.0 - high


def _preferred(p_first: float, tie_band: float) -> Literal[1, 2] | None:
    if abs(p_first - 0.5) <= tie_band:
        return None
    return 1 if p_first > 0.5 else 2


def _thought(view: Answer) -> Thought:
    """A thought in the caller's numbering."""
    trace, p_heard = view.trace, view.p_heard
    answer: Literal[1, 2] | None = trace.answer
    if view.flipped and answer is not None:
        answer = 2 if answer == 1 else 1
    return Thought(
        text=trace.thought,
        order="swapped" if view.flipped else "as given",
        answer=answer,
        p_first=1.0 - view.p_own if view.flipped else view.p_own,
        listener_p_first=None if p_heard is None else (1.0 - p_heard if view.flipped else p_heard),
        contradicted=None if p_heard is None else contradicted(trace, p_heard),
    )
