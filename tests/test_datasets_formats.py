"""Every published format, under its publisher's field names, against labels worked by hand; the real files where they
are."""

from __future__ import annotations

import csv
import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from listener_reward.chat import CRITERIA
from listener_reward.datasets import FEATURES, FORMATS, load_pairs
from listener_reward.datasets.format import PUBLISHED, read_pairs
from listener_reward.datasets.load import fault
from listener_reward.datasets.rows import Hub
from listener_reward.errors import InputError
from listener_reward.evaluate import evaluate_scores
from listener_reward.evaluate.scores import Scores
from listener_reward.media.images import to_pil

MP4 = b"....ftypisom"
"""The start of a video file."""

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(folder: Path, *names: str) -> None:
    """Files whose gray level is the number in their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(int("".join(filter(str.isdigit, Path(name).stem)))))


def shade(image: dict) -> int:
    pixel: Any = to_pil(image).getpixel((0, 0))
    return pixel[0]


def as_published(row: Any) -> dict:
    """A row with the images, the label and the columns of the file's own order."""
    if not row["swapped"]:
        return dict(row)
    turned = {"_first": "_second", "_second": "_first"}
    back = {next((k.removesuffix(a) + b for a, b in turned.items() if k.endswith(a)), k): v for k, v in row.items()}
    return back | {"images": row["images"][::-1], "p_first": 1 - row["p_first"]}


def rows_of(spec: str, *asked: str, **options) -> list[dict]:
    """The rows; `asked` are those of `sources` and `criterion` that they have to have."""
    data = load_pairs(spec, **options)
    own = FORMATS[data[0]["dataset"]].columns.keys()
    assert data.features.keys() == FEATURES.keys() | PUBLISHED.keys() | own | {*asked}
    return [as_published(row) for row in data]


