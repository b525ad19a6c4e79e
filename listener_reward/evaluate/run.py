"""Evaluates a judge on labelled pairs: accuracy with its interval, calibration, contradictions, position bias.

The labels are fractions of people, so the calibration metrics compare probabilities with fractions. Accuracy leaves out
pairs on which people are split evenly; on any other pair a judge's exact tie is wrong. The data set's published
protocols (`judged`) apply to a judge that is run here and to a file of another model's scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from listener_reward.errors import InputError
from listener_reward.evaluate.asked import CriterionResult, by_criterion, check_asked
from listener_reward.evaluate.batches import batches_of, load_batches
from listener_reward.evaluate.confidence import brier_score, expected_calibration_error, negative_log_likelihood
from listener_reward.evaluate.intervals import clustered_interval
from listener_reward.evaluate.judged import (
    JudgedPairs,
    Labels,
    ProtocolResult,
    apply_protocol,
    check_labels,
    check_protocols,
    choose_tie_threshold,
    default_protocols,
)
from listener_reward.misfits import check_format
from listener_reward.progress import progress_bars
from listener_reward.verdict import PairJudge, Verdict, checked

if TYPE_CHECKING:
    import datasets

    from listener_reward.evaluate.scores import Scores

__all__ = [
    "Evaluation",
    "count_right",
    "evaluate",
    "evaluate_scores",
    "is_mirrored",
    "margins_by_order",
    "side",
]

SWAP_TOLERANCE = 1e-6
"""A judge counts as symmetric if p_first of a pair and of its swapped copy sum to 1 within this."""


@dataclass(frozen=True)
class Evaluation:
    """A judge's metrics on a set of labelled pairs. A rate over nothing is None."""

    judge: str
    data: str
    """The sources of the pairs, as the data set names them."""
    n: int
    n_ties: int
    """Pairs on which people are split evenly; they count in the calibration metrics only."""
    accuracy: float | None
    """Fraction of the other pairs on which the judge prefers the majority's image."""
    accuracy_interval: tuple[float, float] | None
    """95 % interval, by a bootstrap over prompts; Wilson's interval where every prompt has one pair."""
    always_first: float | None
    """The accuracy of always preferring the first image: what an evaluation without shuffled pairs hides."""
    contradiction_rate: float | None
    """Fraction of the well-formed completions after which the listener prefers the other image than the answer."""
    contradiction_interval: tuple[float, float] | None
    malformed_rate: float | None
    """Fraction of all completions."""
    swap_consistency: float | None
    """Fraction of `swap_checked` pairs whose swapped copy gets the mirrored verdict."""
    swap_checked: int
    position_gap: float | None
    """Mean absolute position gap, in [0, 1]; None for a judge that is asked in one order."""
    ece: float | None
    """Expected calibration error; see `expected_calibration_error`. `ece`, `brier` and `nll` are None for scores that
    are no probabilities."""
    brier: float | None
    nll: float | None
    """In nats; people's own disagreement is its floor."""
    listener_accuracy: float | None
    """Accuracy of the listener's probability, over the pairs that have one."""
    seconds: float
    """Wall-clock time of the whole evaluation, the swapped pairs included."""
    verdicts: tuple[Verdict, ...] | None = None
    """One for each pair, in order; None unless `keep` was set."""
    label_mass: float | None = None
    """The two labels' total probability at the judge's answer slot, in [0, 1], the mean over the pairs; near 0 the
    judge would have answered in another format. None for a judge that has no answer slot."""
    missing: int = 0
    """Pairs without a score in a file of scores. They count as wrong, except where a protocol says otherwise."""
    protocols: tuple[ProtocolResult, ...] = ()
    """The published protocols, the data set's own first."""
    by_criterion: tuple[CriterionResult, ...] = ()
    """The same metrics for the pairs of each criterion, where the data has criteria."""
    judged: JudgedPairs | None = None
    """Labels and the judge's margins as arrays, for further protocols and paired tests."""

    def to_dict(self) -> dict[str, Any]:
        """The metrics as JSON-able values, without `verdicts` and `judged`; `protocols` and `by_criterion` by name."""
        left_out = ("verdicts", "judged", "protocols", "by_criterion")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        by_criterion = {result.criterion: result.to_dict() for result in self.by_criterion}
        protocols = {result.protocol: result.to_dict() for result in self.protocols}
        return plain | ({"by_criterion": by_criterion} if by_criterion else {}) | {"protocols": protocols}


