"""Small files of the published shapes, made by hand, from the loader to the protocol, against counts worked by hand.

The real labels have facts of their own (6,399 untied pairs, 48.46 %), which other tests check where those files are;
these check the same way through the package everywhere.
"""

from __future__ import annotations

import csv
import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from listener_reward.datasets import load_pairs
from listener_reward.datasets.check import check_data
from listener_reward.evaluate import Evaluation, evaluate_scores
from listener_reward.evaluate.judged import ProtocolResult
from listener_reward.evaluate.scores import Scores, read_scores

FIXTURES = Path(__file__).with_name("fixtures")


def by_name(record: Evaluation) -> dict[str, ProtocolResult]:
    return {result.protocol: result for result in record.protocols}


def always_first(pairs: Any) -> Scores:
    """Who prefers the first of the file, whatever the loader's shuffle shows first."""
    return Scores("first", "score", {name: (1.0, None) for name in pairs["id"]})


def test_imagereward_counts_and_its_leaking_order():
    # made-1 has ranks 1 2 2 4: one tie, and the first wins all 5 others. made-2 has 3 1 5: it wins 2 of 3. made-3 has
    # 1 1 1 2: three ties, and it wins the 3 others. So 4 ties, 11 pairs with a side, 10 of them the first's.
    pairs = load_pairs(f"imagereward:{FIXTURES / 'imagereward.json'}", check_images=False)
    record = evaluate_scores(always_first(pairs), pairs)
    results = by_name(record)
    assert (record.n, record.n_ties, results["imagereward"].pairs, results["imagereward"].prompts) == (15, 4, 11, 3)
    assert record.accuracy == results["imagereward"].value == results["imagereward"].always_first_in_file == 10 / 11
    assert results["hpsv2"].value == pytest.approx((1 + 2 / 3 + 1) / 3)
    found = check_data(f"imagereward:{FIXTURES / 'imagereward.json'}")
    assert (found.pairs, found.ties, found.images) == (15, 4, 11)
    assert found.first_preferred_as_published == 10 / 11


def test_imagereward_s_own_ranks_are_right_on_every_pair(tmp_path: Path):
    rows = [
        {"image": image, "score": -rank}
        for record in json.loads((FIXTURES / "imagereward.json").read_text())
        for image, rank in zip(record["generations"], record["ranking"], strict=True)
    ]
    path = tmp_path / "ranks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(3):
        pairs = load_pairs(f"imagereward:{FIXTURES / 'imagereward.json'}", check_images=False, seed=seed)
        results = by_name(evaluate_scores(read_scores(path), pairs))
        assert (results["imagereward"].value, results["hpsv2"].value, results["tau-b"].value) == (
            1,
            1,
            pytest.approx(1),
        )


def test_hpdv2_agreement_of_its_people_and_inversions():
    # Two of three people agree on one of three pairs of votes where they are 2 to 1, and on all where they are 3 to 0.
    # First prompt: 2-1, 3-0, 2-1; second: 0-3, 0-3, 2-1. In all (1/3 + 1 + 1/3 + 1 + 1 + 1/3) / 6.
    pairs = load_pairs(f"hpdv2:{FIXTURES / 'hpdv2.json'}", check_images=False)
    votes, n = np.array(pairs["votes_first"]), 3
    agreed = (votes * (votes - 1) + (n - votes) * (n - votes - 1)) / (n * (n - 1))
    assert agreed.mean() == pytest.approx(2 / 3)
    one_by_one = [
        (a[i] < a[j]) == (b[i] < b[j])
        for record in json.loads((FIXTURES / "hpdv2.json").read_text())
        for i, j in combinations(range(3), 2)
        for a, b in combinations([one["rank"] for one in record["raw_annotations"]], 2)
    ]
    assert np.mean(one_by_one) == pytest.approx(agreed.mean())
    # By rank the first prompt is in the file's order; in the second the first image is the worst and the others tie.
    result = by_name(evaluate_scores(always_first(pairs), pairs))["hpsv2-inversion"]
    assert result.value == result.always_first_in_file == pytest.approx((1 + 1 / 3) / 2)
    assert result.pairs == 6


