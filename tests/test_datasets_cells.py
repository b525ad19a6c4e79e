"""Cells are untrusted: whatever JSON puts in one, a row becomes pairs of the right types, or an InputError names it."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image, features

from listener_reward.datasets import FORMATS, load_pairs
from listener_reward.datasets.check import check_data
from listener_reward.datasets.format import Labelled, Place, read_pairs
from listener_reward.datasets.generic import OPTIONAL, generic_format
from listener_reward.errors import InputError
from listener_reward.media.images import to_pil


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = {"bytes": png(10), "path": None}
ROWS = {
    "generic": {"prompt": "x", "image_first": "1.png", "image_second": "2.png", "label": 1, "id": "a"}
    | {"sources": ["3.png"], "criterion": "text"}
    | {name: 1 if kind == "float64" else "m" for name, kind in OPTIONAL.items()},
    "hpdv2": {"prompt": "x", "image_path": ["1.png", "2.png"], "rank": [0, 1], "raw_annotations": [{"rank": [0, 1]}]},
    "imagereward": {"id": "a", "prompt": "x", "generations": ["1.png", "2.png"], "ranking": [2, 1]},
    "hpdv3": {"prompt": "x", "path1": "1.png", "path2": "2.png", "choice_dist": [2, 8], "model1": "a", "model2": "b"}
    | {"confidence": 0.9},
    "pickapic": {"caption": "x", "jpg_0": IMAGE, "jpg_1": IMAGE, "label_0": 1.0, "label_1": 0.0, "has_label": True}
    | {"image_0_uid": "a", "image_1_uid": "b", "model_0": "m", "model_1": "n", "num_example_per_prompt": 2},
    "rapidata": {"prompt": "x", "image1": IMAGE, "image2": IMAGE, "image1_path": "a", "image2_path": "b"}
    | {"votes_image1": 3, "votes_image2": 1, "model1": "a", "model2": "b", "category": "c"},
    "genai-bench": {"prompt": "x", "left_image": IMAGE, "right_image": IMAGE, "vote_type": "leftvote"}
    | {"left_model": "a", "right_model": "b"},
    "videogen": {"prompt": "x", "path_A": "a.mp4", "path_B": "b.mp4", "A_model": "a", "B_model": "b", "Overall": "A"}
    | {"fps_A": 8, "fps_B": 8, "num_frames_A": 9, "num_frames_B": 9, "MOS_A_Overall": 1.5, "MOS_B_Overall": 1.0},
    "mmrb2": {
        "id": "1",
        "prompt_content": [["text", "x"]],
        "response_a": {"response_content": [["image", "1.png"]], "model_name": "a"},
        "response_b": {"response_content": [["image", "2.png"]], "model_name": "b"},
        "chosen": "A",
        "human_annotations": [1, 2],
        "prompt_source": "s",
    },
    "editreward-bench": {"id": "7_AvsC", "instruction": "x", "ranking": "C>A", "comparison_type": "AvsC"}
    | {"source_image": IMAGE, "candidate_1": IMAGE, "candidate_2": IMAGE, "model_1": "a", "model_2": "b"}
    | {"dataset": "3pair"},
    "editscore-bench": {"instruction": "x", "input_image": IMAGE, "output_images": [IMAGE, IMAGE], "key": ["a", "b"]}
    | {"dimension": "overall", "task_type": "extract"},
}
ODD = [None, True, 0, -1, 10**400, math.nan, math.inf, "", " ", "\ud800", "\0", "x" * 5000, [], [1, 2, 3], [[1]], {}]
ODD += [
    {"bytes": "iVBORw0KGgo="},
    {"bytes": [137, 80]},
    {"path": 3},
    {"rank": None},
    ["a", None],
    [{"rank": "a"}],
    b"\0",
    [[["text"], "x"]],
    ["\ud800", "b"],
    [10**400, 1],
]


def read(kind: str, row: dict) -> list:
    form = generic_format("a.jsonl", set(row), {}) if kind == "generic" else FORMATS[kind]
    return list(read_pairs([(Place("a.jsonl", 3, Path("folder")), row)], form))


@pytest.mark.parametrize("kind", [*ROWS])
def test_a_good_row_is_read(kind):
    assert any(isinstance(one, Labelled) for one in read(kind, ROWS[kind]))


@pytest.mark.parametrize("kind", [*ROWS])
def test_any_cell_may_be_anything(kind):
    form = generic_format("a.jsonl", set(ROWS[kind]), {}) if kind == "generic" else FORMATS[kind]
    for name in ROWS[kind]:
        for odd in ODD:
            try:
                found = [one for one in read(kind, ROWS[kind] | {name: odd}) if isinstance(one, Labelled)]
            except InputError as error:
                assert str(error).startswith("a.jsonl, row 3: "), (name, odd)
                assert len(str(error)) < 1000, (name, odd, str(error)[:200])
                continue
            except Exception as error:
                raise AssertionError(f"{name}={odd!r:.60} raises {type(error).__name__}: {error}") from error
            for one in found:
                images: list[Any] = [one.pair.first, one.pair.second, *one.pair.sources]
                for image in images:
                    assert isinstance(image["bytes"], bytes | None) and isinstance(image["path"], str | None)
                for text in (one.pair.prompt, one.pair.id, *filter(None, (images[-1]["path"],))):
                    text.encode()
                for column, value in one.columns.items():
                    wanted = {**form.columns, "group": "string"}.get(column, "string")
                    types = {"string": str, "float64": int | float, "int64": int | np.integer, "bool": bool}[wanted]
                    assert value is None or isinstance(value, types), (name, odd, column, value)


# ---------------------------------------------------------------- images in JSON


def jsonl(folder: Path, *rows: dict, name: str = "pairs.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def pair(first: object, second: object, **fields: object) -> dict:
    return {"prompt": "x", "image_first": first, "image_second": second, "label": 1, **fields}


def test_a_data_url_is_the_image_in_it(tmp_path):
    urls = [f"data:image/png;base64,{base64.b64encode(png(level)).decode()}" for level in (40, 200)]
    row: Any
    (row,) = load_pairs(jsonl(tmp_path, pair(urls[0], {"path": urls[1]})))
    levels = [int(np.asarray(to_pil(image))[0, 0, 0]) for image in row["images"]]
    assert sorted(levels) == [40, 200] and levels[0] == (200 if row["swapped"] else 40)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (base64.b64encode(png(40) + bytes(300)).decode(), "bare base64; JSON holds an image as a data URL"),
        ({"bytes": base64.b64encode(png(40)).decode()}, "JSON holds an image as a data URL"),
        ({"bytes": [*png(40)]}, r"bytes of an image are \[137, 80, .*JSON holds an image as a data URL"),
        ([*png(40)], r"image is \[137, 80, .*; give a path"),
        ({"path": 7}, r"image is \{'path': 7\}; give a path"),
        ("data:image/png;base64,%%%", "is the data URL .* does not decode"),
        ("data:image/png,abc", "is the data URL .* does not decode"),
        ("half \ud800", "half a character"),
    ],
)
def test_an_image_that_json_cannot_hold_is_refused_with_its_row(tmp_path, image, says):
    good = f"data:image/png;base64,{base64.b64encode(png(40)).decode()}"
    path = jsonl(tmp_path, pair(good, good), pair(good, image))
    for use in (load_pairs, check_data):
        with pytest.raises(InputError, match=rf"(?s)^pairs\.jsonl, row 1: .*{says}"):
            use(path)


# ---------------------------------------------------------------- images in a video's container


def embedded(folder: Path, kind: str, brand: bytes | None = None) -> str:
    rows = []
    for level in (40, 200):
        image = Image.new("RGB", (16, 16), (level,) * 3)
        file = io.BytesIO()
        image.save(file, kind)
        data = file.getvalue()
        rows.append({"bytes": data if brand is None else data[:8] + brand + data[12:16] + brand * 4 + data[32:]})
    table = pandas.DataFrame([pair(*rows)])
    table.to_parquet(folder / f"{kind}.parquet")
    return str(folder / f"{kind}.parquet")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_embedded_in_parquet_is_a_picture(tmp_path):
    path = embedded(tmp_path, "AVIF")
    found = check_data(path)
    assert found.usable and (found.images, found.broken_images) == (2, 0)
    assert found.sizes is not None and found.sizes["least"] == [16, 16]
    row: Any
    (row,) = load_pairs(path)
    assert sorted(int(np.asarray(to_pil(image))[3, 3, 0]) for image in row["images"]) == pytest.approx([40, 200], abs=2)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_heic_embedded_in_parquet_is_refused_by_name(tmp_path):
    path = embedded(tmp_path, "AVIF", b"heic")
    found = check_data(path)
    assert not found.usable and found.broken_images == 2 and "HEIC is not read" in found.broken_named[0]
    with pytest.raises(InputError, match="HEIC is not read; save it as PNG, JPEG or WebP"):
        load_pairs(path)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl", "json"])
def test_a_label_column_with_an_empty_cell_is_read_alike_in_every_format(tmp_path, suffix):
    """pandas makes floats of the other labels: 1.0, which a CSV holds as text. The row without one has a fraction."""
    for level in (1, 2):
        (tmp_path / f"{level}.png").write_bytes(png(level))
    rows = [pair("1.png", "2.png", id=str(k)) | {"label": label} for k, label in enumerate([1, 2, None])]
    table = pandas.DataFrame(rows)
    table["p_first"] = [None, None, 0.75]
    assert str(table["label"].dtype) == "float64"
    path = tmp_path / f"pairs.{suffix}"
    {
        "csv": lambda: table.to_csv(path, index=False),
        "parquet": lambda: table.to_parquet(path),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "json": lambda: table.to_json(path, orient="records"),
    }[suffix]()
    found: Any = load_pairs(str(path))
    assert [1 - row["p_first"] if row["swapped"] else row["p_first"] for row in found] == [1.0, 0.0, 0.75]


@pytest.mark.parametrize("label", ["1.5", 3.0, "1.0.0", True, [1], {"a": 1}, "0x1"])
def test_labels_that_mean_nothing_are_refused(tmp_path, label):
    with pytest.raises(InputError, match=r"^pairs\.jsonl, row 0: label is "):
        load_pairs(jsonl(tmp_path, pair("1.png", "2.png") | {"label": label}))


# ---------------------------------------------------------------- columns of two sides


@pytest.mark.parametrize("name", [name for name in OPTIONAL if name.endswith(("_first", "_second"))])
def test_a_column_of_one_side_is_found_by_the_check_as_by_the_reader(tmp_path, name):
    url = f"data:image/png;base64,{base64.b64encode(png(40)).decode()}"
    path = jsonl(tmp_path, *[pair(url, url, **{name: "1"}) for _ in range(4)])
    other = name.replace("_first", "_second") if name.endswith("_first") else name.replace("_second", "_first")
    for use in (load_pairs, check_data):
        with pytest.raises(InputError, match=rf"^pairs\.jsonl has a column {name} and no {other}; add it, or give"):
            use(path)