def evaluate(
    judge: PairJudge,
    pairs: datasets.Dataset | datasets.IterableDataset,
    *,
    batch_size: int = 64,
    progress: bool = True,
    swap_check: int = 32,
    think: bool | None = None,
    keep: bool = False,
    protocols: Sequence[str] | None = None,
    watch: Callable[[dict[str, list[Any]], list[Verdict]], None] | None = None,
    validation: datasets.Dataset | datasets.IterableDataset | None = None,
) -> Evaluation:
    """Judges every pair and computes the judge's metrics.

    Images are read a batch at a time, and verdicts are dropped once counted, so memory does not grow with the data
    unless `keep` is set. A streamed data set is read once, from start to end.

    Args:
        judge: a `Judge`, or any other `PairJudge`.
        pairs: columns `prompt`, `images` (two), `p_first` in [0, 1] and `dataset`, as `load_pairs` makes them, and
            `sources` and `criterion` where the data has them: each pair is judged by its own question. Videos
            are judged as clips: a `Judge` looks at clips as its `clips` says, other judges see storyboards.
        batch_size: pairs for each call of the judge.
        progress: show a progress bar on standard error.
        swap_check: how many pairs, from the first on, are judged a second time with their images swapped.
        think: passed on to the judge; None is its own setting.
        keep: keep the verdicts.
        protocols: names from `judged.PROTOCOLS`; None for those of the data set.
        watch: called with each batch (column to list) and its verdicts, such as `Gallery.add`, which keeps the worst
            mistakes.
        validation: further pairs, judged first, on which the protocol `pickscore` chooses its tie threshold, as
            published; without them the threshold is cross-fitted. No swapped copy of these pairs is judged.

    Raises:
        InputError: no pairs; a column or label missing or out of range; a batch size below 1; an unknown protocol, or
            one that needs columns that the data lacks; `validation` without a protocol that uses it; or pairs with
            sources or a criterion that the judge has no question about, which is said before any pair is judged.
        JudgeError: the judge broke. One pair without a verdict leaves the whole set without metrics.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    if swap_check < 0:
        raise InputError(f"swap_check is {swap_check}; it must be 0 or more")
    check_protocols(protocols or ())
    n = _check(pairs)
    for some in (pairs, *([] if validation is None else [validation])):
        check_asked(judge, some)
    threshold = None if validation is None else _judged_threshold(judge, validation, batch_size, think, protocols)
    labels, tally, kept = Labels(), _Tally(), []
    mirrored = checked = right = decided = 0
    started = time.perf_counter()

    with progress_bars(visible=progress) as bars:
        task = bars.add_task("judging", total=None if n is None else n + min(swap_check, n))
        for rows in load_batches(batches_of(pairs, batch_size), labels):
            prompts, firsts, seconds = rows["asked"], *map(list, zip(*rows["images"], strict=True))
            verdicts = _judge(judge, prompts, firsts, seconds, think)
            tally.add(verdicts)
            if keep:
                kept += verdicts
            if watch:
                watch(rows, verdicts)
            if again := min(swap_check - checked, len(verdicts)):
                swapped = _judge(judge, prompts[:again], seconds[:again], firsts[:again], think)
                mirrored += sum(map(is_mirrored, verdicts, swapped))  # stops at the shorter one
                checked += again
            new = len(verdicts)
            more = count_right(np.array(labels.p_first[-new:]), np.array(tally.preferred[-new:]))
            right, decided = right + more[0], decided + more[1]
            bars.update(task, advance=new + again, note=f"{right / decided:.1%} right" if decided else "")

    check_format(judge)
    preferred, gaps = np.array(tally.preferred), np.array(tally.position_gap)
    judged = labels.judged(
        2 * np.array(tally.p_first) - 1,
        preferred=preferred,
        forward=np.array(tally.forward),
        reverse=np.array(tally.reverse),
        position_gap=gaps,
        listened=np.array(tally.listened),
        contradicted=np.array(tally.contradictions),
        tie_threshold=threshold,
    )
    listener = np.array(tally.listener)
    has_listener = ~np.isnan(listener)
    listener_right, listener_decided = count_right(np.array(labels.p_first)[has_listener], side(listener[has_listener]))
    contradictions, listened = np.array(tally.contradictions, float), np.array(tally.listened, float)
    record = _record(judge.name, labels, judged, preferred, protocols)
    return replace(
        record,
        contradiction_rate=_rate(int(contradictions.sum()), int(listened.sum())),
        contradiction_interval=clustered_interval(contradictions, listened, judged.prompts),
        malformed_rate=_rate(tally.malformed, tally.thoughts),
        label_mass=sum(tally.masses) / len(tally.masses) if tally.masses else None,
        swap_consistency=_rate(mirrored, checked),
        swap_checked=checked,
        position_gap=float(np.nanmean(np.abs(gaps))) if not np.isnan(gaps).all() else None,
        listener_accuracy=_rate(listener_right, listener_decided),
        seconds=time.perf_counter() - started,
        verdicts=tuple(kept) if keep else None,
    )


def evaluate_scores(
    scores: Scores,
    pairs: datasets.Dataset | datasets.IterableDataset,
    *,
    protocols: Sequence[str] | None = None,
    validation: datasets.Dataset | datasets.IterableDataset | None = None,
) -> Evaluation:
    """The metrics of a model that was run elsewhere, from its file of scores (`scores.read_scores`). No picture is
    read.

    Args:
        validation: as for `evaluate`; the file has to score its images too.

    Raises:
        InputError: as `evaluate`; or the scores are not those of these pairs; or `validation`, and a file that names
            pairs: two sets have pairs of the same name.
    """
    check_protocols(protocols or ())
    _check(pairs)
    started, threshold = time.perf_counter(), None
    if validation is not None:
        if not scores.images:
            raise InputError(
                f"{scores.name} names pairs, of which a validation set has the same ids; give one row an image"
            )
        _check(validation)
        labels, columns = _scored(scores, validation)
        threshold = _threshold(labels, protocols, columns)
    labels, columns = _scored(scores, pairs)
    judged = labels.judged(**columns, tie_threshold=threshold)
    record = _record(scores.name, labels, judged, side(judged.judge / 2 + 0.5), protocols)
    return replace(record, missing=int(np.isnan(judged.judge).sum()), seconds=time.perf_counter() - started)


def _scored(scores: Scores, pairs: datasets.Dataset | datasets.IterableDataset) -> tuple[Labels, dict[str, Any]]:
    """The labels, and the file's margins as arguments of `JudgedPairs`."""
    labels, asked = Labels(), []
    for rows in batches_of(pairs.select_columns(Labels.read(_column_names(pairs))), 1000):
        labels.add(rows)
        if scores.images:
            asked += zip(*(rows[name] for name in ("group", "prompt") if name in rows), strict=True)
    return labels, scores.margins(labels.columns, asked)


