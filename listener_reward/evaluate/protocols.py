"""The published ways to score a judge of pairs, each by its name, as pure functions of plain arrays.

A *margin* is a float for each pair: positive prefers the first image, negative the second, zero neither. `judge` holds
the judge's margins, such as score(first) - score(second) or p(first) - p(second), with NaN where it gave no answer;
`people` holds the people's, such as p_first - 0.5 or rank(second) - rank(first). Only the latter's sign is used. An
answer that is missing is wrong and not left out, except where the published script leaves it out.

A protocol returns `Credits`: what each pair earned and what it could. Their sums' ratio is the published number, and
`intervals` takes the same two arrays for its interval and for a paired test between two judges.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import kendalltau, spearmanr

from listener_reward.errors import InputError

PICKSCORE_GRID = np.round(np.arange(11) / 10, 1)
"""The tie thresholds that PickScore's script tries."""

Vote = Literal["leftvote", "rightvote", "tievote", "bothbad_vote"]
"""GenAI-Bench's human labels."""


class Credits(NamedTuple):
    """What each pair earned and could have, (n,) float64 both; a pair that the protocol leaves out has 0 and 0."""

    earned: np.ndarray
    possible: np.ndarray

    @property
    def value(self) -> float | None:
        """The protocol's number, None where no pair counts."""
        total = float(self.possible.sum())
        return float(self.earned.sum()) / total if total else None


# ---------------------------------------------------------------------------------------------------------------------
# Ties of people left out
# ---------------------------------------------------------------------------------------------------------------------


def imagereward(judge: np.ndarray, people: np.ndarray) -> Credits:
    """ImageReward, `test.py:acc`: the fraction of right pairs over all pairs on which people have a side.

    A tie of the judge is wrong. The paper's caption says "averaged per prompt"; the code pools, and so does this.
    """
    return _counted(_agrees(judge, people), people != 0)


def hpsv2(judge: np.ndarray, people: np.ndarray, prompts: np.ndarray) -> Credits:
    """HPSv2, `calc_ImageReward` in `evaluate_ranking`: as `imagereward`, for each prompt, then averaged over prompts.

    `prompts` is (n,), equal for pairs of one prompt. A prompt on which people are always split is left out; the
    published script divides by zero there.
    """
    return per_prompt(imagereward(judge, people), prompts)


def hpsv2_inversion(
    judge: np.ndarray, people: np.ndarray, prompts: np.ndarray, swapped: np.ndarray | None = None
) -> Credits:
    """HPSv2, `inversion_score`: one minus the fraction of pairs in the opposite order, averaged over prompts.

    A pair tied in either ranking counts as right, so every pair counts. `people` is the difference of the published
    (averaged) ranks. The published script ranks the images by `argsort`, which breaks a judge's exact tie by the place
    in the file: the published first wins it, which is the second image where `swapped` is. A missing answer is wrong.
    """
    earlier = 1.0 if swapped is None else np.where(swapped, -1.0, 1.0)
    right = _agrees(np.where(judge == 0, earlier, judge), people) | (people == 0)
    return per_prompt(_counted(right & ~np.isnan(judge), np.ones(len(people))), prompts)


def hpsv3_pair(judge: np.ndarray, people: np.ndarray) -> Credits:
    """HPSv3, `evaluate.py` in mode `pair`: the fraction of pairs whose winner has the higher score; a tie is wrong.

    The published files hold the winner in `path1`, and the script looks at no votes: `people` is positive where the
    first image is `path1`. Where a tie of people comes in from elsewhere it is left out.
    """
    return imagereward(judge, people)


def hpsv3_ranking(judge: np.ndarray, people: np.ndarray) -> Credits:
    """HPSv3, `evaluate.py:calc_rank_acc` in mode `ranking`: the fraction of pairs in the people's order, over all
    prompts.

    It pools, as `imagereward` does and `hpsv2` does not: pairs of equal rank are left out, a judge's tie is wrong.
    """
    return imagereward(judge, people)


def genai_bench_diff(judge: np.ndarray, people: np.ndarray) -> Credits:
    """UnifiedReward and VisionReward on GenAI-Bench, "diff": ties of people are dropped, the rest is pooled."""
    return imagereward(judge, people)


