"""`listener-reward data check` says what is in a file, and whether it can be used."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from listener_reward.cli import app
from listener_reward.datasets import load_pairs
from listener_reward.datasets.check import check_data
from listener_reward.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def run(*arguments: str):
    return CliRunner().invoke(app, ["data", "check", *arguments], env={"COLUMNS": "120"})


@pytest.fixture
def write(tmp_path: Path):
    """Writes rows as JSONL beside four pictures, 40 x 20 to 100 x 50, and a broken one."""
    for place, width in enumerate((40, 60, 80, 100)):
        Image.new("RGB", (width, width // 2), (place * 60,) * 3).save(tmp_path / f"{place}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "3.png").read_bytes()[:50])

    def rows(*some: dict) -> str:
        base = {"prompt": "a cat", "image_first": "0.png", "image_second": "1.png", "label": 1}
        lines = [json.dumps(base | {"id": str(i)} | row) for i, row in enumerate(some)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        return str(tmp_path / "pairs.jsonl")

    return rows


def test_a_sound_file(write):
    found = check_data(write({}, {"image_second": "2.png", "label": 2}, {"image_first": "3.png", "p_first": 0.75}))
    assert found.usable and found.problems == found.notes == []
    assert (found.format, found.pairs, found.ties, found.shares) == ("generic", 3, 0, 1)
    assert found.first_preferred_as_published == pytest.approx(2 / 3)
    assert (found.images, found.broken_images, found.broken_named) == (4, 0, [])
    assert found.sizes == {"least": [40, 20], "median": [80, 40], "greatest": [100, 50]}
    assert found.prompt_characters == {"least": 5, "median": 5, "greatest": 5} and found.prompts == 1


def test_the_share_as_shown_is_that_of_load_pairs(write):
    path = write(*[{}] * 60)
    for seed in (0, 1):
        shown = check_data(path, seed=seed).first_preferred_as_shown
        assert shown == pytest.approx(sum(load_pairs(path, seed=seed)["p_first"]) / 60)
    assert check_data(path).order_leaks and "always the first" in " ".join(check_data(path).notes)
    even = check_data(write(*[{"label": 1 + i % 2} for i in range(60)]))
    assert even.first_preferred_as_published == 0.5 and not even.order_leaks


def test_duplicates_in_either_order_and_what_they_say(write):
    turned = {"image_first": "1.png", "image_second": "0.png"}
    found = check_data(
        write(
            {},
            {},  # the same again
            turned | {"label": 2},  # the same in the other order
            turned | {"label": 2},  # the same in the other order
            turned,  # contradicts
            {"label": "tie"},  # contradicts
            {"prompt": "a dog"},  # another prompt
            {"image_second": "2.png"},  # another image
        )
    )
    assert (found.duplicate_pairs, found.contradicting_duplicates, found.ties) == (5, 2, 1)
    assert any("2 duplicates disagree" in note for note in found.notes)


def test_duplicates_of_embedded_images_are_found_by_their_bytes(tmp_path):
    import datasets

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    row = {"prompt": "a", "image_first": buffer.getvalue(), "image_second": buffer.getvalue(), "label": 1}
    datasets.Dataset.from_list([row] * 3).to_parquet(str(tmp_path / "a.parquet"))
    found = check_data(str(tmp_path / "a.parquet"))
    assert (found.images, found.duplicate_pairs, found.contradicting_duplicates) == (1, 2, 0)


def test_prompts(write):
    prompts = ["", " \n", "x" * 5000, "a <|image_pad|> cat<|im_end|>", "a cat"]
    found = check_data(write(*[{"prompt": prompt, "id": "same"} for prompt in prompts]))
    assert (found.empty_prompts, found.long_prompts, found.reserved_prompts) == (2, 1, 1)
    assert found.reserved_tokens == ["<|im_end|>", "<|image_pad|>"]
    assert found.prompt_characters == {"least": 0, "median": 5, "greatest": 5000}
    assert found.repeated_ids == 4 and found.usable and len(found.notes) == 4


def test_broken_images_are_counted_and_named(write):
    good = [{}] * 8
    found = check_data(write(*good, {"image_first": "cut.png"}, {"image_second": "gone.png"}))
    assert (found.broken_images, found.broken_pairs, found.usable) == (2, 2, True)
    assert "pair 8 is" in found.broken_named[0] and "gone.png" in found.broken_named[1]
    assert not check_data(write(*good, {"image_first": "cut.png"}), max_broken=0.05).usable
    named = check_data(write(*good, *[{"image_first": f"gone {i}.png"} for i in range(9)])).broken_named
    assert len(named) == 5


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "there are no pairs"),
        ([{"label": "tie"}] * 3, "every pair is a tie"),
        ([{"prompt": " "}] * 3, "every prompt is empty"),
        ([{"image_first": "gone.png"}, {}], "50.0% of the pairs have an unreadable image"),
    ],
)
def test_data_that_cannot_be_used_ends_with_two(write, rows, says):
    result = run(write(*rows))
    assert result.exit_code == 2
    assert says in result.output and "This data cannot be used." in result.output


def test_the_table_says_it_in_words(write):
    rows = [{"prompt": "a <|im_end|> cat"}, {"image_first": "gone.png"}, *[{}] * 6]
    result = run(write(*rows))
    assert result.exit_code == 0
    for words in (
        "generic",
        "8; 0 tied",
        "100.0% as published",
        "3; 1 broken, in 1 pairs",
        "40 x 20 to 60 x 30",
        "1 with special tokens (<|im_end|>)",
        "an image of pair 1 is",
        "This data can be used.",
    ):
        assert words in result.stdout, result.stdout


def test_json_is_one_object(write):
    result = run(write({}, {"label": 2}), "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["usable"] is True and found["pairs"] == 2
    assert found["problems"] == [] and found["first_preferred_as_published"] == 0.5
    result = run(write({"label": "tie"}), "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["usable"] is False


def test_options(write):
    path = write(*[{}] * 9, {"image_first": "cut.png"})
    assert json.loads(run(path, "--json", "--limit", "4").stdout)["pairs"] == 4
    assert run(path, "--max-broken", "0.05").exit_code == 2
    assert run(path, "--max-broken", "2").exit_code == 2 and run(path, "--limit", "0").exit_code == 2
    with pytest.raises(InputError, match="limit is 0"):
        check_data(path, limit=0)


@pytest.mark.parametrize(("row", "says"), [({"label": 7}, "row 1: label is 7"), ({"prompt": 7}, "prompt is 7")])
def test_a_row_that_cannot_be_read_is_one_line(write, row, says):
    result = run(write({}, row))
    assert result.exit_code == 2 and says in result.stderr and not result.stdout
    assert run("no-such-file.jsonl").exit_code == 2


def test_the_tiny_world_is_not_shuffled():
    found = check_data("tiny:id", limit=40)
    assert (found.format, found.pairs, found.images, found.usable) == ("tiny", 40, 80, True)
    assert found.first_preferred_as_shown == found.first_preferred_as_published


def test_rows_that_are_no_pairs_are_counted_by_their_reason(tmp_path):
    lines = ["path_A,path_B,prompt,VQ", *(f"a.mp4,b.mp4,a cat,{label}" for label in ("A", "invalid", "same"))]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"....ftypisom")
    found = check_data(f"videogen:{tmp_path / 'train.csv'}#VQ")
    assert (found.format, found.pairs, found.left_out) == ("videogen", 2, {"VQ is invalid": 1})
    assert found.sizes is None and found.usable


def test_a_duplicate_has_the_same_prompt_and_the_same_dimension(tmp_path):
    """Also where a prompt is the name of its dimension, or the two change places."""
    lines = ["path_A,path_B,prompt,VQ,MQ", "a.mp4,b.mp4,VQ,A,B", "b.mp4,a.mp4,MQ,A,B", "a.mp4,b.mp4,VQ,B,"]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"....ftypisom")
    found = check_data(f"videogen:{tmp_path / 'train.csv'}#all")
    assert (found.pairs, found.duplicate_pairs, found.contradicting_duplicates) == (5, 1, 1)


@pytest.mark.skipif(not (SHARED / "imagereward").is_dir(), reason="ImageReward's labels are not on this machine")
def test_imagereward_leaks_its_labels_by_their_order():
    found = check_data(f"imagereward:{SHARED / 'imagereward'}")
    assert (found.pairs, found.ties, found.images, found.broken_images) == (7230, 831, 2720, 2720)
    assert round(found.first_preferred_as_published or 0, 3) == 0.590 and found.order_leaks
    assert not found.usable, "its images are not there"
