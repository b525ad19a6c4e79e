"""Intervals and tests against scipy, against sampling from a known truth, and by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, permutation_test

from listener_reward.evaluate.intervals import clustered_interval, paired_test, wilson


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def clustered(rng: np.random.Generator, prompts: int, pairs: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Rights and prompts: a prompt's own chance of a right answer is 0.65 + or - `spread`."""
    chance = 0.65 + spread * rng.choice([-1, 1], size=prompts)
    return (rng.random((prompts, pairs)) < chance[:, None]).astype(float).ravel(), np.repeat(np.arange(prompts), pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------------------------


def test_one_pair_a_prompt_is_wilson():
    rights = array(1, 1, 1, 0, 1)
    assert clustered_interval(rights, np.ones(5), np.arange(5)) == wilson(4, 5)
    uncounted = clustered_interval(array(1, 1, 1, 0, 1, 0), array(1, 1, 1, 1, 1, 0), np.arange(6))
    assert uncounted == wilson(4, 5)  # a pair that the protocol leaves out changes nothing


def test_the_bootstrap_is_scipys_over_the_prompts_sums():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 12, size=60)
    prompts = np.repeat(np.arange(60), sizes)
    rights = (rng.random(len(prompts)) < np.repeat(rng.random(60), sizes)).astype(float)
    got, could = np.bincount(prompts, rights), np.bincount(prompts).astype(float)
    reference = bootstrap(
        (got, could),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = clustered_interval(rights, np.ones(len(rights)), prompts, resamples=20_000)
    assert found == pytest.approx((reference.low, reference.high), abs=0.004)


def test_the_bootstrap_worked_out_sample_by_sample():
    """Prompts are drawn by the seed's own integers, and both ends are linear quantiles of the samples' shares."""
    got, could = array(3, 0, 2, 5, 1, 4), array(4, 3, 2, 6, 1, 8)
    prompts = np.repeat(np.arange(6), could.astype(int))
    rights = np.concatenate([np.arange(c) < g for g, c in zip(got, could, strict=True)]).astype(float)
    samples = np.random.default_rng(7).integers(6, size=(500, 6))
    fractions = [sum(got[k] for k in sample) / sum(could[k] for k in sample) for sample in samples]
    expected = pytest.approx(np.quantile(np.array(fractions), (0.025, 0.975)), abs=1e-12)
    assert clustered_interval(rights, np.ones(24), prompts, resamples=500, seed=7) == expected
    # Against a judge that is never right, the difference is the share itself, drawn the same.
    found = paired_test((rights, np.ones(24)), (np.zeros(24), np.ones(24)), prompts, resamples=500, seed=7)
    assert found is not None and found.interval == expected


def test_the_order_of_the_pairs_changes_nothing_and_the_seed_does():
    rights, prompts = clustered(np.random.default_rng(0), 30, 6, 0.2)
    found = clustered_interval(rights, np.ones(180), prompts)
    order = np.random.default_rng(1).permutation(180)
    assert clustered_interval(rights[order], np.ones(180), prompts[order] * 7 - 3) == found
    assert len({clustered_interval(rights, np.ones(180), prompts, seed=seed) for seed in range(5)}) > 1


def test_memory_does_not_change_the_samples(monkeypatch):
    rights, prompts = clustered(np.random.default_rng(0), 30, 6, 0.2)
    whole = clustered_interval(rights, np.ones(180), prompts)
    monkeypatch.setattr("listener_reward.evaluate.intervals._CELLS", 1000)  # 33 samples at a time and not all 2,000
    assert clustered_interval(rights, np.ones(180), prompts) == whole


def test_pairs_of_a_prompt_are_not_independent():
    """Where prompts differ in difficulty, the interval over pairs is too narrow and the one over prompts covers."""
    rng, truth, covered, naive = np.random.default_rng(0), 0.65, 0, 0
    for _ in range(200):
        rights, prompts = clustered(rng, 60, 10, 0.3)
        low, high = clustered_interval(rights, np.ones(600), prompts, resamples=400) or (0, 0)
        covered += low <= truth <= high
        low, high = wilson(int(rights.sum()), 600) or (0, 0)
        naive += low <= truth <= high
    assert covered >= 180 > 160 >= naive  # of 200, where 190 are wanted


def test_equal_credits_that_a_bootstrap_knows_nothing_of():
    prompts = np.repeat(np.arange(5), 3)
    assert clustered_interval(np.ones(15), np.ones(15), prompts) == wilson(5, 5)
    assert clustered_interval(np.zeros(15), np.ones(15), prompts) == wilson(0, 5)
    assert clustered_interval(array(1, 0), np.ones(2), np.zeros(2)) is None  # one prompt says nothing of others
    assert clustered_interval(array(0), array(0), array(0)) is None
    assert wilson(0, 0) is None


# ---------------------------------------------------------------------------------------------------------------------
# Paired tests
# ---------------------------------------------------------------------------------------------------------------------


def credits(*rights: float) -> tuple[np.ndarray, np.ndarray]:
    return array(*rights), np.ones(len(rights))


def test_wilson_is_for_shares_only():
    """A tau of 0 on each of six prompts is no fraction of nothing in six."""
    zeros, ones = np.zeros(6), np.ones(6)
    assert clustered_interval(zeros, ones, np.arange(6)) == wilson(0, 6)
    assert clustered_interval(zeros, ones, np.arange(6), fraction=False) is None
    mixed = clustered_interval(array(1, 1, 1, 1, 0, 0), ones, np.arange(6), fraction=False)
    assert mixed is not None and mixed != wilson(4, 6)
    assert mixed[1] == 1.0, "the bootstrap draws six times a one often enough"


def test_mcnemar_worked_by_hand():
    # Only the first is right on 8 pairs, only the second on 2: P(at most 2 or at least 8 of 10) = 2 * 56 / 1024.
    first, second = [1] * 8 + [0] * 2 + [1] * 5, [0] * 8 + [1] * 2 + [1] * 5
    found = paired_test(credits(*first), credits(*second), np.arange(15))
    assert found is not None
    assert (found.only_first, found.only_second, found.pairs, found.prompts) == (8, 2, 15, 15)
    assert found.difference == pytest.approx(6 / 15)
    assert found.mcnemar_p_value == pytest.approx(112 / 1024) == binomtest(8, 10).pvalue
    # Where every prompt has one pair, exchanging prompt by prompt is the same test.
    assert found.p_value == pytest.approx(112 / 1024)


def test_the_exchange_of_prompts_worked_out_in_full():
    gaps = array(3, 2, -1, 2, 0)  # pairs that the first judge gains in each of five prompts, of three pairs each
    first = np.concatenate([np.where(np.arange(3) < g, 1.0, 0.0) for g in gaps])
    second = np.concatenate([np.where(np.arange(3) < -g, 1.0, 0.0) for g in gaps])
    sums = [abs(np.dot(signs, gaps[:4])) for signs in product((1, -1), repeat=4)]
    found = paired_test((first, np.ones(15)), (second, np.ones(15)), np.repeat(np.arange(5), 3))
    assert found is not None
    assert found.p_value == pytest.approx(np.mean(np.array(sums) >= 6))
    assert found.difference == pytest.approx(6 / 15)


def test_many_prompts_are_exchanged_at_random():
    """Against scipy's own random exchanges, with gaps of several sizes."""
    gaps = np.random.default_rng(0).choice([-2.0, -1.0, 1.0, 1.5, 3.0], size=40)
    second = np.zeros(40)
    found = paired_test((gaps, np.ones(40)), (second, np.ones(40)), np.arange(40))
    reference = permutation_test(
        (gaps,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=20_000, vectorized=True
    )
    assert found is not None
    assert found.p_value == pytest.approx(reference.pvalue, abs=0.02) and 0.001 < found.p_value < 0.2


def test_the_difference_s_interval_knows_that_the_judges_saw_the_same_prompts():
    """Two judges that share nearly all of their luck: each alone is uncertain, their difference is not."""
    rng = np.random.default_rng(0)
    first, prompts = clustered(rng, 200, 5, 0.3)
    second = np.where(rng.random(1000) < 0.04, 0.0, first)
    ones = np.ones(1000)
    found = paired_test((first, ones), (second, ones), prompts)
    alone = clustered_interval(first, ones, prompts)
    assert found is not None and alone is not None
    assert found.interval is not None and found.interval[0] <= found.difference <= found.interval[1]
    assert found.interval[0] > 0 and found.p_value < 0.001
    assert found.interval[1] - found.interval[0] < (alone[1] - alone[0]) / 3


def test_clusters_take_away_a_false_certainty():
    """One prompt with twenty pairs is one observation and not twenty."""
    first = np.concatenate([np.ones(20), array(1, 0, 1, 0)])
    second = np.concatenate([np.zeros(20), array(0, 1, 0, 1)])
    prompts = np.concatenate([np.zeros(20), array(1, 2, 3, 4)])
    found = paired_test((first, np.ones(24)), (second, np.ones(24)), prompts)
    assert found is not None
    assert found.mcnemar_p_value < 0.001 < 0.5 < found.p_value


def test_the_same_judge_twice_and_mirrored_judges():
    judge = credits(1, 0, 1, 1)
    found = paired_test(judge, judge, np.arange(4))
    assert found is not None
    assert (found.difference, found.interval, found.p_value, found.mcnemar_p_value) == (0, (0, 0), 1, 1)
    one, two = credits(1, 1, 1, 0, 0, 1), credits(0, 1, 0, 1, 0, 1)
    ahead, behind = paired_test(one, two, np.arange(6)), paired_test(two, one, np.arange(6))
    assert ahead is not None and behind is not None
    assert ahead.difference == -behind.difference and ahead.p_value == behind.p_value
    assert ahead.interval is not None and behind.interval is not None
    assert ahead.interval == pytest.approx((-behind.interval[1], -behind.interval[0]))
    assert ahead.to_dict()["interval"] == list(ahead.interval)


def test_pairs_that_only_one_judge_was_counted_on_are_left_out():
    found = paired_test((array(1, 0, 1), array(1, 0, 1)), (array(0, 1, 1), np.ones(3)), np.arange(3))
    assert found is not None and found.pairs == 2 and found.difference == 0.5
    assert paired_test((array(0), array(0)), (array(1), array(1)), np.arange(1)) is None


def test_one_prompt_says_nothing_of_others():
    found = paired_test(credits(1, 1, 0), credits(0, 0, 0), np.zeros(3))
    assert found is not None and found.difference == pytest.approx(2 / 3)
    assert (found.interval, found.p_value, found.to_dict()["interval"]) == (None, 1, None)


def test_false_alarms_are_as_rare_as_they_say():
    """Two equally good judges: p below 0.05 in about one of twenty samples."""
    rng, alarms = np.random.default_rng(3), 0
    for _ in range(200):
        first, prompts = clustered(rng, 12, 5, 0.3)
        second, _ = clustered(rng, 12, 5, 0.3)
        found = paired_test((first, np.ones(60)), (second, np.ones(60)), prompts, resamples=2)
        alarms += found is not None and found.p_value < 0.05
    assert alarms <= 20
