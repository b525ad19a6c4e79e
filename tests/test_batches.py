"""What a judge is shown: pictures decoded once, as many as there is room for, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from listener_reward.datasets import load_pairs
from listener_reward.evaluate import batches as module
from listener_reward.evaluate import evaluate
from listener_reward.evaluate.batches import load_batches
from listener_reward.evaluate.gallery import Gallery
from listener_reward.evaluate.judged import Labels
from listener_reward.media import images
from listener_reward.media.images import Picture, to_picture, to_pil

SIDE = 10
"""A picture is 400 bytes, as Pillow holds it."""


@pytest.fixture
def files(tmp_path: Path) -> list[dict[str, Any]]:
    """Nine pictures, each of its own red, as `load_pairs` gives them."""
    for red in range(9):
        Image.new("RGB", (SIDE, SIDE), (red, 0, 0)).save(tmp_path / f"{red}.png")
    return [{"bytes": None, "path": str(tmp_path / f"{red}.png")} for red in range(9)]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pictures that were decoded, in the order in which they were asked for by the threads."""
    seen: list[Any] = []
    monkeypatch.setattr(module, "to_picture", lambda image: seen.append(image) or to_picture(image))
    return seen


def batch(*pairs: list[Any]) -> dict[str, list[Any]]:
    return {
        "prompt": ["x"] * len(pairs),
        "p_first": [1.0] * len(pairs),
        "images": [[dict(i) for i in p] for p in pairs],
    }


def reds(rows: dict[str, list[Any]]) -> list[list[int]]:
    return [[np.asarray(to_pil(image))[0, 0, 0] for image in pair] for pair in rows["images"]]


def test_a_picture_of_many_pairs_is_decoded_once(files, decoded):
    pairs = [[files[i], files[j]] for i in range(9) for j in range(9) if i != j]
    labels = Labels()
    parts = list(load_batches([batch(*pairs[:40]), batch(*pairs[40:])], labels))
    assert [red for part in parts for red in reds(part)] == [[i, j] for i in range(9) for j in range(9) if i != j]
    assert sorted(image["path"] for image in decoded) == [image["path"] for image in files]
    assert all(isinstance(image, Picture) for part in parts for pair in part["images"] for image in pair)
    assert labels.columns["item_first"][:2] == [files[0]["path"]] * 2, "labels name a picture by its file"


def test_what_is_kept_stays_within_the_budget_and_is_the_latest(files, decoded, monkeypatch):
    monkeypatch.setattr(module, "BUDGET", 4 * 4 * SIDE * SIDE)
    for numbers in ([0, 1], [2, 3], [0, 4], [0, 1]):
        list_of = batch([files[k] for k in numbers])
        kept_before = len(decoded)
        streams = load_batches([list_of], Labels())
        assert reds(next(streams)) == [numbers]
        assert len(decoded) - kept_before == 2, "nothing outlives a run"
    decoded.clear()
    batches = [batch([files[i], files[j]]) for i, j in ((0, 1), (2, 3), (0, 4), (2, 3), (1, 0))]
    assert [reds(part)[0] for part in load_batches(batches, Labels())] == [[0, 1], [2, 3], [0, 4], [2, 3], [1, 0]]
    # Four are kept: 4 drives out 1, the one not used for longest, so that of the last pair only 1 is decoded anew.
    assert [int(Path(image["path"]).stem) for image in decoded] in ([0, 1, 2, 3, 4, 1], [1, 0, 2, 3, 4, 1])


def test_a_large_batch_is_shown_in_parts_and_each_picture_decoded_once(files, decoded, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 3 * 4 * SIDE * SIDE)
    monkeypatch.setattr(module, "_AHEAD", 1)
    rows = batch([files[0], files[1]], [files[2], files[3]], [files[4], files[5]]) | {"id": ["a", "b", "c"]}
    labels = Labels()
    parts = list(load_batches([rows], labels))
    assert [part["id"] for part in parts] == [["a", "b"], ["c"]] and labels.columns["id"] == ["a", "b", "c"]
    assert [reds(part) for part in parts] == [[[0, 1], [2, 3]], [[4, 5]]] and len(decoded) == 6
    assert all(isinstance(image, Picture) for part in parts for pair in part["images"] for image in pair)


def test_equal_embedded_bytes_are_decoded_once(files, decoded):
    rows = [
        batch([{"bytes": Path(image["path"]).read_bytes(), "path": "0.png"} for image in files[k : k + 2]])
        for k in (0, 2, 1)
    ]
    labels = Labels()
    assert [reds(part)[0] for part in load_batches(rows, labels)] == [[0, 1], [2, 3], [1, 2]]
    assert len(decoded) == 4 and labels.columns["item_second"][0] == labels.columns["item_first"][2]


def test_what_cannot_be_decoded_is_the_judge_s_to_tell(files):
    pictures = [files[0], {"bytes": None, "path": "gone.png"}]
    (part,) = load_batches([batch(pictures)], Labels())
    assert part["images"][0][1] == pictures[1]
    drawn = [Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2))]
    rows = {"prompt": ["x"], "p_first": [1.0], "images": [drawn], "item_first": ["a"], "item_second": ["b"]}
    ((first, second),) = next(load_batches([rows], Labels()))["images"]
    assert [first.image, second.image] == drawn, "what is decoded already stays the same"
    assert any(first.image is one for one in drawn), "and is not copied"


def test_an_evaluation_decodes_and_hashes_each_picture_once(files, FakeJudge, tmp_path, monkeypatch):
    """The pair, the swapped pair, the gallery and the labels have one picture."""
    rows = [
        {"prompt": "x", "p_first": 1.0, "image_first": f"{k + 1}.png", "image_second": f"{k}.png"} for k in range(8)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, seen, hashed = load_pairs(str(data)), [], []
    decode, crop = images._decoded, Image.Image.crop
    monkeypatch.setattr(images, "_decoded", lambda image, field: seen.append(image) or decode(image, field))
    monkeypatch.setattr(Image.Image, "crop", lambda image, box: hashed.append(box) or crop(image, box))
    gallery = Gallery("fake")
    record = evaluate(FakeJudge(), pairs, batch_size=4, progress=False, watch=gallery.add)
    assert (record.accuracy, record.swap_checked, len(gallery.pairs)) == (1.0, 8, 6)
    assert sorted(image["path"] for image in seen) == [file["path"] for file in files]
    assert len(hashed) == 9, "to_picture hashes ten rows of pixels in one piece"