def videogen_without_ties(judge: np.ndarray, people: np.ndarray) -> Credits:
    """VideoGen-RewardBench, `calc_accuracy_without_ties`: C / (C + D), a margin of exactly zero counting among D."""
    return imagereward(judge, people)


# ---------------------------------------------------------------------------------------------------------------------
# Ties of people kept
# ---------------------------------------------------------------------------------------------------------------------


def with_ties(judge: np.ndarray, people: np.ndarray, threshold: float, *, half: float = 0.0) -> Credits:
    """Three-way accuracy: the judge ties where |margin| <= `threshold`, and a negative threshold never ties.

    A tie that only one side sees earns `half`. With `half` 0 this is acc_eq of Deutsch et al., "Ties Matter" (2023),
    (C + Thm) / all.
    """
    tie, human = np.abs(judge) <= threshold, people == 0
    earned = np.where(tie & human, 1.0, np.where(tie != human, half, _agrees(judge, people)))
    return _counted(np.where(np.isnan(judge), 0.0, earned), np.ones(len(people)))


def best_tie_threshold(
    judge: np.ndarray, people: np.ndarray, *, half: float = 0.0, grid: Sequence[float] | np.ndarray | None = None
) -> float:
    """The threshold at which `with_ties` is highest; of several the smallest, which sees the fewest ties.

    Tried are -1, at which nothing is a tie, and every |margin| there is, equal ones together, so the result does not
    depend on the order of the pairs; or the values of `grid`. VideoAlign's `calc_accuracy.py` leaves out the first and
    splits equal margins.
    """
    if grid is not None:
        values = [with_ties(judge, people, float(t), half=half).value or 0.0 for t in grid]
        return float(grid[int(np.argmax(values))])
    answered = ~np.isnan(judge)
    judge, people = judge[answered], people[answered]
    order = np.argsort(np.abs(judge), kind="stable")
    sizes, human = np.abs(judge)[order], people[order] == 0
    as_tie = np.where(human, 1.0, half)
    as_preference = np.where(human, half, _agrees(judge, people)[order])
    # The first k sizes taken for ties, for k = 0 .. n; only where a run of equal sizes ends is k a threshold.
    totals = np.concatenate([[0.0], np.cumsum(as_tie - as_preference)])
    ends = np.append(np.flatnonzero(np.diff(sizes)) + 1, len(sizes)) if len(sizes) else np.array([], dtype=int)
    candidates = np.concatenate([[0], ends])
    best = candidates[int(np.argmax(np.round(totals[candidates], 9)))]  # half credits must not differ by rounding
    return float(sizes[best - 1]) if best else -1.0


def videogen_with_ties(judge: np.ndarray, people: np.ndarray) -> tuple[Credits, float]:
    """VideoGen-RewardBench, `calc_accuracy_with_ties`: `with_ties` at its best threshold on these very pairs.

    Done as Deutsch et al. describe it, not as the script does; see `best_tie_threshold`. GenAI-Bench's "tau" of
    VisionReward and UnifiedReward is the same number. Also returns the threshold.
    """
    threshold = best_tie_threshold(judge, people)
    return with_ties(judge, people, threshold), threshold


def pickscore(judge: np.ndarray, people: np.ndarray, threshold: float) -> Credits:
    """PickScore, `eval_preference_predictor.py`: a tie where |p(first) - p(second)| <= threshold; half a point where
    exactly one side ties.

    `judge` is p(first) - p(second), in [-1, 1]. The threshold is chosen on the validation split:
    `best_tie_threshold(judge, people, half=0.5, grid=PICKSCORE_GRID)`.
    """
    return with_ties(judge, people, threshold, half=0.5)


def pickscore_cross_fitted(judge: np.ndarray, people: np.ndarray, prompts: np.ndarray) -> tuple[Credits, list[float]]:
    """`pickscore` where there is no validation split: each half of the prompts is scored at the other half's threshold.

    Prompts fall into the halves by their number, odd or even. Also returns the two thresholds, of the even half first.
    """
    _, number = np.unique(prompts, return_inverse=True)
    earned, possible, thresholds = np.zeros(len(judge)), np.zeros(len(judge)), []
    for fold in (number % 2 == 0, number % 2 == 1):
        other = ~fold if (~fold).any() else fold
        thresholds.append(best_tie_threshold(judge[other], people[other], half=0.5, grid=PICKSCORE_GRID))
        earned[fold], possible[fold] = pickscore(judge[fold], people[fold], thresholds[-1])
    return Credits(earned, possible), thresholds


