"""Every format comes out as the same five columns, and what cannot be used is refused by name."""

from __future__ import annotations

import io
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets.exceptions import DatasetNotFoundError
from PIL import Image
from tables import write_table

from listener_reward.datasets import FEATURES, TINY_PAIRS, load_pairs
from listener_reward.datasets.format import Labelled
from listener_reward.datasets.load import _sample
from listener_reward.errors import InputError
from listener_reward.media.images import to_pil
from listener_reward.pairs import PreferencePair
from listener_reward.tiny.drawing import draw_pair
from listener_reward.tiny.world import split_pairs

GALLERY = Path(__file__).resolve().parents[2] / "shared" / "data" / "hpdv2"


def shade(row: Any, place: int) -> int:
    """The gray level of a row's image: files made here tell their images apart by it."""
    pixel: Any = to_pil(row["images"][place]).getpixel((0, 0))
    return pixel[0]


def gray_png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images 10.png to 200.png, named after their gray level, and a broken one."""
    (tmp_path / "pictures").mkdir()
    for level in range(10, 210, 10):
        (tmp_path / "pictures" / f"{level}.png").write_bytes(gray_png(level))
    (tmp_path / "pictures" / "broken.png").write_bytes(gray_png(10)[:40])
    return tmp_path


def entry(first: object = "pictures/10.png", second: object = "pictures/200.png", **fields) -> dict:
    return {"prompt": "a red circle", "image_first": first, "image_second": second, **fields}


def written(folder: Path, rows: list, name: str = "pairs.jsonl") -> str:
    return str(write_table(folder / name, rows))


def dark_wins(row: Any) -> float:
    """The share for the darker image, whichever place the shuffle gave it."""
    return row["p_first"] if shade(row, 0) < shade(row, 1) else 1 - row["p_first"]


# ---------------------------------------------------------------- the tiny world


def test_the_tiny_world_is_its_pairs_and_pictures_in_their_order():
    data: Any = load_pairs("tiny:ood", limit=6, seed=3)
    assert data.features == FEATURES
    for row, pair in zip(data, split_pairs("ood", 6, seed=3), strict=True):
        assert (row["prompt"], row["p_first"], row["dataset"]) == (pair.wording, pair.p_first, "tiny:ood")
        for undecoded, drawn in zip(row["images"], draw_pair(pair), strict=True):
            np.testing.assert_array_equal(np.asarray(to_pil(undecoded)), np.asarray(drawn))
    assert len(set(data["id"])) == 6


def test_the_tiny_world_has_a_default_length_and_a_seed():
    assert len(load_pairs("tiny:train")) == TINY_PAIRS
    assert load_pairs("tiny:id", limit=3)[:] == load_pairs("tiny:id", limit=3)[:]
    assert load_pairs("tiny:id", limit=3)[:] != load_pairs("tiny:id", limit=3, seed=1)[:]


@pytest.mark.parametrize("spec", ["tiny:test", "tiny:", "tiny"])
def test_a_split_that_the_tiny_world_has_not(spec):
    with pytest.raises(InputError, match=r"split is .*'train', 'id', 'ood', 'wrong'"):
        load_pairs(spec)


# ---------------------------------------------------------------- HPDv2


@pytest.mark.skipif(not GALLERY.is_dir(), reason="the HPDv2 gallery is not on this machine")
def test_the_hpdv2_gallery_gives_the_annotators_shares():
    data: Any = load_pairs(f"hpdv2:{GALLERY}")
    records = json.loads((GALLERY / "annotations.json").read_text())
    assert len(data) == 12 * 36
    for row in data.select(range(0, len(data), 29)):
        record = next(r for r in records if r["prompt"] == row["prompt"])
        first, second = (record["image_path"].index(Path(image["path"]).name) for image in row["images"])
        votes = [ranks[first] < ranks[second] for ranks in record["annotator_ranks"]]
        assert row["p_first"] == pytest.approx(sum(votes) / 10)
        assert to_pil(row["images"][0]).size == (512, 512)
    assert 0.4 < np.mean(np.array(data["p_first"]) > 0.5) < 0.6, "the order of the images tells the label"


def hpdv2(folder: Path, **fields) -> str:
    """One HPDv2 entry of three images, the darkest best by its file order."""
    record = {"prompt": "a cat", "image_path": ["10.png", "20.png", "30.png"], **fields}
    (folder / "test").mkdir(exist_ok=True)
    for level in (10, 20, 30):
        (folder / "test" / f"{level}.png").write_bytes(gray_png(level))
    (folder / "test.json").write_text(json.dumps([record]))
    return f"hpdv2:{folder}"


def shares(spec: str) -> dict[tuple[int, ...], Any]:
    """Dark and light level of each pair to the fraction for the dark one."""
    rows = list(load_pairs(spec))
    return {tuple(sorted((shade(r, 0), shade(r, 1)))): pytest.approx(dark_wins(r)) for r in rows}


def test_hpdv2_test_json_gives_the_share_of_its_raw_annotations(tmp_path):
    # Ranks of the images 10, 20, 30 by four people. 10 beats 20: yes, yes, no, yes. 10 beats 30: yes, yes, no, tie.
    raw = [[1, 2, 3], [1, 2, 3], [3, 2, 1], [1, 2, 1]]
    spec = hpdv2(tmp_path, rank=[1, 2, 3], raw_annotations=[{"rank": r, "user_hash": "u"} for r in raw])
    assert shares(spec) == {(10, 20): 0.75, (10, 30): 0.625, (20, 30): 0.5}


def test_hpdv2_test_json_without_annotations_gives_hard_labels(tmp_path):
    assert shares(hpdv2(tmp_path, rank=[2, 1, 2])) == {(10, 20): 0.0, (10, 30): 0.5, (20, 30): 1.0}


def test_hpdv2_train_json_marks_the_chosen_image(folder):
    record = {"prompt": "a cat", "file_path": ["10.png", "20.png"], "human_preference": [0, 1]}
    (folder / "pictures" / "train.json").write_text(json.dumps([record]))
    assert shares(f"hpdv2:{folder / 'pictures' / 'train.json'}") == {(10, 20): 0.0}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "test.json, entry 0 has no annotator_ranks"),
        ({"rank": [1, 2]}, "rank .* for each of 3 images"),
        ({"rank": [1, "x", 3]}, "rank is not one number"),
        ({"rank": [1, 2, None]}, "not finite"),
        ({"annotator_ranks": []}, "annotator_ranks"),
        ({"annotator_ranks": [[1, 2, 3], [1, 2]]}, "annotator_ranks is not one number"),
        ({"rank": [1, 2, 3], "raw_annotations": [{"rank": [3, 2, 1]}]}, "run against rank"),
        ({"rank": [1, 2, 3], "raw_annotations": [{"user_hash": "u"}]}, "raw_annotations"),
        ({"rank": [1, 2, 3], "prompt": None}, "prompt is None"),
        ({"rank": [1, 2, 3], "image_path": "10.png"}, "image_path is '10.png'"),
    ],
)
def test_hpdv2_entries_that_cannot_be_used(tmp_path, fields, says):
    with pytest.raises(InputError, match=says):
        load_pairs(hpdv2(tmp_path, **fields))


def test_an_hpdv2_folder_without_annotations(tmp_path):
    for spec in (f"hpdv2:{tmp_path}", f"hpdv2:{tmp_path / 'gone'}"):
        with pytest.raises(InputError, match="check the path"):
            load_pairs(spec)


# ---------------------------------------------------------------- the generic schema


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.csv", "pairs.parquet", "PAIRS.JSONL"])
def test_every_kind_of_file(folder, name):
    path = written(folder, [entry(p_first=0.75, id="a"), entry(p_first=1.0, id="b")], name.lower())
    Path(path).rename(folder / name)
    data = load_pairs(str(folder / name))
    assert data.features == FEATURES
    assert data["id"] == ["a", "b"] and data["dataset"] == [name] * 2 and data["prompt"] == ["a red circle"] * 2
    assert [dark_wins(row) for row in data] == pytest.approx([0.75, 1.0])


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({"label": 1}, 1.0),
        ({"label": 2}, 0.0),
        ({"label": "1"}, 1.0),
        ({"label": 2.0}, 0.0),
        ({"label": "First"}, 1.0),
        ({"label": " second "}, 0.0),
        ({"label": "tie"}, 0.5),
        ({"p_first": "0.25"}, 0.25),
        ({"p_first": 0}, 0.0),
        ({"p_first": 0.25, "label": 1}, 0.25),
        ({"p_first": None, "label": 2}, 0.0),
        ({"p_first": "", "label": "tie"}, 0.5),
    ],
)
def test_labels(folder, fields, share):
    assert dark_wins(load_pairs(written(folder, [entry(**fields)]))[0]) == pytest.approx(share)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (entry(), "p_first and label are missing"),
        (entry(label=None), "p_first and label are missing"),
        (entry(label=0), "label is 0; give 1 or 'first'"),
        (entry(label=3), "label is 3"),
        (entry(label=True), "label is True"),
        (entry(label="left"), "label is 'left'"),
        (entry(p_first=1.5), "p_first is 1.5"),
        (entry(p_first=float("nan")), "p_first is nan"),
        (entry(p_first="most"), "p_first is 'most'"),
        (entry(p_first=[1, 0]), "p_first is"),
        (entry(p_first=1, prompt=7), "prompt is 7"),
        (entry(7, p_first=1), "image is 7"),
        ({"image_first": "a", "image_second": "b", "label": 1}, "prompt is missing from columns image_first"),
        ({"prompt": "a", "label": 1}, "image_first and image_second, or images, are not in columns prompt, label"),
        ({"prompt": "a", "images": ["a"], "label": 1}, r"images is \['a'\]; give a list of two"),
        ({"prompt": "a", "images": "ab", "label": 1}, "images is 'ab'; give a list of two"),
    ],
)
def test_rows_that_cannot_be_used_are_named(folder, row, says):
    with pytest.raises(InputError, match=f"pairs.jsonl, row 1: .*{says}"):
        load_pairs(written(folder, [entry(label=1), row]))


def test_images_as_a_list_of_two(folder):
    row = {"prompt": "a", "images": ["pictures/10.png", "pictures/20.png"], "p_first": 0.75}
    assert dark_wins(load_pairs(written(folder, [row]))[0]) == 0.75


def test_columns_rename_and_embedded_bytes_lose_their_file_name(folder):
    rows = [{"caption": "a cat", "jpg_0": gray_png(10), "jpg_1": gray_png(20), "label_0": 0.5} for _ in range(2)]
    columns = {"prompt": "caption", "image_first": "jpg_0", "image_second": "jpg_1", "p_first": "label_0"}
    row = load_pairs(written(folder, rows, "pick.parquet"), columns=columns)[1]
    assert (row["prompt"], row["p_first"], row["id"]) == ("a cat", 0.5, "1")
    embedded = entry({"bytes": gray_png(10), "path": "model-a.png"}, {"bytes": gray_png(20), "path": "b.png"}, label=1)
    stored = load_pairs(written(folder, [embedded], "embedded.parquet"))[0]["images"]
    assert {shade({"images": stored}, 0), shade({"images": stored}, 1)} == {10, 20}
    assert [image["path"] for image in stored] == [None, None]


@pytest.mark.parametrize(
    ("spec", "columns", "says"),
    [
        (None, {"caption": "prompt"}, "columns names the field 'caption'"),
        (None, {"prompt": "caption"}, "column 'caption' is missing from columns prompt, image_first"),
        ("tiny:id", {"prompt": "caption"}, "leave it out"),
    ],
)
def test_columns_that_cannot_be_used(folder, spec, columns, says):
    with pytest.raises(InputError, match=says):
        load_pairs(spec or written(folder, [entry(label=1)]), columns=columns)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "{", "a.json does not parse"),
        ("a.json", '{"prompt": "a"}', "not a list of objects"),
        ("a.json", "[1, 2]", "not a list of objects"),
        ("a.json", "[" * 100_000, "does not parse"),
        ("a.json", "[]", "holds no pairs"),
        ("a.jsonl", "\n\n", "holds no pairs"),
        ("a.jsonl", '{"prompt": "a"}\n{', "line 2"),
        ("a.csv", "", "holds no pairs"),
        ("a.csv", "prompt,label\n", "holds no pairs"),
        ("a.csv", "prompt,label\n" + "x" * 200_000 + ",1\n", "does not parse"),
        ("a.parquet", "PAR1", "does not parse"),
        ("a.json", b"\xff\xfe\x00", "does not parse"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=says):
        load_pairs(str(tmp_path / name))


@pytest.mark.parametrize("spec", ["", "pairs", "pairs.txt", "a/b/c", "a/b:c:d", "imagereward", "../x y/z"])
def test_specs_that_name_nothing(spec):
    with pytest.raises(InputError, match="give tiny:SPLIT"):
        load_pairs(spec)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no file"):
        load_pairs(str(tmp_path / "gone.jsonl"))


# ---------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub; what it is given, `load_dataset` returns or raises."""
    asked: list[tuple[str, str]] = []

    def answer_with(answer):
        def load_dataset(name: str, *, split: str):
            asked.append((name, split))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return asked

    return answer_with


