"""Labelled pairs beside one judge's margins, and the protocols that turn both into a number.

`protocols` has the rules as functions of arrays. This module has each rule's arguments, each data set's default
protocols, the always-first baseline, the intervals, and the comparison of two judges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from listener_reward.errors import InputError
from listener_reward.evaluate import protocols
from listener_reward.evaluate.intervals import PairedTest, clustered_interval, paired_test
from listener_reward.evaluate.protocols import Credits
from listener_reward.media.images import identity


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgedPairs:
    """Labels and one judge's margins on the same n pairs. A margin is positive for the first image; see `protocols`."""

    judge: np.ndarray
    """(n,) float64 margins of the judge; NaN where it gave none."""
    people: np.ndarray
    """(n,) float64 margins of the labels: p_first - 0.5."""
    prompts: np.ndarray
    """(n,) int64 prompt numbers; pairs of one prompt have the same."""
    ranks: np.ndarray | None = None
    """(n,) float64 margins of the published ranks, rank(second) - rank(first), where the data set has ranks."""
    swapped: np.ndarray | None = None
    """(n,) bool, whether the loader exchanged the published order."""
    firsts: Sequence[str] | None = None
    """A name for each pair's first image; equal images of one prompt have the same name."""
    seconds: Sequence[str] | None = None
    kinds: np.ndarray | None = None
    """(n,) int64 numbers of what the data calls a category, such as a kind of edit; None takes all for one kind."""
    both_bad: np.ndarray | None = None
    """(n,) bool, which of the people's ties are "both bad", as GenAI-Bench tells them."""
    preferred: np.ndarray | None = None
    """(n,) the judge's preference: 1, 2, or 0 for neither. With a tie band the judge prefers neither at small
    margins."""
    forward: np.ndarray | None = None
    """(n,) float64 margins in the given order; None for a file of scores without orders."""
    reverse: np.ndarray | None = None
    """(n,) float64 margins for the same first image in the swapped order."""
    position_gap: np.ndarray | None = None
    """(n,) float64 in [-1, 1], `Verdict.position_gap`; NaN for a pair asked in one order."""
    listened: np.ndarray | None = None
    """(n,) number of the pair's well-formed completions that a listener read."""
    contradicted: np.ndarray | None = None
    """(n,) number of those that the listener contradicts."""
    words: Sequence[str | None] | None = None
    """The judge's output with a GenAI-Bench label, in the order of this data; None makes labels from the margins."""
    tie_threshold: float | None = None
    """The tie threshold of `pickscore`, chosen on a validation set by `choose_tie_threshold`; None cross-fits it on
    these pairs."""
    unit: Literal["probability", "score", "answer"] = "probability"
    """The unit of the margins: p(first) - p(second), a difference of scores, or 1, 0 and -1 for an answer."""

    def __len__(self) -> int:
        return len(self.judge)