def videoscore(judge: np.ndarray, people: np.ndarray, threshold: float = 0.5) -> Credits:
    """VideoScore, `get_genaibench_pairwise_acc.py`: a tie of people is right where |margin| < threshold, any other pair
    where the sign is right, however small the margin. For scores from 1 to 4."""
    return _counted(np.where(people == 0, np.abs(judge) < threshold, _agrees(judge, people)), np.ones(len(people)))


def editreward_bench(
    judge: np.ndarray, people: np.ndarray, rankings: np.ndarray, threshold: float | None = None
) -> tuple[Credits, float]:
    """EditReward-Bench, `eval_bench.py`, "strict ranking accuracy": the fraction of rankings with every pair right.

    A ranking of two, three or four edits is 1, 3 or 6 pairs, and counts once. A pair is right by the margin's sign; one
    on which people tie, where |margin| <= `threshold`. None chooses the threshold at which `with_ties` is highest on
    the rankings of one pair, as the script does; only those have ties. Also returns it. The paper's "overall" is this
    number over all rankings, its K = 2, 3 and 4 the same over those of each size.

    `rankings` is (n,), equal for pairs of one ranking. A ranking that lost a pair counts by those that are left.
    """
    _, number = np.unique(rankings, return_inverse=True)
    size = np.bincount(number)[number]
    if threshold is None:
        threshold = best_tie_threshold(judge[size == 1], people[size == 1])
    right = np.where(people == 0, np.abs(judge) <= threshold, _agrees(judge, people))
    whole = np.bincount(number, weights=right)[number] == size
    return Credits(whole / size, 1.0 / size), threshold


def editscore_bench(judge: np.ndarray, people: np.ndarray, kinds: np.ndarray) -> Credits:
    """EditScore's EditReward-Bench, `calculate_statistics.py`, "average": as `imagereward`, for each of the 13 kinds of
    edit, then averaged over the kinds. A tie of the judge is wrong; the set has none of people.

    `kinds` is (n,), equal for pairs of one kind. The script does it for each dimension by itself.
    """
    return per_prompt(imagereward(judge, people), kinds)


# ---------------------------------------------------------------------------------------------------------------------
# Answers in words, and both orders
# ---------------------------------------------------------------------------------------------------------------------

_RIGHT_ANSWERS: dict[str, frozenset[str]] = {
    "leftvote": frozenset({"[[A>B]]", "[[A>>B]]"}),
    "rightvote": frozenset({"[[B>A]]", "[[B>>A]]"}),
    "tievote": frozenset({"[[A=B]]", "[[A=B=Good]]"}),
    "bothbad_vote": frozenset({"[[A=B]]", "[[A=B=Bad]]"}),
}


def genai_bench(outputs: Sequence[str | None], votes: Sequence[str]) -> Credits:
    """GenAI-Bench, `inference.py:parse_response`: the four labels [[A>B]], [[B>A]], [[A=B=Good]], [[A=B=Bad]].

    [[A=B]] is right for both kinds of tie. The label runs from the first [[ to the last ]] of its line, so several
    labels on one line are one wrong vote. What cannot be parsed is wrong and stays in the denominator.

    Args:
        outputs: the judge's whole output for each pair, None or empty where there is none.
        votes: people's, one of `leftvote`, `rightvote`, `tievote`, `bothbad_vote`.

    Raises:
        InputError: another vote, or not as many outputs as votes.
    """
    if len(outputs) != len(votes):
        raise InputError(f"outputs has {len(outputs)} entries and votes {len(votes)}; give one output for each vote")
    right = []
    for number, (output, vote) in enumerate(zip(outputs, votes, strict=True)):
        if vote not in _RIGHT_ANSWERS:
            raise InputError(f"votes[{number}] is {vote!r}; GenAI-Bench has {', '.join(_RIGHT_ANSWERS)}")
        found = re.search(r"\[\[.*\]\]", output or "")
        right.append(found is not None and found[0] in _RIGHT_ANSWERS[vote])
    return _counted(np.array(right, dtype=bool), np.ones(len(right)))