def _judged_threshold(
    judge: PairJudge,
    validation: datasets.Dataset | datasets.IterableDataset,
    batch_size: int,
    think: bool | None,
    protocols: Sequence[str] | None,
) -> float:
    """The judge's tie threshold, from its verdicts on a validation set."""
    _check(validation)
    labels, p_first = Labels(), []
    for rows in load_batches(batches_of(validation, batch_size), labels):
        if not p_first:
            _threshold(labels, protocols, None)
        firsts, seconds = map(list, zip(*rows["images"], strict=True))
        p_first += [verdict.p_first for verdict in _judge(judge, rows["asked"], firsts, seconds, think)]
    return _threshold(labels, protocols, {"judge": 2 * np.array(p_first) - 1})


def _threshold(labels: Labels, protocols: Sequence[str] | None, columns: Mapping[str, Any] | None) -> float:
    """The tie threshold from a judge's margins. With `columns` None, only checks that some protocol uses a
    threshold."""
    names = default_protocols(list(labels.datasets)) if protocols is None else protocols
    if "pickscore" not in names:
        raise InputError(
            f"validation is given, for which {', '.join(names)} has no use; ask for the protocol pickscore"
        )
    return 0.0 if columns is None else choose_tie_threshold(labels.judged(**columns))


def _record(
    name: str, labels: Labels, judged: JudgedPairs, preferred: np.ndarray, protocols: Sequence[str] | None
) -> Evaluation:
    """The metrics that margins are enough for; `evaluate` adds those that need verdicts."""
    fractions = np.array(labels.p_first)
    if len(fractions) == 0:
        raise InputError("pairs has 0 rows; there is nothing to evaluate")
    right, decided = count_right(fractions, preferred)
    credits = ((fractions != 0.5) & (side(fractions) == preferred)).astype(float), (fractions != 0.5).astype(float)
    p_first = judged.judge / 2 + 0.5
    known = ~np.isnan(p_first)
    calibrated = judged.unit == "probability" and bool(known.any())
    names = default_protocols(list(labels.datasets)) if protocols is None else protocols
    return Evaluation(
        judge=name,
        data=labels.data,
        n=len(fractions),
        n_ties=len(fractions) - decided,
        accuracy=_rate(right, decided),
        accuracy_interval=clustered_interval(*credits, judged.prompts),
        always_first=_rate(count_right(fractions, np.ones(len(fractions)))[0], decided),
        contradiction_rate=None,
        contradiction_interval=None,
        malformed_rate=None,
        swap_consistency=None,
        swap_checked=0,
        position_gap=None,
        ece=expected_calibration_error(fractions[known], p_first[known]) if calibrated else None,
        brier=brier_score(fractions[known], p_first[known]) if calibrated else None,
        nll=negative_log_likelihood(fractions[known], p_first[known]) if calibrated else None,
        listener_accuracy=None,
        seconds=0.0,
        protocols=tuple(apply_protocol(judged, protocol) for protocol in names),
        by_criterion=by_criterion(
            labels.criteria, fractions, side(fractions) == preferred, p_first if calibrated else None, judged.prompts
        ),
        judged=judged,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: `labels` and `p_first` are (n,) probabilities that the first image is preferred, by people and by the judge
# ---------------------------------------------------------------------------------------------------------------------


def side(p_first: np.ndarray) -> np.ndarray:
    """The image that a probability prefers: 1, 2, or 0 for exactly one half."""
    return np.where(p_first > 0.5, 1, np.where(p_first < 0.5, 2, 0))


def count_right(labels: np.ndarray, preferred: np.ndarray) -> tuple[int, int]:
    """How many of `preferred` (1, 2, or 0 for a tie) are the majority's image, and how many pairs have a majority."""
    decided = labels != 0.5
    return int(np.sum(decided & (side(labels) == preferred))), int(np.sum(decided))


def is_mirrored(verdict: Verdict, swapped: Verdict) -> bool:
    """Whether a swapped pair's verdict mirrors the pair's verdict."""
    flipped = {1: 2, 2: 1, None: None}[swapped.preferred]
    return abs(verdict.p_first + swapped.p_first - 1) <= SWAP_TOLERANCE and verdict.preferred == flipped


def margins_by_order(verdict: Verdict) -> tuple[float, float]:
    """p(first) - p(second) in the given order and in the swapped order; NaN for an order not asked.

    A user's own judge may leave `by_order` out. Both margins then follow from p_first, the mean of the two orders, and
    the position gap, their difference.
    """
    if verdict.by_order == (None, None):
        margin = 2 * verdict.p_first - 1
        gap = 0.0 if np.isnan(verdict.position_gap) else verdict.position_gap
        return margin + gap, margin - gap
    forward, reverse = (np.nan if p is None else 2 * p - 1 for p in verdict.by_order)
    return forward, reverse


def _rate(count: int, n: int) -> float | None:
    return count / n if n else None


# ---------------------------------------------------------------------------------------------------------------------
# Running a judge
# ---------------------------------------------------------------------------------------------------------------------


class _Tally:
    """What the record needs of the verdicts: nine numbers a pair, and two counts over the thoughts."""

    def __init__(self) -> None:
        self.p_first: list[float] = []
        self.preferred: list[int] = []
        self.listener: list[float] = []
        self.position_gap: list[float] = []
        self.forward: list[float] = []
        self.reverse: list[float] = []
        self.listened: list[int] = []
        self.contradictions: list[int] = []
        self.masses: list[float] = []
        self.thoughts = self.malformed = 0

    def add(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            self.p_first.append(verdict.p_first)
            self.preferred.append(verdict.preferred or 0)
            self.listener.append(np.nan if verdict.listener_p_first is None else verdict.listener_p_first)
            self.position_gap.append(verdict.position_gap)
            forward, reverse = margins_by_order(verdict)
            self.forward.append(forward)
            self.reverse.append(reverse)
            self.thoughts += len(verdict.thoughts)
            self.malformed += verdict.malformed
            if verdict.label_mass is not None:
                self.masses.append(verdict.label_mass)
            contradicted = [thought.contradicted for thought in verdict.thoughts if thought.contradicted is not None]
            self.listened.append(len(contradicted))
            self.contradictions.append(sum(contradicted))


def _judge(judge: PairJudge, prompts: list, firsts: list, seconds: list, think: bool | None) -> list[Verdict]:
    """`judge.compare_many`, with its verdicts checked: a NaN would spoil every metric in silence."""
    return checked(judge.compare_many(prompts, firsts, seconds, think=think), prompts, judge.name)


def _check(pairs: datasets.Dataset | datasets.IterableDataset) -> int | None:
    """Checks `pairs` before anything slow begins. Returns their number; None for a stream, whose length is unknown."""
    if missing := {"prompt", "images", "p_first"} - set(_column_names(pairs)):
        raise InputError(f"pairs has no column {', '.join(sorted(missing))}; load_pairs makes what evaluate reads")
    if not isinstance(pairs, Sized):
        return None
    if len(pairs) == 0:
        raise InputError("pairs has 0 rows; there is nothing to evaluate")
    check_labels(np.asarray(pairs["p_first"][:], dtype=np.float64))
    return len(pairs)


def _column_names(pairs: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """A stream may know its columns only once it has been looked at."""
    return list(pairs.column_names or next(iter(pairs), {}))
