"""Labelled pairs and what one judge answered, measured by named protocols.

`protocols` has the rules as functions of arrays; here is what each of them is given, which of them a data set is
measured by, the always-first baseline, the intervals, and the comparison of two judges.
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
class Answers:
    """What people and one judge say of the same n pairs. A margin is positive for the first image; see `protocols`."""

    judge: np.ndarray
    """(n,) float64 margins, NaN where the judge gave none."""
    people: np.ndarray
    """(n,) float64 margins: p_first - 0.5."""
    prompts: np.ndarray
    """(n,) int64, equal for pairs of one prompt."""
    ranks: np.ndarray | None = None
    """(n,) float64 margins of the published ranks, rank(second) - rank(first), where the data set has ranks."""
    swapped: np.ndarray | None = None
    """(n,) bool, whether the loader exchanged the published order."""
    firsts: Sequence[str] | None = None
    """What identifies the first image of each pair among those of its prompt."""
    seconds: Sequence[str] | None = None
    both_bad: np.ndarray | None = None
    """(n,) bool, which of the people's ties are "both bad", as GenAI-Bench tells them."""
    preferred: np.ndarray | None = None
    """(n,) 1, 2, or 0 for neither: the judge's own choice, where it may tie without a margin of zero."""
    forward: np.ndarray | None = None
    """(n,) float64 margins with the pair shown in order; None for a judge that does not know of orders."""
    reverse: np.ndarray | None = None
    """(n,) float64 margins for the same first image with the pair shown swapped."""
    position_gap: np.ndarray | None = None
    """(n,) float64 in [-1, 1], `Verdict.position_gap`; NaN for a pair shown in one order."""
    listened: np.ndarray | None = None
    """(n,) how many of the pair's thoughts have an answer that a listener agrees with or contradicts."""
    contradicted: np.ndarray | None = None
    """(n,) how many of these the listener contradicts."""
    words: Sequence[str | None] | None = None
    """The judge's output with a GenAI-Bench label, about the pair as shown here; else made from the margins."""
    tie_threshold: float | None = None
    """The threshold that `pickscore` takes, chosen on a validation set by `choose_tie_threshold`; without one it is
    cross-fitted on these pairs."""
    unit: Literal["probability", "score", "answer"] = "probability"
    """What the margins are: p(first) - p(second), or the difference of a model's scores, or 1, 0 and -1 for answers."""

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
    """The same number for a judge that always prefers the first image it is shown."""
    always_first_in_file: float | None
    """The same in the published order, before the loader's shuffle: what the file's order gives away. None where
    nothing was shuffled."""
    pairs: int
    """How many pairs count."""
    prompts: int
    missing: int
    """Pairs that the judge did not answer. Only MMRB2 leaves them out; everywhere else they are wrong."""
    thresholds: tuple[float, ...] = ()
    """The tie thresholds that were used, in the unit of the margins."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The protocols by name
# ---------------------------------------------------------------------------------------------------------------------

Rule = Callable[[Answers], "Credits | tuple[Credits, Any]"]


def _genai_bench(answers: Answers) -> Credits:
    both_bad = np.zeros(len(answers), dtype=bool) if answers.both_bad is None else answers.both_bad
    ties = np.where(both_bad, "bothbad_vote", "tievote")
    votes = np.where(answers.people > 0, "leftvote", np.where(answers.people < 0, "rightvote", ties)).tolist()
    words = answers.words
    if words is None:
        side = np.sign(answers.judge) if answers.preferred is None else np.array([0, 1, -1])[answers.preferred]
        said = np.where(side > 0, "[[A>B]]", np.where(side < 0, "[[B>A]]", "[[A=B]]"))
        words = np.where(np.isnan(answers.judge), "", said).tolist()
    return protocols.genai_bench(words, votes)


def _pickscore(answers: Answers) -> tuple[Credits, Any]:
    judge, threshold = _softmax_margins(answers), answers.tie_threshold
    if threshold is None:
        return protocols.pickscore_cross_fitted(judge, answers.people, answers.prompts)
    return protocols.pickscore(judge, answers.people, threshold), threshold


def choose_tie_threshold(validation: Answers) -> float:
    """The threshold of PickScore's grid at which `pickscore` is highest on a validation set.

    It is for `Answers.tie_threshold` of the same judge on the test set; `eval_preference_predictor.py` does so.
    """
    return protocols.best_tie_threshold(
        _softmax_margins(validation), validation.people, half=0.5, grid=protocols.PICKSCORE_GRID
    )


def _softmax_margins(answers: Answers) -> np.ndarray:
    # PickScore's own probabilities are the softmax over the two scores, whose difference is tanh of half their margin.
    return np.tanh(answers.judge / 2) if answers.unit == "score" else answers.judge


def _mmrb2(answers: Answers) -> Credits:
    forward = answers.judge if answers.forward is None else answers.forward
    reverse = answers.judge if answers.reverse is None else answers.reverse
    return protocols.mmrb2(forward, reverse, answers.people)


def _rank_correlation(answers: Answers, method: Any) -> Credits:
    if answers.firsts is None or answers.seconds is None:
        raise InputError(f"the protocol {method} needs to know which pairs share an image; this data does not say")
    people = _ranked(answers)
    return protocols.rank_correlation(
        answers.judge, people, answers.prompts, answers.firsts, answers.seconds, method=method
    )


def _ranked(answers: Answers) -> np.ndarray:
    """The people's order as published, where it was; the share of people can differ from the order of mean ranks."""
    return answers.people if answers.ranks is None else answers.ranks


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
    "tau-b": partial(_rank_correlation, method="tau-b"),
    "tau-c": partial(_rank_correlation, method="tau-c"),
    "spearman": partial(_rank_correlation, method="spearman"),
}
"""Every protocol by its name; `docs/evaluation.md` says what each computes and where it is from."""

