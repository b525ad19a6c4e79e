"""Anchors: an image's score by a few fixed images, worked by hand, and the same at every step of a training run."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import kendalltau
from typer.testing import CliRunner

from listener_reward import Judge, ListenerReward
from listener_reward.anchor_sets import AnchorSets, add_line, read_folder
from listener_reward.anchors import (
    Anchors,
    fit,
    fit_anchors,
    identity_of,
    next_anchor,
    pick,
    place,
    win_share,
)
from listener_reward.cli import app
from listener_reward.errors import InputError, JudgeError
from listener_reward.media.images import png_of
from listener_reward.media.storyboards import to_still, to_visual, to_visuals
from listener_reward.pairs import Prompt
from listener_reward.ranking import PRIOR_STD, estimate_votes, fit_bradley_terry
from listener_reward.references import AnchorFile, ReferenceFile


def reds_of(anchors: Anchors) -> list[int]:
    return [np.asarray(to_still(image).image)[0, 0, 0].item() for image in anchors.images]


@pytest.fixture
def pictures(shade):
    return lambda reds: to_visuals([shade(red) for red in reds])


@pytest.fixture
def anchors_at(pictures) -> Callable[..., Anchors]:
    """Anchors with these scores, which are red 0, 1, 2 and so on."""
    return lambda *scores, votes=16.0: Anchors(tuple(pictures(range(len(scores)))), scores, votes, "fake")


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def test_one_anchor_worked_by_hand(anchors_at):
    # The score s solves votes * (p - sigmoid(s - 0)) = s / 4. With 4 votes, s = 1 needs p = sigmoid(1) + 1/16.
    p = 1 / (1 + math.exp(-1)) + 1 / 16
    score, error = place(anchors_at(0.0, votes=4.0), {0: p})
    assert score == pytest.approx(1.0, abs=1e-9)
    # Information: the prior's 1/4, and 4 votes of sigmoid(1) (1 - sigmoid(1)).
    assert error == pytest.approx((1 / 4 + 4 / (1 + math.exp(-1)) / (1 + math.exp(1))) ** -0.5)


def test_two_anchors_worked_by_hand(anchors_at):
    # Anchors at -1 and 1 and outcomes that mirror one another, p and 1 - p: the score is 0 and both inform alike.
    score, error = place(anchors_at(-1.0, 1.0), {0: 0.8, 1: 0.2})
    assert score == pytest.approx(0.0, abs=1e-9)
    assert error == pytest.approx((1 / 4 + 2 * 16 * expit(1) * expit(-1)) ** -0.5)


def test_without_a_comparison_the_score_is_the_priors(anchors_at):
    assert place(anchors_at(-1.0, 1.0), {}) == (pytest.approx(0, abs=1e-9), PRIOR_STD)


def test_an_outcome_of_certainty_has_a_finite_score(anchors_at):
    score, error = place(anchors_at(-1.0, 1.0, votes=1000.0), {0: 1.0, 1: 1.0})
    assert 5 < score < 20 and 0 < error < PRIOR_STD


@given(
    scores=st.lists(st.floats(-6, 6), min_size=1, max_size=8),
    data=st.data(),
    votes=st.floats(0.5, 1000),
)
def test_the_score_is_the_posteriors_mode(scores, data, votes):
    visual = to_visual(np.zeros((2, 2, 3), np.uint8))
    anchors = Anchors((visual,) * len(scores), tuple(scores), votes, "fake")
    outcomes = {a: data.draw(st.floats(0, 1)) for a in range(len(scores))}
    score, error = place(anchors, outcomes)

    def density(s: float) -> float:
        gaps = s - np.array(scores)
        p = np.array([*outcomes.values()])
        return float(votes * np.sum(-p * np.logaddexp(0, -gaps) - (1 - p) * np.logaddexp(0, gaps)) - s**2 / 8)

    assert density(score) >= max(density(score - 1e-3), density(score + 1e-3))
    assert 0 < error <= PRIOR_STD
    assert place(anchors, dict(reversed(outcomes.items()))) == (score, error), "the order does not matter to a bit"


def test_an_image_is_placed_as_bradley_terry_places_it_beside_fixed_scores(anchors_at):
    """With very many comparisons among the anchors, the fit of all images leaves the anchors where they are."""
    scores = (-2.0, 0.5, 1.5)
    sure = [(i, j, float(expit(scores[i] - scores[j]))) for i in range(3) for j in range(i)] * 3000
    outcomes = {0: 0.97, 1: 0.7, 2: 0.3}
    fitted, _ = fit_bradley_terry(4, [*sure, *((3, a, p) for a, p in outcomes.items())], votes=16, prior_std=1e3)
    expected = fitted[3] - np.mean(fitted[:3])
    wide = [s for s in np.linspace(-3, 3, 60001)]
    gaps = np.subtract.outer(np.array(wide), np.array(scores))
    likelihood = (np.array([*outcomes.values()]) * gaps - np.logaddexp(0, gaps)).sum(1)
    assert expected == pytest.approx(wide[int(np.argmax(likelihood))], abs=2e-3)
    assert place(anchors_at(*scores, votes=1e4), outcomes)[0] == pytest.approx(expected, abs=2e-3)


def test_the_win_share_is_the_mean_chance_to_win(anchors_at):
    anchors = anchors_at(-2.0, 2.0)
    share, error = win_share(anchors, 1.0, 0.1)
    assert share == pytest.approx((expit(3) + expit(-1)) / 2)
    assert error == pytest.approx(0.1 * (expit(3) * expit(-3) + expit(1) * expit(-1)) / 2)
    assert win_share(anchors, 0.0, 1.0)[0] == pytest.approx(0.5)


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=8), st.floats(-30, 30), st.floats(0, 2))
def test_win_shares_are_shares_and_grow_with_the_score(scores, score, error):
    visual = to_visual(np.zeros((2, 2, 3), np.uint8))
    anchors = Anchors((visual,) * len(scores), tuple(scores), 16.0, "fake")
    share, its_error = win_share(anchors, score, error)
    assert 0 <= share <= 1 and 0 <= its_error <= error / 4 + 1e-12
    assert win_share(anchors, score + 0.5, error)[0] >= share


def test_the_next_anchor_is_the_one_that_tells_most(anchors_at):
    anchors = anchors_at(-3.0, -1.0, 0.25, 3.0)
    assert next_anchor(anchors, 0.0, []) == 2, "the middle"
    assert next_anchor(anchors, 2.5, [2]) == 3
    assert next_anchor(anchors, -1.5, [2, 1]) == 0
    assert next_anchor(anchors, 0.0, range(4)) is None
    # The nearest one is the one with the most expected information, whatever the spread of the posterior is.
    half = np.random.default_rng(0).normal(0, 1, 4000)
    drawn = np.concatenate([half, -half])
    for score, width in ((-2.2, 0.3), (-0.3, 2.0), (1.7, 0.7)):
        gaps = score + width * drawn[:, None] - np.array(anchors.scores)
        assert next_anchor(anchors, score, []) == np.argmax((expit(gaps) * expit(-gaps)).mean(0))


def test_anchors_have_the_group_fits_scores_with_mean_zero(FakeJudge, shade):
    judge = FakeJudge(slope=3.0, noise=0.3)
    anchors = fit_anchors(judge, "a", [shade(10), shade(200), shade(10), shade(90)])
    assert judge.calls == [[("a", 10, 200), ("a", 10, 90), ("a", 200, 90)]], "equal images count once"
    outcomes = [(i, j, judge.compare("a", shade(x), shade(y)).p_first) for i, j, x, y in
                ((0, 1, 10, 200), (0, 2, 10, 90), (1, 2, 200, 90))]  # fmt: skip
    votes = estimate_votes(3, outcomes)
    assert anchors.votes == votes and anchors.judge == "fake"
    assert anchors.scores == pytest.approx(fit_bradley_terry(3, outcomes, votes=votes)[0])
    assert sum(anchors.scores) == pytest.approx(0, abs=1e-12)


def test_picked_anchors_are_spread_over_the_groups_quality(pictures):
    reds = [30, 0, 70, 10, 50, 60, 20, 40]
    outcomes = [(i, j, float(expit((reds[i] - reds[j]) / 20))) for i in range(8) for j in range(i)]
    group = fit(pictures(reds), outcomes, "fake")
    anchors = pick(pictures(reds), outcomes, 4, "fake")
    assert reds_of(anchors) == [10, 30, 50, 70]
    chosen = [group.scores[reds.index(red)] for red in (10, 30, 50, 70)]
    assert anchors.scores == pytest.approx([score - np.mean(chosen) for score in chosen])
    assert len(pick(pictures(reds), outcomes, 20, "fake")) == 8, "all of a smaller group"
    assert pick(pictures(reds), outcomes, 1, "fake").scores == (0.0,)


# ---------------------------------------------------------------------------------------------------------------------
# The scheme
# ---------------------------------------------------------------------------------------------------------------------

GIVEN = (0, 80, 160, 240)


@pytest.fixture
def make(FakeJudge, shade):
    """A reward with `GIVEN` as the anchors of every prompt."""

    def with_options(judge=None, reds=GIVEN, **options):
        images = [shade(red) for red in reds]
        return ListenerReward(judge or FakeJudge(), scheme="anchors", anchors=lambda prompt: images, **options)

    return with_options


def test_scores_are_the_log_odds_on_the_anchors_scale(make, FakeJudge, shade):
    # The judge's log-odds add up, so an image is where its red is: slope * (red - the anchors' mean) / 255.
    judge = FakeJudge(slope=4.0)
    scores, info = make(judge)([shade(r) for r in (100, 10, 250)], ["a", "a", "b"])
    assert len(judge.calls[0]) == 2 * 6 and judge.calls[1] == [
        (prompt, red, anchor) for prompt, red in (("a", 100), ("a", 10), ("b", 250)) for anchor in GIVEN
    ]
    assert len(judge.calls) == 2, "one batch for the anchors, and one for all images"
    anchors = fit_anchors(FakeJudge(slope=4.0), "a", [shade(r) for r in GIVEN])
    for score, error, share, red in zip(scores, info["standard_error"], info["win_share"], (100, 10, 250), strict=True):
        outcomes = {k: judge.compare("a", shade(red), shade(a)).p_first for k, a in enumerate(GIVEN)}
        expected = place(anchors, outcomes)
        assert (score, error) == pytest.approx(expected, rel=1e-6)
        assert share == pytest.approx(win_share(anchors, *expected)[0], rel=1e-6)
        assert score == pytest.approx(4 * (red - 120) / 255, abs=0.25)
    assert info["comparisons"].tolist() == [4, 4, 4] and not info["failed"].any()


def test_each_image_meets_the_anchors_that_tell_most(make, FakeJudge, shade):
    judge = FakeJudge(slope=8.0)
    reward = make(judge, reds=(0, 60, 120, 180, 240), anchor_comparisons=2)
    scores, info = reward([shade(r) for r in (250, 5, 125)], ["a"] * 3)
    first, *rounds = judge.calls
    assert len(first) == 10
    assert rounds == [
        [("a", 250, 120), ("a", 5, 120), ("a", 125, 120)],
        [("a", 250, 240), ("a", 5, 0), ("a", 125, 180)],
    ]
    assert info["comparisons"].tolist() == [2, 2, 2] and scores[0] > scores[2] > scores[1]


def test_no_more_comparisons_than_the_error_needs(make, FakeJudge, shade):
    judge = FakeJudge(slope=8.0)
    reward = make(judge, reds=(0, 60, 120, 180, 240), anchor_error=0.4)
    _, info = reward([shade(r) for r in (255, 5, 125)], ["a"] * 3)
    assert (info["standard_error"][info["comparisons"] < 5] <= 0.4).all()
    assert info["comparisons"].min() < 5
    *_, last = judge.calls
    assert 0 < len(last) < 3, "who is sure enough meets nobody any more"


def test_a_score_does_not_depend_on_its_company(make, shade):
    for options in ({}, {"anchor_comparisons": 2}, {"anchor_error": 0.5}):
        reward = make(**options)
        together = reward([shade(r) for r in (33, 77, 222)], ["a"] * 3)[0]
        alone = [reward([shade(r)], ["a"])[0][0] for r in (33, 77, 222)]
        assert together.tolist() == alone


def test_an_image_that_is_an_anchor_ties_with_it_unasked(make, FakeJudge, shade):
    judge = FakeJudge(slope=4.0)
    scores, info = make(judge)([shade(160), shade(161), shade(160)], ["a"] * 3)
    assert ("a", 160, 160) not in judge.calls[1] and len(judge.calls[1]) == 3 + 4, "and equal images are asked once"
    assert info["comparisons"].tolist() == [3, 4, 3] and scores[0] == scores[2]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)
    only = make(reds=(160,))
    scores, info = only([shade(160)], ["a"])
    assert scores[0] == pytest.approx(0, abs=1e-9) and info["comparisons"][0] == 0 and info["failed"][0] == 0


def test_the_same_call_has_the_same_scores_at_the_start_and_at_the_end_of_a_run(FakeJudge, shade, tmp_path):
    judge = FakeJudge(noise=0.5)
    images, prompts = [shade(r) for r in range(0, 240, 15)], ["a"] * 8 + ["b"] * 8
    reward = ListenerReward(judge, scheme="anchors", state=tmp_path / "state.db", anchor_comparisons=3)
    expected = reward(images, prompts)[0].tolist()
    for epoch in range(40):
        reward([shade(255 - epoch - k) for k in range(8)], ["a", "b", "c", "c"] * 2)
    assert reward(images, prompts)[0].tolist() == expected
    assert pickle.loads(pickle.dumps(ListenerReward("tiny", scheme="anchors"))).scheme == "anchors"
    restarted = ListenerReward(
        FakeJudge(noise=0.5), scheme="anchors", state=tmp_path / "state.db", anchor_comparisons=3
    )
    assert restarted(images, prompts)[0].tolist() == expected
    assert reward.state_dict()["references"] == {}


def test_pickles_and_states_have_the_scale_in_them(loads_fake, shade, tmp_path):
    images, prompts = [shade(r) for r in range(0, 240, 30)], ["a"] * 8
    reward = ListenerReward("fake", scheme="anchors", anchors=3)
    expected = reward(images, prompts)[0].tolist()
    copy = pickle.loads(pickle.dumps(reward))
    assert copy(images[:2], prompts[:2])[0].tolist() == expected[:2]
    torch.save(reward.state_dict(), tmp_path / "state.pt")
    resumed = ListenerReward("fake", scheme="anchors")
    resumed(images[3:], prompts[3:])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed(images[:2], prompts[:2])[0].tolist() == expected[:2]
    for state in ({"references": {}, "anchors": {"a": {}}}, {"references": {}, "anchors": {"a": {"images": [1]}}}):
        with pytest.raises(InputError, match="cannot be read"):
            resumed.load_state_dict(state)
    with pytest.raises(InputError, match="make it with scheme='anchors'"):
        ListenerReward("fake").load_state_dict(reward.state_dict())


@pytest.fixture
def loads_fake(monkeypatch, FakeJudge):
    monkeypatch.setattr("listener_reward.judge.Judge.from_pretrained", lambda name, **options: FakeJudge(name=name))


def test_anchors_are_taken_from_the_first_group(FakeJudge, shade):
    judge = FakeJudge(slope=4.0)
    reward = ListenerReward(judge, scheme="anchors", anchors=2)
    scores, info = reward([shade(r) for r in (0, 200, 50, 150)], ["a"] * 4)
    assert len(judge.calls[0]) == 6 and {pair[2] for pair in judge.calls[1]} == {50, 200}
    assert scores.tolist() == sorted(scores.tolist(), key=lambda s: [*scores].index(s))
    assert np.argsort(scores).tolist() == [0, 2, 3, 1]
    assert info["comparisons"].tolist() == [2, 1, 1, 2], "two of them are the anchors"
    assert scores[[1, 2]].sum() == pytest.approx(0, abs=0.05)
    reward([shade(255)], ["a"])
    assert judge.calls[2:] == [[("a", 255, 50), ("a", 255, 200)]]


def test_a_lone_first_image_is_no_group(FakeJudge, shade):
    with pytest.raises(InputError, match=r"one image in its first call.*give anchors"):
        ListenerReward(FakeJudge(), scheme="anchors")([shade(1), shade(1)], ["a", "a"])


def test_prompts_with_other_sources_or_criteria_have_anchors_of_their_own(FakeJudge, shade):
    class Texts(FakeJudge):
        def compare_many(self, prompts, firsts, seconds, *, think=None):
            return super().compare_many([p if isinstance(p, str) else p.key for p in prompts], firsts, seconds)

    given = {"a": [shade(0), shade(255)], Prompt("a", criterion="b"): [shade(5), shade(10)]}
    reward = ListenerReward(Texts(), scheme="anchors", anchors=given)
    reward([shade(3), shade(3)], ["a", Prompt("a", criterion="b")])
    assert reward.state_dict()["anchors"].keys() == {"a", "a\x1fcriterion b"}
    first, second = (Anchors.from_dict(saved) for saved in reward.state_dict()["anchors"].values())
    assert first.scores[1] > 1 > second.scores[1]


def test_anchors_may_be_a_dict_or_a_json_file(FakeJudge, shade, tmp_path):
    for red in GIVEN:
        (tmp_path / f"{red}.png").write_bytes(png_of(shade(red)))
    (tmp_path / "anchors.json").write_text(json.dumps({"a": [f"{red}.png" for red in GIVEN]}), encoding="utf-8")
    one = ListenerReward(FakeJudge(), scheme="anchors", anchors={"a": [shade(red) for red in GIVEN]})
    other = ListenerReward(FakeJudge(), scheme="anchors", anchors=tmp_path / "anchors.json")
    batch = [shade(7), shade(99)], ["a", "a"]
    assert one(*batch)[0].tolist() == other(*batch)[0].tolist()
    with pytest.raises(InputError, match="anchors has no images for prompt 'b'"):
        one([shade(7)], ["b"])


@pytest.mark.parametrize(
    ("text", "words"),
    [("[", "cannot be read as JSON"), ('{"a": "b.png"}', "no object of lists"), ('{"a": ["b.png"]}', "not there")],
)
def test_refuses_a_json_file_of_another_form(FakeJudge, tmp_path, text, words):
    (tmp_path / "anchors.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        ListenerReward(FakeJudge(), scheme="anchors", anchors=tmp_path / "anchors.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "group", "anchors": 4}, "anchors would have no effect with scheme='group'"),
        ({"anchor_comparisons": 4}, "anchor_comparisons would have no effect with scheme='auto'"),
        ({"scheme": "anchors", "anchors": 0}, "anchors is 0"),
        ({"scheme": "anchors", "anchors": True}, "anchors is True"),
        ({"scheme": "anchors", "anchors": [1]}, "anchors is a list"),
        ({"scheme": "anchors", "anchor_comparisons": 0}, "anchor_comparisons is 0"),
        ({"scheme": "anchors", "anchor_error": 0.0}, "anchor_error is 0.0"),
        ({"scheme": "anchors", "reference": {}}, "give it as anchors"),
    ],
)
def test_refuses_a_configuration_that_makes_no_sense(FakeJudge, options, words):
    with pytest.raises(InputError, match=words):
        ListenerReward(FakeJudge(), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------------------------------


def test_a_comparison_that_failed_is_left_out(make, FakeJudge, shade):
    broken = make(FakeJudge(breaks_on=lambda prompt, first, second: (first, second) == (100, 80)), on_failure="nan")
    scores, info = broken([shade(100), shade(101)], ["a", "a"])
    assert info["comparisons"].tolist() == [3, 4] and not info["failed"].any()
    anchors = fit_anchors(FakeJudge(), "a", [shade(r) for r in GIVEN])
    outcomes = {k: FakeJudge().compare("a", shade(100), shade(r)).p_first for k, r in enumerate(GIVEN) if r != 80}
    assert scores[0] == pytest.approx(place(anchors, outcomes)[0], rel=1e-6)
    with pytest.raises(JudgeError, match="broke"):
        make(FakeJudge(breaks_on=lambda prompt, first, second: first == 100))([shade(100)], ["a"])


@pytest.mark.parametrize(("policy", "expected"), [("nan", math.nan), ("group-mean", 0.0)])
def test_an_image_all_of_whose_comparisons_failed_has_no_score(make, FakeJudge, shade, policy, expected):
    reward = make(FakeJudge(breaks_on=lambda prompt, first, second: first == 100), on_failure=policy)
    scores, info = reward([shade(100), shade(40), shade(200)], ["a"] * 3)
    assert scores[0] == pytest.approx(expected, nan_ok=True, abs=1e-6)
    assert info["failed"].tolist() == [1, 0, 0] and info["comparisons"][0] == 0
    assert np.isnan([info["standard_error"][0], info["win_share"][0]]).all()


def test_given_anchors_that_failed_are_not_kept_and_score_nothing(make, FakeJudge, shade):
    broken = {"now": True}
    judge = FakeJudge(breaks_on=lambda prompt, first, second: broken["now"] and (first, second) == (0, 80))
    with pytest.raises(JudgeError):
        make(judge)([shade(100)], ["a"])
    reward = make(judge, on_failure="nan")
    scores, info = reward([shade(100)], ["a"])
    assert np.isnan(scores[0]) and info["failed"][0] == 1 and reward.state_dict()["anchors"] == {}
    broken["now"] = False
    assert reward([shade(100)], ["a"])[0].tolist() == make()([shade(100)], ["a"])[0].tolist(), "the next call mends it"


def test_an_image_on_which_the_judge_broke_is_no_anchor(FakeJudge, shade):
    judge = FakeJudge(breaks_on=lambda prompt, first, second: 100 in (first, second))
    reward = ListenerReward(judge, scheme="anchors", on_failure="nan", anchors=4)
    scores, info = reward([shade(r) for r in (0, 100, 50, 200)], ["a"] * 4)
    anchors = Anchors.from_dict(reward.state_dict()["anchors"]["a"])
    assert sorted(reds_of(anchors)) == [0, 50, 200]
    assert np.isnan(scores).tolist() == [False, True, False, False] and info["failed"].tolist() == [0, 1, 0, 0]
    broken = ListenerReward(FakeJudge(breaks_on=lambda *_: True), scheme="anchors", on_failure="nan")
    assert np.isnan(broken([shade(0), shade(9)], ["a", "a"])[0]).all() and not broken.state_dict()["anchors"]


def test_a_broken_call_leaves_nothing_behind_and_later_calls_do_not_wait(FakeJudge, shade):
    broken = {"now": True}
    reward = ListenerReward(FakeJudge(breaks_on=lambda *_: broken["now"]), scheme="anchors")
    with pytest.raises(JudgeError):
        reward([shade(0), shade(9)], ["a", "a"])
    assert reward.state_dict()["anchors"] == {}
    broken["now"] = False
    assert np.isfinite(reward([shade(0), shade(9)], ["a", "a"])[0]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Kept on disk
# ---------------------------------------------------------------------------------------------------------------------


def test_another_judges_scores_are_refused(FakeJudge, shade, tmp_path):
    path = tmp_path / "state.db"
    batch = [shade(0), shade(9), shade(50)], ["a"] * 3
    ListenerReward(FakeJudge(), scheme="anchors", state=path)(*batch)
    with pytest.raises(InputError, match="by the judge 'fake', and this is 'other'"):
        ListenerReward(FakeJudge(name="other"), scheme="anchors", state=path)(*batch)
    assert np.isfinite(ListenerReward(FakeJudge(), scheme="anchors", state=path)(*batch)[0]).all()


def test_other_images_than_those_kept_are_refused(make, shade, tmp_path):
    make(state=tmp_path / "state.db")([shade(9)], ["a"])
    with pytest.raises(InputError, match="other images than those"):
        make(reds=(1, 2, 3), state=tmp_path / "state.db")([shade(9)], ["a"])


def test_the_first_writer_wins(FakeJudge, shade, tmp_path):
    """Two processes come with parts of a group: both score by what the first of them kept."""
    path = tmp_path / "state.db"
    late = ListenerReward(FakeJudge(), scheme="anchors", state=path)
    early = ListenerReward(FakeJudge(), scheme="anchors", state=path)

    class Overtaken(FakeJudge):
        def compare_many(self, *args, **options):
            if not self.calls:
                early([shade(0), shade(100), shade(200)], ["a"] * 3)
            return super().compare_many(*args, **options)

    late.judge = Overtaken()
    scores = late([shade(40), shade(60)], ["a", "a"])[0]
    assert scores.tolist() == early([shade(40), shade(60)], ["a", "a"])[0].tolist()
    assert len(Anchors.from_dict(AnchorFile(path)["a"])) == 3


def test_many_prompts_in_memory_are_worth_a_word(FakeJudge, shade, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr("listener_reward.anchor_sets.MANY_PROMPTS", 2)
    images, prompts = [shade(0), shade(9)] * 3, ["a", "a", "b", "b", "c", "c"]
    ListenerReward(FakeJudge(), scheme="anchors", state=tmp_path / "state.db")(images, prompts)
    reward = ListenerReward(FakeJudge(), scheme="anchors")
    reward(images[:4], prompts[:4])
    assert not caplog.records
    reward(images, prompts)
    reward(images, ["d", "d", *prompts[2:]])
    assert [record.getMessage()[:23] for record in caplog.records] == ["3 prompts have their an"], "said once"


def test_a_file_keeps_references_and_anchors_apart(FakeJudge, shade, tmp_path):
    path = tmp_path / "state.db"
    ListenerReward(FakeJudge(), scheme="anchors", state=path)([shade(0), shade(9)], ["a", "a"])
    ListenerReward(FakeJudge(), scheme="reference", state=path)([shade(0)], ["b"])
    assert [*AnchorFile(path)] == ["a"] and [*ReferenceFile(path)] == ["b"]


def test_clips_are_anchors_too(tmp_path, shade):
    from listener_reward.media.clips import Clip

    clip = Clip(tuple(to_visuals([shade(1), shade(2)])), (0.0, 0.5))  # pyright: ignore[reportArgumentType]
    anchors = Anchors((clip, to_visual(shade(3))), (0.5, -0.5), 16.0, "fake")
    file = AnchorFile(tmp_path / "state.db")
    file.keep({"a": anchors.to_dict()})
    assert Anchors.from_dict(file["a"]) == anchors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_shares_the_file(FakeJudge, shade, tmp_path):
    reward = ListenerReward(FakeJudge(), scheme="anchors", state=tmp_path / "state.db")
    expected = reward([shade(0), shade(200)], ["a", "a"])[0].tolist()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        os._exit(int(reward([shade(0), shade(200)], ["a", "a"])[0].tolist() == expected))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_threads_fit_a_prompts_anchors_once(FakeJudge, shade):
    judge = FakeJudge(delay=0.01)
    reward = ListenerReward(judge, scheme="anchors")
    batches = [([shade(r + k) for k in range(0, 200, 50)], ["a"] * 4) for r in range(6)]
    with ThreadPoolExecutor(6) as pool:
        scores = [future.result()[0] for future in [pool.submit(reward, *batch) for batch in batches]]
    assert sum(len(call) == 6 for call in judge.calls) <= 1 + 5  # the mutual ones of one batch; others have 16 or less
    assert len(reward.state_dict()["anchors"]) == 1
    assert [reward(*batch)[0].tolist() for batch in batches] == [each.tolist() for each in scores]


# ---------------------------------------------------------------------------------------------------------------------
# A folder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(FakeJudge, shade, tmp_path) -> Path:
    place = tmp_path / "anchors"
    place.mkdir()
    for red in GIVEN:
        (place / f"{red}.png").write_bytes(png_of(shade(red)))
    anchors = fit_anchors(FakeJudge(), "a", [shade(red) for red in GIVEN])
    add_line(place, "a", [f"{red}.png" for red in GIVEN], anchors)
    return place


def test_a_folder_has_the_scores_with_the_images(folder, make, FakeJudge, shade):
    judge = FakeJudge()
    reward = ListenerReward(judge, scheme="anchors", anchors=folder)
    assert reward([shade(9)], ["a"])[0].tolist() == make()([shade(9)], ["a"])[0].tolist()
    assert len(judge.calls) == 1, "nothing is fitted anew"
    assert pickle.loads(pickle.dumps(AnchorSets(folder))).of("a", "fake") == read_folder(folder).of("a")
    with pytest.raises(InputError, match="has none for prompt 'b'"):
        reward([shade(9)], ["b"])
    with pytest.raises(InputError, match="another; make"):
        ListenerReward(FakeJudge(name="other"), scheme="anchors", anchors=folder)([shade(9)], ["a"])
    with pytest.raises(InputError, match="leave one of them out"):
        ListenerReward(judge, scheme="anchors", anchors=folder, state=folder / "state.db")


def test_a_line_that_a_kill_cut_short_is_passed_over(folder):
    path = folder / "anchors.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"prompt": "b", "ima', encoding="utf-8")
    assert read_folder(folder).lines.keys() == {"a"}
    add_line(folder, "b", ["0.png"], Anchors((to_visual(folder / "0.png"),), (0.0,), 16.0, "fake"))
    assert read_folder(folder).lines.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"images": "0.png"}, "cannot be read"),
        ({"scores": ["high"]}, "cannot be read"),
        ({"judge": None}, "cannot be read"),
        ({"images": ["gone.png"]}, "not there"),
    ],
)
def test_refuses_a_folder_of_another_form(folder, line, words):
    sound = {"prompt": "b", "images": ["0.png"], "scores": [0.0], "votes": 16.0, "judge": "fake"}
    (folder / "anchors.jsonl").write_text(json.dumps(sound | line), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        AnchorSets(folder)


def test_an_empty_folder_is_none(tmp_path):
    with pytest.raises(InputError, match="listener-reward anchors"):
        AnchorSets(tmp_path)


@pytest.mark.parametrize(
    ("has", "wanted", "sound"),
    [
        ("anchors", "anchors", True),
        ("anchors", "reference", True),  # scores of all calls on one scale: what a host that scatters groups needs
        ("anchors", None, True),
        ("anchors", "group", False),
        ("reference", "anchors", False),
        ("auto", "anchors", False),
    ],
)
def test_a_server_says_whether_its_scores_are_what_a_client_wants(FakeJudge, has, wanted, sound):
    from listener_reward.integrations.serving.schemes import OtherScheme, check_scheme

    reward = ListenerReward(FakeJudge(), scheme=has)
    if sound:
        return check_scheme(reward, wanted, ["a", "b"])
    with pytest.raises(OtherScheme):
        check_scheme(reward, wanted, ["a", "b"])


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    invoke: Callable[..., Any]
    judges: list[Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.invoke(*arguments)


@pytest.fixture
def run(monkeypatch, FakeJudge) -> Run:
    """`run(*arguments)` calls the command with `FakeJudge`s; `run.judges` are those that it loaded."""
    judges: list[Any] = []

    def load(name, **options):
        judges.append(FakeJudge(name=name, breaks_on=lambda prompt, first, second: prompt == "broken"))
        judges[-1].identity = f"{name} 1"
        return judges[-1]

    monkeypatch.setattr("listener_reward.judge.Judge.from_pretrained", load)

    def invoke(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["anchors", *map(str, arguments)])

    return Run(invoke, judges)


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("two red circles\n\na blue square\ntwo red circles\n", encoding="utf-8")
    return tmp_path / "prompts.txt"


def test_the_command_draws_from_a_pipeline_and_goes_on_where_it_was(run, prompts, tmp_path):
    pytest.importorskip("diffusers")
    line = ("--prompts", prompts, "--pipeline", "tiny", "--judge", "fake", "--out", tmp_path / "out", "-n", 2)
    call = ("--samples", 5, "--call", '{"num_inference_steps": 1}', "--json")
    done = run(*line, *call)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer == {"folder": str(tmp_path / "out"), "prompts": 2, "made": 2, "failed": {}, "judge": "fake 1"}
    made = read_folder(tmp_path / "out")
    assert made.lines.keys() == {"two red circles", "a blue square"} and len(made.of("a blue square")) == 2
    assert [len(call) for call in run.judges[0].calls] == [10, 10], "5 samples each"

    text = (tmp_path / "out" / "anchors.jsonl").read_text(encoding="utf-8")
    (tmp_path / "out" / "anchors.jsonl").write_text(text[: text.rindex('"votes"')], encoding="utf-8")  # a kill
    assert read_folder(tmp_path / "out").lines.keys() == {"two red circles"}
    again = run(*line, *call)
    assert json.loads(again.stdout)["made"] == 1 and [len(call) for call in run.judges[1].calls] == [10]
    assert read_folder(tmp_path / "out").of("a blue square") == made.of("a blue square"), "the same seeds"
    assert "2 prompts, 2 of them from before" in run(*line).output
    other = run(*line[:4], "--judge", "other", *line[6:])
    assert other.exit_code == 2 and "'fake 1', and this is 'other 1'" in other.output


def test_the_command_takes_images_that_are_there(run, shade, tmp_path):
    for red in (*GIVEN, 20):
        (tmp_path / f"{red}.png").write_bytes(png_of(shade(red)))
    files = [f"{red}.png" for red in (*GIVEN, 20)]
    (tmp_path / "all.json").write_text(json.dumps({"a": files, "broken": files}), encoding="utf-8")
    done = run("--images", tmp_path / "all.json", "--judge", "fake", "--out", tmp_path / "out", "-n", 3)
    assert done.exit_code == 3 and "1 prompts have no anchors, such as 'broken'" in done.output
    anchors = read_folder(tmp_path / "out").of("a")
    assert reds_of(anchors) == [0, 80, 240] and anchors.judge == "fake 1"
    reward = ListenerReward("fake", scheme="anchors", anchors=tmp_path / "out")
    assert reward([shade(90)], ["a"])[0][0] == np.float32(place(anchors, {
        k: run.judges[-1].compare("a", shade(90), shade(red)).p_first for k, red in enumerate((0, 80, 240))
    })[0])  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "give --pipeline to draw samples, or --images"),
        (("--pipeline", "tiny"), "prompts is missing"),
        (("--pipeline", "tiny", "--prompts", "gone.txt"), "'gone.txt' cannot be read"),
        (("--pipeline", "tiny", "--samples", 3, "-n", 4), "samples is 3, and 4 of them"),
        (("--pipeline", "tiny", "--call", "[1]"), "give a JSON object"),
        (("--pipeline", "tiny", "--call", "{"), "which is no JSON"),
        (("--pipeline", "/nowhere/at/all"), "nowhere"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(run, prompts, tmp_path, given, words):
    more = () if "--prompts" in given or words == "prompts is missing" else ("--prompts", prompts)
    done = run(*given, *more, "--judge", "fake", "--out", tmp_path / "out")
    assert done.exit_code == 2 and words in done.output.replace("\n", " "), done.output


def test_each_criterion_has_a_scale_of_its_own(FakeJudge, shade):
    class ByCriterion(FakeJudge):
        """By one criterion the other way round."""

        def compare_many(self, prompts, firsts, seconds, *, think=None):
            turned = [prompt.criterion == "darkness" for prompt in prompts]
            sides = zip(firsts, seconds, turned, strict=True)
            one, other = zip(*[(b, a) if turn else (a, b) for a, b, turn in sides], strict=True)
            return super().compare_many([prompt.text for prompt in prompts], one, other)

    judge = ByCriterion()
    reward = ListenerReward(judge, scheme="anchors", criteria={"light": 1.0, "darkness": 0.5})
    scores, info = reward([shade(r) for r in (0, 50, 150, 250)], ["a"] * 4)
    assert reward.state_dict()["anchors"].keys() == {"a\x1fcriterion light", "a\x1fcriterion darkness"}
    assert info["light/score"] == pytest.approx(-info["darkness/score"], abs=1e-6)
    assert scores == pytest.approx(0.5 * info["light/score"], abs=1e-6)
    assert info["light/win_share"] == pytest.approx(1 - info["darkness/win_share"], abs=1e-6)
    assert len(judge.calls) == 2 and len(judge.calls[1]) == 2 * 12


# ---------------------------------------------------------------------------------------------------------------------
# The embedded judge
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Judge:
    return Judge.from_pretrained("tiny", listener="none")


def test_the_absolute_score_orders_good_and_bad_pictures(tiny):
    import random

    from listener_reward.tiny.drawing import draw
    from listener_reward.tiny.world import sample_candidate, sample_prompt, utility, wording

    rng = random.Random("anchors")
    prompt = sample_prompt(rng, held=False)
    words = wording(prompt, rng)
    scenes = [sample_candidate(prompt, rng, rng.choice((0.35, 0.35, 1.0))) for _ in range(12)]
    images = [draw(scene, rng) for scene in scenes]
    anchors = fit_anchors(tiny, words, images[:4])
    reward = ListenerReward(tiny, scheme="anchors", anchors={words: images[:4]}, anchor_comparisons=3)
    expected, info = reward(images[4:], [words] * 8)
    truth = [utility(prompt, scene) for scene in scenes[4:]]
    assert kendalltau(info["win_share"], truth)[0] > 0.5
    assert reward(images[4:], [words] * 8)[0].tolist() == expected.tolist(), "the scale is where it was"
    found = tiny.score(words, images[4], anchors=anchors, comparisons=3)
    assert found.comparisons == 3 and 0 < found.win_share < 1 and 0 < found.win_share_error < 0.2
    # Another batch: the same up to rounding.
    assert (found.score, found.standard_error) == pytest.approx((expected[0], info["standard_error"][0]), rel=1e-4)
    assert found.win_share == pytest.approx(info["win_share"][0], rel=1e-4)
    assert tiny.score(words, images[4], anchors=images[:2]).comparisons == 2, "anchors may be images"
    assert found.to_dict()["win_share"] == found.win_share


def test_the_absolute_score_is_of_its_judge(tiny, shade):
    other = Anchors((to_visual(shade(0)),), (0.0,), 16.0, "other")
    with pytest.raises(InputError, match="by the judge 'other'"):
        tiny.score("a red circle", shade(9), anchors=other)
    with pytest.raises(InputError, match="comparisons is 0"):
        tiny.score("a red circle", shade(9), anchors=[shade(0)], comparisons=0)
    with pytest.raises(InputError, match="listener-reward anchors"):
        tiny.score("a red circle", shade(9), anchors="/nowhere/at/all")


def test_an_identity_is_that_of_the_verdicts(tiny, FakeJudge):
    again = Judge.from_pretrained("tiny", listener="none", seed=7, batch_size=4)
    assert tiny.identity == again.identity == identity_of(tiny) and tiny.identity.startswith("tiny ")
    others: tuple[dict[str, Any], ...] = (
        {},
        {"listener": "none", "think": False},
        {"listener": "none", "orders": "one"},
    )
    for options in others:
        assert Judge.from_pretrained("tiny", **options).identity != tiny.identity
    assert identity_of(FakeJudge()) == "fake"


def test_a_field_that_a_later_card_adds_at_its_default_leaves_the_identity(tiny, monkeypatch):
    from listener_reward import judge
    from listener_reward.card import Card

    before, asdict = tiny.identity, judge.asdict
    monkeypatch.setattr(judge, "asdict", lambda card: asdict(card) | {"later": None})
    assert tiny.identity == before
    monkeypatch.setattr(judge, "asdict", lambda card: asdict(card) | {"later": card != Card()})
    assert tiny.identity != before