def mmrb2(forward: np.ndarray, reverse: np.ndarray, people: np.ndarray) -> Credits:
    """MMRB2, `compute_accuracy.py`: the fraction of right judgements over both orders, each order counting by itself.

    `forward` and `reverse` are the judge's margins for the same first image, with the two shown in order and swapped. A
    missing judgement (NaN) leaves the denominator, as published: look at how many are missing.
    """
    decided = people != 0
    one, two = (_counted(_agrees(margins, people), ~np.isnan(margins) & decided) for margins in (forward, reverse))
    return Credits(one.earned + two.earned, one.possible + two.possible)


# ---------------------------------------------------------------------------------------------------------------------
# Whole rankings
# ---------------------------------------------------------------------------------------------------------------------


def rank_correlation(
    judge: np.ndarray,
    people: np.ndarray,
    prompts: np.ndarray,
    firsts: Sequence[str],
    seconds: Sequence[str],
    method: Literal["tau-b", "tau-c", "spearman"],
) -> Credits:
    """The rank correlation between the judge's and the people's order of a prompt's images, averaged over prompts.

    Each side's order of a prompt's images is that of their mean margins against the others, which for a judge with
    scores is the order of the scores, and for people's fractions the order of mean ranks. A prompt whose order is
    undefined (fewer than two images, or all equal on one side) is left out. Pairs without an answer do not count.

    Args:
        judge, people: (n,) margins; here the size of `people` matters too.
        prompts: (n,), equal for pairs of one prompt.
        firsts, seconds: what identifies each pair's images within its prompt.
        method: Kendall's tau-b or tau-c or Spearman's rho, each as scipy has it.
    """
    earned, possible = np.zeros(len(judge)), np.zeros(len(judge))
    first_of, second_of = np.asarray(firsts, dtype=object), np.asarray(seconds, dtype=object)
    _, number = np.unique(prompts, return_inverse=True)
    order = np.argsort(number, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
        answered = rows[~np.isnan(judge[rows])]
        mine, theirs = (
            _means(margins[answered], first_of[answered], second_of[answered]) for margins in (judge, people)
        )
        if np.ptp(mine) > 0 and np.ptp(theirs) > 0:
            if method == "spearman":
                found: Any = spearmanr(mine, theirs)
            else:
                found = kendalltau(mine, theirs, variant="b" if method == "tau-b" else "c")
            # Spread over the prompt's pairs, so that it counts once and lies in its own cluster.
            earned[rows], possible[rows] = float(found.statistic) / len(rows), 1 / len(rows)
    return Credits(earned, possible)


def per_prompt(credits: Credits, prompts: np.ndarray) -> Credits:
    """The same credits with every prompt of equal weight, so that their value is the mean over prompts."""
    _, number = np.unique(prompts, return_inverse=True)
    total = np.bincount(number, weights=credits.possible)[number]
    weight = np.divide(1.0, total, out=np.zeros(len(total)), where=total > 0)
    return Credits(credits.earned * weight, credits.possible * weight)


def all_pairs(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """The margins of all pairs i < j of n images with `scores` (higher is better): (n (n - 1) / 2,) float64.

    For ranks, where lower is better, give the negative ranks.
    """
    values = np.asarray(scores, dtype=np.float64)
    first, second = np.triu_indices(len(values), k=1)
    return values[first] - values[second]


# ---------------------------------------------------------------------------------------------------------------------


def _agrees(judge: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Whether the judge has a side and it is the people's, (n,) bool."""
    return np.sign(judge) * np.sign(people) > 0


def _counted(earned: np.ndarray, counted: np.ndarray) -> Credits:
    possible = counted.astype(np.float64)
    return Credits(earned.astype(np.float64) * possible, possible)


def _means(margins: np.ndarray, firsts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The mean margin of each image against the others, rounded so that equal ones are equal."""
    if len(margins) == 0:
        return np.zeros(1)
    names, place = np.unique(np.concatenate([firsts, seconds]).astype(str), return_inverse=True)
    signed = np.concatenate([margins, -margins])
    means = np.bincount(place, weights=signed) / np.bincount(place)
    largest = np.abs(means).max()
    return np.round(means / largest, 12) if largest > 0 else np.zeros(len(names))