_CORRELATIONS = ("tau-b", "tau-c", "spearman")
"""Those whose number is no share of anything."""

DEFAULTS: dict[str, tuple[str, ...]] = {
    "imagereward": ("imagereward", "hpsv2", "tau-b"),
    "hpdv2": ("hpsv2-inversion", "hpsv2", "tau-b", "tau-c", "spearman"),
    "hpdv3": ("hpsv3-pair",),
    "pickapic": ("pickscore", "imagereward"),
    "genai-bench": ("genai-bench", "genai-bench-diff", "genai-bench-tau"),
    "videogen": ("videogen-without-ties", "videogen-with-ties"),
    "mmrb2": ("mmrb2",),
}
"""What a data set is measured by where nothing is asked for, its own first; all others by `imagereward`."""


def default_protocols(sources: Sequence[str]) -> tuple[str, ...]:
    """The protocols of the data set that the pairs are from; `imagereward` for an unknown one or a mixture."""
    kinds = {source.partition(":")[0] for source in sources}
    return DEFAULTS.get(kinds.pop(), ("imagereward",)) if len(kinds) == 1 else ("imagereward",)


def check_protocols(names: Sequence[str]) -> None:
    """Refuses a name that is none, before anything slow begins.

    Raises:
        InputError: names the protocols there are.
    """
    for name in names:
        if name not in PROTOCOLS:
            raise InputError(f"protocol is {name!r}; there are {', '.join(PROTOCOLS)}")


def measure(answers: Answers, protocol: str) -> ProtocolResult:
    """One judge by one protocol, with its interval and the always-first baselines.

    Raises:
        InputError: there is no such protocol, or it needs what the data does not have.
    """
    (credits, thresholds), baseline = _credits(answers, protocol), np.ones(len(answers))
    in_file = None
    if answers.swapped is not None and answers.swapped.any():
        in_file = _credits(_always(answers, np.where(answers.swapped, -1.0, 1.0)), protocol)[0].value
    counted = credits.possible > 0
    missing = np.isnan(answers.judge) if answers.words is None else np.array([not word for word in answers.words])
    return ProtocolResult(
        protocol=protocol,
        value=credits.value,
        interval=clustered_interval(*credits, answers.prompts, share=protocol not in _CORRELATIONS),
        always_first=_credits(_always(answers, baseline), protocol)[0].value,
        always_first_in_file=in_file,
        pairs=int(counted.sum()),
        prompts=len(np.unique(answers.prompts[counted])),
        missing=int(missing.sum()),
        thresholds=thresholds,
    )


