"""Each protocol against the published rule written out anew, against scipy, and against published numbers."""

from __future__ import annotations

import csv
import json
import random
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau, rankdata, spearmanr

from listener_reward.errors import InputError
from listener_reward.evaluate import protocols as p

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NAN = float("nan")


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


@pytest.fixture
def lists() -> list[tuple[list[float], list[int]]]:
    """Scores and human ranks (1 = best, ties allowed) of the images of forty prompts; scores tie now and then."""
    rng = random.Random(0)
    return [
        ([rng.choice([rng.random(), 0.5]) for _ in range(n)], [rng.randint(1, n) for _ in range(n)])
        for n in [rng.randint(2, 9) for _ in range(40)]
    ]


def as_pairs(lists: list[tuple[list[float], list[int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Judge's margins, people's margins and prompts of all pairs of every list."""
    judge = np.concatenate([p.all_pairs(scores) for scores, _ in lists])
    people = np.concatenate([p.all_pairs([-rank for rank in ranks]) for _, ranks in lists])
    sizes = [len(ranks) * (len(ranks) - 1) // 2 for _, ranks in lists]
    return judge, people, np.repeat(np.arange(len(lists)), sizes)


# ---------------------------------------------------------------------------------------------------------------------
# ImageReward and HPSv2, as their scripts loop over lists
# ---------------------------------------------------------------------------------------------------------------------


def right_and_all(scores: list[float], ranks: list[int]) -> tuple[int, int]:
    """Both scripts' rule for one list: pairs with equal ranks are skipped, equal scores are wrong."""
    right = total = 0
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            total += 1
            right += (scores[i] > scores[j]) if ranks[i] < ranks[j] else (scores[i] < scores[j])
    return right, total


def test_imagereward_pools_and_hpsv2_averages(lists):
    judge, people, prompts = as_pairs(lists)
    counts = [right_and_all(*one) for one in lists]
    assert p.imagereward(judge, people).value == pytest.approx(sum(r for r, _ in counts) / sum(t for _, t in counts))
    per_prompt = [right / total for right, total in counts if total]
    assert p.hpsv2(judge, people, prompts).value == pytest.approx(np.mean(per_prompt))
    assert p.imagereward(judge, people).value != pytest.approx(np.mean(per_prompt))  # the two are not the same number


def test_hpsv3_ranking_counts_over_all_prompts(lists):
    """`calc_rank_acc`, one pair at a time: lower ranks are better, and one pair of counters serves all prompts."""
    right = total = 0
    for scores, ranks in lists:
        for i, j in combinations(range(len(ranks)), 2):
            if ranks[i] != ranks[j]:
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                right += scores[better] > scores[worse]
                total += 1
    judge, people, prompts = as_pairs(lists)
    assert p.hpsv3_ranking(judge, people).value == pytest.approx(right / total)
    assert p.hpsv3_ranking(judge, people).value != pytest.approx(p.hpsv2(judge, people, prompts).value)


def test_a_prompt_on_which_people_are_always_split_is_left_out():
    judge, people, prompts = array(1, 1, 1), array(0, 1, -1), np.array([0, 1, 1])
    credits = p.hpsv2(judge, people, prompts)
    assert credits.value == 0.5
    assert credits.possible.tolist() == [0, 0.5, 0.5]
    assert p.imagereward(array(1), array(0)).value is None


def test_inversion_score_of_the_published_loop(lists):
    """`inversion_score` over rankings made by a stable argsort, so that an exact tie goes to the earlier image."""

    def inversion_score(one: list[int], two: list[int]) -> float:
        n, count = len(one), 0
        for i in range(n - 1):
            for j in range(i + 1, n):
                count += (one[i] > one[j] and two[i] < two[j]) or (one[i] < one[j] and two[i] > two[j])
        return 1 - count / (n * (n - 1) / 2)

    expected = []
    for scores, ranks in lists:
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        expected.append(inversion_score([order.index(i) for i in range(len(scores))], ranks))
    assert p.hpsv2_inversion(*as_pairs(lists)).value == pytest.approx(np.mean(expected))


def test_inversion_ties_go_to_the_published_first_whatever_is_shown():
    judge, people, prompts = array(0, 0), array(1, -1), np.array([0, 1])  # both: the winner is published first
    assert p.hpsv2_inversion(judge, people, prompts, np.array([False, True])).value == 1
    assert p.hpsv2_inversion(judge, -people, prompts, np.array([False, True])).value == 0
    assert p.hpsv2_inversion(judge, people, prompts).value == 0.5, "without a shuffle the first image is it"


def test_without_ties_all_rank_protocols_are_one_and_follow_kendall():
    """With no tie on either side the fraction of concordant pairs is (tau + 1) / 2."""
    rng = np.random.default_rng(0)
    lists = [(rng.normal(size=6).tolist(), rng.permutation(6).tolist()) for _ in range(10)]
    judge, people, prompts = as_pairs(lists)
    concordant = np.mean([(kendalltau(scores, [-r for r in ranks]).statistic + 1) / 2 for scores, ranks in lists])
    for rule in (p.hpsv2, p.hpsv2_inversion):
        assert rule(judge, people, prompts).value == pytest.approx(concordant)
    assert p.hpsv3_ranking(judge, people).value == pytest.approx(concordant), "all prompts are of one size"


def test_pairs_with_a_winner():
    judge, people = array(2, -1, 0, NAN), array(1, 1, 1, 1)  # right, wrong, a tie and no answer: both wrong
    for rule in (p.hpsv3_pair, p.videogen_without_ties, p.genai_bench_diff):
        assert rule(judge, people).value == 0.25
        assert rule(judge, -people).value == 0.25


def test_a_missing_answer_is_never_right():
    judge, people, prompts = array(NAN, NAN), array(0, 1), np.array([0, 1])
    assert p.hpsv2_inversion(judge, people, prompts).value == 0
    assert p.videoscore(judge, people).value == 0
    assert p.with_ties(judge, people, threshold=1.0, half=0.5).value == 0


# ---------------------------------------------------------------------------------------------------------------------
# Ties
# ---------------------------------------------------------------------------------------------------------------------


def three_way(judge: np.ndarray, people: np.ndarray, threshold: float, half: float) -> float:
    """PickScore's `get_pred` and `calc_score`, one pair at a time; VideoAlign's counts where `half` is 0, of which an
    exact zero that is no tie is discordant."""
    total = 0.0
    for m, h in zip(judge.tolist(), people.tolist(), strict=True):
        prediction = 0 if abs(m) <= threshold else 1 if m > 0 else -1 if m < 0 else None
        label = 0 if h == 0 else 1 if h > 0 else -1
        total += 1 if prediction == label else half if 0 in (prediction, label) else 0
    return total / len(judge)


@pytest.mark.parametrize("half", [0.0, 0.5])
def test_three_ways_pair_by_pair(half):
    rng = np.random.default_rng(1)
    judge, people = rng.normal(size=200).round(1), rng.integers(-1, 2, size=200).astype(float)
    for threshold in (-1, 0, 0.3, 5):
        credits = p.with_ties(judge, people, threshold, half=half)
        assert credits.value == pytest.approx(three_way(judge, people, threshold, half))
    assert p.pickscore(judge, people, 0.3).value == pytest.approx(three_way(judge, people, 0.3, 0.5))


@pytest.mark.parametrize("half", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_is_the_best_of_all(seed, half):
    """Against trying -1 and every |margin| one after another; margins are rounded, so that many are equal."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 30))
    judge, people = rng.normal(size=n).round(1), rng.integers(-1, 2, size=n).astype(float)
    tried = {t: three_way(judge, people, t, half) for t in sorted({-1.0, *np.abs(judge).tolist()})}
    found = p.best_tie_threshold(judge, people, half=half)
    assert tried[found] == pytest.approx(max(tried.values()))
    assert found == min(t for t, value in tried.items() if value == pytest.approx(max(tried.values())))
    shuffled = rng.permutation(n)
    assert p.best_tie_threshold(judge[shuffled], people[shuffled], half=half) == found


def test_where_the_published_tie_calibration_goes_wrong():
    # One right pair scores 0 there and four right pairs 0.75, because no tie at all is never tried.
    assert p.videogen_with_ties(array(1), array(1))[0].value == 1
    assert p.videogen_with_ties(array(1, 2, 3, 4), array(1, 1, 1, 1)) == (pytest.approx(np.ones((2, 4))), -1.0)
    # Equal margins: (0, 1) and (1, 0) with margins (1, 1) score 1.0 and 0.5 there. Either way one of two is possible.
    assert p.videogen_with_ties(array(1, 1), array(0, 1))[0].value == 0.5
    assert p.videogen_with_ties(array(1, 1), array(1, 0))[0].value == 0.5


def test_pickscore_chooses_among_its_own_thresholds():
    judge, people = array(0.05, -0.05, 0.9, -0.9, 0.35), array(0, 0, 1, -1, 0)
    grid = {t: three_way(judge, people, t, 0.5) for t in p.PICKSCORE_GRID.tolist()}
    best = p.best_tie_threshold(judge, people, half=0.5, grid=p.PICKSCORE_GRID)
    assert best == 0.4 == max(grid, key=lambda t: grid[t])
    assert p.pickscore(judge, people, best).value == 1


def test_cross_fitted_thresholds_are_those_of_the_other_half():
    rng = np.random.default_rng(2)
    judge, people = rng.uniform(-1, 1, 60), rng.integers(-1, 2, 60).astype(float)
    prompts = np.repeat(np.arange(20), 3)
    even = prompts % 2 == 0
    thresholds = [
        p.best_tie_threshold(judge[half], people[half], half=0.5, grid=p.PICKSCORE_GRID) for half in (~even, even)
    ]
    credits, found = p.pickscore_cross_fitted(judge, people, prompts)
    assert found == thresholds
    expected = [three_way(judge[h], people[h], t, 0.5) for h, t in zip((even, ~even), thresholds, strict=True)]
    assert credits.value == pytest.approx(np.mean(expected))
    assert p.pickscore_cross_fitted(array(0.9), array(1), np.array([0]))[0].value == 1  # one prompt has no other half


def test_videoscore_uses_its_threshold_on_human_ties_only():
    judge, people = array(0.4, 0.5, -0.1, 0.1), array(0, 0, -1, -1)
    assert p.videoscore(judge, people).earned.tolist() == [1, 0, 1, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Words, and both orders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right_for"),
    [
        ("I prefer the left. [[A>B]]", {"leftvote"}),
        ("[[A>>B]]", {"leftvote"}),
        ("[[B>A]]", {"rightvote"}),
        ("[[B>>A]]", {"rightvote"}),
        ("[[A=B=Good]]", {"tievote"}),
        ("[[A=B=Bad]]", {"bothbad_vote"}),
        ("[[A=B]]", {"tievote", "bothbad_vote"}),
        ("not [[B>A]] but [[A>B]]", set()),  # greedy: one label that is none
        ("not [[B>A]]\nbut [[A>B]]", {"rightvote"}),  # the first line's
        ("[[ A>B ]]", set()),
        ("A>B", set()),
        ("", set()),
        (None, set()),
    ],
)
def test_genai_bench_labels(answer, right_for):
    votes = ["leftvote", "rightvote", "tievote", "bothbad_vote"]
    earned = p.genai_bench([answer] * 4, votes).earned
    assert {vote for vote, one in zip(votes, earned, strict=True) if one} == right_for


def test_genai_bench_refuses_another_vote():
    with pytest.raises(InputError, match=r"votes\[1\] is 'left'"):
        p.genai_bench(["[[A>B]]"] * 2, ["leftvote", "left"])
    with pytest.raises(InputError, match="2 entries and votes 1"):
        p.genai_bench(["[[A>B]]"] * 2, ["leftvote"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published votes are not on this machine")
@pytest.mark.parametrize(
    ("task", "judge", "published"),
    [
        ("image", "gpt4o", 45.59),
        ("video", "gpt4o", 48.46),
        ("image", "gemini-1.5-pro", 44.67),
        ("video", "gemini-1.5-pro", 46.21),
        ("image", "llava", 37.00),
        ("video", "llava", 30.40),
        ("image", "idefics1", 0.81),
        ("video", "videollava", 0.00),
    ],
)
def test_genai_bench_gives_the_recorded_judges_their_published_numbers(task, judge, published):
    with (SHARED / "genai_bench" / f"votes_{task}_generation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    credits = p.genai_bench([row[judge] for row in rows], [row["human_vote"] for row in rows])
    assert len(rows) == {"image": 1735, "video": 1069}[task]
    assert round(100 * (credits.value or 0), 2) == published


def test_mmrb2_counts_each_order_and_drops_what_is_missing():
    people = array(1, 1, -1, -1, 0)
    forward, reverse = array(1, -1, NAN, 0, 1), array(1, 1, -1, NAN, 1)
    # Right: both, one of two, one of one, none of one (a tie is no A and no B); people's tie does not count.
    credits = p.mmrb2(forward, reverse, people)
    assert credits.earned.tolist() == [2, 1, 1, 0, 0] and credits.possible.tolist() == [2, 2, 1, 1, 0]
    assert credits.value == pytest.approx(4 / 6)
    always_first = np.ones(4)
    assert p.mmrb2(always_first, -always_first, array(1, 1, 1, -1)).value == 0.5  # whatever the labels


# ---------------------------------------------------------------------------------------------------------------------
# Rankings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tau-b", "tau-c", "spearman"])
def test_rank_correlation_is_scipys_on_the_lists_themselves(lists, method):
    functions = {
        "tau-b": kendalltau,
        "tau-c": lambda a, b: kendalltau(a, b, variant="c"),
        "spearman": spearmanr,
    }
    expected = [
        functions[method](scores, [-rank for rank in ranks]).statistic
        for scores, ranks in lists
        if len(set(scores)) > 1 and len(set(ranks)) > 1
    ]
    names = [list(combinations([f"image {i}" for i in range(len(ranks))], 2)) for _, ranks in lists]
    firsts, seconds = zip(*chain.from_iterable(names), strict=True)
    order = np.random.default_rng(0).permutation(len(firsts))  # and the pairs may come in any order, and swapped
    judge, people, prompts = as_pairs(lists)
    turn = np.where(order % 3 == 0, -1, 1)
    sides = np.array([firsts, seconds])[:, order]
    sides = np.where(turn < 0, sides[::-1], sides)
    credits = p.rank_correlation(
        judge[order] * turn, people[order] * turn, prompts[order], sides[0].tolist(), sides[1].tolist(), method
    )
    assert len(expected) < len(lists)  # some prompt has no order at all
    assert credits.value == pytest.approx(np.mean(expected))


def test_people_s_shares_give_the_order_of_their_mean_ranks():
    ranks = np.array([[1, 2, 3, 4], [2, 1, 4, 3], [1, 3, 2, 4]])  # three annotators, four images
    firsts, seconds = np.triu_indices(4, k=1)
    shares = (ranks[:, firsts] < ranks[:, seconds]).mean(0)
    scores = [0.9, 0.1, 0.5, 0.2]
    credits = p.rank_correlation(
        p.all_pairs(scores),
        shares - 0.5,
        np.zeros(6),
        firsts.astype(str).tolist(),
        seconds.astype(str).tolist(),
        "spearman",
    )
    assert credits.value == pytest.approx(spearmanr(scores, -ranks.mean(0)).statistic)


def test_a_prompt_without_an_answer_has_no_order():
    credits = p.rank_correlation(array(NAN, 1), array(1, 1), np.array([0, 1]), ["a", "c"], ["b", "d"], "tau-b")
    assert credits.value == 1 and credits.possible.tolist() == [0, 1]


def test_a_ranking_of_edits_is_right_with_all_its_pairs():
    # Rankings of one pair: right, a tie of people with a margin of 0.1, wrong. One of three pairs: all right. One of
    # six: five right.
    judge = array(0.5, 0.1, -0.4, 1, 2, 1, 1, 1, 1, 1, 1, -1)
    people = array(1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    rankings = np.array([0, 1, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4])
    credits, threshold = p.editreward_bench(judge, people, rankings)
    assert threshold == 0.1 and credits.value == pytest.approx(3 / 5)
    assert [round(float(credits.possible[rankings == k].sum()), 9) for k in range(5)] == [1] * 5
    assert p.editreward_bench(judge, people, rankings, 0.0)[0].value == pytest.approx(2 / 5)
    # The threshold is for ties of people only: the first pair is right however near to zero its margin is.
    assert p.editreward_bench(judge, people, rankings, 10.0)[0].value == pytest.approx(3 / 5)
    judge[3] = NAN
    assert p.editreward_bench(judge, people, rankings)[0].value == pytest.approx(2 / 5)


def test_the_overall_of_edit_rankings_pools_them_as_the_paper_does():
    """K = 2, 3, 4 have 186, 150, 148 rankings; EditReward on MiMo-VL has 105, 64 and 17 of them right, by its table."""
    sizes, right = np.repeat([1, 3, 6], [186, 150, 148]), np.zeros(484, dtype=bool)
    right[:105] = right[186:250] = right[336:353] = True
    rankings = np.repeat(np.arange(484), sizes)
    judge = np.where(np.repeat(right, sizes), 1.0, -1.0)
    credits, _ = p.editreward_bench(judge, np.ones(len(judge)), rankings)
    assert len(judge) == 1524 and round(100 * (credits.value or 0), 2) == 38.43  # 38.42 in the table
    parts = [credits.earned[np.repeat(sizes, sizes) == size].sum() / n for size, n in ((1, 186), (3, 150), (6, 148))]
    assert np.round(100 * np.array(parts), 2).tolist() == [56.45, 42.67, 11.49]


def test_kinds_of_edit_count_alike_whatever_their_number():
    judge, people, kinds = array(1, 1, 1, -1, 0), array(1, 1, 1, 1, 1), np.array([0, 0, 0, 1, 1])
    assert p.editscore_bench(judge, people, kinds).value == 0.5 and p.imagereward(judge, people).value == 0.6


# ---------------------------------------------------------------------------------------------------------------------
# Published facts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="ImageReward's labels are not on this machine")
def test_always_first_in_imagerewards_test_labels():
    """466 prompts, 831 tied and 6,399 untied pairs; the file's order leaks: always first is right on 59.0 %."""
    records = json.loads((SHARED / "imagereward" / "test.json").read_text())
    people = np.concatenate([p.all_pairs([-rank for rank in record["ranking"]]) for record in records])
    credits = p.imagereward(np.ones(len(people)), people)
    assert (len(records), int((people == 0).sum()), int(credits.possible.sum())) == (466, 831, 6399)
    assert round(100 * (credits.value or 0), 1) == 59.0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the HPDv2 gallery is not on this machine")
def test_the_agreement_of_people_on_the_hpdv2_pictures():
    """Ten full rankings of each of twelve prompts: how well one person predicts another, and the mean of the others.

    The expectation goes another way: without ties, the fraction of concordant pairs is (Kendall's tau + 1) / 2.
    """
    records = json.loads((SHARED / "hpdv2" / "annotations.json").read_text())
    ones, others, prompts, expected, mean_of_others = [], [], [], [], []
    for number, record in enumerate(records):
        ranks = np.array(record["annotator_ranks"])
        for one, other in combinations(ranks, 2):
            ones.append(p.all_pairs(-one))
            others.append(p.all_pairs(-other))
            prompts.append(np.full(len(ones[-1]), number))
            expected.append((kendalltau(one, other).statistic + 1) / 2)
        for person in range(len(ranks)):
            rest = rankdata(np.delete(ranks, person, axis=0).mean(0).round(9))
            margins = p.all_pairs(-ranks[person]), p.all_pairs(-rest)
            mean_of_others.append(p.hpsv2_inversion(*margins, np.zeros(36)).value)
    arrays = np.concatenate(ones), np.concatenate(others)
    agreement = p.imagereward(*arrays).value
    assert agreement == pytest.approx(np.mean(expected))
    assert p.hpsv2(*arrays, np.concatenate(prompts)).value == pytest.approx(agreement)  # prompts are of one size
    assert round(100 * (agreement or 0), 1) == 80.3
    assert round(100 * float(np.mean(mean_of_others)), 1) == 85.4