def test_a_hub_data_set_with_embedded_images(hub):
    images = [Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 20)]
    features = datasets.Features(
        prompt=datasets.Value("string"),
        image_first=datasets.Image(),
        image_second=datasets.Image(),
        label=datasets.Value("int64"),
    )
    asked = hub(datasets.Dataset.from_list([entry(*images, label=1)] * 3, features=features))
    data = load_pairs("org/name:test", limit=2)
    assert asked == [("org/name", "test")]
    assert len(data) == 2 and data["dataset"] == ["org/name:test"] * 2
    assert [dark_wins(row) for row in data] == [1.0, 1.0]
    load_pairs("org/name")
    assert asked[-1] == ("org/name", "train")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionError("no route"), "org/name: the Hugging Face Hub cannot be reached"),
        (DatasetNotFoundError("no such"), "cannot be loaded .*no such"),
        (ValueError("Unknown split"), "split 'train', cannot be loaded .*Unknown split"),
    ],
)
def test_a_hub_that_does_not_answer(hub, error, says):
    hub(error)
    with pytest.raises(InputError, match=says):
        load_pairs("org/name")


def test_a_hub_data_set_never_reads_local_files(hub, folder):
    hub(datasets.Dataset.from_list([entry(str(folder / "pictures" / "10.png"), label=1)]))
    with pytest.raises(InputError, match="has to embed its images"):
        load_pairs("org/name")