def parquet(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def as_json(path: Path, rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return str(path)


# ---------------------------------------------------------------- what all have in common


def test_the_shuffle_turns_the_columns_with_the_images(tmp_path):
    files = [f"{level}.png" for level in range(10, 250, 10)]
    pictures(tmp_path, *files)
    path = as_json(tmp_path / "test.json", [{"id": "a", "prompt": "x", "generations": files, "ranking": [*range(24)]}])
    data: Any = load_pairs(f"imagereward:{path}")
    swapped = np.array(data["swapped"])
    assert 0.3 < swapped.mean() < 0.7
    for row in data:
        names = row["item_first"], row["item_second"]
        assert [shade(image) for image in row["images"]] == [int(name.removesuffix(".png")) for name in names]
        assert (row["place_first"] > row["place_second"]) == row["swapped"]
        assert (row["rank_first"] < row["rank_second"]) == (row["p_first"] == 1.0)
    assert [as_published(row)["id"] for row in data] == [f"a/{i}-{j}" for i, j in combinations(range(24), 2)]
    assert (swapped != np.array(load_pairs(f"imagereward:{path}", seed=1)["swapped"])).mean() > 0.3


@pytest.mark.parametrize("kind", [*FORMATS])
def test_a_wrong_path_is_told_before_anything_else(kind, tmp_path):
    with pytest.raises(InputError, match="check the"):
        load_pairs(f"{kind}:{tmp_path / 'gone'}")
    with pytest.raises(InputError, match="is without"):
        load_pairs(f"{kind}:{tmp_path}")


@pytest.mark.parametrize("kind", ["hpdv2", "hpdv3", "imagereward", "videogen", "mmrb2"])
def test_sets_whose_images_are_archives_say_what_to_download(kind):
    with pytest.raises(InputError, match=r"hf download --repo-type dataset .* unpack"):
        load_pairs(f"{kind}:org/name")


def test_images_of_no_interest_need_not_be_there(tmp_path):
    record = {"id": "a", "prompt": "x", "generations": ["1.png", "2.png"], "ranking": [2, 1]}
    path = as_json(tmp_path / "test.json", [record])
    with pytest.raises(InputError, match="1 of 1 pairs have an unreadable image"):
        load_pairs(path)
    row = rows_of(path, check_images=False)[0]
    assert row["p_first"] == 0.0 and row["images"][0]["path"] == str(tmp_path / "1.png")


# ---------------------------------------------------------------- ImageRewardDB


def test_imagereward_ranks_may_tie_and_skip(tmp_path):
    files = ["images/10.png", "images/20.png", "images/30.png"]
    pictures(tmp_path, *files)
    record = {"id": "005-1", "prompt": "a cat", "generations": files, "ranking": [1, 4, 1]}
    rows = rows_of(f"imagereward:{Path(as_json(tmp_path / 'test.json', [record])).parent}")
    assert [(row["id"], row["p_first"]) for row in rows] == [("005-1/0-1", 1.0), ("005-1/0-2", 0.5), ("005-1/1-2", 0.0)]
    assert [(row["rank_first"], row["rank_second"]) for row in rows] == [(1, 4), (1, 1), (4, 1)]
    assert {row["group"] for row in rows} == {"005-1"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ranking": [1]}, "one rank for each of 2"),
        ({"ranking": [1, None]}, "not finite"),
        ({"generations": "ab"}, "generations is 'ab'"),
        ({"generations": [1, 2]}, "generations is"),
        ({"prompt": None}, "prompt is None"),
    ],
)
def test_imagereward_records_that_cannot_be_used(tmp_path, fields, says):
    record = {"id": "1", "prompt": "a", "generations": ["1.png", "2.png"], "ranking": [1, 2], **fields}
    with pytest.raises(InputError, match=f"test.json, entry 0: .*{says}"):
        load_pairs(f"imagereward:{as_json(tmp_path / 'test.json', [record])}")


@pytest.mark.skipif(not (SHARED / "imagereward").is_dir(), reason="ImageReward's labels are not on this machine")
def test_imagereward_test_labels_are_the_published_ones():
    data = load_pairs(f"imagereward:{SHARED / 'imagereward'}", check_images=False)
    p_first, swapped = np.array(data["p_first"]), np.array(data["swapped"])
    untied = p_first != 0.5
    assert (untied.sum(), (~untied).sum(), len(data.unique("group"))) == (6399, 831, 466)
    as_in_file = np.where(swapped, 1 - p_first, p_first)
    assert round(as_in_file[untied].mean(), 3) == 0.590, "always answering the first, in the order of the file"
    assert abs(p_first[untied].mean() - 0.5) < 0.02, "and after the shuffle"
    assert len(data.unique("id")) == len(data)


# ---------------------------------------------------------------- HPDv2


def test_hpdv2_keeps_ranks_votes_and_places(tmp_path):
    pictures(tmp_path, "test/10.png", "test/20.png", "test/30.png")
    raw = [[1, 2, 3], [1, 2, 3], [3, 2, 1], [1, 2, 1]]
    record = {
        "prompt": "a cat",
        "image_path": ["10.png", "20.png", "30.png"],
        "rank": [1, 2, 3],
        "raw_annotations": [{"rank": rank, "user_hash": "u"} for rank in raw],
    }
    rows = rows_of(f"hpdv2:{Path(as_json(tmp_path / 'test.json', [record])).parent}")
    assert [(row["votes_first"], row["votes_second"]) for row in rows] == [(3, 1), (2.5, 1.5), (2, 2)]
    assert all(row["p_first"] == row["votes_first"] / 4 for row in rows)
    assert [(row["rank_first"], row["place_second"], row["item_second"]) for row in rows] == [
        (1, 1, "20.png"),
        (1, 2, "30.png"),
        (2, 2, "30.png"),
    ]


def test_hpdv2_train_has_a_choice_and_no_votes(tmp_path):
    pictures(tmp_path, "train/1.png", "train/2.png")
    record = {"prompt": "a cat", "file_path": ["1.png", "2.png"], "human_preference": [0, 1]}
    (row,) = rows_of(as_json(tmp_path / "train.json", [record]))
    assert (row["p_first"], row["rank_first"], row["rank_second"], row["votes_first"]) == (0.0, 2, 1, None)


@pytest.mark.skipif(not (SHARED / "hpdv2").is_dir(), reason="the HPDv2 gallery is not on this machine")
def test_the_votes_of_the_hpdv2_gallery_give_the_agreement_of_its_people():
    data = load_pairs(f"hpdv2:{SHARED / 'hpdv2'}")
    for_first, n = np.array(data["votes_first"]), 10
    agreed = (for_first * (for_first - 1) + (n - for_first) * (n - for_first - 1)) / (n * (n - 1))
    one_by_one = []
    for record in json.loads((SHARED / "hpdv2" / "annotations.json").read_text()):
        for i, j in combinations(range(len(record["image_path"])), 2):
            votes = [ranks[i] < ranks[j] for ranks in record["annotator_ranks"]]
            one_by_one += [a == b for a, b in combinations(votes, 2)]
    assert len(one_by_one) == 12 * 36 * 45
    assert agreed.mean() == pytest.approx(np.mean(one_by_one))
    assert round(agreed.mean(), 3) == 0.803


# ---------------------------------------------------------------- HPDv3 and HPDv3++


def test_hpdv3_path1_always_wins(tmp_path):
    pictures(tmp_path, "images/10.png", "images/20.png")
    base = {"prompt": "a cat", "path1": "images/10.png", "path2": "images/20.png"}
    voted = {"model1": "kolors", "model2": "sd14", "choice_dist": [12, 4], "confidence": 0.9999}
    unknown = {"model1": None, "model2": None, "choice_dist": None, "confidence": None}
    rows = rows_of(as_json(tmp_path / "test.json", [base | voted, base | unknown] * 8))
    assert [row["p_first"] for row in rows] == [0.75, 1.0] * 8
    assert {(row["rank_first"], row["rank_second"]) for row in rows} == {(1, 2)}
    assert {tuple(map(shade, row["images"])) for row in rows} == {(10, 20)}
    assert [(row["model_first"], row["votes_second"], row["confidence"]) for row in rows[:2]] == [
        ("kolors", 4, 0.9999),
        (None, None, None),
    ]
    assert len({row["group"] for row in rows}) == 1, "the same prompt is the same group"


def test_hpdv3_votes_stand_in_either_order_and_path1_has_the_more(tmp_path):
    """As upstream, which sorts them. Even votes say nothing, but the file still says who won."""
    base = {"prompt": "a cat", "path1": "images/10.png", "path2": "images/20.png", "confidence": None}
    votes = [[9, 3], [3, 9], [5, 5], [0, 4]] * 8
    path = as_json(tmp_path / "test.json", [base | {"choice_dist": counts} for counts in votes])
    pairs = load_pairs(f"hpdv3:{path}", check_images=False)
    assert len(set(pairs["swapped"])) == 2
    rows = [as_published(row) for row in pairs]
    assert [row["p_first"] for row in rows] == [0.75, 0.75, 0.5, 1.0] * 8
    assert [(row["votes_first"], row["votes_second"]) for row in rows[:4]] == [(9, 3), (9, 3), (5, 5), (4, 0)]
    scores = Scores("path1", "score", {row["id"]: (1.0, None) for row in rows})
    results = {r.protocol: r for r in evaluate_scores(scores, pairs, protocols=["hpsv3-pair", "imagereward"]).protocols}
    assert (results["hpsv3-pair"].value, results["hpsv3-pair"].pairs) == (1.0, 32), "even votes count too"
    turned = Scores("path2", "score", {row["id"]: (-1.0, None) for row in rows})
    assert evaluate_scores(turned, pairs).protocols[0].value == 0.0
    assert evaluate_scores(scores, pairs).n_ties == 8


def test_hpdv3_plus_plus_has_its_images_above_its_files(tmp_path):
    pictures(tmp_path, "images/qwen_image/10.png", "images/qwen_image/20.png")
    row = {"path1": "images/qwen_image/20.png", "path2": "images/qwen_image/10.png", "prompt": "a cat"}
    (one,) = rows_of(f"hpdv3:{as_json(tmp_path / 'test' / 'test_aes.json', [row])}")
    assert (one["p_first"], shade(one["images"][0]), one["item_first"]) == (1.0, 20, "images/qwen_image/20.png")


@pytest.mark.parametrize("votes", [[1], "12", [0, 0], [-1, 2], ["a", 1]])
def test_hpdv3_votes_that_cannot_be_used(tmp_path, votes):
    row = {"path1": "a", "path2": "b", "prompt": "c", "choice_dist": votes}
    with pytest.raises(InputError, match=r"all.json, entry 0: choice_dist"):
        load_pairs(f"hpdv3:{as_json(tmp_path / 'all.json', [row])}")


# ---------------------------------------------------------------- Pick-a-Pic


def pick(label: float, **fields) -> dict:
    return {
        "are_different": True,
        "best_image_uid": "u0",
        "caption": "a cat",
        "has_label": True,
        "image_0_uid": "u0",
        "image_1_uid": "u1",
        "jpg_0": png(10),
        "jpg_1": png(20),
        "label_0": label,
        "label_1": 1 - label,
        "model_0": "sdxl",
        "model_1": "dreamlike",
        "num_example_per_prompt": 3,
        **fields,
    }


def test_pickapic_labels_ties_and_rows_without_a_label(tmp_path):
    rows = [pick(1.0), pick(0.0), pick(0.5), pick(0.0, has_label=False)]
    found = rows_of(
        f"pickapic:{Path(parquet(tmp_path / 'data' / 'test_unique-00000-of-00001-ab.parquet', rows)).parent}"
    )
    assert [row["p_first"] for row in found] == [1.0, 0.0, 0.5]
    first = found[0]
    assert [shade(image) for image in first["images"]] == [10, 20]
    assert (first["item_first"], first["model_second"], first["examples_per_prompt"]) == ("u0", "dreamlike", 3)


def test_shards_of_several_splits_have_to_be_told_apart(tmp_path):
    for split in ("train", "test_unique"):
        parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [pick(1.0)])
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [pick(0.0)])
    with pytest.raises(InputError, match="holds the splits test_unique, train; name one by a pattern"):
        load_pairs(f"pickapic:{tmp_path}")
    rows = rows_of(f"pickapic:{tmp_path}/**/train-*")
    assert [(row["id"], row["p_first"]) for row in rows] == [("0", 1.0), ("1", 0.0)]
    with pytest.raises(InputError, match="no file matches"):
        load_pairs(f"pickapic:{tmp_path}/valid-*")


