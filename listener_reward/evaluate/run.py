"""How good a judge is on labelled pairs: accuracy with its interval, and whether its reasoning may be trusted.

The labels are shares of people, so the calibration measures compare probabilities with shares; accuracy leaves out the
pairs on which people are split evenly, and a judge's exact tie on any other pair counts as wrong. Beside that stand the
published protocols of the data set (`measure`), for a judge that is run here as for a file of another model's scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from listener_reward.errors import InputError, JudgeError
from listener_reward.evaluate.batches import batches_of, shown
from listener_reward.evaluate.confidence import brier_score, expected_calibration_error, negative_log_likelihood
from listener_reward.evaluate.intervals import clustered_interval
from listener_reward.evaluate.measure import (
    Answers,
    Labels,
    ProtocolResult,
    check_protocols,
    check_shares,
    choose_tie_threshold,
    default_protocols,
    measure,
)
from listener_reward.progress import progress_bars
from listener_reward.verdict import PairJudge, Verdict

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
    """95 %, by a bootstrap that draws prompts; Wilson's where every prompt has one pair."""
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
    position_gap: float | None
    """Mean absolute position gap before it is averaged out, in [0, 1]; None for a judge that is shown one order."""
    ece: float | None
    """Expected calibration error; see `expected_calibration_error`. None for scores that are no probabilities, as the
    two below."""
    brier: float | None
    nll: float | None
    """In nats; people's own disagreement is its floor."""
    listener_accuracy: float | None
    """As `accuracy`, of the listener's probability, over the pairs that have one."""
    seconds: float
    """Wall-clock time of the whole evaluation, the swapped pairs included."""
    verdicts: tuple[Verdict, ...] | None = None
    """One for each pair, in order, if they were asked for."""
    label_mass: float | None = None
    """The two labels' total probability at the judge's answer slot, in [0, 1], the mean over the pairs; near 0 the
    judge would have answered in another format. None for a judge that has no answer slot."""
    missing: int = 0
    """Pairs that a file of scores says nothing about. They count as wrong, except where a protocol says otherwise."""
    protocols: tuple[ProtocolResult, ...] = ()
    """The published protocols, the data set's own first."""
    answers: Answers | None = None
    """What people and the judge said of each pair, as arrays: for further protocols and paired tests."""

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-able values, without the verdicts and the answers; `protocols` by their names."""
        left_out = ("verdicts", "answers", "protocols")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return plain | {"protocols": {result.protocol: result.to_dict() for result in self.protocols}}


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
    """Judges every pair and takes the judge's record.

    Images are read a batch at a time and thoughts are counted and let go, so memory does not grow with the data unless
    `keep` is set; a streamed data set is read once, from its start to its end.

    Args:
        judge: a `Judge`, or any other `PairJudge`.
        pairs: columns `prompt`, `images` (two), `p_first` in [0, 1] and `source`, as `load_pairs` makes them. Videos
            are judged as clips: by a `Judge` in the way that its `clips` says, by others as storyboards.
        batch_size: pairs for each call of the judge.
        progress: show a progress bar on standard error.
        swap_check: how many pairs, from the first on, are judged a second time with their images swapped.
        think: passed on to the judge; None is its own setting.
        keep: keep the verdicts.
        protocols: names from `measure.PROTOCOLS`; None for those of the data set.
        watch: called with each batch (column to list) and its verdicts, such as `Gallery.add`, which keeps the worst
            mistakes.
        validation: further pairs, judged first, on which the protocol `pickscore` chooses its tie threshold, as
            published; without them it is cross-fitted. The tests with the swapped pairs are left out there.

    Raises:
        InputError: no pairs, a column or a label that is missing or out of range, a batch size below 1, or a protocol
            that there is not, or that needs what the data does not have; or `validation`, and no protocol that asks
            for it.
        JudgeError: the judge broke. A pair that could not be judged has no score, so neither has the set.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    if swap_check < 0:
        raise InputError(f"swap_check is {swap_check}; it must be 0 or more")
    check_protocols(protocols or ())
    n = _check(pairs)
    threshold = None if validation is None else _judged_threshold(judge, validation, batch_size, think, protocols)
    labels, tally, kept = Labels(), _Tally(), []
    mirrored = checked = right = decided = 0
    started = time.perf_counter()

    with progress_bars(shown=progress) as bars:
        task = bars.add_task("judging", total=None if n is None else n + min(swap_check, n))
        for rows in shown(batches_of(pairs, batch_size), labels):
            prompts, firsts, seconds = rows["prompt"], *map(list, zip(*rows["images"], strict=True))
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

    preferred, gaps = np.array(tally.preferred), np.array(tally.position_gap)
    answers = labels.answers(
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
    heard = ~np.isnan(listener)
    listener_right, listener_decided = count_right(np.array(labels.p_first)[heard], side(listener[heard]))
    contradictions, listened = np.array(tally.contradictions, float), np.array(tally.listened, float)
    record = _record(judge.name, labels, answers, preferred, protocols)
    return replace(
        record,
        contradiction_rate=_rate(int(contradictions.sum()), int(listened.sum())),
        contradiction_interval=clustered_interval(contradictions, listened, answers.prompts),
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
    """The record of a model that was run elsewhere, from its file of scores (`scores.read_scores`). No picture is read.

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
        labels, judged = _scored(scores, validation)
        threshold = _threshold(labels, protocols, judged)
    labels, judged = _scored(scores, pairs)
    answers = labels.answers(**judged, tie_threshold=threshold)
    record = _record(scores.name, labels, answers, side(answers.judge / 2 + 0.5), protocols)
    return replace(record, missing=int(np.isnan(answers.judge).sum()), seconds=time.perf_counter() - started)


def _scored(scores: Scores, pairs: datasets.Dataset | datasets.IterableDataset) -> tuple[Labels, dict[str, Any]]:
    """The labels, and what the file says of the pairs as arguments of `Answers`."""
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
    for rows in shown(batches_of(validation, batch_size), labels):
        if not p_first:
            _threshold(labels, protocols, None)
        firsts, seconds = map(list, zip(*rows["images"], strict=True))
        p_first += [verdict.p_first for verdict in _judge(judge, rows["prompt"], firsts, seconds, think)]
    return _threshold(labels, protocols, {"judge": 2 * np.array(p_first) - 1})


def _threshold(labels: Labels, protocols: Sequence[str] | None, judged: Mapping[str, Any] | None) -> float:
    """The tie threshold for what was `judged`; without it this only refuses protocols that have no use for one."""
    names = default_protocols(list(labels.sources)) if protocols is None else protocols
    if "pickscore" not in names:
        raise InputError(
            f"validation is given, for which {', '.join(names)} has no use; ask for the protocol pickscore"
        )
    return 0.0 if judged is None else choose_tie_threshold(labels.answers(**judged))


def _record(
    name: str, labels: Labels, answers: Answers, preferred: np.ndarray, protocols: Sequence[str] | None
) -> Evaluation:
    """All of the record that margins tell; a run of the judge knows the rest."""
    shares = np.array(labels.p_first)
    if len(shares) == 0:
        raise InputError("pairs has 0 rows; there is nothing to evaluate")
    right, decided = count_right(shares, preferred)
    credits = ((shares != 0.5) & (side(shares) == preferred)).astype(float), (shares != 0.5).astype(float)
    p_first = answers.judge / 2 + 0.5
    known = ~np.isnan(p_first)
    calibrated = answers.unit == "probability" and bool(known.any())
    names = default_protocols(list(labels.sources)) if protocols is None else protocols
    return Evaluation(
        judge=name,
        data=labels.source,
        n=len(shares),
        n_ties=len(shares) - decided,
        accuracy=_rate(right, decided),
        accuracy_interval=clustered_interval(*credits, answers.prompts),
        always_first=_rate(count_right(shares, np.ones(len(shares)))[0], decided),
        contradiction_rate=None,
        contradiction_interval=None,
        malformed_rate=None,
        swap_consistency=None,
        swap_checked=0,
        position_gap=None,
        ece=expected_calibration_error(shares[known], p_first[known]) if calibrated else None,
        brier=brier_score(shares[known], p_first[known]) if calibrated else None,
        nll=negative_log_likelihood(shares[known], p_first[known]) if calibrated else None,
        listener_accuracy=None,
        seconds=0.0,
        protocols=tuple(measure(answers, protocol) for protocol in names),
        answers=answers,
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


def is_mirrored(verdict: Verdict, swapped: Verdict) -> bool:
    """Whether the verdict on a swapped pair is the mirror image of that on the pair."""
    flipped = {1: 2, 2: 1, None: None}[swapped.preferred]
    return abs(verdict.p_first + swapped.p_first - 1) <= SWAP_TOLERANCE and verdict.preferred == flipped


def margins_by_order(verdict: Verdict) -> tuple[float, float]:
    """p(first) - p(second) with the pair shown in order, and with it shown swapped; NaN for an order not asked.

    Of a verdict without `by_order`, which a judge of the user's own may give, they are had back from p_first, the mean
    of the two orders, and the position gap, their difference.
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
            heard = [thought.contradicted for thought in verdict.thoughts if thought.contradicted is not None]
            self.listened.append(len(heard))
            self.contradictions.append(sum(heard))


def _judge(judge: PairJudge, prompts: list, firsts: list, seconds: list, think: bool | None) -> list[Verdict]:
    """`judge.compare_many`, with its answers checked: a NaN would spoil every measure in silence."""
    verdicts = judge.compare_many(prompts, firsts, seconds, think=think)
    if len(verdicts) != len(prompts):
        raise JudgeError(f"{judge.name} gave {len(verdicts)} verdicts on {len(prompts)} pairs")
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        if not 0 <= verdict.p_first <= 1:
            raise JudgeError(f"{judge.name} answered p_first = {verdict.p_first} for prompt {prompt!r}")
    return verdicts


def _check(pairs: datasets.Dataset | datasets.IterableDataset) -> int | None:
    """Refuses unusable `pairs` before anything slow begins; their number, None where only reading them tells."""
    if missing := {"prompt", "images", "p_first"} - set(_column_names(pairs)):
        raise InputError(f"pairs has no column {', '.join(sorted(missing))}; load_pairs makes what evaluate reads")
    if not isinstance(pairs, Sized):
        return None
    if len(pairs) == 0:
        raise InputError("pairs has 0 rows; there is nothing to evaluate")
    check_shares(np.asarray(pairs["p_first"][:], dtype=np.float64))
    return len(pairs)


def _column_names(pairs: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """A stream may know its columns only once it has been looked at."""
    return list(pairs.column_names or next(iter(pairs), {}))
