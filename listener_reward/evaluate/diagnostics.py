"""Breaks an evaluation down by the judge's confidence, by the order of the pictures, and by contradiction.

`diagnose` returns JSON-able numbers that `report.write_report` draws. What does not apply to a judge is None: a file of
scores has no contradictions, and scores are no probabilities.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from listener_reward.errors import InputError
from listener_reward.evaluate.confidence import binned, reliability
from listener_reward.evaluate.intervals import clustered_interval
from listener_reward.evaluate.run import side

if TYPE_CHECKING:
    from listener_reward.evaluate.judged import JudgedPairs
    from listener_reward.evaluate.run import Evaluation

BINS = 10
"""Bins of confidence between 0.5 and 1."""

KEPT = (0.1, 0.25, 0.5, 1.0)
"""Fractions of the pairs, the most confident first, whose accuracy is given with an interval."""

FEWEST = 20
"""Fewest pairs behind a point of the coverage curve: fewer pairs tell nothing."""

POINTS = 100
"""Points of the coverage curve, at most."""

GAP_BINS = 21
"""Bins of the position gap between -1 and 1. An odd number, so that a gap of 0 lies in the middle of a bin."""


def diagnose(evaluation: Evaluation) -> dict[str, Any]:
    """The breakdown of an evaluation, as JSON-able values; pairs on which people are split evenly count nowhere but in
    `bins[...]["agreement"]` and `position`.

    - `unit`: what the judge's margins are, as in `JudgedPairs.unit`.
    - `bins`: for each bin of confidence that holds a pair `low`, `high`, `n`, `confidence`, `agreement` (as
      `reliability`), and `accuracy` with `interval`. None for scores that are no probabilities.
    - `coverage`: `share` of the pairs that are kept and their `accuracy`, lists of equal length, the surest pairs
      first; `kept`: the same at `KEPT` with `interval` and `n`. Pairs as sure as one another are kept or left
      together, so the fraction can be more than was asked for. Both None where the judge is as sure of every pair.
    - `position`: `n` pairs shown in both orders, `mean` and `mean_size` of p_first shown in order minus p_first shown
      swapped, `counts` of its `GAP_BINS` bins, the fraction of pairs whose answer the order alone turns (`turned` with
      `interval`), and whether it turns `to_first` or `to_second`, the picture shown there. None without two orders.
    - `contradictions`: `thoughts` that a listener read, `rate` and `interval` of those it contradicts; the rate on
      pairs that the judge got `right` and `wrong`; and `by_pair`: `n`, `accuracy` and `interval` of the pairs of whose
      thoughts `none`, `some` or `all` were contradicted. None without a listener.

    Raises:
        InputError: the evaluation has no answers.
    """
    judged = evaluation.judged
    if judged is None:
        raise InputError("an evaluation has no judged pairs to break down; take it as evaluate returned it")
    decided = judged.people != 0
    preferred = side(judged.judge / 2 + 0.5) if judged.preferred is None else judged.preferred
    right = decided & (side(judged.people + 0.5) == preferred)
    coverage, kept = _coverage(judged, right, decided)
    return {
        "unit": judged.unit,
        "bins": _bins(judged, right, decided) if judged.unit == "probability" else None,
        "coverage": coverage,
        "kept": kept,
        "position": _position(judged),
        "contradictions": _contradictions(evaluation, judged, right, decided),
    }


def _accuracy_among(judged: JudgedPairs, right: np.ndarray, among: np.ndarray) -> dict[str, Any]:
    """`n`, and the accuracy with its interval over the pairs `among`."""
    n = int(among.sum())
    interval = clustered_interval((right & among).astype(float), among.astype(float), judged.prompts)
    return {"n": n, "accuracy": float(right[among].mean()) if n else None, "interval": _list(interval)}


def _bins(judged: JudgedPairs, right: np.ndarray, decided: np.ndarray) -> list[dict[str, Any]] | None:
    known = ~np.isnan(judged.judge)
    labels, p_first = judged.people[known] + 0.5, judged.judge[known] / 2 + 0.5
    number = np.full(len(judged), -1)
    number[known] = binned(labels, p_first, BINS).number
    bins = []
    # Both go through the bins that hold a pair, from unsure to sure.
    for one, place in zip(reliability(labels, p_first, BINS), np.unique(number[known]), strict=True):
        found = _accuracy_among(judged, right, decided & (number == place))
        bins.append(asdict(one) | {"accuracy": found["accuracy"], "interval": found["interval"]})
    return bins or None


def _coverage(judged: JudgedPairs, right: np.ndarray, decided: np.ndarray) -> tuple[Any, Any]:
    sureness = np.where(np.isnan(judged.judge), -1.0, np.abs(judged.judge))  # no answer is the least sure one
    order = np.argsort(-sureness[decided], kind="stable")
    sure, hits = sureness[decided][order], right[decided][order]
    if len(np.unique(sure[sure >= 0])) < 2:
        return None, None
    ends = np.flatnonzero(np.append(np.diff(sure) != 0, True)) + 1  # pairs kept at each confidence that occurs
    accuracy, fractions = np.cumsum(hits)[ends - 1] / ends, ends / len(sure)
    kept = []
    for wanted in KEPT:
        place = int(np.searchsorted(fractions, wanted - 1e-9))
        found = _accuracy_among(judged, right, decided & (sureness >= sure[ends[place] - 1]))
        kept.append({"wanted": wanted, "share": float(fractions[place]), **found})
    enough = np.flatnonzero(ends >= min(FEWEST, len(sure)))
    drawn = np.unique(enough[np.linspace(0, len(enough) - 1, min(POINTS, len(enough))).round().astype(int)])
    return {"share": fractions[drawn].tolist(), "accuracy": accuracy[drawn].tolist()}, kept


def _position(judged: JudgedPairs) -> dict[str, Any] | None:
    forward, reverse, gap = judged.forward, judged.reverse, judged.position_gap
    if forward is None or reverse is None or judged.unit != "probability":
        return None
    gap = (forward - reverse) / 2 if gap is None else gap
    known = ~(np.isnan(gap) | np.isnan(forward) | np.isnan(reverse))
    if not known.any():
        return None
    to_first, to_second = known & (forward > 0) & (reverse < 0), known & (forward < 0) & (reverse > 0)
    turned = (to_first | to_second).astype(float)
    counts, _ = np.histogram(gap[known], bins=GAP_BINS, range=(-1, 1))
    return {
        "n": int(known.sum()),
        "mean": float(gap[known].mean()),
        "mean_size": float(np.abs(gap[known]).mean()),
        "counts": counts.tolist(),
        "turned": float(turned[known].mean()),
        "interval": _list(clustered_interval(turned, known.astype(float), judged.prompts)),
        "to_first": float(to_first[known].mean()),
        "to_second": float(to_second[known].mean()),
    }


def _contradictions(
    evaluation: Evaluation, judged: JudgedPairs, right: np.ndarray, decided: np.ndarray
) -> dict[str, Any] | None:
    thoughts, contradicted = judged.listened, judged.contradicted
    if thoughts is None or contradicted is None or not thoughts.any():
        return None

    def rate(among: np.ndarray) -> float | None:
        return float(contradicted[among].sum() / thoughts[among].sum()) if thoughts[among].any() else None

    listened = decided & (thoughts > 0)
    groups = {
        "none": contradicted == 0,
        "some": (contradicted > 0) & (contradicted < thoughts),
        "all": contradicted == thoughts,
    }
    return {
        "thoughts": int(thoughts.sum()),
        "rate": evaluation.contradiction_rate,
        "interval": _list(evaluation.contradiction_interval),
        "right": rate(listened & right),
        "wrong": rate(listened & ~right),
        "by_pair": {name: _accuracy_among(judged, right, listened & group) for name, group in groups.items()},
    }


def _list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
