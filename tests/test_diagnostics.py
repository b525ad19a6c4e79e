"""Where a judge may be trusted: every number against a case worked by hand, and None where there is nothing to tell."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError
from listener_reward.evaluate import evaluate
from listener_reward.evaluate.diagnostics import FEWEST, GAP_BINS, POINTS, diagnose
from listener_reward.evaluate.intervals import wilson
from listener_reward.evaluate.judged import JudgedPairs


@pytest.fixture(scope="module")
def record() -> Any:
    """`record(p_first, people)` is an evaluation of a judge that said so, a prompt a pair; more fields of
    `JudgedPairs`."""
    base = evaluate(_Fixed(), load_pairs("tiny:id", limit=2), progress=False, swap_check=0)

    def make(p_first: Any, people: Any, **more: Any) -> Any:
        p_first, people = np.asarray(p_first, float), np.asarray(people, float)
        fields = {"judge": 2 * p_first - 1, "people": people - 0.5, "prompts": np.arange(len(people))}
        return replace(base, judged=JudgedPairs(**(fields | more)))

    return make


class _Fixed:
    name = "fixed"

    def compare_many(self, prompts: Any, *_: Any, **__: Any) -> list[Any]:
        from listener_reward.verdict import Verdict

        return [Verdict(0.7, 1, (), None, None, float("nan"), 0)] * len(prompts)


def test_bins_worked_by_hand(record):
    found = diagnose(record([0.96, 0.04, 0.98, 0.62, 0.5], [1.0, 0.0, 0.2, 0.5, 0.9]))["bins"]
    # 0.95 to 1: right, right, wrong; 0.6 to 0.65: people are split; 0.5: no side, so wrong, and half agree.
    assert [(one["n"], one["accuracy"]) for one in found] == [(1, 0.0), (1, None), (3, pytest.approx(2 / 3))]
    assert [one["agreement"] for one in found] == pytest.approx([0.5, 0.5, (1 + 1 + 0.2) / 3])
    assert found[2]["interval"] == pytest.approx(list(wilson(2, 3) or ()))
    assert found[1]["interval"] is None


def test_coverage_keeps_the_surest_first_and_equals_together(record):
    n = 2 * FEWEST
    sure = np.concatenate([np.full(FEWEST, 0.9), np.linspace(0.6, 0.7, FEWEST)])
    people = np.concatenate([np.ones(FEWEST), np.zeros(FEWEST)])  # all of the sure ones right, all others wrong
    shuffled = np.random.default_rng(0).permutation(n)
    found = diagnose(record(sure[shuffled], people[shuffled]))
    assert found["coverage"]["share"][0] == 0.5 and found["coverage"]["accuracy"][0] == 1.0
    assert found["coverage"]["share"][-1] == 1.0 and found["coverage"]["accuracy"][-1] == 0.5
    assert found["coverage"]["accuracy"] == sorted(found["coverage"]["accuracy"], reverse=True)
    # A tenth cannot be kept without the other pairs of the same confidence.
    assert [(one["share"], one["n"]) for one in found["kept"]] == [(0.5, 20), (0.5, 20), (0.5, 20), (1.0, 40)]
    assert [one["accuracy"] for one in found["kept"]] == [1, 1, 1, 0.5]


def test_the_coverage_curve_is_short_whatever_the_data(record):
    draws = np.random.default_rng(0).random((2, 5000))
    found = diagnose(record(draws[0], draws[1]))["coverage"]
    assert len(found["share"]) == len(found["accuracy"]) == POINTS
    assert found["share"] == sorted(found["share"]) and found["share"][-1] == 1


def test_a_missing_answer_is_wrong_and_the_least_sure(record):
    p_first = np.array([0.9] * 30 + [0.6] * 20 + [np.nan] * 50)
    found = diagnose(record(p_first, np.ones(100)))
    assert found["kept"][-2]["accuracy"] == 1.0 and found["kept"][-1]["accuracy"] == 0.5
    assert sum(one["n"] for one in found["bins"]) == 50


def test_a_judge_that_is_always_as_sure_has_no_coverage(record):
    found = diagnose(record([1.0, 0.0, 1.0], [1.0, 0.0, 0.0], unit="answer"))
    assert found["coverage"] is None and found["kept"] is None and found["bins"] is None


def test_position_worked_by_hand(record):
    # Margins in order and swapped: turned to the first shown, turned to the second shown, steady, asked once.
    forward, reverse = np.array([0.2, -0.4, 0.8, 0.5]), np.array([-0.2, 0.4, 0.6, np.nan])
    gap = (forward - reverse) / 2  # 0.2, -0.4, 0.1, nan
    found = diagnose(record([0.5] * 4, [1.0] * 4, forward=forward, reverse=reverse, position_gap=gap))["position"]
    assert found["n"] == 3 == sum(found["counts"]) and len(found["counts"]) == GAP_BINS
    assert (found["mean"], found["mean_size"]) == pytest.approx((-0.1 / 3, 0.7 / 3))
    assert (found["turned"], found["to_first"], found["to_second"]) == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    assert found["interval"] == pytest.approx(list(wilson(2, 3) or ()))
    # -1 + 2 k / 21 bounds bin k: 0.2 is in 12, -0.4 in 6, 0.1 in 11; the middle one, 10, holds no gap at all.
    assert [number for number, count in enumerate(found["counts"]) if count] == [6, 11, 12]


def test_no_gap_is_known_of_one_order_or_of_bare_scores(record):
    margins = np.array([0.2, -0.4])
    once = {"forward": margins, "reverse": margins, "position_gap": np.full(2, np.nan)}
    assert diagnose(record([0.6, 0.3], [1, 0], **once))["position"] is None
    assert diagnose(record([0.6, 0.3], [1, 0], forward=margins, reverse=margins, unit="score"))["position"] is None
    assert diagnose(record([0.6, 0.3], [1, 0]))["position"] is None
    of_a_file = diagnose(record([0.6, 0.3], [1, 0], forward=margins, reverse=margins - 0.2))["position"]
    assert of_a_file["mean"] == pytest.approx(0.1)


def test_contradictions_worked_by_hand(record):
    # Right, right, wrong, wrong, a tie of people, and a pair whose thoughts nobody heard.
    listened, contradicted = np.array([2, 2, 2, 2, 2, 0]), np.array([0, 1, 2, 0, 2, 0])
    people = [1, 1, 0, 0, 0.5, 1]
    found = diagnose(record([0.9] * 6, people, listened=listened, contradicted=contradicted))["contradictions"]
    assert found["thoughts"] == 10
    assert (found["right"], found["wrong"]) == (0.25, 0.5)
    by_pair = {name: (group["n"], group["accuracy"]) for name, group in found["by_pair"].items()}
    assert by_pair == {"none": (2, 0.5), "some": (1, 1.0), "all": (1, 0.0)}
    assert diagnose(record([0.9], [1], listened=np.array([0]), contradicted=np.array([0])))["contradictions"] is None


def test_of_a_judge_that_was_run(FakeJudge):
    judge = FakeJudge(slope=2.0, listener_slope=-1.0, noise=2.0)
    evaluation = evaluate(judge, load_pairs("tiny:id", limit=60), progress=False)
    found = json.loads(json.dumps(diagnose(evaluation), allow_nan=False))
    assert found["kept"][-1]["accuracy"] == pytest.approx(evaluation.accuracy)
    assert sum(one["n"] for one in found["bins"]) == 60
    contradictions = found["contradictions"]
    assert contradictions["rate"] == evaluation.contradiction_rate and 0 < contradictions["rate"] < 1
    assert sum(group["n"] for group in contradictions["by_pair"].values()) == 60 - evaluation.n_ties
    assert found["position"] is None  # this fake thinks in one order


def test_needs_answers(record):
    with pytest.raises(InputError, match="no judged pairs"):
        diagnose(replace(record([0.6], [1]), judged=None))