def test_hpdv3_path1_is_the_winner_whatever_the_votes():
    pairs = load_pairs(f"hpdv3:{FIXTURES / 'hpdv3.json'}", check_images=False)
    record = evaluate_scores(always_first(pairs), pairs)
    result = by_name(record)["hpsv3-pair"]
    assert (result.value, result.pairs, result.always_first_in_file) == (1.0, 4, 1.0)
    assert (record.accuracy, record.n, record.n_ties) == (1.0, 4, 1), "by the votes one pair is even"
    labels = np.where(pairs["swapped"], 1 - np.array(pairs["p_first"]), pairs["p_first"])
    assert labels.tolist() == [0.75, 0.75, 0.5, 1.0]


@pytest.mark.parametrize("media", ["image", "video"])
@pytest.mark.parametrize(("judge", "right"), [("plain", 4), ("wordy", 5)])
def test_genai_bench_recorded_answers(tmp_path: Path, media: str, judge: str, right: int):
    # plain: right on 0, 2, 4 and 6. wordy: right on 0, on 1 ([[A>>B]]), 4 and 6 ([[A=B]] is both ties), and 5; two
    # labels on one line (2) are none, and so is silence (3).
    with (FIXTURES / "genai_bench_votes.csv").open(newline="") as file:
        votes = list(csv.DictReader(file))
    sides = {f"{side}_{media}": f"{side}.{'png' if media == 'image' else 'mp4'}" for side in ("left", "right")}
    rows = [{"prompt": row["idx"], "vote_type": row["human_vote"], **sides} for row in votes]
    (tmp_path / "test_v1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"id": row["idx"], "answer": row[judge]} for row in votes]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    for seed in range(3):
        pairs = load_pairs(f"genai-bench:{tmp_path / 'test_v1.jsonl'}", check_images=False, seed=seed)
        result = by_name(evaluate_scores(read_scores(tmp_path / "answers.jsonl"), pairs))["genai-bench"]
        assert (result.value, result.pairs) == (right / 8, 8)


def test_videogen_by_dimension():
    found = {}
    for dimension in ("VQ", "MQ", "TA", "Overall"):
        pairs = load_pairs(f"videogen:{FIXTURES / 'videogen-rewardbench.csv'}#{dimension}", check_images=False)
        results = by_name(evaluate_scores(always_first(pairs), pairs))
        found[dimension] = [results[f"videogen-{ties}-ties"].value for ties in ("without", "with")]
    # Labels A B A, then same B A, then B same A, then A same B. With ties all margins are equal: either everything is a
    # tie or nothing is, so it is the better of the fraction of ties and of A among three.
    assert found["VQ"] == [2 / 3, 2 / 3]
    assert found["MQ"] == found["TA"] == found["Overall"] == [1 / 2, pytest.approx(1 / 3)]


def test_mmrb2_counts_both_orders(tmp_path: Path):
    shutil.copy(FIXTURES / "mmrb2_t2i.json", tmp_path / "t2i.json")
    pairs: Any = load_pairs(f"mmrb2:{tmp_path}", check_images=False)
    by_id = {row["id"]: row for row in pairs}
    votes = {
        name: (row["votes_first"], row["votes_second"])[:: -1 if row["swapped"] else 1] for name, row in by_id.items()
    }
    assert votes == {"made_1": (2, 1), "made_2": (0, 3)}
    assert set(pairs["dimension"]) == {"t2i"}
    # Right on both in order, right on one with the two shown swapped, and no answer to the other.
    scores = Scores("mine", "probability", {"made_1": (0.8, 0.2), "made_2": (-0.4, float("nan"))})
    assert by_name(evaluate_scores(scores, pairs))["mmrb2"].value == 1.0
    scores = Scores("mine", "probability", {"made_1": (0.8, -0.2), "made_2": (-0.4, float("nan"))})
    assert by_name(evaluate_scores(scores, pairs))["mmrb2"].value == pytest.approx(2 / 3)