def compare(first: Answers, second: Answers, protocol: str) -> PairedTest | None:
    """Whether two judges of the same pairs, in the same order, differ by a protocol; see `intervals.paired_test`."""
    if len(first) != len(second) or not np.array_equal(first.people, second.people):
        raise InputError("the two judges were asked different pairs; evaluate both on the same data with the same seed")
    return paired_test(_credits(first, protocol)[0], _credits(second, protocol)[0], first.prompts)


def _credits(answers: Answers, protocol: str) -> tuple[Credits, tuple[float, ...]]:
    check_protocols([protocol])
    found = PROTOCOLS[protocol](answers)
    if isinstance(found, Credits):
        return found, ()
    credits, thresholds = found
    return credits, tuple(thresholds) if isinstance(thresholds, list) else (float(thresholds),)


def _always(answers: Answers, judge: np.ndarray) -> Answers:
    """The same pairs, answered by someone who looks at the place alone; with the pair swapped he prefers the other."""
    place = replace(answers, judge=judge, preferred=None, forward=judge, reverse=-judge, words=None)
    # A threshold that was chosen for somebody else's margins; he himself never sees a tie.
    threshold = None if answers.tie_threshold is None else 0.0
    return replace(place, tie_threshold=threshold, unit="probability")


# ---------------------------------------------------------------------------------------------------------------------
# The labels of a data set
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Labels:
    """Gathers what the protocols need of a data set, batch by batch, and lets the pictures go."""

    p_first: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    sources: dict[str, None] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)

    KEPT = ("id", "swapped", "item_first", "item_second", "rank_first", "rank_second", "both_bad")

    @classmethod
    def read(cls, column_names: Sequence[str]) -> list[str]:
        """Which of a data set's columns are read, the pictures left out."""
        return [name for name in column_names if name in ("prompt", "p_first", "group", "source", *cls.KEPT)]

    def add(self, rows: Mapping[str, list[Any]]) -> None:
        """A batch: column to list.

        Raises:
            InputError: a label that is no share of people.
        """
        shares = np.asarray(rows["p_first"], dtype=np.float64)
        check_shares(shares, len(self.p_first))
        self.p_first += shares.tolist()
        groups = rows.get("group") or [None] * len(shares)
        for group, prompt in zip(groups, rows["prompt"], strict=True):
            # The prompt's text where there is no group: then pairs that only share their words share a cluster.
            self.prompts.append(self._numbers.setdefault(prompt if group is None else f"\0{group}", len(self._numbers)))
        self.sources |= dict.fromkeys(rows.get("source", []))
        for name in self.KEPT:
            if name in rows:
                self.columns.setdefault(name, []).extend(rows[name])
        if "images" in rows and "item_first" not in rows:
            for place, name in enumerate(("item_first", "item_second")):
                self.columns.setdefault(name, []).extend(identity(pair[place]) for pair in rows["images"])

    def answers(self, judge: np.ndarray, **more: Any) -> Answers:
        """The labels beside a judge's margins."""
        n, columns = len(self.p_first), self.columns
        complete = {name: values for name, values in columns.items() if len(values) == n and None not in values}
        ranks = None
        if {"rank_first", "rank_second"} <= complete.keys():
            ranks = np.array(complete["rank_second"], dtype=np.float64) - np.array(complete["rank_first"])
        return Answers(
            judge=np.asarray(judge, dtype=np.float64),
            people=np.array(self.p_first) - 0.5,
            prompts=np.array(self.prompts, dtype=np.int64),
            ranks=ranks,
            swapped=np.array(complete["swapped"], dtype=bool) if "swapped" in complete else None,
            firsts=complete.get("item_first"),
            seconds=complete.get("item_second"),
            both_bad=np.array(columns["both_bad"], dtype=object) == True if "both_bad" in columns else None,  # noqa: E712
            **more,
        )

    @property
    def source(self) -> str:
        """The sources in words, the first three by name."""
        names = sorted(self.sources) or ["unnamed"]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_shares(shares: np.ndarray, first_row: int = 0) -> None:
    """Refuses labels outside [0, 1].

    Raises:
        InputError: names the row, counted from `first_row`.
    """
    if (wrong := ~((shares >= 0) & (shares <= 1))).any():
        row = int(wrong.argmax())
        raise InputError(f"p_first of row {first_row + row} is {shares[row]}; a label is a share of people in [0, 1]")
