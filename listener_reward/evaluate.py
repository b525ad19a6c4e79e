"""How good a judge is on labelled pairs: accuracy with its interval, and whether its reasoning may be trusted.

The labels are shares of people, so the calibration measures compare probabilities with shares; accuracy leaves out the
pairs on which people are split evenly, and a judge's exact tie on any other pair counts as wrong.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import xlogy
from scipy.stats import binomtest

from listener_reward.errors import InputError, JudgeError
from listener_reward.verdict import Verdict

if TYPE_CHECKING:
    import datasets
    from rich.progress import Progress

    from listener_reward.judge import Judge

SWAP_TOLERANCE = 1e-6
"""How far p_first of a pair and of its swapped copy may be from summing to one, for the judge to be symmetric."""


@dataclass(frozen=True)
class Evaluation:
    """A judge's record on a set of labelled pairs. A rate is None where there was nothing to take it over."""

    judge: str
    data: str
    """The sources of the pairs, as the data set names them."""
    n: int
    n_ties: int
    """Pairs on which people are split evenly; they count in the calibration measures only."""
    accuracy: float | None
    """Share of the other pairs on which the judge sides with the majority."""
    accuracy_interval: tuple[float, float] | None
    """Its Wilson 95 % interval."""
    always_first: float | None
    """The accuracy of always preferring the first image: what an evaluation without shuffled pairs hides."""
    contradiction_rate: float | None
    """Share of the well-formed thoughts whose listener prefers the other image than they do."""
    contradiction_interval: tuple[float, float] | None
    malformed_rate: float | None
    """Share of all thoughts."""
    swap_consistency: float | None
    """Share of `swap_checked` pairs whose verdict on the swapped pair is the exact mirror image."""
    swap_checked: int
    position_gap: float
    """Mean absolute position gap before it is averaged out, in [0, 1]."""
    ece: float
    """Expected calibration error; see `expected_calibration_error`."""
    brier: float
    nll: float
    """In nats; people's own disagreement is its floor."""
    listener_accuracy: float | None
    """As `accuracy`, of the listener's probability, over the pairs that have one."""
    seconds: float
    """Wall-clock time of the whole evaluation, the swapped pairs included."""
    verdicts: tuple[Verdict, ...] | None = None
    """One for each pair, in order, if they were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-able values, without the verdicts."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "verdicts"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def evaluate(
    judge: Judge,
    pairs: datasets.Dataset,
    *,
    batch_size: int = 64,
    progress: bool = True,
    swap_check: int = 32,
    think: bool | None = None,
    keep: bool = False,
) -> Evaluation:
    """Judges every pair and takes the judge's record.

    Images are read a batch at a time and thoughts are counted and let go, so memory does not grow with the data unless
    `keep` is set.

    Args:
        judge: a `Judge`, or anything with its `compare_many` and `name`.
        pairs: columns `prompt`, `images` (two), `p_first` in [0, 1] and `source`, as `load_pairs` makes them.
        batch_size: pairs for each call of the judge.
        progress: show a progress bar on standard error.
        swap_check: how many pairs, from the first on, are judged a second time with their images swapped.
        think: passed on to the judge; None is its own setting.
        keep: keep the verdicts.

    Raises:
        InputError: no pairs, a column or a label that is missing or out of range, or a batch size below 1.
        JudgeError: the judge broke. A pair that could not be judged has no score, so neither has the set.
    """
    labels = _check(pairs, batch_size, swap_check)
    n, tally, kept = len(labels), _Tally(), []
    mirrored, started = 0, time.perf_counter()
    swap_check = min(swap_check, n)

    with _bar(progress) as bar:
        task = bar.add_task("judging", total=n + swap_check) if bar else None
        for start in range(0, n, batch_size):
            rows: dict[str, list[Any]] = pairs[start : start + batch_size]
            prompts, firsts, seconds = rows["prompt"], *map(list, zip(*rows["images"], strict=True))
            verdicts = _judge(judge, prompts, firsts, seconds, think)
            tally.add(verdicts)
            if keep:
                kept += verdicts
            if again := min(max(swap_check - start, 0), len(verdicts)):
                swapped = _judge(judge, prompts[:again], seconds[:again], firsts[:again], think)
                mirrored += sum(map(is_mirrored, verdicts, swapped))  # stops at the shorter one
            if bar and task is not None:
                right, decided = count_right(labels[: len(tally.preferred)], np.array(tally.preferred))
                words = f"judging, {right / decided:.1%} right" if decided else "judging"
                bar.update(task, advance=len(verdicts) + again, description=words)

    p_first, preferred = np.array(tally.p_first), np.array(tally.preferred)
    heard = ~np.isnan(tally.listener)
    right, decided = count_right(labels, preferred)
    listener_right, listener_decided = count_right(labels[heard], side(np.array(tally.listener)[heard]))
    return Evaluation(
        judge=judge.name,
        data=_sources(pairs),
        n=n,
        n_ties=n - decided,
        accuracy=_rate(right, decided),
        accuracy_interval=wilson(right, decided),
        always_first=_rate(count_right(labels, np.ones(n))[0], decided),
        contradiction_rate=_rate(tally.contradictions, tally.listened),
        contradiction_interval=wilson(tally.contradictions, tally.listened),
        malformed_rate=_rate(tally.malformed, tally.thoughts),
        swap_consistency=_rate(mirrored, swap_check),
        swap_checked=swap_check,
        position_gap=float(np.mean(tally.position_gap)),
        ece=expected_calibration_error(labels, p_first),
        brier=brier_score(labels, p_first),
        nll=negative_log_likelihood(labels, p_first),
        listener_accuracy=_rate(listener_right, listener_decided),
        seconds=time.perf_counter() - started,
        verdicts=tuple(kept) if keep else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Measures: `labels` and `p_first` are (n,) probabilities that the first image is preferred, by people and by the judge
# ---------------------------------------------------------------------------------------------------------------------


def side(p_first: np.ndarray) -> np.ndarray:
    """The image that a probability prefers: 1, 2, or 0 for exactly one half."""
    return np.where(p_first > 0.5, 1, np.where(p_first < 0.5, 2, 0))


def count_right(labels: np.ndarray, preferred: np.ndarray) -> tuple[int, int]:
    """How many of `preferred` (1, 2, or 0 for a tie) are the majority's image, and of how many pairs that have one."""
    decided = labels != 0.5
    return int(np.sum(decided & (side(labels) == preferred))), int(np.sum(decided))


