"""Source images and criteria in data: read under every name and from every kind of file, checked, judged and kept."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from tables import write_table

from listener_reward.datasets import FEATURES, load_pairs
from listener_reward.datasets.check import check_data
from listener_reward.datasets.load import ASKED
from listener_reward.errors import InputError
from listener_reward.evaluate import evaluate
from listener_reward.evaluate.gallery import Gallery
from listener_reward.evaluate.journal import Journal
from listener_reward.media.images import to_pil
from listener_reward.pairs import Prompt
from listener_reward.scoring import read_verdicts, score_pairs
from listener_reward.verdict import Verdict


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def shade(image: Any) -> int:
    pixel: Any = to_pil(image).getpixel((0, 0))
    return pixel[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 10.png to 90.png, named after their gray level."""
    for level in range(10, 100, 10):
        (tmp_path / f"{level}.png").write_bytes(png(level))
    return tmp_path


def row(**fields: Any) -> dict[str, Any]:
    return {"prompt": "make it darker", "image_first": "10.png", "image_second": "20.png", "label": 1, **fields}


def written(folder: Path, name: str, *rows: dict[str, Any]) -> str:
    return str(write_table(folder / name, rows))


def loaded(spec: str, **options: Any) -> Any:
    return load_pairs(spec, **options)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "saved"])
def test_sources_and_criteria_are_read_from_every_kind_of_file(folder, name, stream):
    several: Any = ["50.png", "60.png"]
    none: Any = []
    if name == "a.csv":
        several, none = json.dumps(several), ""
    if name == "saved":  # a folder of its own, beside which the images are not
        several, none = [str(folder / one) for one in several], []
        sides = {"image_first": str(folder / "10.png"), "image_second": str(folder / "20.png")}
    else:
        sides = {}
    path = written(
        folder,
        name,
        row(sources=several, criterion="consistency", **sides),
        row(sources=none, criterion=None, **sides),
    )
    data = loaded(path, stream=stream)
    assert data.features == datasets.Features({**FEATURES, **ASKED, "group": datasets.Value("string")})
    edit, plain = data
    assert [shade(image) for image in edit["sources"]] == [50, 60] and edit["criterion"] == "consistency"
    assert plain["sources"] == [] and plain["criterion"] is None
    assert edit["group"] is not None and plain["group"] is None
    assert shade(edit["images"][edit["swapped"]]) == 10


@pytest.mark.parametrize("name", ["sources", "image_source", "source_image"])
def test_one_source_under_each_name(folder, name):
    (one,) = loaded(written(folder, "a.jsonl", row(**{name: "50.png"})))
    assert [shade(image) for image in one["sources"]] == [50] and "criterion" not in one
    embedded = {"image_first": png(10), "image_second": png(20), name: {"bytes": png(70), "path": "x.png"}}
    (one,) = loaded(written(folder, "a.parquet", {"prompt": "x", "label": 2, **embedded}))
    assert one["sources"] == [{"bytes": png(70), "path": None}]


def test_columns_rename_them(folder):
    path = written(folder, "a.jsonl", row(path_src="50.png", asked="quality"))
    (one,) = loaded(path, columns={"sources": "path_src", "criterion": "asked"})
    assert (shade(one["sources"][0]), one["criterion"]) == (50, "quality")
    assert "sources" not in loaded(path).column_names and "criterion" not in loaded(path).column_names


def test_the_column_source_of_other_people_is_no_image(folder):
    assert loaded(written(folder, "a.jsonl", row(source="hpdv2"))).column_names == [*FEATURES]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sources": "50.png", "image_source": "60.png"}, "sources and image_source are both there"),
        ({"sources": ["50.png", None]}, "sources is .* with an empty place"),
        ({"sources": "[50.png"}, "sources is .* no list in JSON"),
        ({"sources": 3}, "image is 3"),
        ({"criterion": ["quality"]}, "criterion is .*give a string"),
    ],
)
def test_what_cannot_be_asked_names_its_row(folder, fields, said):
    with pytest.raises(InputError, match=f"a.jsonl, row 1: {said}"):
        loaded(written(folder, "a.jsonl", row(), row(**fields)))


def test_a_missing_source_breaks_its_pair_as_a_missing_image_does(folder):
    path = written(folder, "a.jsonl", *[row(sources="50.png")] * 9, row(sources=["50.png", "gone.png"]))
    for stream in (False, True):
        with pytest.warns(UserWarning, match="1 of 10 pairs have an unreadable image.*pair 9 is '.*gone.png'"):
            assert len(list(loaded(path, stream=stream))) == 9
    with pytest.raises(InputError, match="2 of 4 pairs"):
        loaded(written(folder, "b.jsonl", *[row(sources="50.png")] * 2, *[row(sources="gone.png")] * 2))


def test_a_source_that_comes_late_is_not_lost(folder):
    path = written(folder, "a.jsonl", *[row()] * 40, row(sources="50.png", criterion="text"))
    last = loaded(path)[40]
    assert (shade(last["sources"][0]), last["criterion"]) == (50, "text")
    with pytest.raises(InputError, match="pair 40 has sources, which none of the first 32 pairs"):
        list(loaded(path, stream=True))
    assert check_data(path).pairs_with_sources == 1