@pytest.mark.parametrize("fields", [{"label_0": 0.3}, {"label_1": 1.0}, {"label_0": None}])
def test_pickapic_labels_that_cannot_be_used(tmp_path, fields):
    path = parquet(tmp_path / "a.parquet", [pick(1.0, **fields)])
    with pytest.raises(InputError, match=r"a.parquet, row 0: label_0 is"):
        load_pairs(f"pickapic:{path}")


def test_pickapic_without_images(tmp_path):
    row = {name: value for name, value in pick(1.0).items() if not name.startswith("jpg")}
    with pytest.raises(InputError, match="take the version that has images"):
        load_pairs(parquet(tmp_path / "a.parquet", [row]))


# ---------------------------------------------------------------- Rapidata


def rapid(**fields) -> dict:
    images = {"image1": {"bytes": png(10), "path": "a.png"}, "image2": {"bytes": png(20), "path": "b.png"}}
    return {"prompt": "a cat", **images, "model1": "flux", "model2": "imagen", **fields}


def test_rapidata_votes_are_shares(tmp_path):
    votes = {"detailed_results": "{}", "image1_path": "p/1.jpg", "image2_path": "p/2.jpg"}
    counts = [(3, 1), (5, 5), (0, 0), (0, 4)]
    rows = [rapid(votes_image1=one, votes_image2=two, **votes) for one, two in counts]
    found = rows_of(parquet(tmp_path / "train_0001.parquet", rows))
    assert [(row["id"], row["p_first"]) for row in found] == [
        ("0/preference", 0.75),
        ("1/preference", 0.5),
        ("3/preference", 0.0),
    ]
    assert (found[0]["votes_first"], found[0]["model_second"], found[0]["item_second"]) == (3, "imagen", "p/2.jpg")


