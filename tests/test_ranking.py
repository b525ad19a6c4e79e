"""Bradley-Terry against worked cases and an independent optimiser; schedules against what they promise."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import kendalltau

from listener_reward.calibration.maps import Curve
from listener_reward.errors import InputError, JudgeError
from listener_reward.ranking import VOTES, estimate_votes, fit_bradley_terry, next_round, pairings, rank_images


def test_one_win_worked_by_hand():
    # Scores are (s, -s). The slope of log sigmoid(2s) - 2 s^2 / (2 t^2) in s is zero where 1 - sigmoid(2s) = s / t^2.
    # With s = ln(3)/2, sigmoid(2s) = 3/4, so t^2 = s / (1/4) = 2 ln 3.
    # Curvature: [[v + l, -v], [-v, v + l]], v = 3/4 * 1/4, l = 1/t^2; its inverse has (v + l) / (l (2v + l)) twice.
    v, precision = 3 / 16, 1 / (2 * math.log(3))
    scores, errors = fit_bradley_terry(2, [(0, 1, 1.0)], prior_std=math.sqrt(2 * math.log(3)))
    assert scores == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-12)
    assert errors == pytest.approx([math.sqrt((v + precision) / (precision * (2 * v + precision)))] * 2, abs=1e-6)


def test_one_tie_worked_by_hand():
    # v = l = 1/4: the variance is (1/2) / (1/4 * 3/4) = 8/3, below the prior's 4: a tie is information.
    scores, errors = fit_bradley_terry(2, [(0, 1, 0.5)], prior_std=2.0)
    assert scores == pytest.approx([0, 0], abs=1e-12)
    assert errors == pytest.approx([math.sqrt(8 / 3)] * 2)


def test_nothing_known_gives_the_prior():
    scores, errors = fit_bradley_terry(3, [], prior_std=1.5)
    assert scores.tolist() == [0, 0, 0]
    assert errors == pytest.approx([1.5] * 3)


@pytest.mark.parametrize("prior_std", [0.1, 2.0, 50.0])
def test_agrees_with_an_independent_optimiser(prior_std):
    rng = np.random.default_rng(0)
    n, outcomes = 6, []
    for _ in range(20):
        i, j = rng.choice(6, 2, replace=False)
        outcomes.append((int(i), int(j), float(rng.random())))

    def loss(s):
        fit = sum(p * np.log(expit(s[i] - s[j])) + (1 - p) * np.log(expit(s[j] - s[i])) for i, j, p in outcomes)
        return -fit + np.sum(s**2) / (2 * prior_std**2)

    scores, _ = fit_bradley_terry(n, outcomes, prior_std=prior_std)
    assert scores == pytest.approx(minimize(loss, np.zeros(n), tol=1e-10).x, abs=1e-4)
    assert scores.mean() == pytest.approx(0, abs=1e-12)


def test_recovers_the_scores_that_made_the_outcomes():
    true = np.array([-2.0, -0.5, 0.5, 2.0])
    outcomes = [(i, j, float(expit(true[i] - true[j]))) for i in range(4) for j in range(i)]
    assert fit_bradley_terry(4, outcomes, prior_std=1e3)[0] == pytest.approx(true, abs=1e-4)


@pytest.mark.parametrize("prior_std", [1e-3, 2.0, 1e3])
def test_converges_where_one_image_wins_everything(prior_std):
    outcomes = [(i, j, 1.0) for i in range(12) for j in range(i + 1, 12)]
    scores, errors = fit_bradley_terry(12, outcomes, prior_std=prior_std)
    won = np.arange(11, -1, -1)
    expected = expit(scores[:, None] - scores).sum(1) - 0.5  # less the half that meeting oneself would count
    assert won - expected == pytest.approx(scores / prior_std**2, abs=1e-6)  # the gradient is zero
    assert (np.diff(scores) < 0).all() and np.isfinite(errors).all()


def test_renaming_the_images_renames_the_scores():
    outcomes = [(0, 1, 0.9), (1, 2, 0.3), (0, 3, 0.6)]
    names = [2, 0, 3, 1]
    scores, errors = fit_bradley_terry(4, outcomes)
    renamed, renamed_errors = fit_bradley_terry(4, [(names[i], names[j], p) for i, j, p in outcomes])
    assert renamed[names] == pytest.approx(scores)
    assert renamed_errors[names] == pytest.approx(errors)


def test_the_order_within_an_outcome_does_not_matter():
    assert fit_bradley_terry(2, [(0, 1, 0.8)])[0] == pytest.approx(fit_bradley_terry(2, [(1, 0, 0.2)])[0])


def test_errors_shrink_with_comparisons():
    errors = [fit_bradley_terry(3, [(0, 1, 0.6), (1, 2, 0.6)] * times)[1][0] for times in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("n", "outcomes", "prior_std", "field"),
    [
        (0, [], 2.0, "n is 0"),
        (2, [(0, 2, 0.5)], 2.0, "0..1"),
        (2, [(-1, 0, 0.5)], 2.0, "0..1"),
        (2, [(1, 1, 0.5)], 2.0, "different"),
        (2, [(0, 1, 1.01)], 2.0, "probability"),
        (2, [(0, 1, math.nan)], 2.0, "probability"),
        (2, [], 0.0, "prior_std"),
        (2, [], math.inf, "prior_std"),
    ],
)
def test_refuses_what_makes_no_sense(n, outcomes, prior_std, field):
    with pytest.raises(InputError, match=field):
        fit_bradley_terry(n, outcomes, prior_std=prior_std)


def test_few_images_all_meet():
    assert pairings(1) == []
    assert pairings(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert len(pairings(8)) == 28


@pytest.mark.parametrize("n", [9, 10, 11, 12, 13, 16, 24, 33, 64, 101, 256])
def test_many_images_meet_seven_or_eight_others_a_few_meetings_apart(n):
    pairs = pairings(n)
    assert len(set(pairs)) == len(pairs) and all(0 <= i < j < n for i, j in pairs)
    assert set(Counter(k for pair in pairs for k in pair).values()) == {7 if n % 2 == 0 else 8}

    others = {k: {i + j - k for i, j in pairs if k in (i, j)} for k in range(n)}
    reached, steps = {0}, 0
    while len(reached) < n:
        reached |= {m for k in reached for m in others[k]}
        steps += 1
    assert steps <= (4 if n < 128 else 6)  # a ring of nearest neighbours would need 32 steps for 256 images


def test_ranking_asks_once_for_every_pair_and_orders_by_score():
    quality, asked = [0.0, 2.0, -1.0, 1.0], []

    def compare_batch(pairs):
        asked.append(pairs)
        return [float(expit(quality[i] - quality[j])) for i, j in pairs]

    ranking = rank_images(compare_batch, 4)
    assert ranking.order == [1, 3, 0, 2]
    assert asked == [[(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]] and ranking.comparisons == 6
    assert sum(ranking.scores) == pytest.approx(0)
    assert json.loads(json.dumps(ranking.to_dict())) == ranking.to_dict()


def test_equal_images_keep_the_order_given():
    assert rank_images(lambda pairs: [0.5] * len(pairs), 5).order == [0, 1, 2, 3, 4]


def test_one_image_is_ranked_without_a_comparison():
    def never(pairs):
        raise AssertionError("nothing to compare")

    ranking = rank_images(never, 1, prior_std=1.5)
    assert (ranking.order, ranking.scores, ranking.standard_errors, ranking.comparisons) == ([0], [0.0], [1.5], 0)


def test_no_image_cannot_be_ranked():
    with pytest.raises(InputError, match="0 images"):
        rank_images(lambda pairs: [], 0)


@pytest.mark.parametrize("outcomes", [[0.5, math.nan, 0.5], [0.5, 1.2, 0.5], [0.5, 0.5], [0.5] * 4])
def test_a_broken_judge_is_no_ranking(outcomes):
    with pytest.raises(JudgeError):
        rank_images(lambda pairs: outcomes, 3)


# ---------------------------------------------------------------- votes, rounds and budgets


def a_judge(n, error, seed):
    """p (n, n) of a judge whose log-odds are score differences, each with an error of its own."""
    rng = np.random.default_rng(seed)
    scores, errors = rng.normal(0, 2, n), np.triu(rng.normal(0, error, (n, n)), 1)
    return expit(scores[:, None] - scores + errors - errors.T)


def all_outcomes(p):
    return [(i, j, float(p[i, j])) for i, j in combinations(range(len(p)), 2)]


def test_votes_are_repeated_outcomes():
    outcomes = [(0, 1, 0.9), (1, 2, 0.3)]
    many = fit_bradley_terry(3, outcomes * 5)
    assert fit_bradley_terry(3, outcomes, votes=5)[0] == pytest.approx(many[0])
    assert fit_bradley_terry(3, outcomes, votes=5)[1] == pytest.approx(many[1])
    with pytest.raises(InputError, match="votes is 0"):
        fit_bradley_terry(3, outcomes, votes=0)


def test_the_votes_that_made_the_outcomes_are_found():
    """Each outcome is the fraction of k voters, so an outcome is worth k votes."""
    for k in (4, 16, 64):
        rng = np.random.default_rng(k)
        true = rng.normal(0, 1, 24)
        outcomes = [(i, j, rng.binomial(k, expit(true[i] - true[j])) / k) for i, j in combinations(range(24), 2)]
        assert estimate_votes(24, outcomes) == pytest.approx(k, rel=0.3)


def test_a_judge_that_contradicts_itself_is_worth_one_vote_and_its_errors_are_wide():
    cycle = [(i, j, 0.99 if (j - i) % 7 < 4 else 0.01) for i, j in combinations(range(7), 2)]
    assert estimate_votes(7, cycle) < 2
    ranking = rank_images(lambda pairs: [p for _, _, p in cycle], 7)
    assert np.ptp(ranking.scores) < min(ranking.standard_errors)
    consistent = rank_images(lambda pairs: [p for _, _, p in all_outcomes(a_judge(7, 0.0, 0))], 7)
    assert max(consistent.standard_errors) < min(ranking.standard_errors)
    assert estimate_votes(5, []) == VOTES


def test_standard_errors_say_how_far_scores_are_off():
    """Over many noisy judges, a score lies within its standard error of the truth two times in three."""
    inside = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        true = rng.normal(0, 2, 8)
        p = rng.binomial(10, expit(true[:, None] - true)) / 10
        ranking = rank_images(lambda pairs, p=p: [p[i, j] for i, j in pairs], 8)
        inside += (np.abs(ranking.scores - (true - true.mean())) < ranking.standard_errors).tolist()
    assert 0.6 < np.mean(inside) < 0.85


def test_a_round_has_new_pairs():
    outcomes = []
    p = a_judge(9, 0.5, 1)
    for _ in range(9):
        pairs = next_round(9, outcomes, 4)
        assert len(set(pairs)) == 4 and all(0 <= i < j < 9 for i, j in pairs)
        assert not set(pairs) & {outcome[:2] for outcome in outcomes}
        outcomes += [(i, j, float(p[i, j])) for i, j in pairs]
    assert next_round(9, outcomes, 4) == []  # all 36 have been compared
    turned = [(j, i, 1 - p) for i, j, p in outcomes[:-1]]
    assert next_round(9, turned, 4) == [outcomes[-1][:2]]


@pytest.mark.parametrize("n", [2, 5, 16, 33])
def test_as_few_pairs_as_can_connect_all_images(n):
    """With nothing known, n - 1 pairs place every image; none is spent where two are already connected."""
    component = list(range(n))
    for i, j in next_round(n, [], n - 1):
        assert component[i] != component[j]
        component = [component[i] if c == component[j] else c for c in component]
    assert len(set(component)) == 1


def test_a_round_asks_where_the_order_is_in_doubt():
    # 0 beats 2 and 1 beats 3 by as much, so 0 against 1 and 2 against 3 are open, and 0 against 3 is not.
    assert next_round(4, [(0, 2, 0.95), (1, 3, 0.95)], 2) == [(0, 1), (2, 3)]


@pytest.mark.parametrize("n", range(1, 65))
def test_any_number_of_images_under_any_budget(n):
    p, asked = a_judge(n, 0.5, n), []

    def compare_batch(pairs):
        asked.append(pairs)
        return [p[i, j] for i, j in pairs]

    every = n * (n - 1) // 2
    budget = max(1, every // 5)
    ranking = rank_images(compare_batch, n, budget=budget)
    made = [pair for pairs in asked for pair in pairs]
    assert ranking.comparisons == len(made) == len(set(made)) == min(budget, every)
    assert sorted(ranking.order) == list(range(n)) and np.isfinite(ranking.standard_errors).all()
    assert all(len(pairs) <= max(n // 2, 1) for pairs in asked)
    assert len(asked) <= 2 + budget // max(n // 4, 1)  # batches and not one by one


def test_a_budget_that_is_enough_is_the_round_robin():
    p = a_judge(6, 0.5, 0)

    def compare_batch(pairs):
        return [p[i, j] for i, j in pairs]

    assert rank_images(compare_batch, 6, budget=15) == rank_images(compare_batch, 6, budget=99)
    assert rank_images(compare_batch, 6, budget=15) == rank_images(compare_batch, 6)


@pytest.mark.parametrize("budget", [0, -1, 2.5, True])
def test_a_budget_is_a_number_of_comparisons(budget):
    with pytest.raises(InputError, match="budget"):
        rank_images(lambda pairs: [0.5] * len(pairs), 4, budget=budget)


def test_equal_images_under_a_budget_keep_the_order_given():
    ranking = rank_images(lambda pairs: [0.5] * len(pairs), 12, budget=20)
    assert ranking.order == list(range(12))
    assert ranking.scores == pytest.approx([0] * 12)


@pytest.mark.parametrize(("n", "share", "groups"), [(16, 0.25, 16), (64, 0.08, 3)])
def test_few_comparisons_order_a_group_as_all_would(n, share, groups):
    """The promise of docs/ranking.md, for a judge whose log-odds err by a quarter; random pairs do not keep it."""
    ours, drawn = [], []
    for seed in range(groups):
        p, rng = a_judge(n, 0.25, seed), np.random.default_rng(seed)

        def compare_batch(pairs, p=p):
            return [p[i, j] for i, j in pairs]

        full = rank_images(compare_batch, n).scores
        budget = int(share * n * (n - 1) / 2)
        ours.append(np.asarray(kendalltau(rank_images(compare_batch, n, budget=budget).scores, full))[0])
        outcomes = [all_outcomes(p)[k] for k in rng.permutation(n * (n - 1) // 2)[:budget]]
        scores, _ = fit_bradley_terry(n, outcomes, votes=estimate_votes(n, outcomes))
        drawn.append(np.asarray(kendalltau(scores, full))[0])
    assert np.mean(ours) >= 0.95
    assert np.mean(drawn) < np.mean(ours) - 0.01


# ---------------------------------------------------------------- the embedded judge


@pytest.fixture(scope="module")
def tiny():
    from listener_reward import Judge

    return Judge.from_pretrained("tiny", listener="none", think=False)


def shades(n):
    return [Image.new("RGB", (64, 64), (200 * k // n + 30, 40, 60)) for k in range(n)]


def test_a_judge_compares_in_batches_under_a_budget(tiny, monkeypatch):
    sizes, answers = [], tiny.judgements

    def counted(prompts, firsts, seconds, **options):
        sizes.append(len(prompts))
        return answers(prompts, firsts, seconds, **options)

    monkeypatch.setattr(tiny, "judgements", counted)
    ranking = tiny.rank("a red circle", shades(12), budget=20)
    assert (sizes, ranking.comparisons) == ([6, 3, 3, 3, 3, 2], 20)
    sizes.clear()
    assert tiny.rank("a red circle", shades(5), budget=1000).comparisons == 10 and sizes == [10]
    sizes.clear()
    assert tiny.rank("a red circle", shades(1), budget=3).order == [0] and sizes == []


@pytest.mark.parametrize("budget", [None, 1, 5])
def test_a_judge_scores_equal_images_equally(tiny, budget):
    ranking = tiny.rank("a red circle", shades(1) * 4, budget=budget)
    assert ranking.order == [0, 1, 2, 3] and ranking.scores == pytest.approx([0] * 4)


def test_two_equal_images_among_others_are_neighbours(tiny):
    one, two, three = shades(3)
    ranking = tiny.rank("a red circle", [one, two, three, two])
    assert ranking.scores[1] == pytest.approx(ranking.scores[3], abs=1e-6)
    assert abs(ranking.order.index(1) - ranking.order.index(3)) == 1


@pytest.mark.parametrize("budget", [None, 16])
def test_copies_share_a_score_and_keep_their_order_under_any_budget(tiny, budget):
    """Compared one by one, copies met different images and came out apart, in either order."""
    images = shades(9)
    given = [images[4], *images, images[7], images[4]]
    ranking = tiny.rank("a red circle", given, budget=budget)
    assert ranking.scores[0] == ranking.scores[5] == ranking.scores[11]
    assert ranking.scores[8] == ranking.scores[10]
    assert ranking.standard_errors[8] == ranking.standard_errors[10]
    places = [ranking.order.index(k) for k in (0, 5, 11)]
    assert places == [places[0], places[0] + 1, places[0] + 2]
    assert ranking.order.index(8) + 1 == ranking.order.index(10)
    assert ranking.comparisons == (36 if budget is None else 16)
    assert sorted(ranking.order) == list(range(12))


def test_what_differs_by_rounding_is_equal():
    p = {(0, 1): 0.3, (0, 2): 0.3 - 1e-13, (1, 2): 0.5}
    ranking = rank_images(lambda pairs: [p[pair] for pair in pairs], 3)
    assert ranking.scores[1] < ranking.scores[2] and ranking.order == [1, 2, 0]


def test_scores_behind_a_curve_are_fitted_before_it_and_calibrated_after():
    """Answers that add up, and a curve that bends them: the order is theirs, the scale that of the calibrated ones."""
    quality = np.array([0.0, 0.3, 0.1, -0.2])
    curve = Curve(((0.1, 0.5), (0.5, 0.9)))

    def compare_batch(pairs):
        return [float(expit(quality[i] - quality[j])) for i, j in pairs]

    bent = rank_images(compare_batch, 4, curve=curve)
    straight = rank_images(compare_batch, 4)
    stretch = bent.scores[1] / straight.scores[1]
    assert bent.scores == pytest.approx([stretch * score for score in straight.scores])
    assert bent.standard_errors == pytest.approx([stretch * error for error in straight.standard_errors])
    pairs = list(combinations(range(4), 2))
    gaps = np.array([straight.scores[i] - straight.scores[j] for i, j in pairs])
    wanted = expit(curve.of(np.array([quality[i] - quality[j] for i, j in pairs])))

    def loss(factor):
        return -np.sum(wanted * np.log(expit(factor * gaps)) + (1 - wanted) * np.log(expit(-factor * gaps)))

    assert stretch == pytest.approx(float(minimize(loss, 1.0, tol=1e-10).x[0]), rel=1e-3)
    assert rank_images(lambda pairs: [0.5] * len(pairs), 3, curve=curve).scores == [0, 0, 0]
    # One curve that only multiplies is found again.
    triple = rank_images(compare_batch, 4, curve=Curve(((1.0, 3.0),)), prior_std=1000.0)
    assert triple.scores == pytest.approx(3 * (quality - quality.mean()), abs=1e-2)


def test_without_thoughts_a_judge_ranks_before_its_curve(tiny):
    """With a curve that flattens, scores are stretched alike and the order and their ratios are the answers' own."""

    def ranked(knots):
        judge = copy.copy(tiny)
        judge.card = replace(
            tiny.card, fast_calibration=replace(tiny.card.fast_calibration, reasoner_curve=Curve(knots), tie_band=0.0)
        )
        return np.array(judge.rank("a red circle", shades(6), budget=8).scores)

    bare, bent = ranked(()), ranked(((0.01, 1.0), (0.5, 1.5)))
    assert np.corrcoef(bare, bent)[0, 1] == pytest.approx(1, abs=1e-9)
    assert np.abs(bent).max() > 1.5 * np.abs(bare).max()


def test_a_round_where_nothing_is_in_doubt_any_more_still_has_pairs():
    outcomes = [(0, 1, 1.0), (1, 2, 1.0)] * 400
    assert next_round(3, outcomes, 2, prior_std=50.0) == [(0, 2)]