@dataclass(frozen=True, slots=True)
class ProtocolResult:
    """A judge's number by one protocol."""

    protocol: str
    value: float | None
    """None where the protocol counts none of the pairs."""
    interval: tuple[float, float] | None
    """95 %, clustered by prompt; see `intervals.clustered_interval`. A tie threshold is held fixed in it."""
    always_first: float | None
    """The same number for a judge that always prefers the image in first place."""
    always_first_in_file: float | None
    """The same number in the published order, before the loader's shuffle; far from 1/2, the file's order gives the
    label away. None if nothing was shuffled."""
    pairs: int
    """How many pairs count."""
    prompts: int
    missing: int
    """Pairs without a margin of the judge. Only MMRB2 leaves these pairs out; every other protocol counts them as
    wrong."""
    thresholds: tuple[float, ...] = ()
    """The tie thresholds that were used, in the unit of the margins."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The protocols by name
# ---------------------------------------------------------------------------------------------------------------------

Rule = Callable[[JudgedPairs], "Credits | tuple[Credits, Any]"]


def _genai_bench(judged: JudgedPairs) -> Credits:
    both_bad = np.zeros(len(judged), dtype=bool) if judged.both_bad is None else judged.both_bad
    ties = np.where(both_bad, "bothbad_vote", "tievote")
    votes = np.where(judged.people > 0, "leftvote", np.where(judged.people < 0, "rightvote", ties)).tolist()
    words = judged.words
    if words is None:
        side = np.sign(judged.judge) if judged.preferred is None else np.array([0, 1, -1])[judged.preferred]
        said = np.where(side > 0, "[[A>B]]", np.where(side < 0, "[[B>A]]", "[[A=B]]"))
        words = np.where(np.isnan(judged.judge), "", said).tolist()
    return protocols.genai_bench(words, votes)


def _pickscore(judged: JudgedPairs) -> tuple[Credits, Any]:
    judge, threshold = _softmax_margins(judged), judged.tie_threshold
    if threshold is None:
        return protocols.pickscore_cross_fitted(judge, judged.people, judged.prompts)
    return protocols.pickscore(judge, judged.people, threshold), threshold


def choose_tie_threshold(validation: JudgedPairs) -> float:
    """The threshold of PickScore's grid at which `pickscore` is highest on a validation set.

    Use it as `JudgedPairs.tie_threshold` of the same judge on the test set, as PickScore's
    `eval_preference_predictor.py` does.
    """
    return protocols.best_tie_threshold(
        _softmax_margins(validation), validation.people, half=0.5, grid=protocols.PICKSCORE_GRID
    )


def _softmax_margins(judged: JudgedPairs) -> np.ndarray:
    # PickScore's own probabilities are the softmax over the two scores, whose difference is tanh of half their margin.
    return np.tanh(judged.judge / 2) if judged.unit == "score" else judged.judge


def _mmrb2(judged: JudgedPairs) -> Credits:
    forward = judged.judge if judged.forward is None else judged.forward
    reverse = judged.judge if judged.reverse is None else judged.reverse
    return protocols.mmrb2(forward, reverse, judged.people)


def _rank_correlation(judged: JudgedPairs, method: Any) -> Credits:
    if judged.firsts is None or judged.seconds is None:
        raise InputError(f"the protocol {method} needs to know which pairs share an image; this data does not say")
    people = _ranked(judged)
    return protocols.rank_correlation(
        judged.judge, people, judged.prompts, judged.firsts, judged.seconds, method=method
    )


def _ranked(judged: JudgedPairs) -> np.ndarray:
    """The people's order as published, where it was; the fraction of people can differ from the order of mean ranks."""
    return judged.people if judged.ranks is None else judged.ranks


def _editreward_bench(judged: JudgedPairs) -> tuple[Credits, Any]:
    # An answer that is a tie says so; only of a number has somebody to say how near to zero it is one.
    threshold = 0.0 if judged.unit == "answer" else None
    return protocols.editreward_bench(judged.judge, judged.people, judged.prompts, threshold)


def _editscore_bench(judged: JudgedPairs) -> Credits:
    one = np.zeros(len(judged), dtype=np.int64)
    return protocols.editscore_bench(judged.judge, judged.people, one if judged.kinds is None else judged.kinds)


PROTOCOLS: dict[str, Rule] = {
    "imagereward": lambda a: protocols.imagereward(a.judge, _ranked(a)),
    "hpsv2": lambda a: protocols.hpsv2(a.judge, _ranked(a), a.prompts),
    "hpsv2-inversion": lambda a: protocols.hpsv2_inversion(a.judge, _ranked(a), a.prompts, a.swapped),
    "hpsv3-pair": lambda a: protocols.hpsv3_pair(a.judge, _ranked(a)),
    "hpsv3-ranking": lambda a: protocols.hpsv3_ranking(a.judge, _ranked(a)),
    "pickscore": _pickscore,
    "genai-bench": _genai_bench,
    "genai-bench-diff": lambda a: protocols.genai_bench_diff(a.judge, a.people),
    "genai-bench-tau": lambda a: protocols.videogen_with_ties(a.judge, a.people),
    "videoscore": lambda a: protocols.videoscore(a.judge, a.people),
    "videogen-without-ties": lambda a: protocols.videogen_without_ties(a.judge, a.people),
    "videogen-with-ties": lambda a: protocols.videogen_with_ties(a.judge, a.people),
    "mmrb2": _mmrb2,
    "editreward-bench": _editreward_bench,
    "editreward-bench-pairs": lambda a: protocols.videogen_with_ties(a.judge, a.people),
    "editscore-bench": _editscore_bench,
    "tau-b": partial(_rank_correlation, method="tau-b"),
    "tau-c": partial(_rank_correlation, method="tau-c"),
    "spearman": partial(_rank_correlation, method="spearman"),
}
"""Every protocol by its name; `docs/evaluation.md` says what each computes and where it is from."""