def test_rapidata_weighted_results_have_dimensions(tmp_path):
    shares = {"preference": (0.75, 0.25), "coherence": (0.5, 0.5), "alignment": (0.1, 0.9)}
    fields = {f"weighted_results_image{i + 1}_{name}": two[i] for name, two in shares.items() for i in (0, 1)}
    path = parquet(tmp_path / "train.parquet", [rapid(**fields)])
    assert [(row["dimension"], row["p_first"]) for row in rows_of(path)] == [("preference", 0.75)]
    (row,) = rows_of(f"rapidata:{path}#alignment", "criterion")
    assert (row["p_first"], row["criterion"]) == (pytest.approx(0.1), "alignment")
    every = rows_of(f"rapidata:{path}#all", "criterion")
    asked = {row["dimension"]: row["criterion"] for row in every}
    assert asked == {"preference": None, "coherence": "quality", "alignment": "alignment"}
    assert {row["dimension"]: row["p_first"] for row in every} == pytest.approx(
        {"preference": 0.75, "coherence": 0.5, "alignment": 0.1}
    )
    with pytest.raises(InputError, match="dimension is 'beauty'; the file has preference, coherence, alignment"):
        load_pairs(f"rapidata:{path}#beauty")


def test_rapidata_open_image_preferences_keep_votes_as_json(tmp_path):
    results = [json.dumps({"image1": 7, "image2": 3}), json.dumps({"image_2.jpg": 1, "image_1.jpg": 0})]
    rows = [rapid(aggregated_results=one, category="Animation", subcategory="x") for one in results]
    found = rows_of(parquet(tmp_path / "train.parquet", rows))
    assert [row["p_first"] for row in found] == pytest.approx([0.7, 0.0])
    assert found[0]["category"] == "Animation"
    broken = parquet(tmp_path / "broken.parquet", [rapid(aggregated_results='{"left": 1}')])
    with pytest.raises(InputError, match="give the votes for image1 and image2"):
        load_pairs(broken)