# ---------------------------------------------------------------- what every format goes through


def test_the_order_is_a_fair_coin_that_the_id_and_seed_decide(folder):
    rows = [entry(p_first=1.0, id=f"pair {i}") for i in range(400)]
    path = written(folder, rows)
    data = load_pairs(path)
    first = np.array(data["p_first"])
    assert 0.4 < first.mean() < 0.6
    assert {dark_wins(row) for row in data} == {1.0}, "the votes move with the images"
    assert data[:] == load_pairs(path)[:]
    assert (first != load_pairs(path, seed=1)["p_first"]).mean() > 0.3
    # The coin is the pair's own: it does not depend on what else is in the file.
    assert load_pairs(written(folder, rows[7:9], "few.jsonl"))["p_first"] == data["p_first"][7:9]


def test_a_limit_is_a_seeded_sample_in_the_order_of_the_file(folder):
    path = written(folder, [entry(label=1) for _ in range(50)])
    ids = [int(i) for i in load_pairs(path, limit=10)["id"]]
    assert len(ids) == 10 and ids == sorted(ids) and ids != list(range(10))
    assert ids == [int(i) for i in load_pairs(path, limit=10)["id"]]
    assert ids != [int(i) for i in load_pairs(path, limit=10, seed=1)["id"]]
    assert len(load_pairs(path, limit=99)) == 50


