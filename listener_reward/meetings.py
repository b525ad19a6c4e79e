"""What a reward's images are compared with, and the row of numbers that each image gets from its comparisons.

A row is the image's score and then `INFO`. Arithmetic only: nobody is asked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from listener_reward.anchors import Anchors, Candidate
from listener_reward.media.clips import Visual
from listener_reward.pairs import PromptLike, prompt_with
from listener_reward.ranking import PRIOR_STD, first_equal, fit_bradley_terry
from listener_reward.verdict import Verdict

INFO = (
    "standard_error",
    "comparisons",
    "position_gap",
    "contradicted",
    "listener_p_first",
    "malformed",
    "label_mass",
    "failed",
    "win_share",
)
"""What a call reports of each image beside its score; `ListenerReward.__call__` says what each one is."""

P_MARGIN = 1e-4
"""Probabilities are kept this far from 0 and 1 before their log-odds are taken, which bounds them by 9.2."""

Match = tuple[PromptLike, Visual, Visual]
"""A prompt and the two that are compared for it."""

REFERENCE = -1
"""The opponent's number where an image meets its prompt's reference."""


@dataclass(frozen=True, slots=True)
class Task:
    """The images of one prompt in a call, and their comparisons."""

    prompt: PromptLike
    pictures: list[Visual]
    meetings: list[tuple[int, int]]
    """Positions in `pictures`; the second is `REFERENCE` for all or for none."""
    reference: Visual | None = None
    """None where the pictures are compared with one another."""
    opens: bool = False
    """Whether the first picture becomes the prompt's reference."""
    same: Sequence[int] = ()
    """For each picture the first that is equal to it, where the pictures meet one another."""

    def matches(self, criteria: Sequence[str | None]) -> list[Match]:
        """What to ask the judge: one `(prompt, first, second)` for each meeting and criterion.

        The criteria of a meeting stand next to one another, so that a judge looks at its images once for all of them.
        """
        opponents = [*self.pictures, self.reference]  # REFERENCE is the last position
        asked = [prompt_with(self.prompt, (), criterion) for criterion in criteria]
        return [(prompt, self.pictures[i], opponents[j]) for i, j in self.meetings for prompt in asked]


def log_odds(p: float, *, prior_std: float = PRIOR_STD) -> tuple[float, float]:
    """The log-odds of `p` and their standard error, from one comparison with an opponent whose score is known.

    The error is a Bradley-Terry score's (`ranking.fit_bradley_terry`): the information of one comparison, p(1 - p),
    added to the prior's.
    """
    p = min(max(p, P_MARGIN), 1 - P_MARGIN)
    return math.log(p / (1 - p)), (p * (1 - p) + prior_std**-2) ** -0.5


def rows_of(task: Task, verdicts: Sequence[Verdict | None]) -> np.ndarray:
    """One row for each picture of `task`: its score, then `INFO`; the score is NaN where every comparison broke."""
    n = len(task.pictures)
    judged = [(i, j, verdict) for (i, j), verdict in zip(task.meetings, verdicts, strict=True) if verdict is not None]
    if task.reference is None:
        distinct = sorted(set(task.same))
        fitted = fit_bradley_terry(
            len(distinct), [(distinct.index(i), distinct.index(j), verdict.p_first) for i, j, verdict in judged]
        )
        places = [distinct.index(first) for first in task.same]
        scores, errors = (values[places] for values in fitted)
    else:
        scores, errors = np.zeros(n), np.zeros(n)
        for i, _, verdict in judged:
            scores[i], errors[i] = log_odds(verdict.p_first)

    rows = []
    for place in range(n):
        k = task.same[place] if task.same else place
        met = [(verdict, i == k) for i, j, verdict in judged if k in (i, j)]
        failed = not met and any(k in pair for pair in task.meetings)
        rows.append(_row(None if failed else (scores[k], errors[k]), met))
    return np.array(rows, dtype=np.float32)


def _row(
    score: tuple[float, float] | None, met: Sequence[tuple[Verdict, bool]], win_share: float = math.nan
) -> tuple[float, ...]:
    """A score and its standard error, None where every comparison broke, with what its comparisons say: `INFO`.

    Each of `met` is a verdict, and whether the image was the first in it.
    """
    return (
        *(score or (math.nan, math.nan)),
        len(met),
        _mean(abs(verdict.position_gap) for verdict, _ in met),
        _mean(verdict.contradicted for verdict, _ in met),
        _mean(_from_side(verdict.listener_p_first, first) for verdict, first in met),
        _mean(verdict.malformed / len(verdict.thoughts) if verdict.thoughts else None for verdict, _ in met),
        _mean(verdict.label_mass for verdict, _ in met),
        score is None,
        win_share,
    )


def placed_among(prompt: PromptLike, pictures: Sequence[Visual], anchors: Anchors | None) -> list[Candidate | None]:
    """A candidate for each picture, one for all equal pictures; None where the prompt's anchors could not be fitted."""
    if anchors is None:
        return [None] * len(pictures)
    same = first_equal(pictures)
    candidates = {place: Candidate(prompt, pictures[place], anchors) for place in same}
    return [candidates[place] for place in same]


def row_by_anchors(candidate: Candidate | None) -> tuple[float, ...]:
    if candidate is None or candidate.failed:
        return _row(None, [])
    found = candidate.score
    met = [(verdict, True) for verdict in candidate.verdicts]
    return _row((found.score, found.standard_error), met, found.win_share)


def _from_side(p_first: float | None, first: bool) -> float | None:
    return p_first if first or p_first is None else 1 - p_first


def _mean(values: Iterable[float | None]) -> float:
    """The mean of the values that are there, NaN if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