def wilson(count: int, n: int) -> tuple[float, float] | None:
    """The Wilson 95 % interval of a share, None of nothing."""
    if n == 0:
        return None
    low, high = binomtest(count, n).proportion_ci(method="wilson")
    return float(low), float(high)


def expected_calibration_error(labels: np.ndarray, p_first: np.ndarray, bins: int = 15) -> float:
    """How far the judge's confidence is from the share of people who agree with it, on average.

    Confidence is the probability of the preferred image, in [0.5, 1], cut into `bins` bins of equal width; each bin's
    gap between mean confidence and mean agreement counts by its number of pairs.
    """
    confidence = np.maximum(p_first, 1 - p_first)
    # A judge that prefers neither image is agreed with by half of the people, whichever half it is.
    agreement = np.select([p_first > 0.5, p_first < 0.5], [labels, 1 - labels], 0.5)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.bincount(which, weights=confidence - agreement, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def brier_score(labels: np.ndarray, p_first: np.ndarray) -> float:
    """Mean squared distance between probability and share of people, in [0, 1]; saying 0.5 to all gets at most 0.25."""
    return float(np.mean((p_first - labels) ** 2))


def negative_log_likelihood(labels: np.ndarray, p_first: np.ndarray, margin: float = 1e-6) -> float:
    """Mean cross-entropy in nats. Probabilities keep `margin` from 0 and 1: one wrong certainty costs 13.8, not all."""
    p = np.clip(p_first, margin, 1 - margin)
    return float(-np.mean(xlogy(labels, p) + xlogy(1 - labels, 1 - p)))


def is_mirrored(verdict: Verdict, swapped: Verdict) -> bool:
    """Whether the verdict on a swapped pair is the mirror image of that on the pair."""
    flipped = {1: 2, 2: 1, None: None}[swapped.preferred]
    return abs(verdict.p_first + swapped.p_first - 1) <= SWAP_TOLERANCE and verdict.preferred == flipped


def _rate(count: int, n: int) -> float | None:
    return count / n if n else None


# ---------------------------------------------------------------------------------------------------------------------
# Running a judge
# ---------------------------------------------------------------------------------------------------------------------


class _Tally:
    """What the record needs of the verdicts: five numbers a pair, and four counts over the thoughts."""

    def __init__(self) -> None:
        self.p_first: list[float] = []
        self.preferred: list[int] = []
        self.listener: list[float] = []
        self.position_gap: list[float] = []
        self.thoughts = self.malformed = self.listened = self.contradictions = 0

    def add(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            self.p_first.append(verdict.p_first)
            self.preferred.append(verdict.preferred or 0)
            self.listener.append(np.nan if verdict.listener_p_first is None else verdict.listener_p_first)
            self.position_gap.append(abs(verdict.position_gap))
            self.thoughts += len(verdict.thoughts)
            self.malformed += verdict.malformed
            heard = [thought.contradicted for thought in verdict.thoughts if thought.contradicted is not None]
            self.listened += len(heard)
            self.contradictions += sum(heard)


def _judge(judge: Judge, prompts: list, firsts: list, seconds: list, think: bool | None) -> list[Verdict]:
    """`judge.compare_many`, with its answers checked: a NaN would spoil every measure in silence."""
    verdicts = judge.compare_many(prompts, firsts, seconds, think=think)
    if len(verdicts) != len(prompts):
        raise JudgeError(f"{judge.name} gave {len(verdicts)} verdicts on {len(prompts)} pairs")
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        if not 0 <= verdict.p_first <= 1:
            raise JudgeError(f"{judge.name} answered p_first = {verdict.p_first} for prompt {prompt!r}")
    return verdicts


def _check(pairs: datasets.Dataset, batch_size: int, swap_check: int) -> np.ndarray:
    """The labels of usable `pairs`, float64 (n,)."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    if swap_check < 0:
        raise InputError(f"swap_check is {swap_check}; it must be 0 or more")
    if missing := {"prompt", "images", "p_first"} - set(pairs.column_names):
        raise InputError(f"pairs has no column {', '.join(sorted(missing))}; load_pairs makes what evaluate reads")
    if len(pairs) == 0:
        raise InputError("pairs has 0 rows; there is nothing to evaluate")
    labels = np.asarray(pairs["p_first"], dtype=np.float64)
    if (wrong := ~((labels >= 0) & (labels <= 1))).any():
        row = int(wrong.argmax())
        raise InputError(f"p_first of row {row} is {labels[row]}; a label is a share of people in [0, 1]")
    return labels


def _sources(pairs: datasets.Dataset, most: int = 3) -> str:
    names = sorted(pairs.unique("source")) if "source" in pairs.column_names else ["unnamed"]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _bar(shown: bool) -> AbstractContextManager[Progress | None]:
    if not shown:
        return nullcontext()
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