def records(folder: Path, sizes: list[int]) -> str:
    """ImageReward's records, of so many images each."""
    rows = [
        {"id": str(k), "prompt": "x", "generations": [f"{k}-{i}.png" for i in range(n)], "ranking": [*range(n)]}
        for k, n in enumerate(sizes)
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    return f"imagereward:{folder}"


def test_a_limit_takes_whole_records(tmp_path):
    sizes = [4, 5, 6, 4, 5, 9, 4, 4] * 5
    spec, pairs_of = records(tmp_path, sizes), {str(k): n * (n - 1) // 2 for k, n in enumerate(sizes)}
    drawn = set()
    for seed in range(20):
        groups = Counter(load_pairs(spec, limit=50, seed=seed, check_images=False)["group"])
        assert all(pairs_of[name] == n for name, n in groups.items()), "a record in part"
        assert 50 - 36 < sum(groups.values()) <= 50
        drawn |= groups.keys()
    assert len(drawn) > 30, "any record can be drawn"
    assert len(load_pairs(spec, limit=10_000, check_images=False)) == sum(pairs_of.values())


def test_a_record_larger_than_the_limit_gives_some_of_its_pairs_at_random(tmp_path):
    spec = records(tmp_path, [12])
    drawn = [load_pairs(spec, limit=7, seed=seed, check_images=False)["id"] for seed in range(30)]
    assert all(len(set(ids)) == 7 for ids in drawn)
    assert len({name for ids in drawn for name in ids}) > 60, "66 pairs, any of which can be drawn"


def test_a_sample_holds_little_of_a_long_file():
    """Counted where the pairs are kept, over 20,000 pairs of 4,000 prompts that come back again and again."""

    class Counted(Labelled):
        __hash__ = object.__hash__

    most, alive = 0, weakref.WeakSet()

    def pairs():
        nonlocal most
        for k in range(20_000):
            one = Counted(PreferencePair(f"p{k % 4000}", b"", b"", 1.0, str(k), "x"), {})
            alive.add(one)
            most = max(most, len(alive))
            yield one
            del one

    sample = _sample(pairs(), 50, 0)
    assert len(sample) == 50 and most < 70
    assert Counter(Counter(one.pair.prompt for one in sample).values()) == {5: 10}


def test_nothing_left_is_told_even_where_every_image_may_be_broken(folder):
    path = written(folder, [entry("gone.png", label=1)])
    with pytest.warns(UserWarning, match="1 of 1 pairs"), pytest.raises(InputError, match="no pair has two images"):
        load_pairs(path, max_broken=1)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one(limit):
    with pytest.raises(InputError, match=f"limit is {limit}"):
        load_pairs("tiny:id", limit=limit)


@pytest.mark.parametrize("image", ["pictures/broken.png", "pictures/gone.png", "https://example.org/cat.png", None])
def test_a_few_broken_images_cost_their_pairs_and_one_warning(folder, image):
    rows = [entry(label=1) for _ in range(9)] + [entry(image, label=1)]
    with pytest.warns(UserWarning, match=r"1 of 10 pairs .* an image of pair 9 is .*left out") as caught:
        data = load_pairs(written(folder, rows))
    assert len(caught) == 1
    assert data["id"] == [str(i) for i in range(9)]


def test_many_broken_images_refuse_the_data(folder):
    rows = [entry(label=1) for _ in range(7)] + [entry(f"{i}.png", label=1) for i in range(7)]
    with pytest.raises(InputError, match=r"7 of 14 pairs .*and 2 more\. More than 20% .*complete the images"):
        load_pairs(written(folder, rows))


def test_images_shared_by_many_pairs_are_decoded_once(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr("listener_reward.datasets.load.to_pil", lambda image, field: decoded.append(image["path"]))
    load_pairs(written(folder, [entry(label=1) for _ in range(30)]))
    assert len(decoded) == 2
