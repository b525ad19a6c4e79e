"""What a data set's columns become, which protocols it is measured by, and the baselines beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from listener_reward.errors import InputError
from listener_reward.evaluate import protocols
from listener_reward.evaluate.judged import (
    DEFAULTS,
    PROTOCOLS,
    JudgedPairs,
    Labels,
    apply_protocol,
    choose_tie_threshold,
    compare,
    default_protocols,
)


def judged(judge: Sequence[float], people: Sequence[float], **more: Any) -> JudgedPairs:
    prompts = more.pop("prompts", range(len(judge)))
    return JudgedPairs(judge=np.array(judge, float), people=np.array(people, float), prompts=np.array(prompts), **more)


ROWS = {
    "prompt": ["a fox", "a fox", "a fox", "a cat"],
    "p_first": [1.0, 0.2, 0.5, 0.0],
    "id": ["0/0-1", "0/0-2", "0/1-2", "1/0-1"],
    "dataset": ["imagereward"] * 4,
    "group": ["0", "0", "0", "1"],
    "swapped": [False, True, False, True],
    "item_first": ["a.png", "c.png", "b.png", "y.png"],
    "item_second": ["b.png", "a.png", "c.png", "x.png"],
    "rank_first": [1.0, 2.0, 2.0, 9.0],
    "rank_second": [2.0, 1.0, 2.0, 1.0],
    "images": [[{"bytes": None, "path": "no such file"}] * 2] * 4,
}


def labels(rows: dict[str, list[Any]] = ROWS, batch: int = 2) -> Labels:
    found = Labels()
    for start in range(0, len(rows["prompt"]), batch):
        found.add({name: values[start : start + batch] for name, values in rows.items()})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


def test_labels_beside_margins():
    found = labels().judged(np.array([1, 2, 3, 4]), unit="score")
    assert found.people.tolist() == pytest.approx([0.5, -0.3, 0, -0.5])
    assert found.prompts.tolist() == [0, 0, 0, 1]
    assert found.ranks is not None and found.ranks.tolist() == [1, -1, 0, -8]
    assert found.swapped is not None and found.swapped.tolist() == [False, True, False, True]
    assert found.firsts == ROWS["item_first"] and found.unit == "score" and len(found) == 4
    assert labels().data == "imagereward"


def test_the_group_is_the_prompt_where_there_is_none():
    rows = {name: ROWS[name] for name in ("prompt", "p_first", "images")}
    found = labels(rows | {"images": [[{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}]] * 4})
    assert found.prompts == [0, 0, 0, 1] and found.data == "unnamed"
    whole = found.judged(np.zeros(4))
    assert whole.swapped is whole.ranks is whole.both_bad is None
    assert whole.firsts is not None and whole.seconds is not None and whole.firsts[0] != whole.seconds[0]


def test_columns_with_holes_are_left_out():
    rows = ROWS | {
        "rank_first": [1.0, None, 2.0, 9.0],
        "item_second": [None] * 4,
        "both_bad": [None, True, False, None],
    }
    found = labels(rows).judged(np.zeros(4))
    assert found.ranks is None and found.seconds is None
    assert found.both_bad is not None and found.both_bad.tolist() == [False, True, False, False]


@pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan")])
def test_a_label_that_is_no_share_is_named_by_its_row(wrong):
    with pytest.raises(InputError, match="row 3 is"):
        labels(ROWS | {"p_first": [1.0, 0.2, 0.5, wrong]})


# ---------------------------------------------------------------------------------------------------------------------
# Protocols by name
# ---------------------------------------------------------------------------------------------------------------------


def test_every_protocol_runs_and_its_result_is_json():
    known = replace(labels().judged(np.array([0.3, -0.2, 0.1, 0.9])), both_bad=np.zeros(4, dtype=bool))
    for name in PROTOCOLS:
        result = apply_protocol(known, name)
        assert result.protocol == name and result.value is not None and 0 < result.pairs <= 4
        assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_all_defaults_are_protocols():
    assert {name for names in DEFAULTS.values() for name in names} <= PROTOCOLS.keys()
    assert default_protocols(["imagereward"]) == DEFAULTS["imagereward"]
    assert default_protocols(["tiny:ood"]) == default_protocols(["mine.jsonl"]) == ("imagereward",)
    assert default_protocols(["hpdv2", "mmrb2"]) == default_protocols([]) == ("imagereward",)


def test_an_unknown_protocol_names_the_known_ones():
    with pytest.raises(InputError, match="hpsv2-inversion"):
        apply_protocol(judged([1], [1]), "hpsv4")


def test_rank_protocols_use_the_published_ranks_where_they_differ_from_the_majority():
    """Mean ranks can order two images against the majority; the published protocols go by the ranks."""
    found = judged([1.0], [0.1], ranks=np.array([-1.0]))
    assert apply_protocol(found, "hpsv2-inversion").value == apply_protocol(found, "imagereward").value == 0
    assert apply_protocol(found, "genai-bench-diff").value == 1


def test_genai_bench_takes_words_or_makes_them():
    people, both_bad = [0.5, -0.5, 0, 0], np.array([False, False, False, True])
    words = ["[[A>B]]", "no", "[[A=B=Bad]]", None]
    found = apply_protocol(judged([1, -1, 0, 0], people, both_bad=both_bad, words=words), "genai-bench")
    assert (found.value, found.missing) == (0.25, 1)
    made = apply_protocol(judged([0.1, -0.1, 0, float("nan")], people, both_bad=both_bad), "genai-bench")
    assert made.value == 0.75
    chosen = np.array([1, 0, 0, 2])  # a judge with a tie band ties without a margin of zero
    assert (
        apply_protocol(judged([1, -1, 0.1, 0.1], people, both_bad=both_bad, preferred=chosen), "genai-bench").value
        == 0.5
    )


def test_genai_bench_of_plain_votes_counts_a_tie_as_good():
    assert apply_protocol(judged([1], [0], words=["[[A=B=Good]]"]), "genai-bench").value == 1


def test_pickscore_sees_scores_as_probabilities():
    """Scores are logits there: the published thresholds are about their softmax."""
    margins, people, prompts = (
        np.array([3.0, -0.1, 0.15, -4.0] * 5),
        np.array([1, 0, 0, -1] * 5) / 2,
        np.arange(20) // 4,
    )
    scores = apply_protocol(judged(margins.tolist(), people.tolist(), prompts=prompts, unit="score"), "pickscore")
    softmax = np.exp(margins) / (1 + np.exp(margins))
    shares = apply_protocol(judged((2 * softmax - 1).tolist(), people.tolist(), prompts=prompts), "pickscore")
    assert scores == shares and scores.value == 1 and scores.thresholds == (0.1, 0.1)


def test_pickscore_takes_the_threshold_of_a_validation_set():
    """There ties lie below 0.3 and choices above; here a margin of 0.35 is a choice, one of 0.25 a tie."""
    validation = judged([0.3, -0.3, 0.4, -0.4], [0, 0, 0.5, -0.5])
    assert choose_tie_threshold(validation) == 0.3
    test = judged([0.25, 0.35, 0.35, 0.25], [0, 0.5, 0, 0.5])
    result = apply_protocol(replace(test, tie_threshold=0.3), "pickscore")
    assert (result.value, result.thresholds) == ((1 + 1 + 0.5 + 0.5) / 4, (0.3,))
    assert result.always_first == (0.5 + 1 + 0.5 + 1) / 4, "it never ties, whatever the judge's threshold"
    assert result.value != apply_protocol(test, "pickscore").value
    logits = judged([2 * float(np.arctanh(0.29)), 0.0], [0, 0], unit="score")  # 0.3 may come back a rounding above
    assert choose_tie_threshold(logits) == 0.3, "scores are logits: the threshold is about their softmax"


def test_a_correlation_of_zero_everywhere_has_no_interval():
    """Of three images the middle one is moved to an end: two pairs agree on one side, so tau-b is 1/3, then -1/3."""
    images = {"firsts": ["a", "a", "b"] * 2, "seconds": ["b", "c", "c"] * 2}
    people, prompts = [0.5] * 6, [0, 0, 0, 1, 1, 1]
    same = apply_protocol(judged([-1, 1, 2] * 2, people, prompts=prompts, **images), "tau-b")
    assert same.value == pytest.approx(1 / 3) and same.interval is None
    perfect = apply_protocol(judged([1, 2, 1] * 2, people, prompts=prompts, **images), "tau-b")
    assert perfect.value == pytest.approx(1) and perfect.interval is None
    swapped = np.array([True] * 6)
    ties = apply_protocol(judged([0] * 6, people, prompts=prompts, swapped=swapped), "hpsv2-inversion")
    assert ties.value == 0, "an exact tie is the published first's, which is shown second and worse"


def test_mmrb2_without_orders_counts_a_judge_twice():
    found = judged([1, -1, 1], [1, 1, 0])
    assert apply_protocol(found, "mmrb2").value == 0.5
    halves = replace(found, forward=np.array([1.0, 1, 1]), reverse=np.array([1.0, np.nan, -1]))
    assert apply_protocol(halves, "mmrb2").value == 1


def test_a_rank_correlation_needs_to_know_the_images():
    with pytest.raises(InputError, match="tau-b needs to know which pairs share an image"):
        apply_protocol(judged([1], [1]), "tau-b")


def test_always_first_is_beside_every_protocol_as_shown_and_as_in_the_file():
    """Published order: the winner always first. Shown order: as the shuffle had it."""
    swapped = np.array([True, False, True, True])
    found = judged([1, 1, 1, 1], [-1, 1, -1, -1], swapped=swapped)
    for name in ("imagereward", "hpsv2", "hpsv2-inversion", "hpsv3-pair", "videogen-with-ties", "genai-bench"):
        result = apply_protocol(found, name)
        assert (result.value, result.always_first, result.always_first_in_file) == (0.25, 0.25, 1.0), name
    mmrb2 = apply_protocol(found, "mmrb2")
    assert (mmrb2.always_first, mmrb2.always_first_in_file) == (0.5, 0.5)  # asked in both orders it gains nothing
    assert apply_protocol(replace(found, swapped=~swapped & False), "imagereward").always_first_in_file is None


def test_the_interval_is_clustered_by_prompt():
    one = apply_protocol(judged([1] * 10 + [-1] * 10, [1] * 20, prompts=np.arange(20)), "imagereward")
    two = apply_protocol(judged([1] * 10 + [-1] * 10, [1] * 20, prompts=np.arange(20) // 5), "imagereward")
    assert one.interval is not None and two.interval is not None
    assert two.interval[1] - two.interval[0] > 1.5 * (one.interval[1] - one.interval[0])
    assert (one.prompts, two.prompts) == (20, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Two judges
# ---------------------------------------------------------------------------------------------------------------------


def test_two_judges_by_a_protocol():
    people = [1, 1, -1, 0]
    first, second = judged([1, 1, -1, 1], people), judged([1, -1, -1, 1], people)
    test = compare(first, second, "imagereward")
    assert test is not None and (test.difference, test.only_first, test.pairs) == (pytest.approx(1 / 3), 1, 3)
    credits = protocols.imagereward(first.judge, first.people)
    assert test.pairs == credits.possible.sum()


def test_other_pairs_are_refused():
    with pytest.raises(InputError, match="different pairs"):
        compare(judged([1], [1]), judged([1], [-1]), "imagereward")
    with pytest.raises(InputError, match="different pairs"):
        compare(judged([1], [1]), judged([1, 1], [1, 1]), "imagereward")
