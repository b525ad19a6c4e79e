"""Advantages, losses, diversity and the guard against reward hacking, with the working written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from listener_reward.advantages import group_advantages, noise_fraction, normalised_sum
from listener_reward.integrations.ddpo.hacking import HackingGuard
from listener_reward.integrations.ddpo.objectives import (
    PromptStatistics,
    diversity,
    goodness,
    nft_loss,
    ppo_loss,
)

NAN = math.nan


# --- advantages


def test_group_advantages_are_centred_within_the_group():
    rewards, groups = np.array([1.0, 3.0, 10.0, 30.0]), np.array([0, 0, 1, 1])
    # Means 2 and 20; deviations 1 and 10; of all four, mean 11, deviation sqrt((100 + 64 + 1 + 361) / 4) = 11.467.
    assert group_advantages(rewards, groups, std_of="group") == pytest.approx([-1, 1, -1, 1], abs=1e-3)
    assert group_advantages(rewards, groups) == pytest.approx(np.array([-1, 1, -10, 10]) / 11.467, abs=1e-3)


@pytest.mark.parametrize("std_of", ["batch", "group"])
def test_a_missing_reward_changes_nobody_elses_advantage(std_of: str):
    rewards, groups = np.array([1.0, NAN, 3.0, 5.0, 9.0]), np.array([0, 0, 0, 1, 1])
    advantages = group_advantages(rewards, groups, std_of=std_of)  # pyright: ignore[reportArgumentType]
    assert advantages[1] == 0
    known = [0, 2, 3, 4]
    expected = group_advantages(rewards[known], groups[known], std_of=std_of)  # pyright: ignore[reportArgumentType]
    assert advantages[known] == pytest.approx(expected)


def test_a_group_with_one_reward_or_none_has_nothing_to_compare():
    rewards, groups = np.array([1.0, NAN, NAN, NAN, 4.0, 6.0]), np.array([0, 0, 1, 1, 2, 2])
    advantages = group_advantages(rewards, groups)
    assert advantages[:4].tolist() == [0, 0, 0, 0] and advantages[4] < 0 < advantages[5]
    assert group_advantages(np.array([NAN, NAN]), np.array([0, 0])).tolist() == [0, 0]
    assert group_advantages(np.array([2.0, 2.0]), np.array([0, 0])).tolist() == [0, 0]


def test_a_group_whose_spread_is_within_its_errors_does_not_get_unit_variance():
    rewards, groups = np.array([1.0, 3.0, 10.0, 30.0]), np.array([0, 0, 1, 1])
    errors = np.array([3.0, NAN, 3.0, 3.0])
    # Deviations 1 and 10, noise 9: scales sqrt(1 + 9) and sqrt(100 + 9). The unknown error is left out of the mean.
    found = group_advantages(rewards, groups, std_of="group", errors=errors)
    assert found == pytest.approx(np.array([-1, 1, 0, 0]) / 10**0.5 + np.array([0, 0, -10, 10]) / 109**0.5, abs=1e-3)
    # Of the batch: the variance is 131.5, and each group adds its own noise.
    errors = np.array([6.0, 8.0, 0.0, 0.0])
    found = group_advantages(rewards, groups, errors=errors)
    assert found == pytest.approx(
        np.array([-1, 1, 0, 0]) / 181.5**0.5 + np.array([0, 0, -10, 10]) / 131.5**0.5, abs=1e-3
    )


@pytest.mark.parametrize("std_of", ["batch", "group"])
@pytest.mark.parametrize("errors", [[0.0] * 4, [NAN] * 4])
def test_errors_that_are_zero_or_unknown_change_nothing(std_of: str, errors: list[float]):
    rewards, groups, options = np.array([1.0, 3.0, NAN, 30.0]), np.array([0, 0, 1, 1]), {"std_of": std_of}
    found = group_advantages(rewards, groups, errors=np.array(errors), **options)  # pyright: ignore[reportArgumentType]
    assert found.tolist() == group_advantages(rewards, groups, **options).tolist()  # pyright: ignore[reportArgumentType]


def test_more_noise_means_smaller_advantages_in_the_same_order():
    rewards, groups = np.array([0.5, -1.0, 2.0]), np.zeros(3)
    stds = [
        group_advantages(rewards, groups, std_of="group", errors=np.full(3, noise)).std() for noise in (0, 0.5, 1, 5)
    ]
    assert stds == sorted(stds, reverse=True) and stds[0] == pytest.approx(1, abs=1e-3) and stds[3] < 0.3


@pytest.mark.parametrize("std_of", ["batch", "group"])
def test_noise_counts_once_in_the_sum_of_components(std_of: str):
    """One component of one group: normalising the sum again does not blow up what noise has shrunk, nor shrink it."""
    rewards, groups, errors = np.array([1.0, 3.0]), np.zeros(2), np.array([2.0, 2.0])
    sums, noise = normalised_sum({"a": rewards}, {"a": 7.0}, groups, np.full(2, True), errors={"a": errors})
    # Scale sqrt(1 + 4): the sums are 7 x -+0.447, their errors 7 x 0.894, and 0.447^2 + 0.894^2 = 1.
    assert sums == pytest.approx(7 * np.array([-1, 1]) / 5**0.5, abs=1e-3)
    assert noise == pytest.approx(7 * np.array([2, 2]) / 5**0.5, abs=1e-3)
    found = group_advantages(sums, groups, std_of=std_of, errors=noise)  # pyright: ignore[reportArgumentType]
    assert found == pytest.approx(group_advantages(rewards, groups, std_of="group", errors=errors), abs=1e-3)


def test_errors_of_components_add_and_a_sure_component_shrinks_no_other():
    parts, scored = {"sure": np.array([0.0, 2.0]), "vague": np.array([0.0, 2.0])}, np.full(2, True)
    sums, noise = normalised_sum(
        parts, {"sure": 1.0, "vague": 1.0}, np.zeros(2), scored, errors={"vague": np.array([3.0**0.5] * 2)}
    )
    assert sums == pytest.approx([-1.5, 1.5], abs=1e-3) and noise == pytest.approx([3**0.5 / 2] * 2, abs=1e-3)


def test_the_noise_fraction_is_a_mean_over_groups():
    rewards, groups = np.array([1.0, 3.0, 5.0, 5.0, 8.0, NAN]), np.array([0, 0, 1, 1, 2, 2])
    # Variance 1 and noise 3; no variance and noise 3; the third group has one reward.
    assert noise_fraction(rewards, groups, np.full(6, 3**0.5)) == pytest.approx((0.75 + 1) / 2)
    assert noise_fraction(rewards, groups, np.zeros(6)) == 0
    assert math.isnan(noise_fraction(rewards[4:], groups[4:], np.zeros(2)))


def test_prompt_statistics_remember_and_forget():
    statistics = PromptStatistics(size=4, min_count=4)
    first = statistics.advantages(np.array([0.0, 2.0, 10.0]), np.array([7, 7, 8]))
    assert first == pytest.approx((np.array([0, 2, 10]) - 4) / np.std([0, 2, 10]), abs=1e-3)  # the epoch's own
    second = statistics.advantages(np.array([4.0, NAN, 6.0]), np.array([7, 7, 7]))
    assert second == pytest.approx((np.array([4, 3, 6]) - 3) / np.std([0, 2, 4, 6]), abs=1e-3)  # the prompt's
    restored = PromptStatistics(size=4, min_count=4)
    restored.load_state_dict(statistics.state_dict())
    third = [each.advantages(np.array([8.0]), np.array([7])) for each in (statistics, restored)]
    assert third[0] == pytest.approx((8 - 5) / np.std([2, 4, 6, 8]), abs=1e-3) and third[0] == third[1]
    assert statistics.advantages(np.array([NAN]), np.array([7])).tolist() == [0]


# --- losses


def test_ppo_clips_what_goes_too_far_and_leaves_out_what_has_no_reward():
    old = torch.zeros(4)
    log_prob = torch.log(torch.tensor([1.5, 0.5, 0.5, 3.0])).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, 0.0])
    scored = torch.tensor([True, True, True, False])
    loss = ppo_loss(log_prob, old, advantages, scored, 0.2)
    # -min(1.5, 1.2) = -1.2; -min(0.5, 0.8) = -0.5; max(0.5, 0.8) = 0.8; and three are counted.
    assert float(loss.detach()) == pytest.approx((-1.2 - 0.5 + 0.8) / 3)
    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([0, -0.5 / 3, 0, 0])
    assert float(ppo_loss(log_prob.detach(), old, advantages, torch.zeros(4, dtype=torch.bool), 0.2)) == 0


def test_nft_pulls_towards_good_samples_and_away_from_bad_ones():
    x0, old = torch.ones(3, 2), torch.zeros(3, 2)
    predicted = torch.zeros(3, 2, requires_grad=True)
    scored = torch.tensor([True, True, False])
    loss = nft_loss(x0, predicted, old, torch.tensor([1.0, 0.0, 1.0]), scored, beta=1.0)
    # All distances are 1 / 1, so each of the two counted samples loses 1.
    assert float(loss.detach()) == pytest.approx(1.0)
    loss.backward()
    assert predicted.grad is not None
    assert (predicted.grad[0] < 0).all() and (predicted.grad[1] > 0).all() and (predicted.grad[2] == 0).all()
    balanced = torch.zeros(1, 2, requires_grad=True)
    nft_loss(x0[:1], balanced, old[:1], torch.tensor([0.5]), scored[:1], beta=1.0).backward()
    assert balanced.grad is not None and balanced.grad.abs().max() == 0  # an average sample teaches nothing


def test_nft_by_hand_with_another_beta():
    x0, old, predicted = torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2)
    loss = nft_loss(x0, predicted, old, torch.tensor([0.25]), torch.tensor([True]), beta=0.5)
    # Positive 1/2: error 1/2, distance 1/2. Negative -1/2: error 3/2, distance 3/2. (1/4 * 1/2 + 3/4 * 3/2) / (1/2).
    assert float(loss) == pytest.approx(2.5)


def test_goodness_is_a_share():
    assert goodness(np.array([-9.0, -5.0, 0.0, 2.5, 5.0]), 5.0).tolist() == [0, 0, 0.5, 0.75, 1]


def test_diversity_is_the_distance_of_two_images():
    black, white = torch.zeros(3, 40, 40), torch.ones(3, 40, 40)
    assert diversity([torch.stack([black, white])]) == pytest.approx(1)
    assert diversity([torch.stack([black, black, white])]) == pytest.approx(2 / 3)
    assert diversity([torch.stack([black, black])]) == 0
    assert diversity([torch.stack([black, white]).unsqueeze(1).expand(2, 5, 3, 40, 40)]) == pytest.approx(1)  # video
    assert math.isnan(diversity([black.unsqueeze(0)]))


# --- the guard


def rows(n: int, **series: float) -> list[dict[str, float]]:
    """`n` epochs; each quantity starts at 1, the reward at 0, and changes by so much an epoch, with some noise."""
    noise = np.random.default_rng(0).normal(0, 0.01, (n, len(series)))
    starts = [0.0 if name == "reward_mean" else 1.0 for name in series]
    return [
        {name: starts[k] + slope * epoch + noise[epoch, k] for k, (name, slope) in enumerate(series.items())}
        for epoch in range(n)
    ]


def warnings_of(history: list[dict[str, float]]) -> list[str]:
    guard = HackingGuard()
    return [message for row in history for message in guard.update(row)]


def test_the_guard_warns_once_of_what_falls_while_the_reward_rises():
    found = warnings_of(rows(20, reward_mean=0.05, agreement=-0.02, diversity=-0.001))
    assert len(found) == 1 and found[0].startswith("agreement fell")


@pytest.mark.parametrize(
    "history",
    [
        rows(20, reward_mean=0.05, agreement=0.0, diversity=0.0),  # nothing falls
        rows(20, reward_mean=0.05, agreement=0.0, diversity=-0.005),  # less than a fifth
        rows(20, reward_mean=-0.05, agreement=-0.02),  # the reward falls too
        rows(6, reward_mean=0.05, agreement=-0.02),  # too early to say
        rows(20, reward_mean=0.05),  # a reward that tells nothing else
    ],
)
def test_the_guard_is_quiet_otherwise(history: list[dict[str, float]]):
    assert warnings_of(history) == []


def test_a_reward_that_is_always_zero_on_average_counts_as_rising():
    history = [row | {"reward_mean": 1e-9} for row in rows(20, agreement=-0.02)]
    assert len(warnings_of(history)) == 1


@pytest.mark.parametrize(("over", "warned"), [(0.3, 1), (0.1, 0), (-0.3, 0)])
def test_such_a_reward_has_risen_where_it_prefers_the_new_samples_to_the_bases(over: float, warned: int):
    history = [row | {"reward_mean": 1e-9} for row in rows(20, agreement=-0.02)]
    for row in history[::5]:  # as often as samples are drawn
        row |= {"reward_over_base": over, "reward_over_base_se": 0.1}
    assert len(warnings_of(history)) == warned


def test_the_guard_goes_on_where_it_was():
    history = rows(20, reward_mean=0.05, diversity=-0.03)
    whole, cut = HackingGuard(), HackingGuard()
    expected = [whole.update(row) for row in history]
    got = [cut.update(row) for row in history[:7]]
    resumed = HackingGuard()
    resumed.load_state_dict(cut.state_dict())
    assert got + [resumed.update(row) for row in history[7:]] == expected
    assert sum(map(len, expected)) == 1
