"""Several criteria as one score: their weights, and the weighted sum of what each gave.

    ListenerReward("tiny", criteria={"alignment": 1.0, "quality": 0.5})

Arithmetic only; docs/criteria.md has what it means. Nothing here loads a model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

import numpy as np

from listener_reward.errors import InputError
from listener_reward.ranking import Ranking

Columns = dict[str, np.ndarray]
"""What a reward gave for B images: `score`, and each entry of its info, float32 `(B,)`."""

TOTALS = {
    "score": lambda weights, values: (weights * values).sum(0),
    "standard_error": lambda weights, values: np.sqrt(((weights * values) ** 2).sum(0)),
    "comparisons": lambda weights, values: values.sum(0),
    "failed": lambda weights, values: values.max(0),
}
"""Entries that have a rule of their own, from weights (K, 1) and values (K, B); others are means over comparisons."""


def check_weight(name: str, weight: Any) -> float:
    """The weight of a part of a score.

    Raises:
        InputError: it is no finite number, or 0.
    """
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight) or weight == 0:
        raise InputError(f"the weight of {name!r} is {weight!r:.80}; give a finite number other than 0")
    return float(weight)


def read_criteria(criteria: Any) -> dict[str, float]:
    """Criteria with their weights, as a caller gives them: `{name: weight}`, or the text "name=weight,name=weight".

    Raises:
        InputError: none of these, no criterion, or a weight that is none.
    """
    if isinstance(criteria, str):
        parts = [part.rpartition("=") for part in criteria.split(",")]
        try:
            criteria = {name.strip(): float(weight) for name, _, weight in parts}
        except ValueError:
            raise InputError(f"criteria is {criteria!r}; give 'alignment=1,quality=0.5'") from None
        if len(criteria) < len(parts):
            raise InputError("criteria names one twice; give each one weight")
    if not isinstance(criteria, Mapping) or not criteria:
        raise InputError(f"criteria is {criteria!r:.80}; give {{'alignment': 1.0, 'quality': 0.5}}")
    for name in criteria:
        if not isinstance(name, str) or not name.strip() or "/" in name:
            raise InputError(f"a criterion is named {name!r}; give a name without '/', which joins it to its entries")
    return {name: check_weight(name, weight) for name, weight in criteria.items()}


def check_criteria(judge: Any, criteria: Collection[str]) -> None:
    """Refuses criteria that a judge has no question about, before anything is asked.

    A judge that does not say by what it can be asked is taken at its word when it is.

    Raises:
        InputError: names the first of them, and what the judge has.
    """
    known: Collection[str] | None = getattr(getattr(judge, "judge", judge), "criteria", None)
    unknown = [] if known is None else [name for name in criteria if name not in known]
    if unknown and known is not None:
        names = ", ".join(map(repr, known)) or "none"
        raise InputError(f"criteria has {unknown[0]!r}, and the judge has {names}; give its card a text for it")


def combined(parts: Mapping[str, Columns], weights: Mapping[str, float]) -> Columns:
    """The columns of the weighted sum, and after them each criterion's own as `NAME/score`, `NAME/missing`, ...

    The errors of two criteria are taken as independent. A score that a criterion lacks (NaN) leaves the sum without
    one: a weight never goes to the other criteria.
    """
    each = np.array([[weights[name]] for name in parts])
    stacked = {entry: np.array([part[entry] for part in parts.values()], float) for entry in next(iter(parts.values()))}
    total: Columns = {}
    for entry, values in stacked.items():
        found = TOTALS[entry](each, values) if entry in TOTALS else _mean(values, stacked["comparisons"])
        total[entry] = found.astype(np.float32)
    for name, part in parts.items():
        total |= {f"{name}/{'missing' if entry == 'failed' else entry}": values for entry, values in part.items()}
    return total


def _mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean of `values` (K, B) over all comparisons, of which they stand for `counts`; NaN where there is none."""
    counts = np.where(np.isnan(values), 0, counts)
    with np.errstate(invalid="ignore"):
        return (np.nan_to_num(values) * counts).sum(0) / counts.sum(0)


def summed(rankings: Mapping[str, Ranking], weights: Mapping[str, float]) -> Ranking:
    """One ranking by the weighted sum of several, whose errors are taken as independent."""
    each = np.array([[weights[name]] for name in rankings])
    scores = (each * np.array([ranking.scores for ranking in rankings.values()])).sum(0)
    errors = np.sqrt(((each * np.array([ranking.standard_errors for ranking in rankings.values()])) ** 2).sum(0))
    order = np.argsort(-scores, kind="stable")
    return Ranking(
        order.tolist(), scores.tolist(), errors.tolist(), sum(ranking.comparisons for ranking in rankings.values())
    )