# ---------------------------------------------------------------- GenAI-Bench


def test_genai_bench_keeps_the_two_ties_apart(tmp_path):
    votes = ["leftvote", "rightvote", "tievote", "bothbad_vote"]
    rows = [
        {"prompt": "a cat", "left_image": {"bytes": png(10), "path": None}, "right_image": png(20), "vote_type": vote}
        for vote in votes
    ]
    for row in rows:
        row["right_image"] = {"bytes": row["right_image"], "path": None}
    found = rows_of(parquet(tmp_path / "test-00000-of-00001.parquet", rows))
    assert [(row["p_first"], row["both_bad"]) for row in found] == [(1, False), (0, False), (0.5, False), (0.5, True)]
    assert shade(found[0]["images"][0]) == 10
    with pytest.raises(InputError, match="vote_type is 'A'"):
        load_pairs(parquet(tmp_path / "bad.parquet", [rows[0] | {"vote_type": "A"}]))


def genai_videos(folder: Path, first: bytes = MP4) -> str:
    """Two rows as the Hub's `video_generation` has them: videos are strings."""
    (folder / "videos").mkdir()
    (folder / "videos" / "a.mp4").write_bytes(first)
    (folder / "videos" / "b.mp4").write_bytes(MP4)
    sides = {"left_video": "videos/a.mp4", "right_video": "videos/b.mp4", "left_model": "x", "right_model": "y"}
    rows = [{"prompt": f"cat {k}", "vote_type": vote, **sides} for k, vote in enumerate(("leftvote", "bothbad_vote"))]
    return parquet(folder / "test_v1-00000-of-00001.parquet", rows)


def test_genai_bench_videos_are_files_that_are_looked_for_and_not_decoded(tmp_path):
    rows = rows_of(genai_videos(tmp_path))
    assert [row["p_first"] for row in rows] == [1.0, 0.5]
    assert [image["path"] for image in rows[0]["images"]] == [str(tmp_path / "videos" / f"{x}.mp4") for x in "ab"]
    assert (rows[0]["item_first"], rows[0]["model_second"]) == ("videos/a.mp4", "y")


def test_a_genai_bench_video_that_is_none_is_told(tmp_path):
    path = genai_videos(tmp_path, b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"2 of 2 pairs .* a video of pair . is '.*a.mp4', which is no video"):
        load_pairs(path)