_CORRELATIONS = ("tau-b", "tau-c", "spearman")
"""Those whose number is no fraction of anything."""

DEFAULTS: dict[str, tuple[str, ...]] = {
    "imagereward": ("imagereward", "hpsv2", "tau-b"),
    "hpdv2": ("hpsv2-inversion", "hpsv2", "tau-b", "tau-c", "spearman"),
    "hpdv3": ("hpsv3-pair",),
    "pickapic": ("pickscore", "imagereward"),
    "genai-bench": ("genai-bench", "genai-bench-diff", "genai-bench-tau"),
    "videogen": ("videogen-without-ties", "videogen-with-ties"),
    "mmrb2": ("mmrb2",),
    "editreward-bench": ("editreward-bench", "editreward-bench-pairs"),
    "editscore-bench": ("editscore-bench", "imagereward"),
}
"""Each data set's default protocols, its own first; any other data set has `imagereward`."""


def default_protocols(sources: Sequence[str]) -> tuple[str, ...]:
    """The protocols of the data set that the pairs are from; `imagereward` for an unknown one or a mixture."""
    kinds = {source.partition(":")[0] for source in sources}
    return DEFAULTS.get(kinds.pop(), ("imagereward",)) if len(kinds) == 1 else ("imagereward",)


def check_protocols(names: Sequence[str]) -> None:
    """Refuses an unknown protocol before anything slow begins.

    Raises:
        InputError: names the protocols there are.
    """
    for name in names:
        if name not in PROTOCOLS:
            raise InputError(f"protocol is {name!r}; there are {', '.join(PROTOCOLS)}")


def apply_protocol(judged: JudgedPairs, protocol: str) -> ProtocolResult:
    """One judge's number by one protocol, with its interval and the always-first baselines.

    Raises:
        InputError: there is no such protocol, or it needs what the data does not have.
    """
    (credits, thresholds), baseline = _credits(judged, protocol), np.ones(len(judged))
    in_file = None
    if judged.swapped is not None and judged.swapped.any():
        in_file = _credits(_always(judged, np.where(judged.swapped, -1.0, 1.0)), protocol)[0].value
    counted = credits.possible > 0
    missing = np.isnan(judged.judge) if judged.words is None else np.array([not word for word in judged.words])
    return ProtocolResult(
        protocol=protocol,
        value=credits.value,
        interval=clustered_interval(*credits, judged.prompts, fraction=protocol not in _CORRELATIONS),
        always_first=_credits(_always(judged, baseline), protocol)[0].value,
        always_first_in_file=in_file,
        pairs=int(counted.sum()),
        prompts=len(np.unique(judged.prompts[counted])),
        missing=int(missing.sum()),
        thresholds=thresholds,
    )


def compare(first: JudgedPairs, second: JudgedPairs, protocol: str) -> PairedTest | None:
    """Whether two judges of the same pairs, in the same order, differ by a protocol; see `intervals.paired_test`."""
    if len(first) != len(second) or not np.array_equal(first.people, second.people):
        raise InputError("the two judges were asked different pairs; evaluate both on the same data with the same seed")
    return paired_test(_credits(first, protocol)[0], _credits(second, protocol)[0], first.prompts)


def _credits(judged: JudgedPairs, protocol: str) -> tuple[Credits, tuple[float, ...]]:
    check_protocols([protocol])
    found = PROTOCOLS[protocol](judged)
    if isinstance(found, Credits):
        return found, ()
    credits, thresholds = found
    return credits, tuple(thresholds) if isinstance(thresholds, list) else (float(thresholds),)


