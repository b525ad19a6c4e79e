"""The pairs that are kept: the worst mistakes and no others, few and small however much there is."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from listener_reward.evaluate import evaluate, evaluate_scores
from listener_reward.evaluate.gallery import PICTURE_SIDE, TEXT_LENGTH, Gallery, scored_gallery
from listener_reward.evaluate.scores import Scores
from listener_reward.verdict import Thought, Verdict


def picture(size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def rows(people: list[float], content: bytes | None = None) -> dict[str, list[Any]]:
    image = {"bytes": content or picture(), "path": None}
    n = len(people)
    return {
        "prompt": [f"prompt {number}" for number in range(n)],
        "images": [[image, image]] * n,
        "p_first": people,
        "id": [str(number) for number in range(n)],
        "dataset": ["some"] * n,
        "swapped": [False] * n,
    }


def verdict(p_first: float, *thoughts: Thought) -> Verdict:
    preferred = 1 if p_first > 0.5 else 2 if p_first < 0.5 else None
    return Verdict(p_first, preferred, thoughts, None, None, 0.0, 0)


def ids(pairs: list[dict[str, Any]]) -> list[str]:
    return [pair["id"] for pair in pairs]


def decoded(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png)))


def test_the_worst_mistakes_are_found_in_one_pass_whatever_the_batches():
    rng = np.random.default_rng(1)
    people, p_first = np.round(rng.random(200), 1).tolist(), np.round(rng.random(200), 2).tolist()
    wrong = [i for i in range(200) if people[i] != 0.5 and (p_first[i] - 0.5) * (people[i] - 0.5) <= 0]
    worst = sorted(wrong, key=lambda i: (-abs(p_first[i] - people[i]), i))[:5]
    for size in (1, 7, 200):
        gallery, all_rows = Gallery("judge", mistakes=5, right=0), rows(people)
        for start in range(0, 200, size):
            batch = {name: values[start : start + size] for name, values in all_rows.items()}
            gallery.add(batch, [verdict(p) for p in p_first[start : start + size]])
        assert ids(gallery.pairs) == [str(i) for i in worst]


def test_ties_of_people_are_left_out_and_an_undecided_judge_is_wrong():
    gallery = Gallery("judge", right=0)
    gallery.add(rows([0.5, 1.0, 1.0]), [verdict(0.9), verdict(0.5), verdict(0.9)])
    assert ids(gallery.pairs) == ["1"]


def test_right_ones_are_drawn_evenly_and_come_last():
    people, p_first = [1.0] * 400, [0.9] * 399 + [0.1]
    gallery = Gallery("judge", mistakes=3, right=40)
    gallery.add(rows(people), [verdict(p) for p in p_first])
    numbers = [int(number) for number in ids(gallery.pairs)]
    assert numbers[0] == 399 and len(numbers) == 41
    assert numbers[1:] == sorted(numbers[1:]) and 150 < np.mean(numbers[1:]) < 250


def test_nothing_may_be_asked_for():
    gallery = Gallery("judge", mistakes=0, right=0)
    gallery.add(rows([1.0, 1.0]), [verdict(0.1), verdict(0.9)])
    assert gallery.pairs == []


def test_pictures_are_small_and_texts_are_short():
    thought = Thought("x" * 1_000_000, "as given", 1, 0.9, None, None)
    gallery, long = Gallery("judge"), rows([0.0], picture((1200, 600), "JPEG"))
    long["prompt"] = ["p" * 100_000]
    gallery.add(long, [verdict(0.9, thought)])
    kept = gallery.pairs[0]
    assert decoded(kept["first_png"]).size == (PICTURE_SIDE, PICTURE_SIDE // 2)
    assert decoded(kept["first_png"]).format == "JPEG"
    assert kept["prompt"].startswith("p" * TEXT_LENGTH) and "(96000 characters more)" in kept["prompt"]
    assert len(kept["verdict"]["thoughts"][0]["text"]) < TEXT_LENGTH + 100
    assert len(json.dumps(kept)) < 200_000


def test_a_small_picture_keeps_its_pixels():
    gallery = Gallery("judge")
    gallery.add(rows([0.0]), [verdict(0.9)])
    kept = decoded(gallery.pairs[0]["second_png"])
    assert kept.format == "PNG"
    assert (np.asarray(kept) == np.asarray(Image.open(io.BytesIO(picture())))).all()


@pytest.mark.parametrize("stream", [False, True])
def test_watches_an_evaluation(FakeJudge, shade, stream: bool):
    reds = [(0, 255), (255, 0), (10, 200), (90, 100)]
    data = rows([1.0, 1.0, 1.0, 1.0])
    data["images"] = [[_stored(shade(one)), _stored(shade(two))] for one, two in reds]
    pairs: Any = datasets.Dataset.from_dict(data)
    gallery = Gallery("fake", mistakes=2, right=1)
    evaluate(FakeJudge(), pairs.to_iterable_dataset() if stream else pairs, progress=False, watch=gallery.add)
    assert ids(gallery.pairs) == ["0", "2", "1"]
    assert gallery.pairs[0]["verdict"]["thoughts"][0]["text"] == "The first is redder."
    assert decoded(gallery.pairs[0]["second_png"]).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def _stored(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("unit", ["probability", "score", "answer"])
def test_of_a_file_of_scores(unit: Any, stream: bool):
    scale = 10.0 if unit == "score" else 1.0
    margins = [0.9, -0.7, -1.0, float("nan"), -0.1] if unit != "answer" else [1.0, -1.0, -1.0, float("nan"), 1.0]
    data = datasets.Dataset.from_dict(rows([1.0, 1.0, 0.9, 1.0, 0.0]))
    pairs: Any = data.to_iterable_dataset() if stream else data
    scores = Scores("theirs", unit, pairs={str(i): (scale * m, None) for i, m in enumerate(margins)})
    with pytest.warns(UserWarning) if unit != "answer" else _quiet():
        evaluation = evaluate_scores(scores, pairs)
    kept = scored_gallery(evaluation, pairs, mistakes=2)
    # 0 is right. Sureness and votes add up: 2 has 1.0 / 2 + 0.4, 1 has 0.7 / 2 + 0.5, 4 has 0.1 / 2 + 0.5. Answers are
    # all as sure, so there it is the votes alone.
    worst = {"probability": ["2", "1"], "score": ["2", "1"], "answer": ["1", "4"]}[unit]
    assert ids(kept)[:2] == worst
    assert "3" not in ids(kept), "no answer is no mistake to look at"
    first = kept[0]["verdict"]
    assert (first["preferred"], first["thoughts"]) == (2, [])
    assert (first["p_first"] is None) == (unit != "probability") and (first["margin"] is None) == (unit != "score")


def _quiet() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_pictures_of_a_file_of_scores_may_be_missing(tmp_path: Path):
    data = rows([1.0])
    data["images"] = [[{"bytes": None, "path": str(tmp_path / "gone.png")}, {"bytes": b"broken", "path": None}]]
    pairs = datasets.Dataset.from_dict(data)
    evaluation = evaluate_scores(Scores("theirs", "score", pairs={"0": (-1.0, None)}), pairs)
    (kept,) = scored_gallery(evaluation, pairs)
    assert kept["first_png"] is None and kept["second_png"] is None and kept["prompt"] == "prompt 0"