def test_genai_bench_videos_on_the_hub_need_no_file_for_scores(tmp_path):
    """The Hub's rows may not name files of this machine, and these do not: their address is kept instead."""
    hub = Hub("org/name:video_generation/test_v1", datasets.Dataset.from_parquet(genai_videos(tmp_path)))
    one: Any
    one, _ = read_pairs(hub, FORMATS["genai-bench"])
    assert one.pair.first == {"bytes": None, "path": "hf://datasets/org/name/videos/a.mp4"}
    assert one.columns["item_first"] == "videos/a.mp4"
    said = fault("0", one.pair.first)
    assert said is not None and "download the videos" in said
    still = Hub("org/name:image_generation/test_v1", datasets.Dataset.from_list(
        [{"prompt": "x", "vote_type": "tievote", "left_image": "/etc/a.png", "right_image": "/etc/b.png"}]
    ))  # fmt: skip
    with pytest.raises(InputError, match="has to embed its images"):
        list(read_pairs(still, FORMATS["genai-bench"]))


# ---------------------------------------------------------------- VideoGen-RewardBench


def videogen(folder: Path, *labels: dict) -> str:
    rows = [
        {
            "path_A": "videos/1_A.mp4",
            "path_B": "./videos/1_B.mp4",
            "A_model": "kling",
            "B_model": "",
            "prompt": "a cat runs",
            "fps_A": "24.0",
            "num_frames_A": "126.0",
            "fps_B": "30.0",
            "num_frames_B": "",
            **one,
        }
        for one in labels
    ]
    (folder / "videos").mkdir()
    for name in ("1_A.mp4", "1_B.mp4"):
        (folder / "videos" / name).write_bytes(MP4)
    with (folder / "videogen-rewardbench.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return f"videogen:{folder}"


def test_videogen_labels_each_dimension(tmp_path):
    spec = videogen(tmp_path, {"VQ": "A", "MQ": "same", "TA": "B", "Overall": "A", "MOS_A_VQ": 4.5, "MOS_B_VQ": 3.5})
    (row,) = rows_of(spec)
    assert (row["id"], row["dimension"], row["p_first"]) == ("0/Overall", "Overall", 1.0)
    assert "criterion" not in row, "Overall is the general question"
    (row,) = rows_of(f"{spec}#VQ", "criterion")
    assert row["criterion"] == "quality"
    assert (row["mos_first"], row["mos_second"], row["fps_first"], row["frames_second"]) == (4.5, 3.5, 24, None)
    assert (row["item_second"], row["model_first"], row["model_second"]) == ("videos/1_B.mp4", "kling", None)
    rows = rows_of(f"{spec}#all", "criterion")
    assert {row["dimension"]: row["p_first"] for row in rows} == {"VQ": 1.0, "MQ": 0.5, "TA": 0.0, "Overall": 1.0}
    asked = {row["dimension"]: row["criterion"] for row in rows}
    assert asked == {"VQ": "quality", "MQ": "motion", "TA": "alignment", "Overall": None}
    assert {*asked.values()} - {None} <= {*CRITERIA}
    (general,) = rows_of(f"{spec}#VQ,general")
    assert (general["dimension"], general["p_first"]) == ("VQ", 1.0)
    assert len(rows_of(f"{spec}#all,general")) == 4


def test_videogen_invalid_labels_are_left_out_and_missing_videos_counted(tmp_path):
    gone = {"VQ": "A", "path_A": "videos/gone.mp4"}
    spec = videogen(tmp_path, *[{"VQ": "A"}] * 8, {"VQ": "invalid"}, gone)
    with pytest.warns(UserWarning, match=r"1 of 9 pairs .* a video of pair 9/VQ is '.*gone.mp4'"):
        assert len(load_pairs(f"{spec}#VQ")) == 8
    with pytest.raises(InputError, match="there is no Overall; name what to compare as videogen:PATH#VQ"):
        load_pairs(spec)
    with pytest.raises(InputError, match="Overall has no label; the row has labels for VQ"):
        load_pairs(f"{spec}#Overall")
    with pytest.raises(InputError, match="dimension is 'beauty'"):
        load_pairs(f"{spec}#beauty")


@pytest.mark.skipif(not (SHARED / "videoalign").is_dir(), reason="VideoAlign's examples are not on this machine")
def test_the_labelled_clips_of_videoalign():
    rows = rows_of(f"videogen:{SHARED / 'videoalign' / 'example.csv'}#all", "criterion")
    assert len(rows) == 36 and len({row["item_first"] for row in rows}) == 3
    labels = {(row["item_first"][-5 - 2], row["dimension"]): row["p_first"] for row in rows}
    assert [labels["1", name] for name in ("VQ", "MQ", "TA")] == [0.0, 0.0, 1.0]
    assert [labels["2", name] for name in ("VQ", "MQ", "TA")] == [0.5, 0.5, 1.0]
    assert [labels["3", name] for name in ("VQ", "MQ", "TA")] == [1.0, 0.5, 0.5]


# ---------------------------------------------------------------- MMRB2


def bench(chosen: str = "A", prompt: list | None = None, response: list | None = None, **fields) -> dict:
    return {
        "id": "wise_1",
        "prompt_content": [["text", "a cat"]] if prompt is None else prompt,
        "response_a": {"model_name": "imagen4", "response_content": response or [["image", "images/10.png"]]},
        "response_b": {"model_name": "flux", "response_content": [["image", "images/20.png"]]},
        "chosen": chosen,
        "human_annotations": [6, 2, 5],
        "prompt_source": "wise",
        **fields,
    }


def test_mmrb2_pairs_of_one_image_each(tmp_path):
    pictures(tmp_path, "images/10.png", "images/20.png")
    pairs = [
        bench(),
        bench("B", id="wise_2", human_annotations=[1, 1, 2]),
        bench(response=[["image", "images/10.png"], ["image", "images/20.png"]]),
        bench(response=[["image", "images/10.png"], ["text", "Here it is."]]),
    ]
    found = rows_of(f"mmrb2:{Path(as_json(tmp_path / 't2i.json', {'pairs': pairs})).parent}")
    assert [(row["id"], row["p_first"]) for row in found] == [("wise_1", 1.0), ("wise_2", 0.0)]
    assert [(row["votes_first"], row["votes_second"]) for row in found] == [(2, 1), (0, 3)]
    row = found[0]
    assert (row["dimension"], row["category"], row["model_second"]) == ("t2i", "wise", "flux")
    assert (row["prompt"], shade(row["images"][0])) == ("a cat", 10)


def test_mmrb2_files_without_a_usable_pair(tmp_path):
    told = as_json(tmp_path / "interleaved.json", {"pairs": [bench(response=[["image", "1.png"], ["text", "x"]])]})
    said = r"holds no pairs \(all rows are left out: a response is more than one image\)"
    with pytest.raises(InputError, match=said):
        load_pairs(f"mmrb2:{told}")
    no_prompt = {name: value for name, value in bench().items() if name != "prompt_content"}
    with pytest.raises(InputError, match="build the benchmark"):
        load_pairs(as_json(tmp_path / "t2i_response_only.json", {"pairs": [no_prompt]}))
    with pytest.raises(InputError, match="chosen is 'C'"):
        load_pairs(as_json(tmp_path / "t2i.json", {"pairs": [bench("C")]}))


# ---------------------------------------------------------------- the generic schema


def test_generic_files_keep_the_columns_that_evaluators_read(tmp_path):
    pictures(tmp_path, "10.png", "20.png")
    row = {"prompt": "a", "image_first": "10.png", "image_second": "20.png", "label": 1, "id": "x"}
    extra = {"group": 7, "model_first": "ours", "model_second": "theirs", "votes_first": "3", "votes_second": 1}
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row | more) for more in ({}, extra, {"id": "y"})))
    data = load_pairs(str(path))
    assert data.column_names == [*FEATURES, "group", "model_first", "model_second", "votes_first", "votes_second"]
    plain, rich = as_published(data[0]), as_published(data[1])
    assert (plain["group"], plain["model_first"], plain["votes_first"]) == (None, None, None)
    assert (rich["group"], rich["votes_first"], rich["votes_second"]) == ("7", 3.0, 1.0)
    path.write_text(json.dumps(row | {"votes_first": "many", "votes_second": 1}))
    with pytest.raises(InputError, match="votes_first is 'many'"):
        load_pairs(str(path))
