"""Bradley-Terry against worked cases and an independent optimiser; schedules against what they promise."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from listener_reward.errors import InputError, JudgeError
from listener_reward.ranking import fit_bradley_terry, pairings, rank_images


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


@pytest.mark.parametrize("answers", [[0.5, math.nan, 0.5], [0.5, 1.2, 0.5], [0.5, 0.5], [0.5] * 4])
def test_a_broken_judge_is_no_ranking(answers):
    with pytest.raises(JudgeError):
        rank_images(lambda pairs: answers, 3)
