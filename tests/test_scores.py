"""Files of scores: every form of row, the published order against the shown one, and what does not match."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tables import write_table

from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError
from listener_reward.evaluate import evaluate_scores
from listener_reward.evaluate.scores import MAX_MISSING, Scores, read_scores

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def write(tmp_path: Path):
    """`write(rows)` makes a file of them and gives its path."""

    def make(rows: list[dict[str, Any]], name: str = "scores.jsonl") -> Path:
        return write_table(tmp_path / name, rows)

    return make


SHOWN: dict[str, list[Any]] = {
    "id": ["a", "b", "c"],
    "swapped": [False, True, False],
    "item_first": ["x/1.png", "x/3.png", "x/1.png"],
    "item_second": ["x/2.png", "x/1.png", "x/3.png"],
}
"""Of pair b the published second, 3, is shown first."""


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.json", "scores.csv", "scores.parquet"])
@pytest.mark.parametrize(
    ("rows", "unit", "margins"),
    [
        ([{"id": i, "p_first": p} for i, p in zip("abc", (0.9, 0.25, 0.5), strict=True)], "probability", [0.8, 0.5, 0]),
        ([{"id": i, "margin": m} for i, m in zip("abc", (3, -1.5, 0), strict=True)], "score", [3, 1.5, 0]),
        (
            [{"id": i, "score_first": s, "score_second": 1.0} for i, s in zip("abc", (4, -0.5, 1), strict=True)],
            "score",
            [3, 1.5, 0],
        ),
        ([{"image": f"x/{k}.png", "score": s} for k, s in ((1, 1.0), (2, -2.0), (3, 2.5))], "score", [3, 1.5, -1.5]),
        ([{"id": i, "answer": a} for i, a in zip("abc", ("1", "second", "tie"), strict=True)], "answer", [1, 1, 0]),
    ],
)
def test_every_form_of_row_in_every_type_of_file(write, name, rows, unit, margins):
    scores = read_scores(write(rows, name))
    found = scores.margins(SHOWN, [["g"]] * 3)
    assert scores.unit == found["unit"] == unit
    assert found["judge"].tolist() == pytest.approx(margins)  # pair b is turned: its published first is shown second


def test_both_orders_of_a_pair(write):
    rows = [{"id": "a", "p_first": 1.0, "p_first_swapped": 0.5}, {"id": "b", "p_first": 1.0, "p_first_swapped": 0.25}]
    rows.append({"id": "c", "p_first": None, "p_first_swapped": 0.0})
    found = read_scores(write(rows)).margins(SHOWN)
    # As published: forward 1, 1, none; reverse 0, -0.5, -1. Pair b is shown swapped: its orders and sides change.
    assert found["forward"].tolist() == pytest.approx([1, 0.5, math.nan], nan_ok=True)
    assert found["reverse"].tolist() == pytest.approx([0, -1, -1])
    assert found["judge"].tolist() == pytest.approx([0.5, -0.25, -1])


def test_genai_bench_s_labels_are_turned_with_the_pair(write):
    rows = [
        {"id": "a", "answer": "It is [[A>B]]"},
        {"id": "b", "answer": "[[A>>B]]"},
        {"id": "c", "answer": "[[A=B=Bad]]"},
    ]
    found = read_scores(write(rows)).margins(SHOWN)
    assert found["words"] == ["It is [[A>B]]", "[[B>>A]]", "[[A=B=Bad]]"]
    assert found["judge"].tolist() == [1, -1, 0]


def test_an_answer_that_says_nothing_was_still_given(write):
    """A judge whose outputs do not parse is wrong, as GenAI-Bench has it; the file is not for other data."""
    rows = [{"id": i, "answer": a} for i, a in zip("abc", ("I cannot say", "", None), strict=True)]
    found = read_scores(write(rows)).margins(SHOWN)
    assert np.isnan(found["judge"]).all()


def test_images_are_found_by_path_and_by_name_where_that_is_unique(write):
    rows = [{"image": f"/elsewhere/{k}.png", "score": k} for k in (1, 2, 3)]
    assert read_scores(write(rows)).margins(SHOWN)["judge"].tolist() == [-1, 2, -2]
    rows = [{"image": f"C:\\scored\\{k}.png", "score": k} for k in (1, 2, 3)]
    assert read_scores(write(rows)).margins(SHOWN)["judge"].tolist() == [-1, 2, -2]
    twice = [*rows, {"image": "other/1.png", "score": 9.0}]
    with pytest.raises(InputError, match=r"no score for 3 of 3 pairs, such as 'x/1.png'"):
        read_scores(write(twice)).margins(SHOWN)


def test_one_image_may_answer_several_prompts(write):
    rows = [{"image": f"x/{k}.png", "group": g, "score": k * s} for k in (1, 2, 3) for g, s in (("p", 1), ("q", -1))]
    assert read_scores(write(rows)).margins(SHOWN, [["p"], ["p"], ["q"]])["judge"].tolist() == [-1, 2, 2]


@pytest.mark.parametrize("columns", [("prompt",), ("group",), ("group", "prompt")])
@pytest.mark.parametrize("folder", ["images/", "/elsewhere/"])
def test_published_sets_take_scores_by_prompt_and_image(write, tmp_path, columns, folder):
    """HPDv3 with one image under two prompts, where it is the better and the worse one. Its `group` is a hash."""
    rows = [
        {"prompt": "a cat", "path1": "images/1.png", "path2": "images/2.png", "choice_dist": None},
        {"prompt": "a dog", "path1": "images/3.png", "path2": "images/1.png", "choice_dist": None},
    ]
    pairs = load_pairs(f"hpdv3:{write(rows, 'test.json')}", check_images=False)
    group = dict(zip(pairs["prompt"], pairs["group"], strict=True))
    scored = [("a cat", 1, 2.0), ("a cat", 2, 1.0), ("a dog", 3, 0.0), ("a dog", 1, -5.0)]
    lines = [{"prompt": p, "group": group[p], "image": f"{folder}{k}.png", "score": s} for p, k, s in scored]
    lines = [{name: line[name] for name in (*columns, "image", "score")} for line in lines]
    record = evaluate_scores(read_scores(write(lines)), pairs)
    assert (record.missing, record.protocols[0].value, record.accuracy) == (0, 1.0, 1.0)
    margins = np.where(pairs["swapped"], -1, 1) * record.judged.judge
    assert margins.tolist() == [1.0, 5.0]


def test_a_validation_set_is_scored_by_the_same_file_of_images(write):
    """Logits: of a difference of 1 the softmax's margin is 0.46. The validation set's ties lie there, so it is one."""
    image = {"prompt": "x", "image_first": "1.png", "image_second": "2.png", "item_first": "1", "item_second": "2"}
    pairs, validation = (
        load_pairs(str(write([image | {"p_first": share} for share in shares], name)), check_images=False)
        for shares, name in (([1.0, 0.5], "test.jsonl"), ([0.5, 0.5], "validation.jsonl"))
    )
    images = read_scores(write([{"image": "1", "score": 3.0}, {"image": "2", "score": 2.0}]))
    (result,) = evaluate_scores(images, pairs, protocols=["pickscore"], validation=validation).protocols
    assert (result.thresholds, result.value) == ((0.5,), 0.75)
    names = read_scores(write([{"id": "0", "margin": 1.0}, {"id": "1", "margin": 1.0}]))
    with pytest.raises(InputError, match="names pairs, of which a validation set has the same ids"):
        evaluate_scores(names, pairs, protocols=["pickscore"], validation=validation)
    with pytest.raises(InputError, match="has no use"):
        evaluate_scores(images, pairs, validation=validation)


def test_a_score_under_another_prompt_is_none_of_this_one_s(write):
    rows = [{"image": f"x/{k}.png", "prompt": "p", "score": k} for k in (1, 2, 3)]
    with pytest.warns(UserWarning, match="no score for 1 of 6 pairs, such as 'x/1.png'"):
        shown = {name: values * 2 for name, values in SHOWN.items()}
        found = read_scores(write(rows)).margins(shown, [["p"]] * 5 + [["q"]])
    assert np.isnan(found["judge"]).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "a", "p_first": 1.2}], r"row 0: p_first is 1.2"),
        ([{"id": "a", "margin": 1}, {"id": "b", "margin": "high"}], r"row 1: margin is 'high'"),
        ([{"id": "a", "margin": "inf"}], "finite"),
        ([{"id": "", "margin": 1}], "id is missing or empty"),
        ([{"margin": 1}], "id is missing or empty"),
        ([{"id": "a", "points": 1}], "no score in the columns id, points"),
        ([{"id": "a", "score": 1}], "no score in the columns"),
        ([{"id": "a", "margin": 1}, {"id": "a", "margin": 2}], "'a' was scored above, and differently"),
        (
            [{"id": "a", "margin": 1}, {"id": "b", "p_first": 1}],
            "gives a probability where the rows above give a score",
        ),
        ([], "holds no rows"),
    ],
)
def test_rows_that_cannot_be_used(write, rows, words):
    with pytest.raises(InputError, match=words):
        read_scores(write(rows))


def test_no_such_file():
    with pytest.raises(InputError, match="no file"):
        read_scores("nowhere.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Against a data set
# ---------------------------------------------------------------------------------------------------------------------


def shown(n: int) -> dict[str, list[Any]]:
    return {"id": [str(k) for k in range(n)], "swapped": [False] * n}


def scored(n: int) -> Scores:
    return Scores("mine.csv", "score", pairs={str(k): (1.0, None) for k in range(n)})


def test_a_few_missing_scores_are_counted_and_named_and_many_are_refused():
    with pytest.warns(UserWarning, match=r"mine.csv has no score for 2 of 10 pairs, such as '8', '9'"):
        found = scored(8).margins(shown(10))
    assert np.isnan(found["judge"]).tolist() == [False] * 8 + [True] * 2
    assert 2 / 10 <= MAX_MISSING < 3 / 10
    with pytest.raises(InputError, match="More than 20% cannot be right"):
        scored(7).margins(shown(10))


def test_data_that_does_not_say_which_image_is_which():
    with pytest.raises(InputError, match="no column swapped"):
        scored(1).margins({"id": ["0"]})
    with pytest.raises(InputError, match="no column item_first"):
        Scores("mine.csv", "score", images={"x": 1.0}).margins(shown(1))


@pytest.mark.skipif(not SHARED.is_dir(), reason="ImageReward's labels are not on this machine")
def test_imagereward_s_labels_score_themselves_without_a_picture(write):
    """Scores that are the people's own ranking are right on every untied pair, whatever the loader's shuffle did."""
    path = SHARED / "imagereward" / "test.json"
    records = json.loads(path.read_text())
    pairs = load_pairs(f"imagereward:{path}", check_images=False, seed=3)
    rows = [
        {"image": image, "score": -rank}
        for record in records
        for image, rank in zip(record["generations"], record["ranking"], strict=True)
    ]
    record = evaluate_scores(read_scores(write(rows)), pairs)
    results = {result.protocol: result for result in record.protocols}
    assert (record.n, record.n_ties, record.accuracy) == (7230, 831, 1.0)
    assert (results["imagereward"].value, results["imagereward"].pairs, results["imagereward"].prompts) == (
        1,
        6399,
        466,
    )
    assert round(100 * (results["imagereward"].always_first_in_file or 0), 1) == 59.0
    assert abs((results["imagereward"].always_first or 0) - 0.5) < 0.02  # the shuffle takes the leak away
    assert results["tau-b"].value == pytest.approx(1)
    assert record.ece is record.brier is record.nll is None  # a score is no probability


@pytest.mark.skipif(not SHARED.is_dir(), reason="the HPDv2 gallery is not on this machine")
def test_one_annotator_as_a_model_of_all_ten(write):
    """Their ranks as scores, by image and by pair, are the same number as worked out from the file."""
    records = json.loads((SHARED / "hpdv2" / "annotations.json").read_text())
    pairs = load_pairs(f"hpdv2:{SHARED / 'hpdv2'}", check_images=False)
    by_image, by_pair, right = [], [], []
    for number, record in enumerate(records):
        ranks, means = record["annotator_ranks"][0], np.mean(record["annotator_ranks"], axis=0)
        by_image += [{"image": i, "score": -r} for i, r in zip(record["image_path"], ranks, strict=True)]
        for i in range(9):
            for j in range(i + 1, 9):
                by_pair.append({"id": f"{number}/{i}-{j}", "score_first": -ranks[i], "score_second": -ranks[j]})
                right.append((ranks[i] - ranks[j]) * (means[i] - means[j]) >= 0)
    found = [
        evaluate_scores(read_scores(write(rows, f"{k}.jsonl")), pairs) for k, rows in enumerate((by_image, by_pair))
    ]
    assert found[0].protocols == found[1].protocols
    assert found[0].protocols[0].protocol == "hpsv2-inversion"
    assert found[0].protocols[0].value == pytest.approx(np.mean(right))


def test_a_streamed_data_set_gives_the_same(write, tmp_path, shade):
    shade(9).save(tmp_path / "a.png")
    shade(1).save(tmp_path / "b.png")
    row = {"image_first": "a.png", "image_second": "b.png"}
    rows = [row | {"prompt": f"p{k % 4}", "p_first": k / 20, "id": f"n{k}"} for k in range(21)]
    data = str(write(rows, "pairs.jsonl"))
    scores = read_scores(write([{"id": f"n{k}", "p_first": (k * 7 % 21) / 20} for k in range(21)]))
    whole = evaluate_scores(scores, load_pairs(data, seed=1)).to_dict()
    streamed = evaluate_scores(scores, load_pairs(data, seed=1, stream=True)).to_dict()
    assert whole | {"seconds": 0} == streamed | {"seconds": 0}
    assert whole["ece"] is not None
    other_seed = evaluate_scores(scores, load_pairs(data, seed=2))
    assert other_seed.accuracy == whole["accuracy"]  # the shuffle is undone


def test_scores_load_neither_torch_nor_pictures(write, tmp_path):
    """The pictures do not even exist."""
    row = {"prompt": "p", "image_first": "none.png", "image_second": "gone.png"}
    data = write([row | {"p_first": 1.0, "id": "a"}, row | {"p_first": 0.0, "id": "b"}], "pairs.jsonl")
    scores = write([{"id": "a", "margin": 1}, {"id": "b", "margin": 1}])
    code = (
        "import sys\nfrom listener_reward.cli import main\n"
        "try:\n    main()\nexcept SystemExit as left:\n    assert not left.code, left.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, "eval", "--scores", str(scores), "--data", str(data), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy"] == 0.5


@pytest.mark.skipif(not SHARED.is_dir(), reason="GenAI-Bench's votes are not on this machine")
@pytest.mark.parametrize(("task", "published"), [("image", 45.59), ("video", 48.46)])
def test_a_recorded_judge_of_genai_bench_through_the_loader(write, task, published):
    """gpt4o's labels as a file of scores: the loader's shuffle turns the votes and the labels alike."""
    with (SHARED / "genai_bench" / f"votes_{task}_generation.csv").open(newline="") as file:
        votes = list(csv.DictReader(file))
    media = {"image": ("left_image", "right_image"), "video": ("left_video", "right_video")}[task]
    files = {name: f"{name}.{'png' if task == 'image' else 'mp4'}" for name in media}
    rows = [{"prompt": f"prompt {row['idx']}", "vote_type": row["human_vote"], **files} for row in votes]
    pairs = load_pairs(f"genai-bench:{write(rows, 'test.jsonl')}", check_images=False)
    answers = [{"id": name, "answer": row["gpt4o"]} for name, row in zip(pairs["id"], votes, strict=True)]
    record = evaluate_scores(read_scores(write(answers, "gpt4o.jsonl")), pairs)
    results = {result.protocol: result for result in record.protocols}
    assert round(100 * (results["genai-bench"].value or 0), 2) == published
    assert results["genai-bench"].pairs == len(votes) and 0.4 < sum(pairs["swapped"]) / len(votes) < 0.6
