"""The published sets of edits, under their publishers' field names, from the row to the protocol."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from listener_reward.datasets import FEATURES, load_pairs
from listener_reward.datasets.check import check_data
from listener_reward.datasets.format import read_pairs
from listener_reward.datasets.load import FORMATS
from listener_reward.datasets.rows import Hub
from listener_reward.errors import InputError
from listener_reward.evaluate import evaluate_scores
from listener_reward.evaluate.scores import Scores
from listener_reward.media.images import to_pil


def png(level: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def shade(image: Any) -> int:
    pixel: Any = to_pil(image).getpixel((0, 0))
    return pixel[0]


def loaded(spec: str, **options: Any) -> Any:
    return load_pairs(spec, **options)


def in_file_order(row: dict[str, Any]) -> tuple[float, list[int]]:
    """The label and the images as the file has them."""
    turn = -1 if row["swapped"] else 1
    p_first = 1 - row["p_first"] if row["swapped"] else row["p_first"]
    return p_first, [shade(image) for image in row["images"][::turn]]


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def margins(pairs: Any, of: dict[str, float]) -> Scores:
    """Scores by pair's id, in the file's order."""
    return Scores("mine", "score", {name: (of[name], None) for name in pairs["id"]})


def values(scores: Scores, pairs: Any) -> dict[str, float | None]:
    return {result.protocol: result.value for result in evaluate_scores(scores, pairs).protocols}


# ---------------------------------------------------------------- EditReward-Bench, of EditReward


def ranking(subset: str, name: str, pair: str, said: str, **fields: Any) -> dict[str, Any]:
    letters = dict(zip("ABCD", (10, 20, 30, 40), strict=True))
    first, second = pair.split("vs")
    return {
        "id": f"{name}_{pair}",
        "dataset": subset,
        "num_candidates": int(subset[0]),
        "instruction": "make it darker",
        "source_image": png(90),
        "candidate_1": png(letters[first]),
        "candidate_2": png(letters[second]),
        "model_1": f"model {first}",
        "model_2": f"model {second}",
        "ranking": said,
        "comparison_type": pair,
        **fields,
    }


@pytest.fixture
def rankings(tmp_path: Path) -> str:
    """Two rankings of two edits, one of them a tie, and one of three: B before A before C."""
    two = [ranking("2pair", "x", "AvsB", "B>A"), ranking("2pair", "y", "AvsB", "A=B=Bad")]
    three = [ranking("3pair", "x", *one) for one in (("AvsB", "B>A"), ("AvsC", "A>C"), ("BvsC", "B>C"))]
    parquet(tmp_path / "2pair" / "train-00000-of-00001.parquet", two)
    parquet(tmp_path / "3pair" / "train-00000-of-00001.parquet", three)
    return f"editreward-bench:{tmp_path}"


def test_editreward_bench_has_every_pair_of_a_ranking(rankings):
    pairs = loaded(rankings)
    rows = {row["id"]: row for row in pairs}
    assert {name: in_file_order(row) for name, row in rows.items()} == {
        "2pair/x_AvsB": (0.0, [10, 20]),
        "2pair/y_AvsB": (0.5, [10, 20]),
        "3pair/x_AvsB": (0.0, [10, 20]),
        "3pair/x_AvsC": (1.0, [10, 30]),
        "3pair/x_BvsC": (1.0, [20, 30]),
    }
    assert {row["group"] for row in pairs} == {"2pair/x", "2pair/y", "3pair/x"}
    assert all(shade(row["sources"][0]) == 90 and len(row["sources"]) == 1 for row in pairs)
    assert [row["both_bad"] for row in pairs] == [False, True, False, False, False]
    assert {row["category"] for row in pairs} == {"2pair", "3pair"} and "criterion" not in pairs.column_names
    found = check_data(rankings)
    assert (found.pairs, found.pairs_with_sources, found.sources, found.missing_sources) == (5, 5, 1, 0)


def test_editreward_bench_counts_whole_rankings(rankings):
    pairs = loaded(rankings)
    right = {"2pair/x_AvsB": -1.0, "2pair/y_AvsB": 0.1, "3pair/x_AvsB": -2.0, "3pair/x_AvsC": 0.5, "3pair/x_BvsC": 3.0}
    assert values(margins(pairs, right), pairs) == {"editreward-bench": 1.0, "editreward-bench-pairs": 1.0}
    # One pair of the three is wrong, and with it the ranking; of the pairs, four of five are right.
    found = values(margins(pairs, right | {"3pair/x_AvsC": -0.5}), pairs)
    assert found == {"editreward-bench": pytest.approx(2 / 3), "editreward-bench-pairs": pytest.approx(4 / 5)}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"said": "A>C"}, "ranking is 'A>C'; it is A>B, B>A or A=B"),
        ({"said": ""}, "ranking is ''"),
        ({"said": "A>B", "comparison_type": "AB"}, "comparison_type is 'AB'"),
    ],
)
def test_editreward_bench_rows_that_cannot_be_read(tmp_path, fields, said):
    row = ranking("2pair", "x", "AvsB", fields["said"]) | {k: v for k, v in fields.items() if k != "said"}
    with pytest.raises(InputError, match=said):
        load_pairs(parquet(tmp_path / "a.parquet", [row]))


# ---------------------------------------------------------------- EditReward-Bench, of EditScore


def edit(task: str, dimension: str, number: int = 0) -> dict[str, Any]:
    return {
        "key": [f"{task}/{number}/good", f"{task}/{number}/bad"],
        "instruction": f"edit {number}",
        "input_image": png(90),
        "output_images": [png(10), png(20)],
        "task_type": task,
        "dimension": dimension,
    }


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """As the Hub has it, in Arrow files: three pairs by the whole, two by dimensions."""
    rows = [edit("extract", "overall", n) for n in range(2)] + [edit("compose", "overall")]
    rows += [edit("extract", "prompt_following"), edit("extract", "consistency")]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "bench"))
    return f"editscore-bench:{tmp_path / 'bench'}"


def test_editscore_bench_has_the_better_edit_first_in_each_dimension(saved):
    pairs = loaded(saved)
    assert [row["id"] for row in pairs] == ["0/overall", "1/overall", "2/overall"]
    assert [in_file_order(row) for row in pairs] == [(1.0, [10, 20])] * 3
    assert [row["category"] for row in pairs] == ["extract", "extract", "compose"]
    first = pairs[0]
    names = [first["item_first"], first["item_second"]]
    assert names == ["extract/0/good", "extract/0/bad"][:: -1 if first["swapped"] else 1]
    assert "criterion" not in pairs.column_names and shade(first["sources"][0]) == 90
    every = loaded(f"{saved}#all")
    assert {row["dimension"]: row["criterion"] for row in every} == {
        "overall": None,
        "prompt_following": "alignment",
        "consistency": "consistency",
    }
    assert len(every) == 5 and len(loaded(f"{saved}#consistency")) == 1
    assert "criterion" not in loaded(f"{saved}#consistency,general").column_names
    assert (
        check_data(f"{saved}#all").order_leaks is False and check_data(f"{saved}#all").first_preferred_as_published == 1
    )
    with pytest.raises(InputError, match="dimension is 'beauty'; give one of prompt_following"):
        load_pairs(f"{saved}#beauty")


def test_editscore_bench_averages_over_the_kinds_of_edit(saved):
    pairs = loaded(saved)
    found = values(margins(pairs, {"0/overall": 1.0, "1/overall": -1.0, "2/overall": 1.0}), pairs)
    assert found == {"editscore-bench": (1 / 2 + 1) / 2, "imagereward": pytest.approx(2 / 3)}


def test_editscore_bench_streams_and_is_recognised(saved):
    path = saved.removeprefix("editscore-bench:")
    rows = list(loaded(path, stream=True))
    assert len(rows) == 3 and rows[0]["dataset"] == "editscore-bench"


# ---------------------------------------------------------------- MMRB2


def response(*parts: list[str]) -> dict[str, Any]:
    return {"model_name": "m", "response_content": [*parts]}


def task(**fields: Any) -> dict[str, Any]:
    base = {
        "id": "emu_1",
        "prompt_content": [["image", "input_images/90.png"], ["text", "make it darker"]],
        "response_a": response(["image", "images/10.png"]),
        "response_b": response(["image", "images/20.png"]),
        "chosen": "B",
        "human_annotations": [1, 2, 5],
        "prompt_source": "emu-edit",
    }
    return base | fields


def test_mmrb2_edits_have_the_images_of_their_prompt_as_sources(tmp_path):
    for name, level in (("images/10", 10), ("images/20", 20), ("input_images/90", 90), ("input_images/80", 80)):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(level)["bytes"])
    several = [["text", "put"], ["image", "input_images/90.png"], ["text", "on"], ["image", "input_images/80.png"]]
    pairs = [task(), task(id="two", prompt_content=several, chosen="A")]
    pairs += [task(id="agent", response_a=response(["image", "images/10.png"], ["image", "images/20.png"]))]
    (tmp_path / "edit.json").write_text(json.dumps({"pairs": pairs}))
    one, two = loaded(f"mmrb2:{tmp_path / 'edit.json'}")
    assert (one["prompt"], one["dimension"], one["category"]) == ("make it darker", "edit", "emu-edit")
    assert in_file_order(one) == (0.0, [10, 20]) and [shade(image) for image in one["sources"]] == [90]
    assert two["prompt"] == "put\non" and [shade(image) for image in two["sources"]] == [90, 80]
    assert one["group"] != two["group"]
    found = check_data(f"mmrb2:{tmp_path / 'edit.json'}")
    assert (found.pairs, found.left_out) == (2, {"a response is more than one image": 1})
    assert (found.pairs_with_sources, found.sources, found.missing_sources) == (2, 2, 0)
    (tmp_path / "input_images" / "80.png").unlink()
    assert check_data(f"mmrb2:{tmp_path / 'edit.json'}").missing_sources == 1


def test_mmrb2_as_the_hub_has_it(tmp_path):
    row = {
        "pair_id": "emu_1",
        "prompt_text": "<image_1>\nmake it darker",
        "prompt_images": [png(90)],
        "response_a_text": "<image_1>",
        "response_a_images": [png(10)],
        "response_a_model": "one",
        "response_b_text": "",
        "response_b_images": [png(20)],
        "response_b_model": "other",
        "chosen": "a",
        "human_annotations": "[6, 4, 3]",
        "prompt_source": "emu-edit",
        "prompt_metadata": "{}",
    }
    told = row | {"response_a_text": "Here it is: <image_1>"}
    path = parquet(tmp_path / "edit" / "test-00000-of-00001.parquet", [row, told])
    (one,) = loaded(f"mmrb2:{path}")
    assert (one["prompt"], one["id"], one["dimension"]) == ("make it darker", "emu_1", "edit")
    assert in_file_order(one) == (1.0, [10, 20]) and [shade(image) for image in one["sources"]] == [90]
    votes, models = [one["votes_first"], one["votes_second"]], [one["model_first"], one["model_second"]]
    turn = -1 if one["swapped"] else 1
    assert (votes[::turn], models[::turn]) == ([2, 1], ["one", "other"])
    hub = Hub("rl-research/multimodal-rewardbench-2:edit/test", datasets.Dataset.from_parquet(path))
    pair: Any = next(iter(read_pairs(hub, FORMATS["mmrb2"])))
    assert pair.columns["dimension"] == "edit" and len(pair.pair.sources) == 1


def test_mmrb2_on_the_hub_is_asked_for_where_its_images_are_embedded(monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(
        "listener_reward.datasets.load.open_hub",
        lambda name, split, **_: asked.append((name, split)) or Hub(name, datasets.Dataset.from_list([{"a": 1}])),
    )
    with pytest.raises(InputError, match="prompt_content is missing"):
        load_pairs("mmrb2:rl-research/multimodal-rewardbench-2:edit/test")
    assert asked == [("rl-research/multimodal-rewardbench-2", "edit/test")]
    with pytest.raises(InputError, match="hf download"):
        load_pairs("mmrb2:facebook/MMRB2_image")


@pytest.mark.parametrize("hub", [False, True])
def test_mmrb2_responses_of_several_parts_are_pages_where_that_is_asked_for(tmp_path, hub):
    for level in (10, 20, 30):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{level}.png").write_bytes(png(level)["bytes"])
    told = task(
        prompt_content=[["text", "tell a story"]],
        response_a=response(
            ["text", "Once."], ["image", "images/10.png"], ["text", "End."], ["image", "images/30.png"]
        ),
    )
    if hub:
        row = {"pair_id": "emu_1", "prompt_text": "tell a story", "prompt_images": None, "chosen": "B"}
        row |= {"response_a_text": "Once. <image_1> End. <image_2>", "response_a_images": [png(10), png(30)]}
        row |= {"response_b_text": "<image_1>", "response_b_images": [png(20)]}
        path = parquet(tmp_path / "interleaved" / "test.parquet", [row])
    else:
        mute = task(id="mute", response_a=response(["text", "I cannot."]))
        gone = task(id="gone", response_a=response(["text", "Once."], ["image", "images/gone.png"]))
        path = str(tmp_path / "interleaved.json")
        (tmp_path / "interleaved.json").write_text(json.dumps({"pairs": [told, *[told | {"id": "x"}] * 8, mute, gone]}))
    with pytest.raises(InputError, match="a response is more than one image"):
        load_pairs(f"mmrb2:{path}")
    if not hub:
        with pytest.warns(
            UserWarning, match="1 of 10 pairs have an unreadable image: an image of pair gone is '.*gone"
        ):
            pairs = loaded(f"mmrb2:{path}#pages")
        assert check_data(f"mmrb2:{path}#pages").left_out == {"a response has no image": 1}
        with pytest.raises(InputError, match="dimension is 'page'; give pages"):
            load_pairs(f"mmrb2:{path}#page")
    else:
        pairs = loaded(f"mmrb2:{path}#pages")
    one = pairs[0]
    first, second = (np.asarray(to_pil(image)) for image in one["images"][:: -1 if one["swapped"] else 1])
    assert first.shape[1] == second.shape[1] == 1024 and first.shape[0] > second.shape[0]
    # Both pictures of the first response are on its page, 8 x 8 each, with words above each of them.
    dark, light = (
        np.flatnonzero((np.abs(first[:, 17:23].astype(int) - level).max(-1) < 5).all(1)) for level in (10, 30)
    )
    assert len(dark) >= 6 and len(light) >= 6 and dark[0] > 40 and light[0] > dark[-1] + 26
    assert one["dimension"] == "interleaved" and one["item_first"] is None and one["prompt"] == "tell a story"


# ---------------------------------------------------------------- GenAI-Bench's edits, EditReward's training files


def test_genai_bench_edits_have_their_source(tmp_path):
    row = {
        "source_prompt": "a taxi",
        "target_prompt": "a taxi behind sheep",
        "instruct_prompt": "let a herd of sheep block the taxi",
        "source_image": png(90),
        "left_model": "MagicBrush",
        "left_output_image": png(10),
        "right_model": "Pix2PixZero",
        "right_output_image": png(20),
        "vote_type": "bothbad_vote",
    }
    path = parquet(tmp_path / "test_v1-00000-of-00001.parquet", [row | {"vote_type": "leftvote"}, row])
    one, both = loaded(f"genai-bench:{path}")
    assert one["prompt"] == "let a herd of sheep block the taxi" and [shade(image) for image in one["sources"]] == [90]
    assert in_file_order(one) == (1.0, [10, 20]) and both["both_bad"] is True and both["p_first"] == 0.5
    still = {"prompt": "a cat", "left_image": png(10), "right_image": png(20), "vote_type": "leftvote"}
    assert "sources" not in loaded(parquet(tmp_path / "still.parquet", [still])).column_names
    # EditReward-Data has other names for the same, and copies of it a vote of their own.
    data = {name: row[name] for name in ("left_output_image", "right_output_image")}
    data |= {"instruction": "x", "source_img": png(90), "vote_type": "tie"}
    (one,) = loaded(parquet(tmp_path / "data.parquet", [data]))
    assert (one["prompt"], one["p_first"], one["both_bad"], len(one["sources"])) == ("x", 0.5, False, 1)


def test_editreward_training_files_keep_their_source_and_their_ties(tmp_path):
    for level in (10, 20, 90):
        (tmp_path / f"{level}.png").write_bytes(png(level)["bytes"])
    row = {"prompt": "x", "choice_dist": None, "confidence": None, "path1": "10.png", "path2": "20.png"}
    rows = [row | {"path_src": "90.png", "tie_case": False}, row | {"path_src": "90.png", "tie_case": True}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    won, tied = loaded(str(tmp_path / "train.json"))
    assert in_file_order(won) == (1.0, [10, 20]) and [shade(image) for image in won["sources"]] == [90]
    assert tied["p_first"] == 0.5 and tied["rank_first"] == tied["rank_second"] == 1
    (tmp_path / "plain.json").write_text(json.dumps([row]))
    assert loaded(str(tmp_path / "plain.json")).column_names[: len(FEATURES)] == [*FEATURES]
    assert "sources" not in loaded(str(tmp_path / "plain.json")).column_names
    assert np.isin(["rank_first", "rank_second"], loaded(str(tmp_path / "plain.json")).column_names).all()