def test_one_instruction_on_two_sources_is_two_groups(folder):
    rows = [row(sources="50.png"), row(sources="50.png"), row(sources="60.png"), row(sources="60.png", group="mine")]
    groups = loaded(written(folder, "a.jsonl", *rows))["group"]
    assert groups[0] == groups[1] and len({*groups}) == 3 and groups[3] == "mine"


def test_general_leaves_the_criteria_out(folder):
    path = written(folder, "a.jsonl", row(sources="50.png", criterion="consistency"))
    (one,) = loaded(f"{path}#general")
    assert "criterion" not in one and len(one["sources"]) == 1
    assert check_data(f"{path}#general").criteria == {} and check_data(path).criteria == {"consistency": 1}
    (one,) = loaded(f"{path}#general", stream=True)
    assert "criterion" not in one


@pytest.mark.parametrize("how", ["parquet", "disk"])
def test_what_was_loaded_is_written_and_read_again(folder, how):
    rows = [row(sources=["50.png", "60.png"], criterion="text", id="a"), row(id="b", p_first=0.25)]
    pairs = loaded(written(folder, "a.jsonl", *rows))
    (folder / "kept").mkdir()
    if how == "parquet":
        pairs.to_parquet(str(folder / "kept" / "pairs.parquet"))
    else:
        pairs.save_to_disk(str(folder / "kept"))
    again = loaded(str(folder / "kept"))
    assert again.column_names[: len(FEATURES) + 2] == [*FEATURES, *ASKED]
    for before, after in zip(pairs, again, strict=True):
        seen = [shade(image) for image in after["images"]][:: -1 if after["swapped"] else 1]
        assert seen == [shade(image) for image in before["images"]]
        assert [*map(shade, after["sources"])] == [*map(shade, before["sources"])]
        assert [after[name] for name in ("id", "criterion", "group")] == [
            before[n] for n in ("id", "criterion", "group")
        ]


# ---------------------------------------------------------------- checking


def test_the_check_counts_sources_missing_sources_and_criteria(folder):
    rows = [
        row(sources=["50.png", "60.png"], criterion="quality"),
        row(sources="50.png", criterion="quality"),
        row(sources="60.png", criterion="text"),
        *[row()] * 5,
        row(sources="gone.png"),
    ]
    path = written(folder, "a.jsonl", *rows)
    found = check_data(path)
    assert (found.pairs_with_sources, found.sources, found.missing_sources) == (4, 3, 1)
    assert found.criteria == {"quality": 2, "text": 1}
    assert (found.images, found.broken_images, found.broken_pairs) == (5, 1, 1)
    lines = dict(found.lines())
    assert lines["source images"] == "3 in 4 pairs; 1 missing or broken"
    assert lines["criteria"] == "2 by quality; 1 by text; 6 as a whole"
    # The five rows without anything are one pair and four copies of it; those with sources are no copies of theirs.
    assert found.duplicate_pairs == 4
    assert "source images" not in dict(check_data(written(folder, "b.jsonl", row())).lines())


# ---------------------------------------------------------------- whoever reads the rows


class Reader:
    """Prefers the image nearer in brightness to the source, and keeps what it was asked."""

    name = "reader"

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def compare_many(
        self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any], *, think: bool | None = None
    ) -> list[Verdict]:
        self.asked += prompts
        said = []
        for prompt, *sides in zip(prompts, firsts, seconds, strict=True):
            goal = shade(prompt.sources[0].image) if isinstance(prompt, Prompt) and prompt.sources else 0
            near, far = (abs(shade(side) - goal) for side in sides)
            p = float(1 / (1 + np.exp(near - far)))
            said.append(Verdict(p, 1 if p > 0.5 else 2, (), None, None, 0.0, 0))
        return said


def test_scoring_hands_sources_and_criteria_over(folder):
    rows = [row(sources=["90.png", "50.png"], criterion="text"), row()]
    unlabelled = [{name: value for name, value in one.items() if name != "label"} for one in rows]
    judge = Reader()
    scored = score_pairs(judge, written(folder, "a.jsonl", *unlabelled), folder / "out.parquet", progress=False)
    edit, plain = read_verdicts(scored.out)
    assert (edit["criterion"], edit["preferred"]) == ("text", 2) and (plain["criterion"], plain["preferred"]) == (
        None,
        1,
    )
    assert judge.asked == [
        Prompt("make it darker", (folder / "90.png", folder / "50.png"), "text"),
        "make it darker",
    ]


def test_a_journal_tells_sources_and_criteria_apart(folder):
    rows = [row(sources="90.png"), row(sources="50.png"), row(), row(criterion="text")]
    data = load_pairs(written(folder, "a.jsonl", *rows))
    judge = Reader()
    for asked in (4, 4):
        evaluate(Journal(judge, folder / "journal.jsonl"), data, progress=False, swap_check=0)
        assert len(judge.asked) == asked


def test_the_gallery_keeps_sources_and_criterion(folder):
    gallery = Gallery("reader")
    data = loaded(written(folder, "a.jsonl", row(sources=["90.png", "50.png"], criterion="text")))
    evaluate(Reader(), data, progress=False, swap_check=0, watch=gallery.add)
    (kept,) = gallery.pairs
    assert kept["criterion"] == "text" and len(kept["source_pngs"]) == 2 and all(kept["source_pngs"])