def _always(judged: JudgedPairs, judge: np.ndarray) -> JudgedPairs:
    """The same pairs, judged by place alone: in the swapped order the other image is preferred."""
    place = replace(judged, judge=judge, preferred=None, forward=judge, reverse=-judge, words=None)
    # The threshold was chosen for the judge's margins; a judge by place never ties.
    threshold = None if judged.tie_threshold is None else 0.0
    return replace(place, tie_threshold=threshold, unit="probability")


# ---------------------------------------------------------------------------------------------------------------------
# The labels of a data set
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Labels:
    """Gathers the columns that the protocols need, batch by batch; pictures are not kept."""

    p_first: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    datasets: dict[str, None] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    criteria: list[str | None] = field(default_factory=list)
    """Each pair's criterion, None for the general question."""
    _numbers: dict[str, int] = field(default_factory=dict)

    KEPT = ("id", "swapped", "item_first", "item_second", "rank_first", "rank_second", "both_bad", "category")

    @classmethod
    def read(cls, column_names: Sequence[str]) -> list[str]:
        """Which of a data set's columns are read, the pictures left out."""
        return [
            name for name in column_names if name in ("prompt", "p_first", "group", "dataset", "criterion", *cls.KEPT)
        ]

    def add(self, rows: Mapping[str, list[Any]]) -> None:
        """A batch: column to list.

        Raises:
            InputError: a label that is no fraction of people.
        """
        fractions = np.asarray(rows["p_first"], dtype=np.float64)
        check_labels(fractions, len(self.p_first))
        self.p_first += fractions.tolist()
        groups = rows.get("group") or [None] * len(fractions)
        for group, prompt in zip(groups, rows["prompt"], strict=True):
            # The prompt's text where there is no group: then pairs that only share their words share a cluster.
            self.prompts.append(self._numbers.setdefault(prompt if group is None else f"\0{group}", len(self._numbers)))
        self.criteria += rows.get("criterion") or [None] * len(fractions)
        self.datasets |= dict.fromkeys(rows.get("dataset", []))
        for name in self.KEPT:
            if name in rows:
                self.columns.setdefault(name, []).extend(rows[name])
        if "images" in rows and "item_first" not in rows:
            for place, name in enumerate(("item_first", "item_second")):
                self.columns.setdefault(name, []).extend(identity(pair[place]) for pair in rows["images"])

    def judged(self, judge: np.ndarray, **more: Any) -> JudgedPairs:
        """The labels beside a judge's margins."""
        n, columns = len(self.p_first), self.columns
        complete = {name: values for name, values in columns.items() if len(values) == n and None not in values}
        ranks = None
        if {"rank_first", "rank_second"} <= complete.keys():
            ranks = np.array(complete["rank_second"], dtype=np.float64) - np.array(complete["rank_first"])
        return JudgedPairs(
            judge=np.asarray(judge, dtype=np.float64),
            people=np.array(self.p_first) - 0.5,
            prompts=np.array(self.prompts, dtype=np.int64),
            ranks=ranks,
            swapped=np.array(complete["swapped"], dtype=bool) if "swapped" in complete else None,
            firsts=complete.get("item_first"),
            seconds=complete.get("item_second"),
            kinds=np.unique(complete["category"], return_inverse=True)[1] if "category" in complete else None,
            both_bad=np.array(columns["both_bad"], dtype=object) == True if "both_bad" in columns else None,  # noqa: E712
            **more,
        )

    @property
    def data(self) -> str:
        """The data sets in words, the first three by name."""
        names = sorted(self.datasets) or ["unnamed"]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_labels(fractions: np.ndarray, first_row: int = 0) -> None:
    """Refuses labels outside [0, 1].

    Raises:
        InputError: names the row, counted from `first_row`.
    """
    if (wrong := ~((fractions >= 0) & (fractions <= 1))).any():
        row = int(wrong.argmax())
        raise InputError(
            f"p_first of row {first_row + row} is {fractions[row]}; a label is a fraction of people in [0, 1]"
        )
